"""Unsupported fields of requests.

A field that cannot change the answer is ignored, as in vLLM, and logged once. A field that would change it is
refused by its path; its neutral value is accepted, so clients that always send it still work.
"""

import difflib
import logging
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError

logger = logging.getLogger(__name__)

MAX_FIELDS = 256
"""Most fields of one object."""
_MAX_LOGGED = 100

UNSUPPORTED: dict[str, tuple] = {
    # OpenAI's
    "best_of": (),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "max_completion_tokens": (),
    "web_search_options": (),
    # vLLM's
    "use_beam_search": (False,),
    "length_penalty": (1,),
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "logits_processors": ([],),
    "prompt_logprobs": (),
    "prompt_embeds": (),
    "truncate_prompt_tokens": (-1,),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "spaces_between_special_tokens": (True,),
    "detokenize": (True,),
    "thinking_token_budget": (),
    "chat_template": (),
    "continue_final_message": (False,),
    "documents": ([],),
    "echo": (False,),
    # other servers'
    "regex": (),
    "grammar": ("",),
    "json_schema": (),
    "ebnf": (),
    "max_new_tokens": (),
    "no_repeat_ngram_size": (0,),
    "typical_p": (1,),
    "mirostat": (0,),
}
"""Parameters that would change the answer and that the engine lacks: their neutral values, besides
null."""

_logged: set[tuple[str, str]] = set()


class LenientModel(BaseModel):
    """An object of a request: unknown fields are ignored, unless they would change the answer."""

    model_config = ConfigDict(extra="ignore", strict=True)

    unsupported: ClassVar[dict[str, tuple]] = {}

    @model_validator(mode="before")
    @classmethod
    def _known_fields(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        if len(values) > MAX_FIELDS:
            raise PydanticCustomError(
                "too_many_fields",
                "{number} fields in one object; use fewer",
                {"number": len(values)},
            )
        kept = {}
        for name, value in values.items():
            if name in cls.model_fields:
                if value is not None or cls.model_fields[name].is_required():
                    kept[name] = value  # null is the default
            elif name in cls.unsupported:
                if value is not None and not cls._is_neutral(name, value, values):
                    raise PydanticCustomError(
                        "not_supported",
                        "not supported by this server; leave it out",
                        {"name": name},
                    )
            else:
                cls._ignore(name, value)
        return kept

    @classmethod
    def _is_neutral(cls, name: str, value: Any, values: dict[str, Any]) -> bool:
        """Whether an unsupported field has a neutral value."""
        return any(value == neutral for neutral in cls.unsupported[name])

    @classmethod
    def _ignore(cls, name: str, value: Any) -> None:
        known = [*cls.model_fields, *cls.unsupported]
        near = difflib.get_close_matches(name, known, 1, 0.85) if len(name) < 40 else []
        if near:
            raise PydanticCustomError(
                "misspelled",
                "this server does not know the field; did you mean {near}?",
                {"name": name, "near": near[0]},
            )
        field = (cls.__name__, name[:60])
        if value not in (None, [], {}) and field not in _logged and len(_logged) < _MAX_LOGGED:
            _logged.add(field)
            logger.warning("%s: the field %r is ignored (logged once)", *field)
