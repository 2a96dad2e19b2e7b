"""Reads the data of this folder's tasks, from wherever the command is run."""

from pathlib import Path
from typing import Any

from datasets import Dataset


def load(file: str, **_: Any) -> dict[str, Dataset]:
    """The documents of a JSON-lines file of this folder, as lm-eval's test split. lm-eval also passes the
    model's arguments, which say nothing here."""
    dataset = Dataset.from_json(str(Path(__file__).with_name(file)))
    return {"test": dataset}
