"""The layout of a microbatch's tokens: context-parallel ranks and packed documents.

Context parallelism, in Megatron's zigzag order: with C ranks the sequence is cut into 2 C chunks, and
rank r holds chunks r and 2 C - 1 - r, in this order; every rank then has the same work under a causal
mask.

Packed documents: several in one sequence, and no attention and no merge crosses from one to another.

Local letters: X any further dimensions.
"""

from collections.abc import Callable, Sequence

import torch
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor


class SequenceLayout:
    """Moves tensors between a rank's own tokens and the whole sequence, and keeps documents apart.

    Args:
        group: the context-parallel group; None or of one rank: a rank has the whole sequence.
        starts: for each sequence of the batch the first tokens of its documents but the first, in
            rising order. None: a sequence is one document.
    """

    def __init__(
        self,
        group: torch.distributed.ProcessGroup | None = None,
        starts: Sequence[Sequence[int]] | None = None,
    ):
        self.group = group
        self.size = 1 if group is None else group.size()
        self.rank = 0 if group is None else group.rank()
        self.starts = None if starts is None or not any(starts) else starts

    def chunks(self) -> tuple[int, int]:
        """The two chunks of the whole sequence that this rank holds."""
        return self.rank, 2 * self.size - 1 - self.rank

    def gather(self, own_TX: Tensor) -> Tensor:
        """The whole sequence from every rank's own tokens, (T / C, X) -> (T, X).

        The gradient of a token is the sum of what all ranks have for it.
        """
        if self.size == 1:
            return own_TX
        by_rank = gather_from_sequence_parallel_region(own_TX.contiguous(), True, group=self.group)
        by_rank = by_rank.unflatten(0, (2 * self.size, -1))
        # chunk c is rank c's first, or rank (2 C - 1 - c)'s second
        place = [2 * c if c < self.size else 2 * (2 * self.size - 1 - c) + 1
                 for c in range(2 * self.size)]  # fmt: skip
        return by_rank[place].flatten(0, 1)

    def own(self, whole_TX: Tensor) -> Tensor:
        """This rank's tokens of a whole sequence, (T, X) -> (T / C, X)."""
        if self.size == 1:
            return whole_TX
        chunks = whole_TX.unflatten(0, (2 * self.size, -1))
        return chunks[list(self.chunks())].flatten(0, 1)

    def starts_TB(self, num_tokens: int) -> Tensor | None:
        """Bool on the CPU: the first token of every document; None if sequences are documents."""
        if self.starts is None:
            return None
        mask = torch.zeros(num_tokens, len(self.starts), dtype=torch.bool)
        mask[0] = True
        for b, starts in enumerate(self.starts):
            mask[list(starts), b] = True
        return mask

    def angles(self, own_T11F: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
        """RoPE's angles of this rank's tokens and of the whole sequence; each document starts at position 0.

        The borrowed channel's partner takes part in RoPE without it, so a score depends a little on
        the positions themselves, not on their distance alone; a packed document has those that it has
        alone.

        Args:
            own_T11F: Megatron's angles of this rank's positions; for its packed format, of at least
                the longest document's.
            num_tokens: T.
        """
        whole = self.gather(own_T11F)
        if self.starts is None:
            return own_T11F, whole
        starts_TB = self.starts_TB(num_tokens)
        assert starts_TB is not None
        tokens = torch.arange(num_tokens)[:, None]
        positions_TB = tokens - (tokens * starts_TB).cummax(0).values
        whole = whole[positions_TB.to(whole.device), 0]
        return self.own(whole), whole

    def attend(
        self, attention: Callable[..., Tensor], q_TX: Tensor, *keys_TX: Tensor, softmax_scale: float
    ) -> Tensor:
        """Causal attention of this rank's queries over the keys of their own documents.

        Args:
            attention: `causal_attention` or another of `ops` that has its arguments.
            q_TX: (T / C, B, X); keys_TX: (T, B, X) keys, values and what else `attention` takes.
        """
        total = keys_TX[0].shape[0]
        if self.size == 1:
            ranges = [(0, total)]
        else:
            length = total // (2 * self.size)
            ranges = [(c * length, (c + 1) * length) for c in self.chunks()]
        queries = q_TX.split([end - first for first, end in ranges])

        def within(q: Tensor, keys: Sequence[Tensor], first: int, end: int, starts) -> list[Tensor]:
            """Queries `q` of tokens [first, end), a document at a time."""
            outs = []
            for start, stop in zip([0, *starts], [*starts, total], strict=True):
                if start < end and stop > first:
                    low, high = max(start, first), min(stop, end)
                    outs.append(
                        attention(
                            q[low - first : high - first], *(x[start:high] for x in keys),
                            softmax_scale=softmax_scale,
                        )
                    )  # fmt: skip
            return outs

        outs = []
        for q, (first, end) in zip(queries, ranges, strict=True):
            if self.starts is None:
                outs += within(q, keys_TX, first, end, [])
                continue
            rows = [
                torch.cat(
                    within(q[:, b : b + 1], [x[:, b : b + 1] for x in keys_TX], first, end, starts)
                )
                for b, starts in enumerate(self.starts)
            ]
            outs.append(torch.cat(rows, dim=1))
        return outs[0] if len(outs) == 1 else torch.cat(outs)
