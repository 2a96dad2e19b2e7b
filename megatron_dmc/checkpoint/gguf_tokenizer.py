"""The tokenizer of a GGUF file as a tokenizer of transformers.

transformers rebuilds vocabulary, merges and special tokens. How a text is cut before merging is only a name
in the file, of which transformers knows some and takes GPT-2's rule for the others; here the names it does
not know are added or refused.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_dmc.checkpoint.field_checks import shown
from megatron_dmc.errors import CheckpointError, UnsupportedConfig

_LLAMA3 = ("llama3", "llama-v3", "llama-bpe")
_QWEN = ("qwen2", "deepseek-r1-qwen")
_SINGLE_DIGITS = ("smollm", "starcoder", "refact")
_WHOLE_WORDS = (*_LLAMA3, "tekken")
"""A word of the vocabulary is one token, whatever the merges would make of it."""
_KNOWN = (*_WHOLE_WORDS, *_QWEN, *_SINGLE_DIGITS, "gpt-2", "gpt2")


def build_tokenizer(file: Path, metadata: Mapping[str, Any]) -> Any:
    """A tokenizer of transformers, with chat template and special tokens.

    Args:
        metadata: the file's, by name.

    Raises:
        CheckpointError: the file's tokenizer is damaged.
        UnsupportedConfig: its pre-tokenizer is not known.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    kind = metadata.get("tokenizer.ggml.pre")
    is_byte_level = metadata.get("tokenizer.ggml.model") == "gpt2"
    if is_byte_level and kind not in _KNOWN:
        raise UnsupportedConfig(
            f"{file}: its pre-tokenizer is {shown(kind)}; known are {', '.join(_KNOWN)}. Give the model's "
            "tokenizer with --tokenizer"
        )
    try:
        rebuilt = AutoTokenizer.from_pretrained(
            file.parent, gguf_file=file.name, local_files_only=True
        )
        if is_byte_level:
            _complete(rebuilt.backend_tokenizer, str(kind))
        # llama.cpp's default for files that do not say it
        adds_bos = metadata.get(
            "tokenizer.ggml.add_bos_token", not is_byte_level or kind in _LLAMA3
        )
        return PreTrainedTokenizerFast(
            tokenizer_object=rebuilt.backend_tokenizer, chat_template=rebuilt.chat_template,
            add_bos_token=adds_bos, add_eos_token=metadata.get("tokenizer.ggml.add_eos_token", False),
            **rebuilt.special_tokens_map,
        )  # fmt: skip
    except Exception as e:  # of a damaged file, many kinds
        raise CheckpointError(f"{file}: no tokenizer can be read from it ({e})") from e


def _complete(backend: Any, kind: str) -> None:
    """Add to a byte-level tokenizer what its family has and transformers does not take from the file."""
    from tokenizers import normalizers, pre_tokenizers

    if kind in _SINGLE_DIGITS:
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
    if kind in _QWEN:
        backend.normalizer = normalizers.NFC()
    if kind in _WHOLE_WORDS:
        backend.model.ignore_merges = True
