"""Decode steps as CUDA graphs, one for each of a few batch sizes; smaller batches are padded.

Dimension letters: B requests, V vocabulary (of this rank).
"""

import bisect
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

Forward = Callable[[Tensor, Tensor, Tensor], Tensor]
"""The model on token ids, positions and cache rows, int64 (B,) each: logits (B, V). Row -1 is padding."""


class Captured(NamedTuple):
    """A piece of work that can be repeated."""

    replay: Callable[[], object]
    output: Tensor
    """Output of every replay."""


Capture = Callable[[Callable[[], Tensor]], Captured]
"""Makes work repeatable: everything that it reads and writes stays where it is."""


class CudaGraphs:
    """`Capture` by CUDA graphs that share one memory pool, as they never run at the same time: an output
    is valid until the next replay of any of them."""

    def __init__(self, device: torch.device):
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)

    def __call__(self, work: Callable[[], Tensor]) -> Captured:
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            for _ in range(2):  # kernels are loaded and chosen, tables made
                work()
        current.wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(
            graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
        ):
            output = work()
        return Captured(graph.replay, output)


class DecodeGraphs:
    """The model's decode step, captured for some batch sizes.

    Args:
        forward: the step. It runs on padding only while it is captured, which must change nothing.
        sizes: batch sizes.

    Attributes:
        largest: larger batches have no graph.
    """

    def __init__(
        self,
        forward: Forward,
        sizes: Sequence[int],
        capture: Capture,
        *,
        device: torch.device,
        progress: bool = True,
    ):
        self._sizes = sorted(set(sizes))
        self.largest = self._sizes[-1]
        self._device = device
        self._graphs: dict[int, tuple[Tensor, Captured]] = {}
        # the largest first: the others fit into the memory that it leaves in the pool
        bar = tqdm(
            reversed(self._sizes), desc="Capturing CUDA graphs", total=len(self._sizes), unit="size",
            disable=not progress,
        )  # fmt: skip
        for size in bar:
            inputs_3B = torch.zeros(3, size, dtype=torch.int64, device=device)
            inputs_3B[2] = -1
            token_ids_B, positions_B, rows_B = inputs_3B.unbind(0)

            def work(ids=token_ids_B, positions=positions_B, rows=rows_B) -> Tensor:
                return forward(ids, positions, rows)

            self._graphs[size] = inputs_3B, capture(work)

    def run(self, given_3B: np.ndarray) -> Tensor:
        """A step of at most `largest` requests, one token each.

        Args:
            given_3B: token ids, positions and cache rows, int64.

        Returns:
            logits (B, V) of these requests, valid until the next run.
        """
        count = given_3B.shape[1]
        size = self._sizes[bisect.bisect_left(self._sizes, count)]
        inputs_3B, captured = self._graphs[size]
        padded_3B = np.zeros((3, size), dtype=np.int64)
        padded_3B[2] = -1
        padded_3B[:, :count] = given_3B
        values = torch.from_numpy(padded_3B)
        if self._device.type == "cuda":
            values = values.pin_memory()
        inputs_3B.copy_(values, non_blocking=True)
        captured.replay()
        return captured.output[:count]
