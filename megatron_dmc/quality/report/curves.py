"""Training curves from the TensorBoard event files that Megatron writes."""

import logging
import math
import os
import re
from pathlib import Path

from megatron_dmc.quality.report.data import CurvePoint, ValidationPoint

_LAYER = re.compile(r"measured cr/layer (\d+)")
_log = logging.getLogger(__name__)


def read_tensorboard(
    folder: str | os.PathLike, stage: str
) -> tuple[list[CurvePoint], list[ValidationPoint]]:
    """Curves of one stage, in the order of their steps.

    A run that was interrupted and resumed has several event files; where they overlap the newest
    file counts, since training resumed from there. The readable part of a truncated file is used.

    Args:
        folder: the stage's `--tensorboard-dir`.
        stage: name that the points carry.

    Returns:
        training points and validation points; both empty where there are no events.
    """
    tags: dict[str, dict[int, float]] = {}
    for path in sorted(Path(folder).glob("events.out.tfevents.*"), key=_age):
        for tag, values in _read_file(path).items():
            tags.setdefault(tag, {}).update(values)

    def at(tag: str, step: int) -> float | None:
        value = tags.get(tag, {}).get(step)
        return value if value is None or math.isfinite(value) else None

    layers = sorted((int(m[1]), tag) for tag in tags if (m := _LAYER.fullmatch(tag)))
    curves = []
    for step in sorted(tags.get("lm loss", {})):
        per_layer = [cr for _, tag in layers if (cr := at(tag, step)) is not None]
        curves.append(
            CurvePoint(
                stage=stage,
                step=step,
                lm_loss=at("lm loss", step),
                compression_loss=at("compression loss", step),
                target_cr=at("target cr", step),
                measured_cr=at("measured cr", step),
                measured_cr_per_layer=per_layer
                if layers and len(per_layer) == len(layers)
                else None,
            )
        )
    validation = [
        ValidationPoint(
            stage=stage,
            step=step,
            lm_loss=at("lm loss validation", step),
            measured_cr=at("measured cr validation", step),
        )
        for step in sorted(tags.get("lm loss validation", {}))
    ]
    return curves, validation


def _age(path: Path) -> tuple[int, str]:
    """Event files are named events.out.tfevents.<seconds>.<host>...; oldest first."""
    seconds = path.name.split(".")[3]
    return (int(seconds) if seconds.isdigit() else 0, path.name)


def _read_file(path: Path) -> dict[str, dict[int, float]]:
    """Scalars of one event file by tag and step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(path), size_guidance={"scalars": 0}, purge_orphaned_data=False)
    try:
        events.Reload()
    except Exception as error:  # noqa: BLE001 (the reader names no class for damaged records)
        _log.warning("%s is damaged (%s); using what could be read", path, error)
    # event files hold float32: seven digits say all
    return {
        tag: {event.step: float(f"{event.value:.7g}") for event in events.Scalars(tag)}
        for tag in events.Tags()["scalars"]
    }
