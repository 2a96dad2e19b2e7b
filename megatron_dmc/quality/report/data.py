"""The numbers of a report. `report.json` is a plain dump of `ReportData`.

Dimension letters: L layers, G key/value heads of a layer, T tokens of the sample text.
"""

import json
import math
import os
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NotRequired, TypedDict


class CurvePoint(TypedDict):
    """One logged training step. CR and compression loss are None where the stage has none."""

    stage: str
    step: int
    """Step within its stage, from 1."""
    lm_loss: float | None
    """Mean loss per token in nats; None where it was not finite."""
    compression_loss: float | None
    target_cr: float | None
    measured_cr: float | None
    measured_cr_per_layer: NotRequired[list[float] | None]


class ValidationPoint(TypedDict):
    """One evaluation on held-out text during training."""

    stage: str
    step: int
    lm_loss: float | None
    measured_cr: float | None


class Sample(TypedDict):
    """A text and where each KV head starts its cache entries in it."""

    tokens: list[str]
    """Texts of the T tokens; joined they are the text."""
    starts: list[list[list[bool]]]
    """[L][G][T]; True: a new entry begins at this token, False: it merges into the newest one."""
    layer_head: list[int]
    """Layer and head that the page shows first."""


class Completion(TypedDict):
    """One prompt continued by both models."""

    prompt: str
    base: str
    dmc: str
    dmc_cr: float | None


@dataclass(kw_only=True)
class ReportData:
    """Data of the report; None means not measured, and the page says so.

    Raises:
        ValueError: a number is infinite or NaN, as after a training that diverged.
    """

    title: str
    """Headline of the page."""
    model_name: str
    """Name of the model that was retrofitted."""
    base_perplexity: float
    """Perplexity per token of the base model on held-out text."""
    dmc_perplexity: float
    """The same of the DMC model, with hard decisions."""
    base_continued_perplexity: float | None = None
    """Control: the base model trained on for the same steps, without DMC."""
    target_cr: float
    """Compression ratio (tokens / cache entries) that training aimed at."""
    measured_cr: float
    """Decided CR: tokens / cache entries by the decisions on held-out text, total over total."""
    cache_cr: float | None = None
    """Cache CR: slots without DMC / slots in use, summed over time; raw tokens of a delay count."""
    measured_cr_per_layer_head: list[list[float]]
    """[L][G]."""
    engine_vs_full_forward_max_abs_diff: float | None = None
    """Largest absolute difference of logits: the engine's prefill and decode against one full
    forward with hard decisions."""
    cache_bytes: int | None = None
    """Bytes of the KV cache that the generation run held."""
    cache_bytes_uncompressed: int | None = None
    """Bytes that the same tokens need without DMC."""
    tokens_per_second: float | None = None
    """Generation speed of the DMC model."""
    tokens_per_second_base: float | None = None
    """Generation speed of the base model, same engine and requests."""
    seconds: float | None = None
    """Wall time of everything."""
    steps: dict[str, int] = field(default_factory=dict)
    """Training steps per stage, in the order in which the stages ran."""
    curves: list[CurvePoint] = field(default_factory=list)
    validation: list[ValidationPoint] = field(default_factory=list)
    sample: Sample | None = None
    completions: list[Completion] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    """Settings of the retrofit: merge window, learning rate, ..."""
    environment: dict[str, Any] = field(default_factory=dict)
    """Device, versions, commit."""
    commands: list[str] = field(default_factory=list)
    """Shell commands that made the report."""

    def __post_init__(self):
        for name, value in vars(self).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{name} is {value}; a report needs finite numbers")

    def to_json(self, path: str | os.PathLike) -> None:
        """Write `report.json`; an interrupted write leaves the old file as it was."""
        text = json.dumps(asdict(self), indent=1, ensure_ascii=False, allow_nan=False)
        write_atomically(path, (text + "\n").encode())

    @property
    def perplexity_ratio(self) -> float:
        """DMC model over base model; 1 means that nothing was lost."""
        return self.dmc_perplexity / self.base_perplexity

    @property
    def cache_ratio(self) -> float | None:
        """Uncompressed over compressed bytes of the generation run."""
        if self.cache_bytes is None or self.cache_bytes_uncompressed is None:
            return None
        return self.cache_bytes_uncompressed / self.cache_bytes

    @property
    def measured_cr_per_layer(self) -> list[float]:
        """[L]; total over total: all heads see the same tokens, so it is the harmonic mean."""
        return [len(row) / sum(1 / cr for cr in row) for row in self.measured_cr_per_layer_head]


def write_atomically(path: str | os.PathLike, content: bytes) -> None:
    """Write a file so that a reader sees the old content or the new, never a part."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
