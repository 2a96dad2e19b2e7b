"""Count the merge decisions that change when a preempted request is recomputed.

In 16-bit dtypes the last bit of a decision logit depends on the shape of the matrix product that computes it. A
request that is preempted and recomputed in other chunks may therefore merge other tokens.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from megatron_dmc.cache import AsyncCopy
from megatron_dmc.engine.chunk import Chunk


class FlipCounter:
    """Compares each step's decisions with those that the requests have (`RequestDecisions`).

    Attributes:
        num_repeated: decisions made a second time so far.
        num_flipped: of these, decisions that differ from the first.
    """

    def __init__(self) -> None:
        self.num_repeated = self.num_flipped = 0
        self._is_merge_L: list[Tensor] = []

    def prefilled(self, is_merge_TG: Tensor) -> None:
        """Add one layer's decisions about the step's prefilled tokens, layer after layer."""
        self._is_merge_L.append(is_merge_TG)

    def end_step(self, chunks: Sequence[Chunk]) -> Callable[[np.ndarray, np.ndarray], None]:
        """End a step in which all layers decided about these chunks.

        Returns:
            a function that compares, given the entries that the chunks' rows gained, int64 (L, B, G), and
            the rows that were not closed since, bool (B,): a head that a single token did not lengthen has
            merged it.
        """
        prefilled = AsyncCopy([torch.stack(self._is_merge_L)]) if self._is_merge_L else None
        self._is_merge_L = []

        def compare(growth_LBG: np.ndarray, is_open_B: np.ndarray) -> None:
            is_merge_LTG = None if prefilled is None else prefilled.read()[0]
            first = 0
            for b, chunk in enumerate(chunks):
                if chunk.num_tokens == 1:
                    decided = growth_LBG[:, b : b + 1] == 0
                else:
                    assert is_merge_LTG is not None
                    decided = is_merge_LTG[:, first : first + chunk.num_tokens]
                    first += chunk.num_tokens
                if is_open_B[b] and chunk.request.decisions is not None:
                    repeated, flipped = chunk.request.decisions.add(chunk.start, decided)
                    self.num_repeated += repeated
                    self.num_flipped += flipped

        return compare
