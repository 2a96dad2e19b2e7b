"""The settings of a run, from a TOML file."""

import tomllib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal


@dataclass
class Model:
    """The package that holds the model as GGUF."""

    package: str
    sha256: str


@dataclass
class Data:
    """Amounts of text."""

    megabytes: float
    heldout_documents: float
    validation_documents: float


@dataclass
class Training:
    """Settings that all arms share; `--dmc-*` flags of the same names."""

    seq_length: int
    batch: int
    lr: float
    borrowed_lr_mult: float
    adam_beta2: float
    teacher_weight: float
    merge_delay: int
    merge_window: int
    alpha_offset: float
    temperature: float
    noise_scale: float
    finetune_noise_scale: float
    loss_weight: float
    seed: int


@dataclass
class Arm:
    """A model to train: stages and their steps, in order; without a target CR a control."""

    stages: dict[str, int]
    target_cr: float | None = None
    policy: Literal["merge", "evict"] = "merge"
    """evict: DMS, with the merge delay as its eviction delay."""


@dataclass
class Measure:
    """Amounts of what is measured."""

    window_length: int
    windows: int
    long_window_length: int
    long_windows: int
    eviction_windows: int
    problems: int
    answer_tokens: int
    needle_lengths: list[int]
    needle_samples: int
    chat_tokens: int
    context_lengths: list[int]
    speed_tokens: int


@dataclass
class Settings:
    """A file's tables."""

    model: Model
    data: Data
    training: Training
    measure: Measure
    arms: dict[str, Arm] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def read_settings(file: Path) -> Settings:
    """Raises:
    ValueError: the file is damaged, or a setting is missing or unknown.
    """
    try:
        tables = tomllib.loads(file.read_text(encoding="utf-8"))
        arms = {name: Arm(**arm) for name, arm in tables.pop("arms").items()}
        kinds = {"model": Model, "data": Data, "training": Training, "measure": Measure}
        return Settings(**{name: kinds[name](**table) for name, table in tables.items()}, arms=arms)
    except (tomllib.TOMLDecodeError, KeyError, TypeError) as e:
        raise ValueError(
            f"{file}: {e}; compare it with {Path(__file__).with_name('settings.toml')}"
        ) from e
