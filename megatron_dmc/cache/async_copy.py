"""Asynchronous device-to-host copies."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


class AsyncCopy:
    """Copies enqueued on the current stream; reading waits for them. On a GPU they go to pinned memory,
    with one event for all of them."""

    def __init__(self, tensors: Sequence[Tensor]):
        """Start copying. The tensors are on one device and may change afterwards."""
        self._event: torch.cuda.Event | None = None
        if tensors[0].is_cuda:
            self._copies = [
                torch.empty(t.shape, dtype=t.dtype, pin_memory=True).copy_(t, non_blocking=True)
                for t in tensors
            ]
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(tensors[0].device))
        else:
            self._copies = [t.clone() for t in tensors]

    def read(self) -> list[np.ndarray]:
        """The values as they were when the copy was started; waits for the device."""
        if self._event is not None:
            self._event.synchronize()
        return [t.numpy() for t in self._copies]
