"""Held-out perplexity and measured CR of a model, and the engine held against the full forward.

Dimension letters: T tokens, B batch, G key/value heads, L layers, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from megatron_dmc.checkpoint.load import LoadedModel, full_forward
from megatron_dmc.engine import LLM, SamplingParams
from megatron_dmc.engine.chunk import Chunk
from megatron_dmc.engine.request import Request
from megatron_dmc.errors import DMCError
from megatron_dmc.model.decisions import GateKey


class DecisionTrace:
    """Stands in for a recorder and keeps the decisions of the last forward.

    Attributes:
        is_merge_LTBG: list over layers of bool (T, B, G); empty for a plain model.
    """

    def __init__(self, model: Any):
        self.is_merge_LTBG: list[Tensor] = []
        for layer in model.decoder.layers:
            layer.self_attention.recorder = self

    def report(self, carrier: Tensor, alpha_hat_TBG: Tensor, key: GateKey, layer: int) -> Tensor:
        """See `DecisionRecorder.report`."""
        if layer == 0:
            self.is_merge_LTBG = []
        self.is_merge_LTBG.append(alpha_hat_TBG.detach() > 0.5)
        return carrier


@torch.no_grad()
def traced_forward(
    loaded: LoadedModel,
    input_ids: Tensor,
    trace: DecisionTrace,
    key: GateKey | None = None,
) -> Tensor:
    """`full_forward` that leaves its decisions in `trace`; logits (B, T, padded V).

    Args:
        key: of the noise that relaxed gates have.
    """
    key = key or GateKey(0, 0, 0, 0)
    positions = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    return loaded.model(input_ids, positions, key.to_tensor())


@contextmanager
def gates_of(model: Any, kind: Literal["hard", "soft"]) -> Iterator[None]:
    """Within, the model's layers decide as `evaluate` says of `kind`; the model's mode stays.

    Raises:
        ValueError: for another kind.
    """
    if kind not in ("hard", "soft"):
        raise ValueError(f"gates={kind!r}: choose hard or soft")
    layers = [layer.self_attention for layer in model.decoder.layers]
    for layer in layers:
        layer.relaxed_gates = kind == "soft"
    try:
        yield
    finally:
        for layer in layers:
            layer.relaxed_gates = None


@dataclass
class Evaluation:
    """Sums over held-out text; the properties are their quotients."""

    nll: float
    """Negative log-likelihood in nats, summed over predicted tokens."""
    num_predicted: int
    """Predicted tokens."""
    num_tokens: int
    """Tokens that entered a cache: windows x length."""
    num_entries_LG: np.ndarray
    """Entries that they took by the decisions, per layer and KV head."""
    num_token_steps: int
    """Tokens in an uncompressed cache, summed over the steps of every window."""
    num_slot_steps_LG: np.ndarray
    """Slots in use, summed over the same steps, per layer and KV head; raw tokens of a delay are in it."""

    @property
    def perplexity(self) -> float:
        return float(np.exp(self.nll / self.num_predicted))

    @property
    def measured_cr(self) -> float:
        """Decided CR: total tokens / total entries, as the decisions count them."""
        return float(self.num_tokens * self.num_entries_LG.size / self.num_entries_LG.sum())

    @property
    def cache_cr(self) -> float:
        """Cache CR: uncompressed slots / slots in use, each summed over time. With a delay it is below
        `measured_cr`, since a decision frees its slot later."""
        slots_LG = self.num_slot_steps_LG
        return float(self.num_token_steps * slots_LG.size / slots_LG.sum())

    @property
    def measured_cr_LG(self) -> list[list[float]]:
        return (self.num_tokens / self.num_entries_LG).tolist()


def read_tokens(prefix: str | Path, *, limit: int | None = None) -> np.ndarray:
    """Tokens of a Megatron `.bin/.idx` dataset in a row, int64 (num_tokens,).

    Args:
        limit: read whole documents up to this many tokens; None: all.

    Raises:
        DMCError: if there is no such dataset.
    """
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    if not Path(f"{prefix}.idx").is_file():
        raise DMCError(f"{prefix}.idx does not exist; build it with tools/preprocess_data.py")
    dataset = IndexedDataset(str(prefix))
    documents: list[np.ndarray] = []
    count = 0
    for i in range(len(dataset)):
        if limit is not None and count >= limit:
            break
        documents.append(np.array(dataset[i], dtype=np.int64))
        count += len(documents[-1])
    return np.concatenate(documents)


def windows(tokens: np.ndarray, length: int, batch: int, limit: int | None) -> Iterator[Tensor]:
    """Batches of (B, length + 1) tokens from windows that overlap in one token."""
    count = (len(tokens) - 1) // length
    if count < 1:
        raise DMCError(f"{len(tokens)} tokens do not fill one window of {length + 1}")
    count = count if limit is None else min(count, limit)
    for first in range(0, count, batch):
        rows = [
            tokens[w * length : w * length + length + 1]
            for w in range(first, min(first + batch, count))
        ]
        yield torch.from_numpy(np.stack(rows))


def evaluate(
    loaded: LoadedModel,
    tokens: np.ndarray,
    *,
    length: int,
    batch: int = 8,
    limit: int | None = None,
    progress: bool = True,
    label: str = "Evaluating",
    gates: Literal["hard", "soft"] = "hard",
    seed: int = 0,
) -> Evaluation:
    """Perplexity over consecutive windows, as a full forward.

    Args:
        loaded: the model; its recorder is replaced.
        tokens: int64 (num_tokens,).
        length: T of a window; every window starts with an empty cache.
        limit: most windows; None: all.
        gates: hard: the decisions of inference. soft: training's relaxed gates, with the noise and
            temperature of the model's settings; entries are then counted by the hard decision of
            the noisy gate, as training's measured CR is. The model may be in `eval()` for both.
        seed: of the soft gates' noise, which also depends on the window's index, but not on `batch`.
    """
    d = loaded.description
    trace = DecisionTrace(loaded.model)
    device = next(loaded.model.parameters()).device
    nll, predicted, total = 0.0, 0, 0
    entries_LG = np.zeros((d.num_layers, d.num_query_groups), dtype=np.int64)
    slot_steps_LG, token_steps = np.zeros_like(entries_LG), 0
    delay = d.dmc.decision_delay if d.dmc is not None else 0
    # a decision at token t holds from step t + delay on: it saves a slot in the steps that are left
    saved_T = (length - delay - torch.arange(length, device=device)).clamp(min=0)
    batches = list(windows(tokens, length, batch, limit))
    for index, rows in enumerate(tqdm(batches, desc=label, unit="batch", disable=not progress)):
        rows = rows.to(device)
        key = GateKey(seed, 0, index, index * batch)
        with gates_of(loaded.model, gates):
            logits = traced_forward(loaded, rows[:, :-1], trace, key)[..., : d.vocab_size]
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1).float(), rows[:, 1:].flatten(), reduction="sum"
        )
        nll += float(loss)
        predicted += rows[:, 1:].numel()
        total += rows[:, :-1].numel()
        entries_LG += rows[:, :-1].numel()
        token_steps += len(rows) * length * (length + 1) // 2
        for layer, is_merge_TBG in enumerate(trace.is_merge_LTBG):
            entries_LG[layer] -= is_merge_TBG.sum(dim=(0, 1)).cpu().numpy()
            slot_steps_LG[layer] -= (is_merge_TBG.sum(1) * saved_T[:, None]).sum(0).cpu().numpy()
    return Evaluation(
        nll, predicted, total, entries_LG, token_steps, slot_steps_LG + token_steps
    )  # fmt: skip


@torch.no_grad()
def engine_difference(
    loaded: LoadedModel, token_ids: Sequence[int], chunks: Sequence[int]
) -> float:
    """Largest absolute difference between the engine's logits and a full forward's, at any position.

    Args:
        token_ids: the sequence.
        chunks: sizes of the prefill chunks; the tokens left over are decoded one at a time.
    """
    device = next(loaded.model.parameters()).device
    llm = LLM(loaded, max_model_len=len(token_ids) + 1, max_num_seqs=1, device=device)
    engine = llm.engine
    request = Request("check", 0, None, list(token_ids), SamplingParams(max_tokens=1),
                      len(token_ids) + 1)  # fmt: skip
    sizes = list(chunks) + [1] * (len(token_ids) - sum(chunks))
    engine.context.start(request)
    rows = []
    for size in sizes:
        chunk = Chunk.next_of(request, size)
        rows.append(engine.runner.run([chunk], [list(range(size))]).clone())
        request.num_computed_tokens += size
    engine.context.release(request)
    engine.context.pool.check_integrity()
    full = full_forward(loaded.model, torch.tensor([list(token_ids)], device=device))[0]
    return float((torch.cat(rows) - full[:, : rows[0].shape[-1]]).abs().max())
