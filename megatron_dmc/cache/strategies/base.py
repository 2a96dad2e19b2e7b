"""The contract between the paged context and a cache strategy, and what strategies with gates share."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from megatron_dmc.cache.prefixes import PrefixCache, Snapshot
from megatron_dmc.cache.segments import OpenSegments
from megatron_dmc.cache.strategies.rules import CompressionRule
from megatron_dmc.cache.tables import BlockTables
from megatron_dmc.ops import gates
from megatron_dmc.ops.paged.chunks import Chunks
from megatron_dmc.ops.paged.decode import Gates
from megatron_dmc.ops.paged.layer_cache import LayerCache


@dataclass(frozen=True)
class Storage:
    """The tables in which a strategy keeps its entries, and its part of the model.

    Attributes:
        dtype: the model's.
        max_model_len: longest sequence.
        backend: of the cache ops; None: as `ops.backends.DECODE` chooses.
        num_ranks, sum_over_ranks: tensor-parallel ranks, for heads that decide together.
    """

    tables: BlockTables
    dtype: torch.dtype
    max_model_len: int
    backend: str | None = None
    num_ranks: int = 1
    sum_over_ranks: Callable[[Tensor], Tensor] = lambda x: x


@dataclass
class Step:
    """The packed tokens of one run of the model: those of requests with a single token, then prompts.

    Attributes:
        rows_B, positions_B: int64, on the device, of the single tokens; row -1 is padding.
        rounds: the prompts' tokens, in the order in which they are prefilled.
        snapshots: for each round those to take after it.
        make_chunks: gives `chunks`: all tokens by request, single ones included. None while a CUDA graph is
            captured.
        plans_L: each layer's plan of decode attention, once one is made.
    """

    rows_B: Tensor
    positions_B: Tensor
    rounds: Sequence[Chunks] = ()
    snapshots: Sequence[Sequence[Snapshot]] = ()
    make_chunks: Callable[[], Chunks] | None = None
    plans_L: list[Tensor | None] | None = field(default=None, repr=False)

    @cached_property
    def chunks(self) -> Chunks:
        """See `make_chunks`."""
        assert self.make_chunks is not None
        return self.make_chunks()


class LayerStore(Protocol):
    """A cache strategy: which tokens of a request become entries, and when they leave.

    The context reserves pages before each run of the model: for every new token one entry more per head, up to
    `most_entries`.

    Attributes:
        shares_pages: cached prefixes may hold pages with requests: a closed entry is never written again.
        is_capturable: decode steps on kernels wait for nothing, so that CUDA graphs can hold them.
        grows_by_decision: a head gets an entry exactly when its token does not merge.
        segments: the rows' open segments; None without merging.
        row_state: what a cached prefix keeps of a row besides its pages, tensors (L, R, ...).
        num_ring_slots: a head's first slots that are written again, whole pages where prefixes are cached.
        prefixes: set by the context; `attend` captures snapshots.
        observe: set by the context; called with the decisions of each layer's prefilled tokens (T, G).
        impose: set by benchmarks: (layer, first packed token, count) to gates used instead of the model's.
    """

    shares_pages: ClassVar[bool]
    is_capturable: ClassVar[bool]
    segments: OpenSegments | None
    row_state: list[Tensor]
    num_ring_slots: int
    prefixes: PrefixCache | None
    observe: Callable[[Tensor], None] | None
    impose: Callable[[int, int, int], Gates | None] | None

    def __init__(self, storage: Storage, rule: Any): ...

    @classmethod
    def state_bytes(cls, rule: Any, head_dim: int) -> int:
        """Bytes that each row keeps for a KV head, apart from its pages and its block table."""
        ...

    @property
    def grows_by_decision(self) -> bool: ...

    def most_entries(self, num_tokens: int, num_prompt_tokens: int) -> int:
        """Entries that a head has at most after `num_tokens` tokens of a request with such a prompt."""
        ...

    def start(self, row: int, num_prompt_tokens: int) -> None:
        """Prepare an empty row for a request."""
        ...

    def attend(
        self,
        step: Step,
        layer_index: int,
        q_TND: Tensor,
        k_TGD: Tensor,
        v_TGD: Tensor,
        freqs_SF: Tensor | None,
        *,
        softmax_scale: float,
    ) -> Tensor:
        """Cache one layer's new tokens and attend over the requests' caches.

        Args:
            layer_index: 0-based, over all layers.
            q_TND, k_TGD, v_TGD: unrotated, with the borrowed channel in place.
            freqs_SF: RoPE angles of positions 0 to S-1, or None.

        Returns:
            out_TND.
        """
        ...


class GatedStore:
    """Strategies in which a token decides by the borrowed channel, and the plain cache: a `LayerStore`
    that lacks `decode` and `prefill`."""

    shares_pages: ClassVar[bool] = True
    is_capturable: ClassVar[bool] = True

    def __init__(self, storage: Storage, rule: CompressionRule | None):
        self.tables, self.dtype, self.backend = storage.tables, storage.dtype, storage.backend
        self.rule = rule
        self.segments: OpenSegments | None = None
        self.row_state: list[Tensor] = []
        self.num_ring_slots = 0
        self.prefixes: PrefixCache | None = None
        self.observe: Callable[[Tensor], None] | None = None
        self.impose: Callable[[int, int, int], Gates | None] | None = None
        self._num_ranks, self._sum_over_ranks = storage.num_ranks, storage.sum_over_ranks

    @classmethod
    def state_bytes(cls, rule: CompressionRule | None, head_dim: int) -> int:
        return 0

    @property
    def grows_by_decision(self) -> bool:
        return False

    def most_entries(self, num_tokens: int, num_prompt_tokens: int) -> int:
        return num_tokens

    def start(self, row: int, num_prompt_tokens: int) -> None:
        if self.segments is not None:
            self.segments.clear(row)

    def layer(self, layer_index: int) -> LayerCache:
        """A layer's pages, tables and segments."""
        return self.tables.layer(layer_index, self.segments)

    def attend(
        self,
        step: Step,
        layer_index: int,
        q_TND: Tensor,
        k_TGD: Tensor,
        v_TGD: Tensor,
        freqs_SF: Tensor | None,
        *,
        softmax_scale: float,
    ) -> Tensor:
        """As `LayerStore`."""
        num = step.rows_B.shape[0]
        if not step.rounds:
            return self.decode(step, layer_index, q_TND, k_TGD, v_TGD, freqs_SF, softmax_scale)
        out = torch.empty_like(q_TND)
        if num:
            out[:num] = self.decode(
                step, layer_index, q_TND[:num], k_TGD[:num], v_TGD[:num], freqs_SF, softmax_scale
            )
        q, k, v = (x[num:] for x in (q_TND, k_TGD, v_TGD))
        gates_TG = self.gates(layer_index, num, q, k)
        if self.observe is not None and gates_TG is not None:
            self.observe(gates_TG[0])
        for chunks, snapshots in zip(step.rounds, step.snapshots, strict=True):
            at = chunks.tokens
            out[num:][at] = self.prefill(
                chunks, layer_index, q[at], k[at], v[at],
                None if gates_TG is None else (gates_TG[0][at], gates_TG[1][at]), freqs_SF,
                softmax_scale,
            )  # fmt: skip
            for snapshot in snapshots:
                assert self.prefixes is not None
                self.prefixes.capture(snapshot, slice(layer_index, layer_index + 1))
        return out

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
        """Cache one token of each request and attend over all entries: out_BND."""
        raise NotImplementedError

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
        """Cache a round of prompt tokens and attend: out_TND."""
        raise NotImplementedError

    def gates(self, layer_index: int, first: int, q_TND: Tensor, k_TGD: Tensor) -> Gates | None:
        """Gates of packed tokens from `first` on; None for a plain cache. That a sequence's first token never
        merges is up to the ops."""
        rule = self.rule
        if rule is None:
            return None
        imposed = None if self.impose is None else self.impose(layer_index, first, len(q_TND))
        if imposed is not None:
            return imposed
        share = None
        if rule.shared_decisions:
            share = partial(
                gates.share_decisions, num_kv_heads_total=k_TGD.shape[1] * self._num_ranks,
                reduce=self._sum_over_ranks,
            )  # fmt: skip
        return gates.decide(
            q_TND, k_TGD, alpha_offset=rule.alpha_offset, share=share, may_merge=rule.may_merge
        )
