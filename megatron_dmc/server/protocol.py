"""What clients send: OpenAI's parameters, and vLLM's beyond them, checked here.

Nothing is accepted and then ignored: a parameter that the engine lacks is taken only where it asks for
nothing (its neutral value), so that clients which always send it still work.
"""

import json
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from megatron_dmc.engine.sampling_params import MAX_LOGPROBS, SamplingParams

MAX_COMPLETIONS = 128
"""Completions per prompt, at most."""


def _unicode(value: Any) -> Any:
    """Refuse text that no tokenizer can read, wherever in a value it stands."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"not Unicode text ({error.reason}): a lone surrogate; leave it out"
        ) from error
    return value


type AnyText = Annotated[str, AfterValidator(_unicode)]
type Text = Annotated[str, Field(min_length=1)]
type TokenId = Annotated[int, Field(ge=0, lt=2**31)]
type TokenIds = Annotated[list[TokenId], Field(min_length=1)]
type TokenIdText = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]
type Stop = Text | Annotated[list[Text], Field(max_length=64)] | None
type Prompts = (
    str
    | Annotated[list[str], Field(min_length=1)]
    | TokenIds
    | Annotated[list[TokenIds], Field(min_length=1)]
)

_NEUTRAL: dict[str, tuple] = {
    "best_of": (),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "use_beam_search": (False,),
    "length_penalty": (1,),
}
"""Parameters that the engine lacks: the values, beside null, that ask for nothing."""


class StreamOptions(BaseModel):
    """How a stream ends."""

    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool = Field(False, description="Send the token counts in a last chunk.")
    include_obfuscation: Literal[False] | None = None


class _SamplingRequest(BaseModel):
    """What both kinds of completions share."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: AnyText | None = Field(
        None, description="A name that /v1/models lists; default: the first."
    )
    n: int | None = Field(None, ge=1, le=MAX_COMPLETIONS, description="Completions per prompt.")
    temperature: float | None = Field(None, ge=0, allow_inf_nan=False, description="0 is greedy.")
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, lt=2**31, description="0 or -1: no limit.")
    min_p: float | None = Field(None, ge=0, le=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100, description="1 is none.")
    logit_bias: (
        Annotated[
            dict[TokenIdText, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=1024)
        ]
        | None
    ) = Field(None, description="Added to these tokens' logits.")
    allowed_token_ids: TokenIds | None = None
    bad_words: Annotated[list[Text], Field(max_length=64)] | None = None
    min_tokens: int | None = Field(None, ge=0, description="No end before so many tokens.")
    priority: int | None = Field(
        None,
        ge=-(2**31),
        lt=2**31,
        description="Lower goes first, under --scheduling-policy priority.",
    )
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Stop = Field(None, description="Texts that end the completion.")
    stop_token_ids: Annotated[list[TokenId], Field(max_length=1024)] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: AnyText | None = Field(
        None, description="Taken for compatibility; nothing is done with it."
    )

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_the_engine_lacks(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        kept = {}
        for name, value in values.items():
            if name not in _NEUTRAL:
                kept[name] = value
            elif name == "best_of" and value == (values.get("n") or 1):
                pass
            elif value is not None and not any(value == v for v in _NEUTRAL[name]):
                raise PydanticCustomError(
                    "not_supported",
                    "{name} is not supported by this server; leave it out",
                    {"name": name},
                )
        return kept

    @model_validator(mode="after")
    def _stream_options_need_stream(self) -> "_SamplingRequest":
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is for streams only; add stream=true")
        return self

    @property
    def num_completions(self) -> int:
        """Completions of each prompt."""
        return 1 if self.n is None else self.n

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with the token counts."""
        return self.stream_options is not None and self.stream_options.include_usage

    def sampling_params(
        self,
        index: int,
        *,
        defaults: dict[str, Any],
        max_tokens: int | None,
        logprobs: int | None,
        prompt_logprobs: int | None = None,
    ) -> SamplingParams:
        """The engine's parameters of completion `index` of a prompt; each has its own seed.

        Args:
            defaults: arguments of `SamplingParams` in place of its own defaults.

        Raises:
            InvalidRequest: a value that the engine refuses.
        """

        def chosen(name: str) -> Any:
            asked = getattr(self, name)
            return defaults.get(name, getattr(SamplingParams, name)) if asked is None else asked

        return SamplingParams(
            temperature=chosen("temperature"),
            top_p=chosen("top_p"),
            top_k=chosen("top_k"),
            min_p=chosen("min_p"),
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            repetition_penalty=chosen("repetition_penalty"),
            logit_bias={int(i): value for i, value in (self.logit_bias or {}).items()},
            allowed_token_ids=self.allowed_token_ids,
            bad_words=list(self.bad_words or []),
            min_tokens=self.min_tokens or 0,
            seed=None if self.seed is None else self.seed + index,
            stop=[self.stop] if isinstance(self.stop, str) else list(self.stop or []),
            stop_token_ids=list(self.stop_token_ids or []),
            max_tokens=max_tokens,
            ignore_eos=self.ignore_eos,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            include_stop_str_in_output=self.include_stop_str_in_output,
            skip_special_tokens=self.skip_special_tokens,
        )


class CompletionRequest(_SamplingRequest):
    """`POST /v1/completions`."""

    prompt: Prompts = Field(
        description="A text, a list of texts, token ids, or a list of lists of token ids."
    )
    max_tokens: int | None = Field(
        None, ge=0, description="Default 16. 0 is allowed with echo: only the prompt comes back."
    )
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    echo: bool | None = Field(None, description="Return the prompt in front of the completion.")
    add_special_tokens: bool = Field(
        True, description="Begin a text prompt with the tokens that the tokenizer puts there."
    )

    @model_validator(mode="after")
    def _nothing_to_do(self) -> "CompletionRequest":
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens=0 asks for nothing; use 1 or more, or echo=true")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        """One item per prompt."""
        prompt: Any = self.prompt
        if isinstance(prompt, str) or isinstance(prompt[0], int):
            return [prompt]
        return list(prompt)


class TextPart(BaseModel):
    """A part of a message's content."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text"]
    text: AnyText


class Message(BaseModel):
    """A turn of the conversation."""

    model_config = ConfigDict(extra="forbid", strict=True)

    role: Text
    content: AnyText | list[TextPart]
    name: AnyText | None = None
    # what the OpenAI client sends along when an answer's message becomes a turn
    refusal: None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    audio: None = None
    function_call: None = None
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None

    def as_dict(self) -> dict[str, str]:
        """As chat templates take it: the content is one text."""
        content = self.content
        if not isinstance(content, str):
            content = "".join(part.text for part in content)
        return {"role": self.role, "content": content} | ({"name": self.name} if self.name else {})


class ChatCompletionRequest(_SamplingRequest):
    """`POST /v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1, description="Default: up to the context's end.")
    max_completion_tokens: int | None = Field(None, ge=1, description="The same; it goes first.")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    add_generation_prompt: bool = True
    add_special_tokens: bool = Field(
        False, description="Add the tokenizer's to what the template made, which has its own."
    )
    chat_template_kwargs: Annotated[dict[str, Any], AfterValidator(_unicode)] | None = None

    @model_validator(mode="after")
    def _top_logprobs_need_logprobs(self) -> "ChatCompletionRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs=true")
        return self

    @property
    def most_tokens(self) -> int | None:
        """Tokens to generate, at most."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
