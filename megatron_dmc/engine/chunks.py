"""How a step's packed tokens belong to requests, and in which rounds prompts are prefilled."""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_dmc.cache import Snapshot
from megatron_dmc.engine.request import Request
from megatron_dmc.ops.paged.prefill import Chunks
from megatron_dmc.ops.tensors import to_device


@dataclass
class PackedChunk:
    """Tokens of one request within a step's packed tokens."""

    request: Request
    start: int
    """Position of the first token in its sequence."""
    num_tokens: int

    @property
    def end(self) -> int:
        return self.start + self.num_tokens

    @property
    def row(self) -> int:
        assert self.request.row is not None
        return self.request.row


@dataclass
class Piece:
    """A part of a chunk that is computed at once, and the snapshot to take after it."""

    row: int
    first: int
    """Its first token within the packed tokens, those of single tokens left out."""
    start: int
    num_tokens: int
    snapshot: Snapshot | None


@dataclass
class Round:
    """Pieces of different requests, prefilled in one call: of each the first that is not done yet."""

    pieces: list[Piece]
    chunks: Chunks
    tokens: slice | Tensor
    """Their tokens within the packed tokens, those of single tokens left out."""
    positions: Tensor

    @classmethod
    def of(cls, pieces: list[Piece], device: torch.device) -> "Round":
        """Lay out pieces of distinct requests, in the order of the packed tokens."""
        last, sizes = pieces[-1], [p.num_tokens for p in pieces]
        first, end = pieces[0].first, last.first + last.num_tokens
        tokens: slice | Tensor = slice(first, end)
        if end - first > sum(sizes):  # others lie between them
            parts = [torch.arange(p.first, p.first + p.num_tokens) for p in pieces]
            tokens = to_device(torch.cat(parts), device)
        positions = [torch.arange(p.start, p.start + p.num_tokens) for p in pieces]
        return cls(
            pieces, Chunks.of([p.row for p in pieces], sizes, device), tokens,
            to_device(torch.cat(positions), device),
        )  # fmt: skip
