"""Measurements on a trained arm: by kind of text and token, over time, and by copying.

Every function returns plain JSON. Dimension letters: X windows, T tokens of each, L layers, G key/value heads.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from sentencepiece import SentencePieceProcessor
from torch import Tensor

from megatron_dmc.checkpoint.load import LoadedModel
from megatron_dmc.quality.likelihood import DecisionTrace, evaluate, traced_forward
from megatron_dmc.quality.report.measure import sample_of

from eviction import evicting_forward, measured_crs
from texts import CLASSES, PLACES, Repeats, Windows, repeats

BATCH = 16
DISTANCES = (32, 64, 128, 224)
"""Tokens from a string to its repetition, in windows of 256."""

type Forward = Callable[[Tensor], tuple[Tensor, Tensor | None]]
"""ids (X, T) -> logits (X, T, V) and decisions (L, X, T, G), None for a plain model; all on the CPU."""


def forward_of(loaded: LoadedModel) -> Forward:
    """A full forward with hard decisions. A decision stands at the token that it is about: under DMC the one
    that merges; under eviction the one that leaves, and that of the last token is not known (False)."""
    trace = DecisionTrace(loaded.model)
    dmc, device = loaded.description.dmc, next(loaded.model.parameters()).device

    def forward(ids_XT: Tensor) -> tuple[Tensor, Tensor | None]:
        logits = traced_forward(loaded, ids_XT.to(device), trace).cpu()
        logits = logits[..., : loaded.description.vocab_size]
        if not trace.is_merge_LTBG:
            return logits, None
        is_gone_LXTG = torch.stack(trace.is_merge_LTBG).transpose(1, 2).cpu()
        if dmc is not None and dmc.policy == "evict":
            is_gone_LXTG = is_gone_LXTG.roll(-1, dims=2)
            is_gone_LXTG[:, :, -1] = False
        return logits, is_gone_LXTG

    return forward


def evicting(loaded: LoadedModel, policy: str, budget: int) -> Forward:
    """The same of a plain model whose heads keep `budget` entries."""
    device = next(loaded.model.parameters()).device

    def forward(ids_XT: Tensor) -> tuple[Tensor, None]:
        logits = evicting_forward(loaded.model, ids_XT.to(device), policy, budget).cpu()
        return logits[..., : loaded.description.vocab_size], None

    return forward


def _batches(ids_XT: np.ndarray, batch: int) -> Iterator[tuple[slice, Tensor]]:
    for first in range(0, len(ids_XT), batch):
        rows = slice(first, first + batch)
        yield rows, torch.from_numpy(ids_XT[rows])


def _losses(logits: Tensor, targets: Tensor) -> Tensor:
    flat = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), targets.flatten(), reduction="none"
    )
    return flat.view_as(targets)


# --- the cache over time ----------------------------------------------------------------------------


def sizes_over_time(is_gone_LXTG: Tensor, delay: int) -> Tensor:
    """Entries of every head after each token, (L, X, T, G) int64.

    Args:
        is_gone_LXTG: merged into the entry before, or evicted.
        delay: tokens until that takes effect.
    """
    length = is_gone_LXTG.shape[2]
    gone = torch.zeros_like(is_gone_LXTG, dtype=torch.int64)
    gone[:, :, delay:] = is_gone_LXTG.long().cumsum(2)[:, :, : max(0, length - delay)]
    return torch.arange(1, length + 1)[None, None, :, None] - gone


def cache(loaded: LoadedModel, ids_XT: np.ndarray) -> dict[str, Any]:
    """Perplexity, and CR by the entries that are there: at the windows' end and summed over time. Where a
    token leaves some time after its decision, this is less than the CR of the decisions."""
    forward, dmc = forward_of(loaded), loaded.description.dmc
    evicts = dmc is not None and dmc.policy == "evict"
    # `forward_of` puts an eviction at the token that leaves, one before the one that decided
    delay = dmc.decision_delay + evicts if dmc is not None else 0
    nll, last, summed = 0.0, 0, 0
    heads = loaded.description.num_layers * loaded.description.num_query_groups
    length = ids_XT.shape[1] - 1
    for _, rows in _batches(ids_XT, BATCH):
        logits, is_gone_LXTG = forward(rows[:, :-1])
        nll += float(_losses(logits, rows[:, 1:]).sum())
        if is_gone_LXTG is not None:
            sizes = sizes_over_time(is_gone_LXTG, delay)
            last += int(sizes[:, :, -1].sum())
            summed += int(sizes.sum())
    plain = not summed
    return {
        "windows": len(ids_XT),
        "perplexity": math.exp(nll / (len(ids_XT) * length)),
        "final_cr": 1.0 if plain else len(ids_XT) * length * heads / last,
        "mean_cr": 1.0 if plain else len(ids_XT) * length * (length + 1) / 2 * heads / summed,
    }


def eviction(
    loaded: LoadedModel, ids_XT: np.ndarray, policy: str, budget: int, *, batch: int = 128
) -> dict[str, Any]:
    """Perplexity of a plain model under a policy, and the two CRs of the budget."""
    forward, nll = evicting(loaded, policy, budget), 0.0
    for _, rows in _batches(ids_XT, batch):
        nll += float(_losses(forward(rows[:, :-1])[0], rows[:, 1:]).sum())
    length = ids_XT.shape[1] - 1
    final, mean = measured_crs(length, budget)
    return {
        "windows": len(ids_XT),
        "budget": budget,
        "perplexity": math.exp(nll / (len(ids_XT) * length)),
        "final_cr": final,
        "mean_cr": mean,
    }


def gates(
    loaded: LoadedModel, tokens: np.ndarray, *, length: int, limit: int | None
) -> dict[str, Any]:
    """Perplexity and CR with inference's hard decisions and with training's relaxed ones."""
    result = {}
    for kind in ("hard", "soft"):
        found = evaluate(
            loaded, tokens, length=length, limit=limit, progress=False, gates=kind
        )  # fmt: skip
        result[kind] = {"perplexity": found.perplexity, "measured_cr": found.measured_cr}
    return result


# --- kinds of text and of tokens --------------------------------------------------------------------


class _Sums:
    """Over tokens with a label: how often they are predicted and how well, how often they merge."""

    def __init__(self, num_labels: int, num_layers: int):
        self.nll, self.predicted = np.zeros(num_labels), np.zeros(num_labels, dtype=np.int64)
        self.gone_L = np.zeros((num_labels, num_layers))
        self.decided = np.zeros(num_labels, dtype=np.int64)

    def add(self, labels: np.ndarray, losses: Tensor, is_gone_LXTG: Tensor | None, decides: slice):
        """labels (X, T + 1) are those of the window's tokens; negative: not counted."""
        for label in range(len(self.nll)):
            hit = torch.from_numpy(labels[:, 1:] == label)
            self.nll[label] += float(losses[hit].sum())
            self.predicted[label] += int(hit.sum())
            if is_gone_LXTG is not None:
                own = torch.from_numpy(labels[:, :-1] == label)[:, decides]
                gone = is_gone_LXTG[:, :, decides].float().mean(-1)
                self.gone_L[label] += gone[:, own].sum(1).numpy()
                self.decided[label] += int(own.sum())

    def row(self, label: int) -> dict[str, Any]:
        row: dict[str, Any] = {"tokens": int(self.predicted[label])}
        if self.predicted[label]:
            row["perplexity"] = float(np.exp(self.nll[label] / self.predicted[label]))
        if self.decided[label]:
            per_layer = self.gone_L[label] / self.decided[label]
            row |= {"merge_rate": float(per_layer.mean()), "merge_rate_L": per_layer.tolist(),
                    "measured_cr": float(1 / max(1 - per_layer.mean(), 1e-9))}  # fmt: skip
        return row


