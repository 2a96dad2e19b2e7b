"""`generation_config.json`: the tokens that end an answer, and the settings that its model is best sampled
with."""

import json
import shutil
from pathlib import Path
from typing import Any

from megatron_dmc.errors import CheckpointError

GENERATION_CONFIG_FILE = "generation_config.json"

_SAMPLING = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}
"""Name in the file: name in `SamplingParams`."""


def find_generation_config(*places: Path | None) -> Path | None:
    """The first `generation_config.json` in some folders (or next to some files)."""
    for place in places:
        folder = place.parent if place is not None and place.is_file() else place
        if folder is not None and (folder / GENERATION_CONFIG_FILE).is_file():
            return folder / GENERATION_CONFIG_FILE
    return None


def read_generation_config(path: Path | None) -> dict[str, Any]:
    """The contents of a file, or of the one in a folder; {} of None.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    if path is None:
        return {}
    file = path / GENERATION_CONFIG_FILE if path.is_dir() else path
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except OSError as e:
        raise CheckpointError(f"{file}: cannot be read ({e.strerror or e})") from e
    except ValueError as e:
        raise CheckpointError(f"{file}: not valid JSON ({e}); copy the file again") from e
    if not isinstance(config, dict):
        raise CheckpointError(f"{file}: holds {type(config).__name__}, not a JSON object")
    token_ids(config.get("eos_token_id"), where=f"{file}: eos_token_id")
    return config


def copy_generation_config(source: Path | None, folder: Path) -> None:
    """Copy it into a folder that has none."""
    if source is not None and not (folder / GENERATION_CONFIG_FILE).exists():
        shutil.copyfile(source, folder / GENERATION_CONFIG_FILE)


def sampling_defaults(config: dict[str, Any]) -> dict[str, Any]:
    """Sampling defaults in the contents of a file, as arguments of `SamplingParams`."""
    return {
        ours: config[theirs] for theirs, ours in _SAMPLING.items() if config.get(theirs) is not None
    }


def token_ids(value: Any, *, where: str) -> list[int]:
    """Token ids of a setting that is one, several or none.

    Raises:
        CheckpointError: it is something else.
    """
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise CheckpointError(f"{where}={value!r}: use a token id, or a list of them")
    return ids
