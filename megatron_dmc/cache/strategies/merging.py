"""Dynamic Memory Compression: a token merges into the open segment's entry or appends one. docs/method.md,
section 6. The plain cache is the case without a rule: every token is appended."""

from torch import Tensor

from megatron_dmc.cache.segments import OpenSegments
from megatron_dmc.cache.strategies.base import GatedStore, Step, Storage
from megatron_dmc.cache.strategies.rules import CompressionRule
from megatron_dmc.ops import rope
from megatron_dmc.ops.paged import decode
from megatron_dmc.ops.paged.chunks import Chunks
from megatron_dmc.ops.paged.decode import Angles, Gates
from megatron_dmc.ops.paged.prefill import prefill
from megatron_dmc.ops.training.merge import num_kept


def open_segments(storage: Storage, rule: CompressionRule) -> OpenSegments:
    """The segments of all layers and rows."""
    entries_LRG = storage.tables.num_entries_LRG
    num_layers, num_rows, num_kv_heads = entries_LRG.shape
    return OpenSegments(
        num_layers, num_rows, num_kv_heads, storage.tables.pool.head_dim,
        num_kept=num_kept(rule.merge_window), dtype=storage.dtype, device=entries_LRG.device,
    )  # fmt: skip


def segment_bytes(rule: CompressionRule, head_dim: int) -> int:
    """Bytes of a head's open segment, in float32."""
    return num_kept(rule.merge_window) * (2 * head_dim + 1) * 4


class MergingStore(GatedStore):
    """Merges at once. On a GPU a decode step is three launches per layer, and one more per step for the plans."""

    def __init__(self, storage: Storage, rule: CompressionRule | None):
        super().__init__(storage, rule)
        self.window = 0 if rule is None else rule.merge_window
        if rule is not None and rule.merges:
            self.segments = open_segments(storage, rule)
        self.row_state = [] if self.segments is None else [self.segments.state_LRGUA]
        self._angles: tuple[Tensor, Angles] | None = None

    @classmethod
    def state_bytes(cls, rule: CompressionRule | None, head_dim: int) -> int:
        return 0 if rule is None else segment_bytes(rule, head_dim)

    @property
    def grows_by_decision(self) -> bool:
        return self.rule is not None and self.rule.may_merge

    def decode(
        self,
        step: Step,
        layer_index: int,
        q_BND: Tensor,
        k_BGD: Tensor,
        v_BGD: Tensor,
        freqs_SF: Tensor | None,
        softmax_scale: float,
    ) -> Tensor:
        """As `GatedStore`: appending in one kernel, except that the logits of heads that decide together meet first."""
        rule, plan = self.rule, self.plan(step, layer_index, q_BND, k_BGD)
        cache, gates_BG = self.layer(layer_index), None
        if self.impose is not None or (rule is not None and rule.shared_decisions):
            gates_BG = self.gates(layer_index, 0, q_BND, k_BGD)
        rotated = decode.gate_and_append(
            cache, step.rows_B, q_BND, k_BGD, v_BGD, self.angles(freqs_SF, q_BND),
            step.positions_B, alpha_offset=None if rule is None else rule.alpha_offset,
            may_merge=rule is not None and rule.may_merge, merge_window=self.window,
            gates_BG=gates_BG, backend=self.backend,
        )  # fmt: skip
        return decode.paged_decode_attention(
            cache, step.rows_B, rotated, softmax_scale=softmax_scale, plan_Y=plan,
            backend=self.backend,
        )  # fmt: skip

    def prefill(
        self,
        chunks: Chunks,
        layer_index: int,
        q_TND: Tensor,
        k_TGD: Tensor,
        v_TGD: Tensor,
        gates_TG: Gates | None,
        freqs_SF: Tensor | None,
        softmax_scale: float,
    ) -> Tensor:
        return prefill(
            self.layer(layer_index), chunks, q_TND, k_TGD, v_TGD, gates_TG,
            None if freqs_SF is None else freqs_SF[chunks.positions_T],
            softmax_scale=softmax_scale, merge_window=self.window, backend=self.backend,
        )  # fmt: skip

    def plan(self, step: Step, layer_index: int, q_BND: Tensor, k_BGD: Tensor) -> Tensor | None:
        """The layer's part of a plan that serves all layers of a step, made before its first token is appended."""
        if step.plans_L is None:
            step.plans_L = decode.plan_decode_attention(
                self.tables.num_entries_LRG, step.rows_B, like=k_BGD,
                page_size=self.tables.pool.page_size, group=q_BND.shape[1] // k_BGD.shape[1],
                ahead=1, backend=self.backend,
            )  # fmt: skip
        return step.plans_L[layer_index]

    def angles(self, freqs_SF: Tensor | None, q_BND: Tensor) -> Angles:
        """RoPE's tables, made once for angles that stay where they are, as Megatron's do."""
        if freqs_SF is None:
            return None, None
        if self._angles is None or self._angles[0].data_ptr() != freqs_SF.data_ptr():
            # keep freqs_SF alive: its data_ptr() is the key
            self._angles = freqs_SF, rope.cosine_and_sine(freqs_SF, q_BND.dtype)
        return self._angles[1]