def kinds(loaded: LoadedModel, texts: dict[str, Windows]) -> dict[str, Any]:
    """Perplexity and CR of each kind of text, and of each class of token in code.

    A kind's CR is tokens / entries of its windows; a class's is 1 / (1 - merge rate). Merge rates leave the
    first token out, which cannot merge, and under eviction the last, whose decision comes later.
    """
    forward, dmc = forward_of(loaded), loaded.description.dmc
    late = dmc is not None and dmc.policy == "evict"
    decides = slice(0, -1) if late else slice(1, None)
    num_layers = loaded.description.num_layers
    by_class, by_place = _Sums(len(CLASSES), num_layers), _Sums(len(PLACES), num_layers)
    result: dict[str, Any] = {}
    for kind, windows in texts.items():
        nll, gone, decisions = 0.0, 0, 0
        for rows, ids in _batches(windows.ids_XT, BATCH):
            logits, is_gone_LXTG = forward(ids[:, :-1])
            losses = _losses(logits, ids[:, 1:])
            nll += float(losses.sum())
            if is_gone_LXTG is not None:
                gone += int(is_gone_LXTG.sum())
                decisions += is_gone_LXTG.numel()
            if windows.classes_XT is not None and windows.places_XT is not None:
                by_class.add(windows.classes_XT[rows], losses, is_gone_LXTG, decides)
                by_place.add(windows.places_XT[rows], losses, is_gone_LXTG, decides)
        count, length = windows.ids_XT.shape
        result[kind] = {
            "windows": count,
            "perplexity": math.exp(nll / (count * (length - 1))),
            "measured_cr": decisions / (decisions - gone) if decisions else 1.0,
        }
    return {
        "kinds": result,
        "classes": {name: by_class.row(i) for i, name in enumerate(CLASSES)},
        "places": {name: by_place.row(i) for i, name in enumerate(PLACES)},
    }


