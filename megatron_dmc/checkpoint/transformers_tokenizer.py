"""Read a tokenizer with transformers."""

import json
from pathlib import Path
from typing import Any

from megatron_dmc.errors import CheckpointError

_CONFIG_FILE = "tokenizer_config.json"
_PLAIN_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")
"""Names of transformers' class for any `tokenizer.json`."""


def read_tokenizer(folder: Path, trust_remote_code: bool) -> Any:
    """The tokenizer that AutoTokenizer finds in a folder. Raises CheckpointError."""
    import transformers

    try:
        is_plain = is_plain_folder(folder)
        # AutoTokenizer takes a second to import, for the names of all models
        reader = transformers.PreTrainedTokenizerFast if is_plain else transformers.AutoTokenizer
        # trust_remote_code=None would ask at the keyboard where a folder brings code
        return reader.from_pretrained(
            folder, local_files_only=True, trust_remote_code=trust_remote_code
        )
    except Exception as e:  # transformers raises many kinds
        reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        if not trust_remote_code and "trust_remote_code" in str(e):
            reason = (
                "it needs code that lies in the folder; read that code, then pass "
                "--trust-remote-code (trust_remote_code=True)"
            )
        raise CheckpointError(f"{folder}: no tokenizer can be read from it ({reason})") from e


def is_plain_folder(folder: Path) -> bool:
    """Whether AutoTokenizer would read `tokenizer.json` and nothing else: the folder names no other class, and its
    model has no rule of its own."""
    if not (folder / "tokenizer.json").is_file() or not (folder / _CONFIG_FILE).is_file():
        return False
    config = json.loads((folder / _CONFIG_FILE).read_text(encoding="utf-8"))
    if config.get("tokenizer_class") not in _PLAIN_CLASSES or "auto_map" in config:
        return False
    file = folder / "config.json"
    model = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return "auto_map" not in model and model.get("model_type") in (None, "llama")
