"""Chunks of several requests as the ops of prefill read them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_dmc.ops.tensors import to_device


class Tiles(NamedTuple):
    """Chunks cut into tiles.

    Attributes:
        table_X2: int32, each tile's chunk and its first token within the chunk.
        starts_Y: int32, the tiles before each chunk, and their number.
    """

    table_X2: Tensor
    starts_Y: Tensor


@dataclass(frozen=True)
class Chunks:
    """The tokens of a step that are prefilled in one call. Made once a step, they serve all layers; tensors are
    made when they are first read.

    Attributes:
        rows: each chunk's row of the cache; distinct.
        num_tokens: each chunk's length, at least 1.
        starts: position of each chunk's first token in its sequence.
        firsts: each chunk's first token among the packed tokens, increasing. Others may lie between two chunks.
    """

    rows: tuple[int, ...]
    num_tokens: tuple[int, ...]
    starts: tuple[int, ...]
    firsts: tuple[int, ...]
    device: torch.device | str
    _tiles: dict[tuple[int, bool], Tiles] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def of(
        cls,
        rows: Sequence[int],
        num_tokens: Sequence[int],
        device: torch.device | str,
        *,
        starts: Sequence[int] | None = None,
        firsts: Sequence[int] | None = None,
    ) -> "Chunks":
        """Chunks without tokens are left out.

        Args:
            starts: default: 0 each.
            firsts: default: the chunks are consecutive.

        Raises:
            ValueError: a row occurs twice: its second chunk would have to wait for the first.
        """
        if starts is None:
            starts = [0] * len(rows)
        if firsts is None:
            firsts = [0, *accumulate(num_tokens)][: len(rows)]
        chunks = [c for c in zip(rows, num_tokens, starts, firsts, strict=True) if c[1] > 0]
        if len({row for row, *_ in chunks}) < len(chunks):
            raise ValueError(f"prefill: rows {list(rows)} are not distinct; use one call for each")
        rows, num_tokens, starts, firsts = zip(*chunks, strict=True) if chunks else [()] * 4
        return cls(rows, num_tokens, starts, firsts, device)

    @cached_property
    def total(self) -> int:
        """Tokens of all chunks."""
        return sum(self.num_tokens)

    def spans(self) -> Iterator[tuple[int, int, slice]]:
        """Each chunk's row, start, and place among the chunks' own tokens."""
        first = 0
        for row, start, num in zip(self.rows, self.starts, self.num_tokens, strict=True):
            yield row, start, slice(first, first + num)
            first += num

    @cached_property
    def tokens(self) -> slice | Tensor:
        """Index of the chunks' tokens among the packed ones: a slice where they are consecutive."""
        first, end = self.firsts[0], self.firsts[-1] + self.num_tokens[-1]
        if end - first == self.total:
            return slice(first, end)
        return self._ranges(self.firsts)

    @cached_property
    def positions_T(self) -> Tensor:
        """int64, each token's position in its sequence."""
        return self._ranges(self.starts)

    def _ranges(self, starts: Sequence[int]) -> Tensor:
        parts = [torch.arange(a, a + n) for a, n in zip(starts, self.num_tokens, strict=True)]
        return to_device(torch.cat(parts), self.device)

    @cached_property
    def table_B3(self) -> Tensor:
        """int32: row, first token among those of the chunks, number of tokens."""
        table = [(row, at.start, at.stop - at.start) for row, _, at in self.spans()]
        return to_device(table, self.device, dtype=torch.int32).view(-1, 3)

    def tiles(self, size: int, *, latest_first: bool = False) -> Tiles:
        """Tiles of `size` tokens; `latest_first`: by decreasing place in their chunk, so that attention's
        longest work starts first."""
        key = (size, latest_first)
        if key not in self._tiles:
            table = [(c, at) for c, n in enumerate(self.num_tokens) for at in range(0, n, size)]
            if latest_first:
                table.sort(key=lambda tile: -tile[1])
            starts = [0]
            for n in self.num_tokens:
                starts.append(starts[-1] + -(-n // size))
            self._tiles[key] = Tiles(
                *(to_device(x, self.device, dtype=torch.int32) for x in (table, starts))
            )
        return self._tiles[key]