def sample(loaded: LoadedModel, ids: list[int]) -> dict[str, Any]:
    """A text with the share of all heads that merge each token, and where one head starts its entries."""
    found = sample_of(loaded, ids)
    starts_LGT = np.array(found["starts"])
    layer, head = found["layer_head"]
    return {
        "tokens": found["tokens"],
        "merge_share": [round(1 - float(share), 4) for share in starts_LGT.mean((0, 1))],
        "layer_head": found["layer_head"],
        "starts": [bool(start) for start in starts_LGT[layer, head]],
    }


# --- copying ----------------------------------------------------------------------------------------


def copying(
    forward: Forward,
    filler: np.ndarray,
    processor: SentencePieceProcessor,
    *,
    length: int,
    count: int,
) -> dict[str, Any]:
    """Accuracy of the most probable token within a string's second occurrence, by distance in tokens.

    The key "none" holds the same where another string stands first: what the model does without copying.
    """
    result: dict[str, Any] = {}
    for variant in ("name", "code"):
        result[variant] = {}
        for distance in (*DISTANCES, None):
            task = repeats(variant, distance, filler, processor, length=length, count=count)
            result[variant][str(distance).lower()] = _accuracy(forward, task)
    return result


def _accuracy(forward: Forward, task: Repeats) -> dict[str, float]:
    """Mean over windows with its standard error, and the mean loss in nats."""
    accuracies, losses = [], []
    for rows, ids in _batches(task.ids_XT, BATCH):
        logits = forward(ids[:, :-1])[0]
        is_right = logits.argmax(-1) == ids[:, 1:]
        loss = _losses(logits, ids[:, 1:])
        for i, places in enumerate(task.scored[rows]):
            span = slice(places.start - 1, places.stop - 1)
            accuracies.append(float(is_right[i, span].float().mean()))
            losses.append(float(loss[i, span].mean()))
    return {
        "accuracy": float(np.mean(accuracies)),
        "standard_error": float(np.std(accuracies, ddof=1) / math.sqrt(len(accuracies))),
        "loss": float(np.mean(losses)),
    }
