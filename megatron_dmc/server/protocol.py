"""Request schemas: OpenAI's parameters, and vLLM's additions, validated."""

import copy
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    PlainValidator,
    WithJsonSchema,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from megatron_dmc.engine.sampling_params import MAX_LOGPROBS, SamplingParams
from megatron_dmc.server.fields import UNSUPPORTED, LenientModel

MAX_COMPLETIONS = 128
"""Most completions per prompt."""
MAX_MESSAGES = 2**14
"""Most turns of a conversation, and parts of a turn."""
MAX_BIASES = 1024
"""Most tokens of a request with a bias."""

type Text = Annotated[str, Field(min_length=1, max_length=4096)]
type TokenId = Annotated[int, Field(ge=0, lt=2**31)]
type TokenIds = Annotated[list[TokenId], Field(min_length=1, max_length=2**20, fail_fast=True)]
type TokenIdText = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]
type Stop = Text | Annotated[list[Text], Field(max_length=64)] | None

_TOKEN_IDS_SCHEMA = {
    "type": "array",
    "items": {"type": "integer", "minimum": 0, "exclusiveMaximum": 2**31},
    "minItems": 1,
}
_PROMPT_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "string"}, "minItems": 1},
        _TOKEN_IDS_SCHEMA,
        {"type": "array", "items": _TOKEN_IDS_SCHEMA, "minItems": 1},
    ]
}


def _prompts(value: Any) -> list[str | list[int]]:
    """One item per prompt. Not a pydantic union, which would collect an error of every form for
    each of a million items."""
    kinds = set(map(type, value)) if isinstance(value, list) else {type(value)}
    if kinds == {str}:
        return [value] if isinstance(value, str) else value
    if kinds == {int}:
        value = [value]
    elif kinds != {list}:
        raise PydanticCustomError(
            "prompt", "use a text, a list of texts, token ids, or a list of lists of token ids"
        )
    for token_ids in value:
        if not isinstance(token_ids, list) or set(map(type, token_ids)) != {int}:
            raise PydanticCustomError(
                "prompt", "a list of token ids has at least one item, all integers"
            )
        if min(token_ids) < 0 or max(token_ids) >= 2**31:
            raise PydanticCustomError("prompt", "token ids are 0 or more, and below 2**31")
    return value


type Prompts = Annotated[
    list[str | list[int]], PlainValidator(_prompts), WithJsonSchema(_PROMPT_SCHEMA)
]


class StreamOptions(LenientModel):
    """Token counts in a stream."""

    include_usage: bool | None = Field(None, description="Send the token counts in a last chunk.")
    continuous_usage_stats: bool | None = Field(
        None, description="Add the choice's counts so far to each chunk. Needs include_usage."
    )


