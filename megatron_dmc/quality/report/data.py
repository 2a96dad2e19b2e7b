"""The numbers of a report. `report.json` is a plain dump of `ReportData`.

Dimension letters: L layers, G key/value heads of a layer, T tokens of the sample text.
"""

import json
import math
import os
import tempfile
from dataclasses import asdict, dataclass, field, fields
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
    """Data of the report; None means not measured, and the page says so."""

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
        for name in ("title", "model_name"):
            _check(isinstance(getattr(self, name), str), name, getattr(self, name), "a text")
        for name in ("base_perplexity", "dmc_perplexity", "target_cr", "measured_cr"):
            _check_number(name, getattr(self, name), minimum=1)
        _check_number("cache_cr", self.cache_cr, 1, optional=True)
        _check_number("base_continued_perplexity", self.base_continued_perplexity, 1, optional=True)
        for name in ("engine_vs_full_forward_max_abs_diff", "seconds"):
            _check_number(name, getattr(self, name), 0, optional=True)
        for name in ("tokens_per_second", "tokens_per_second_base"):
            value = getattr(self, name)
            _check_number(name, value, 0, optional=True)
            _check(value != 0, name, value, "positive, or None where not measured")
        for name in ("cache_bytes", "cache_bytes_uncompressed"):
            value = getattr(self, name)
            ok = value is None or (_is_int(value) and value > 0)
            _check(ok, name, value, "a positive number of bytes, or None where not measured")
        for stage, steps in self.steps.items():
            _check(_is_int(steps) and steps >= 0, f"steps[{stage!r}]", steps, "an int, at least 0")
        self._check_heads()
        self._check_points()
        self._check_sample()
        for i, completion in enumerate(self.completions):
            name = f"completions[{i}]"
            _check_keys(name, completion, Completion)
            _check_number(f"{name}['dmc_cr']", completion["dmc_cr"], 1, optional=True)

    def _check_heads(self) -> None:
        name, rows = "measured_cr_per_layer_head", self.measured_cr_per_layer_head
        shaped = bool(rows) and all(len(row) == len(rows[0]) > 0 for row in rows)
        _check(shaped, name, rows, "[L][G], at least one layer and head, all rows of one length")
        for layer, row in enumerate(rows):
            for head, cr in enumerate(row):
                _check_number(f"{name}[{layer}][{head}]", cr, minimum=1)

    def _check_points(self) -> None:
        for name, kind in (("curves", CurvePoint), ("validation", ValidationPoint)):
            for i, point in enumerate(getattr(self, name)):
                where = f"{name}[{i}]"
                _check_keys(where, point, kind)
                _check(_is_int(point["step"]) and point["step"] >= 0, f"{where}['step']",
                       point["step"], "an int, at least 0")  # fmt: skip
                for key, minimum in _POINT_MINIMA.items():
                    if key in point:
                        _check_number(f"{where}[{key!r}]", point[key], minimum, optional=True)

    def _check_sample(self) -> None:
        if self.sample is None:
            return
        _check_keys("sample", self.sample, Sample)
        tokens, starts = self.sample["tokens"], self.sample["starts"]
        _check(len(tokens) > 0, "sample['tokens']", tokens, "at least one token")
        shape = bool(starts) and all(len(row) == len(starts[0]) > 0 for row in starts)
        _check(shape, "sample['starts']", f"{len(starts)} layers", "[L][G][T]")
        for layer, row in enumerate(starts):
            for head, flags in enumerate(row):
                name = f"sample['starts'][{layer}][{head}]"
                _check(len(flags) == len(tokens), name, f"{len(flags)} flags",
                       f"one flag for each of the {len(tokens)} tokens")  # fmt: skip
                _check(bool(flags[0]), f"{name}[0]", flags[0],
                       "True: the first token always starts an entry")  # fmt: skip
        pair = self.sample["layer_head"]
        ok = len(pair) == 2 and 0 <= pair[0] < len(starts) and 0 <= pair[1] < len(starts[0])
        _check(ok, "sample['layer_head']", pair,
               f"a layer below {len(starts)} and a head below {len(starts[0])}")  # fmt: skip

    def to_json(self, path: str | os.PathLike) -> None:
        """Write `report.json`; an interrupted write leaves the old file as it was."""
        text = json.dumps(asdict(self), indent=1, ensure_ascii=False, allow_nan=False)
        write_atomically(path, (text + "\n").encode())

    @classmethod
    def from_json(cls, path: str | os.PathLike) -> "ReportData":
        """Read what `to_json` wrote.

        Raises:
            ValueError: the file is not JSON, or a field is missing, unknown or out of range.
        """
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is not a report: {error}") from error
        if not isinstance(values, dict):
            raise ValueError(f"{path} is not a report: it holds a {type(values).__name__}")
        unknown = sorted(values.keys() - {f.name for f in fields(cls)})
        if unknown:
            raise ValueError(f"{path} has fields that a report does not have: {', '.join(unknown)}")
        try:
            return cls(**values)
        except TypeError as error:
            raise ValueError(f"{path} is not a complete report: {error}") from error

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


_POINT_MINIMA = {"lm_loss": 0, "compression_loss": 0, "target_cr": 1, "measured_cr": 1}
# a CR of exactly 1 that was reduced in float32 may come out a little below
_ROUNDING = 1e-5


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check(ok: bool, name: str, value: Any, wanted: str) -> None:
    if not ok:
        shown = repr(value)
        shown = shown if len(shown) <= 80 else shown[:77] + "..."
        raise ValueError(f"{name} is {shown}, but must be {wanted}")


def _check_number(name: str, value: Any, minimum: float, *, optional: bool = False) -> None:
    if value is None and optional:
        return
    ok = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    wanted = f"a finite number, at least {minimum}" + (", or None" if optional else "")
    slack = _ROUNDING if minimum else 0
    _check(ok and value >= minimum - slack, name, value, wanted)


def _check_keys(name: str, value: Any, kind: Any) -> None:
    wanted = kind.__required_keys__
    ok = isinstance(value, dict) and wanted <= value.keys() <= wanted | kind.__optional_keys__
    _check(ok, name, sorted(value) if isinstance(value, dict) else value,
           f"a dict with the keys {', '.join(sorted(wanted))}")  # fmt: skip


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
