"""Chat messages to token ids, by the template and tokenizer that came with the model."""

from pathlib import Path
from typing import Any

from megatron_dmc.errors import CheckpointError, DMCError
from megatron_dmc.server.errors import ApiError

_RESERVED = {"conversations", "messages", "chat_template", "tools", "documents"}


class ChatTemplate:
    """A model's chat template.

    Args:
        tokenizer: transformers' tokenizer: its special tokens stand in the template's output.
        template: Jinja, in place of the tokenizer's own.
    """

    def __init__(self, tokenizer: Any, template: str | None = None):
        self._tokenizer = tokenizer
        self._template = template or getattr(tokenizer, "chat_template", None)

    @property
    def exists(self) -> bool:
        """False where neither the model nor the caller brought one."""
        return bool(self._template)

    def token_ids(
        self,
        messages: list[dict[str, str]],
        *,
        add_generation_prompt: bool,
        arguments: dict[str, Any] | None,
    ) -> list[int]:
        """The conversation as the model reads it.

        Raises:
            ApiError: 400: there is no template, or it refuses the messages.
        """
        if not self.exists:
            raise ApiError(
                400,
                "this model has no chat template; start the server with --chat-template, or use "
                "/v1/completions",
                code="no_chat_template",
            )
        arguments = arguments or {}
        clash = sorted(_RESERVED & arguments.keys())
        if clash:
            raise ApiError(400, f"chat_template_kwargs: {clash[0]} cannot be set; leave it out")
        try:
            text = self._tokenizer.apply_chat_template(
                messages, chat_template=self._template, tokenize=False,
                **{"add_generation_prompt": add_generation_prompt, **arguments},
            )  # fmt: skip
        except Exception as e:  # templates raise what they like, Jinja's own errors included
            raise ApiError(400, f"the chat template refuses these messages: {e}") from e
        return list(self._tokenizer.encode(text, add_special_tokens=False))


def load_chat_template(
    tokenizer_place: str | Path | None, template: str | None
) -> ChatTemplate | None:
    """The template of a model.

    Args:
        tokenizer_place: folder or file of the tokenizer; None: there is none.
        template: `--chat-template`: a file, or Jinja itself; None: the tokenizer's own.

    Returns:
        None where the tokenizer is one that transformers cannot read and no template was asked for.

    Raises:
        DMCError: the file is missing, or there is no tokenizer to go with it.
    """
    if template is not None:
        template = _read(template)
    try:
        if tokenizer_place is None:
            raise CheckpointError("the model has no tokenizer")
        folder = Path(tokenizer_place)
        tokenizer = _transformers_tokenizer(folder.parent if folder.is_file() else folder)
    except CheckpointError as e:
        if template is None:
            return None
        raise DMCError(f"--chat-template: {e}") from e
    return ChatTemplate(tokenizer, template)


def _transformers_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as e:  # transformers raises many kinds
        reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise CheckpointError(f"{folder}: transformers reads no tokenizer there ({reason})") from e


def _read(template: str) -> str:
    if "{" in template or "\n" in template:
        return template
    file = Path(template)
    if not file.is_file():
        raise DMCError(f"--chat-template {template}: no such file; give a Jinja file or its text")
    return file.read_text(encoding="utf-8")