class _SamplingRequest(LenientModel):
    """Fields of both kinds of completions."""

    unsupported = UNSUPPORTED

    model: str | None = Field(None, description="A name that /v1/models lists; default: the first.")
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
            dict[TokenIdText, Annotated[float, Field(ge=-100, le=100)]],
            Field(max_length=MAX_BIASES),
        ]
        | None
    ) = Field(None, description="Added to these tokens' logits.")
    allowed_token_ids: TokenIds | None = None
    bad_words: Annotated[list[Text], Field(max_length=64)] | None = None
    min_tokens: int | None = Field(None, ge=0, description="Fewest tokens of the completion.")
    priority: int | None = Field(
        None,
        ge=-(2**31),
        lt=2**31,
        description="Lower goes first, under --scheduling-policy priority.",
    )
    cache_salt: Text | None = Field(
        None, description="Share cached prefixes only with requests of the same salt."
    )
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Stop = Field(None, description="Texts that end the completion.")
    stop_token_ids: Annotated[list[TokenId], Field(max_length=1024)] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, description="Accepted for compatibility and ignored.")

    @classmethod
    def _is_neutral(cls, name: str, value: Any, values: dict[str, Any]) -> bool:
        if name == "best_of":
            return value == (values.get("n") or 1)
        return super()._is_neutral(name, value, values)

    @field_validator("logit_bias", mode="before")
    @classmethod
    def _few_biases(cls, value: Any) -> Any:
        """Limit the number before any of them is validated."""
        if isinstance(value, dict) and len(value) > MAX_BIASES:
            raise PydanticCustomError(
                "too_many", "{number} biases; use at most {most}",
                {"number": len(value), "most": MAX_BIASES},
            )  # fmt: skip
        return value

    @model_validator(mode="after")
    def _stream_options_need_stream(self) -> "_SamplingRequest":
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is for streams only; add stream=true")
        return self

    @property
    def num_completions(self) -> int:
        """Number of completions per prompt."""
        return 1 if self.n is None else self.n

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with the token counts."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def continuous_usage(self) -> bool:
        """Whether every chunk has token counts."""
        options = self.stream_options
        return self.includes_usage and bool(options and options.continuous_usage_stats)

    def sampling_params(
        self,
        *,
        defaults: dict[str, Any],
        max_tokens: int | None,
        logprobs: int | None,
        prompt_logprobs: int | None = None,
    ) -> list[SamplingParams]:
        """The engine's parameters of each completion of a prompt: they share everything except the seed.

        Args:
            defaults: arguments of `SamplingParams` in place of its own defaults.

        Raises:
            InvalidRequest: a value that the engine refuses.
        """

        def chosen(name: str) -> Any:
            asked = getattr(self, name)
            return defaults.get(name, getattr(SamplingParams, name)) if asked is None else asked

        first = SamplingParams(
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
            seed=self.seed,
            stop=[self.stop] if isinstance(self.stop, str) else list(self.stop or []),
            stop_token_ids=list(self.stop_token_ids or []),
            max_tokens=max_tokens,
            ignore_eos=self.ignore_eos,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            include_stop_str_in_output=self.include_stop_str_in_output,
            skip_special_tokens=self.skip_special_tokens,
        )
        every = [copy.copy(first) for _ in range(self.num_completions)]
        for index, params in enumerate(every):
            params.seed = None if self.seed is None else self.seed + index
        return every


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
        return self.prompt


class TextPart(LenientModel):
    """A part of a message's content."""

    type: Literal["text"]
    text: str


class Message(LenientModel):
    """A turn of the conversation."""

    unsupported = {
        "audio": (),
        "function_call": (),
        "tool_calls": ([],),
        "tool_call_id": (),
    }

    role: Text
    content: (
        str | Annotated[list[TextPart], Field(max_length=MAX_MESSAGES, fail_fast=True)] | None
    ) = Field(None, description="Null (no text) is allowed in an assistant's turn.")
    name: str | None = None

    @model_validator(mode="after")
    def _only_an_assistant_says_nothing(self) -> "Message":
        if self.content is None and self.role != "assistant":
            raise PydanticCustomError(
                "no_content", "content is missing; it is a text or text parts"
            )
        return self

    def as_dict(self) -> dict[str, str]:
        """The message for chat templates: its content is one text."""
        content = self.content or ""
        if not isinstance(content, str):
            content = "".join(part.text for part in content)
        return {"role": self.role, "content": content} | ({"name": self.name} if self.name else {})


class ChatCompletionRequest(_SamplingRequest):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    max_tokens: int | None = Field(None, ge=1, description="Default: up to the context's end.")
    max_completion_tokens: int | None = Field(None, ge=1, description="The same; takes precedence.")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    add_generation_prompt: bool = True
    add_special_tokens: bool = Field(
        False, description="Add the tokenizer's special tokens to the template's output."
    )
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _top_logprobs_need_logprobs(self) -> "ChatCompletionRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs=true")
        return self

    @property
    def most_tokens(self) -> int | None:
        """Most tokens to generate."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
