"""Decisions that are made a second time, after a preemption, and how many of them come out differently.

Dimension letters: L layers, T tokens, B requests, G key/value heads.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from megatron_dmc.cache import LateCopy
from megatron_dmc.engine.chunks import PackedChunk


class FlipCounter:
    """Compares each step's decisions with what the requests' `DecisionRecord` holds of the same tokens.

    Attributes:
        num_repeated: decisions made a second time so far.
        num_flipped: of these, how many came out differently.
    """

    def __init__(self) -> None:
        self.num_repeated = self.num_flipped = 0
        self._is_merge_L: list[Tensor] = []

    def prefilled(self, is_merge_TG: Tensor) -> None:
        """Take in what one layer decides about the step's prefilled tokens, layer after layer."""
        self._is_merge_L.append(is_merge_TG)

    def end_step(self, chunks: Sequence[PackedChunk]) -> Callable[[np.ndarray], None]:
        """All layers have decided about these chunks.

        Returns:
            what compares, given the entries that the chunks' rows got, int64 (L, B, G): a head that did
            not grow by a single token has merged it.
        """
        prefilled = LateCopy([torch.stack(self._is_merge_L)]) if self._is_merge_L else None
        self._is_merge_L = []

        def compare(growth_LBG: np.ndarray) -> None:
            is_merge_LTG = None if prefilled is None else prefilled.read()[0]
            first = 0
            for b, chunk in enumerate(chunks):
                if chunk.num_tokens == 1:
                    decided = growth_LBG[:, b : b + 1] == 0
                else:
                    assert is_merge_LTG is not None
                    decided = is_merge_LTG[:, first : first + chunk.num_tokens]
                    first += chunk.num_tokens
                if chunk.request.decisions is not None:
                    repeated, flipped = chunk.request.decisions.add(chunk.start, decided)
                    self.num_repeated += repeated
                    self.num_flipped += flipped

        return compare
