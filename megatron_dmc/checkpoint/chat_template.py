"""Convert chat messages to token ids with the model's template and tokenizer."""

from pathlib import Path
from typing import Any

from megatron_dmc.checkpoint.tokenizer import HuggingFaceTokenizer, Tokenizer
from megatron_dmc.errors import DMCError, InvalidRequest

_RESERVED = {"conversations", "messages", "chat_template", "tools", "documents"}


class ChatTemplate:
    """A model's chat template.

    Args:
        tokenizer: the template's output contains its special tokens. If it has several templates,
            the one named "default" is used, as in transformers.
        template: Jinja, or the name of one of the tokenizer's templates; overrides that choice.
    """

    def __init__(self, tokenizer: HuggingFaceTokenizer, template: str | None = None):
        self._tokenizer, self._template = tokenizer, template

    @property
    def exists(self) -> bool:
        """False if neither the model nor the caller has one."""
        return bool(self._template or self._tokenizer.inner.chat_template)

    def token_ids(
        self,
        messages: list[dict[str, str]],
        *,
        add_generation_prompt: bool,
        arguments: dict[str, Any] | None,
        add_special_tokens: bool = False,
    ) -> list[int]:
        """The conversation as the model reads it.

        Args:
            add_special_tokens: add the tokens that the tokenizer puts around a text; a begin-of-text
                token that the template writes itself is not duplicated.

        Raises:
            InvalidRequest: there is no template, or it refuses the messages.
        """
        if not self.exists:
            raise InvalidRequest(
                "this model has no chat template; give one (--chat-template, chat_template=) or complete a "
                "text instead"
            )
        arguments = arguments or {}
        clash = sorted(_RESERVED & arguments.keys())
        if clash:
            raise InvalidRequest(f"chat_template_kwargs: {clash[0]} cannot be set; leave it out")
        inner = self._tokenizer.inner
        try:
            text = inner.apply_chat_template(
                messages, chat_template=self._template, tokenize=False,
                **{"add_generation_prompt": add_generation_prompt, **arguments},
            )  # fmt: skip
        except Exception as e:  # templates may raise any exception, Jinja's own included
            raise InvalidRequest(f"the chat template refuses these messages: {e}") from e
        begins = inner.bos_token is not None and text.startswith(inner.bos_token)
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens and not begins)


def load_chat_template(tokenizer: Tokenizer | None, template: str | None) -> ChatTemplate | None:
    """The template of a model.

    Args:
        tokenizer: the engine's; None: there is none.
        template: `--chat-template`: a file, Jinja itself, or the name of one of the tokenizer's
            templates; None: the tokenizer's own.

    Returns:
        None if transformers cannot read the tokenizer and no template was requested.

    Raises:
        DMCError: the file is missing, or there is no tokenizer to go with it.
    """
    if not isinstance(tokenizer, HuggingFaceTokenizer):
        if template is None:
            return None
        raise DMCError(
            "--chat-template: transformers reads no tokenizer of this model; give one with --tokenizer"
        )
    named = tokenizer.inner.chat_template
    if template is not None and not (isinstance(named, dict) and template in named):
        template = _read(template, sorted(named) if isinstance(named, dict) else [])
    elif template is None and isinstance(named, dict) and "default" not in named:
        raise DMCError(
            f"the tokenizer's chat templates are {', '.join(sorted(named))}, none of them the default; "
            "choose one with --chat-template NAME"
        )
    return ChatTemplate(tokenizer, template)


def _read(template: str, names: list[str]) -> str:
    if "{" in template or "\n" in template:
        return template
    file = Path(template)
    if not file.is_file():
        also = f", or one of the tokenizer's: {', '.join(names)}" if names else ""
        raise DMCError(
            f"--chat-template {template}: no such file; give a Jinja file or its text{also}"
        )
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise DMCError(f"--chat-template {template}: cannot be read ({e})") from e
