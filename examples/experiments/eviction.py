"""H2O, TOVA and window over many whole sequences at a time, and the budgets that equal a CR.

The engine runs a policy request by request, out of pages. Here all windows of a batch take their tokens
together, without pages: the same `ops.paged.budget.attend_and_evict`, the same log-likelihoods.

Dimension letters: X windows, T tokens of each, N query heads, G key/value heads, D head dim, E columns of the
working cache.
"""

from typing import Any

import torch
from megatron.core.inference.config import InferenceConfig
from megatron.core.inference.contexts.base_context import BaseInferenceContext
from torch import Tensor

from megatron_dmc.cache.policies import EvictionPolicy, make_policy
from megatron_dmc.ops.paged.budget import WorkingCache, attend_and_evict
from megatron_dmc.ops.rope import rotate_by
from megatron_dmc.ops.tensors import accumulator_dtype


def final_budget(length: int, cr: float) -> int:
    """Entries of a head such that a window of `length` tokens ends with `length / cr` of them."""
    return max(1, round(length / cr))


def mean_budget(length: int, cr: float) -> int:
    """Entries of a head such that its size, averaged over the window, is that of a cache with this CR:
    the B with sum_t min(t, B) nearest to sum_t t / cr, t from 1 to `length`."""
    wanted = length * (length + 1) / 2 / cr
    return min(range(1, length + 1), key=lambda budget: abs(_sizes(length, budget) - wanted))


def measured_crs(length: int, budget: int) -> tuple[float, float]:
    """CR at the window's end, and of the sizes summed over the window."""
    return length / min(length, budget), length * (length + 1) / 2 / _sizes(length, budget)


def _sizes(length: int, budget: int) -> int:
    kept = min(length, budget)
    return kept * (kept + 1) // 2 + (length - kept) * kept


class _Windows(BaseInferenceContext):
    """The cache of X windows, as Megatron's inference context; of one forward of all their tokens."""

    def __init__(self, policy: EvictionPolicy, budget: int, num_windows: int, length: int):
        super().__init__(InferenceConfig(max_sequence_length=length))
        self.max_sequence_length = length
        self.policy, self.budget, self.num_windows = policy, budget, num_windows

    def is_static_batching(self) -> bool:
        return False

    def is_decode_only(self) -> bool:
        return False

    def using_cuda_graph_this_step(self) -> bool:
        return False

    def attend(
        self,
        layer_index: int,
        q_TND: Tensor,
        k_TGD: Tensor,
        v_TGD: Tensor,
        freqs_SF: Tensor | None,
        *,
        softmax_scale: float,
    ) -> Tensor:
        """See `attention.PagedAttentionContext`; the windows are consecutive."""
        if freqs_SF is not None:
            freqs = freqs_SF[: len(q_TND) // self.num_windows].repeat(self.num_windows, 1)
            q_TND, k_TGD = rotate_by(q_TND, freqs), rotate_by(k_TGD, freqs)
        q, k, v = (x.unflatten(0, (self.num_windows, -1)) for x in (q_TND, k_TGD, v_TGD))
        num_windows, length, num_kv_heads, head_dim = k.shape
        columns = (num_windows, num_kv_heads, min(self.budget, length) + 1)

        def each(value: int) -> Tensor:
            return torch.full((num_windows,), value, dtype=torch.int64, device=k.device)

        cache = WorkingCache(
            k.new_zeros(*columns, head_dim), v.new_zeros(*columns, head_dim),
            torch.full(columns, -1, dtype=torch.int64, device=k.device),
            torch.zeros(columns, dtype=accumulator_dtype(k.dtype), device=k.device),
        )  # fmt: skip
        out_XTND = attend_and_evict(
            q, k, v, each(0), each(length), each(self.budget), cache,
            update=self.policy.update, rank=self.policy.rank, softmax_scale=softmax_scale,
        )  # fmt: skip
        return out_XTND.flatten(0, 1)


@torch.no_grad()
def evicting_forward(model: Any, ids_XT: Tensor, policy: str, budget: int) -> Tensor:
    """Logits (X, T, padded V) of a plain model whose heads keep `budget` entries."""
    num_windows, length = ids_XT.shape
    context = _Windows(make_policy(policy), budget, num_windows, length)
    positions = torch.arange(length, device=ids_XT.device).repeat(num_windows)[None]
    logits = model(ids_XT.reshape(1, -1), positions, None, inference_context=context)
    return logits.reshape(num_windows, length, -1)
