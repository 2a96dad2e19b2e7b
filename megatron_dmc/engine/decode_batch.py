"""Requests that decode together, step after step, and what does not change meanwhile."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from megatron_dmc.engine.chunk import Chunk
from megatron_dmc.engine.logit_rules import reads_last_token
from megatron_dmc.engine.request import Request
from megatron_dmc.ops.tensors import to_device


class DecodeBatch:
    """A step of one token of each of these requests, whose row this is in all arrays.

    A step of the same requests is the same batch again: no list over requests is made for it. It ends when a request
    joins, leaves or has its last token sampled.

    Attributes:
        requests: with one token each that is not computed.
        rows_B: their rows of the cache, int64.
        starts_B: positions of these tokens, int64.
        ones_B: their numbers of tokens, int64.
        num_steps: steps of the batch so far.
        num_left: further steps until one of them has its last token sampled.
    """

    def __init__(self, requests: Sequence[Request]):
        self.requests = list(requests)
        self.rows_B = np.array([request.row for request in requests], dtype=np.int64)
        self.starts_B = np.array([r.num_computed_tokens for r in requests], dtype=np.int64)
        self.ones_B = np.ones_like(self.rows_B)
        self.num_steps = 0
        self.num_left = min(r.max_total_tokens - 1 - r.num_computed_tokens for r in requests)
        self._device_rows_B: Tensor | None = None

    def rows_on(self, device: torch.device) -> Tensor:
        """`rows_B` on the device, where all steps run; copied once."""
        if self._device_rows_B is None:
            self._device_rows_B = to_device(self.rows_B, device)
        return self._device_rows_B

    @classmethod
    def of(cls, requests: Sequence[Request]) -> "DecodeBatch | None":
        """The next step of these running requests, without those whose last token is sampled. None where it is
        another kind of step: several tokens of a request are not computed, or its rules read the completion."""
        members = []
        for request in requests:
            num_tokens = request.num_tokens
            if num_tokens >= request.max_total_tokens:
                continue
            if num_tokens - request.num_computed_tokens != 1 or reads_last_token(request):
                return None
            members.append(request)
        return cls(members) if members else None

    def chunks(self) -> list[Chunk]:
        """The step, request by request."""
        starts = self.starts_B.tolist()
        return [Chunk(request, 1, at) for request, at in zip(self.requests, starts, strict=True)]

    def launched(self) -> None:
        """Advance to the next step."""
        for request in self.requests:
            request.num_computed_tokens += 1
        self.starts_B = self.starts_B + 1
        self.num_steps += 1
        self.num_left -= 1
