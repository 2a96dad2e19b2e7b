"""What was decided about a request's tokens, to compare with what a recomputation decides.

In 16-bit dtypes a decision logit depends in its last bit on the shape of the matrix product that it came
from. A request that is preempted and computed again in other chunks may therefore merge another token.

Dimension letters: L layers, T tokens, G key/value heads.
"""

import numpy as np


class DecisionRecord:
    """Decisions of a sequence's tokens, one bit for each head of each layer."""

    def __init__(self) -> None:
        self._rows: list[bytes | None] = []  # None: taken from a cached prefix

    def add(self, start: int, is_merge_LTG: np.ndarray) -> tuple[int, int]:
        """Take in the decisions about tokens `start` and following.

        Args:
            is_merge_LTG: bool.

        Returns:
            decisions made a second time, and how many of these came out differently. The later one is
            kept.
        """
        self._rows += [None] * (start - len(self._rows))
        flat = is_merge_LTG.transpose(1, 0, 2).reshape(is_merge_LTG.shape[1], -1).copy()
        if start == 0 and len(flat):
            flat[0] = False  # a sequence's first token never merges
        rows = [row.tobytes() for row in np.packbits(flat, axis=1)]
        repeated = flipped = 0
        for old, new in zip(self._rows[start:], rows, strict=False):
            if old is not None:
                change = int.from_bytes(old, "little") ^ int.from_bytes(new, "little")
                flipped += change.bit_count()
                repeated += flat.shape[1]
        self._rows[start : start + len(rows)] = rows
        return repeated, flipped
