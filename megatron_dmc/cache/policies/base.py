"""The contract of eviction policies: which entry leaves a head whose cache holds one too many.

Dimension letters: X requests, G key/value heads, R query heads of each, E columns of a cache that is being
worked on.
"""

from typing import Protocol

from torch import Tensor


class EvictionPolicy(Protocol):
    """A method. It has no state of its own: every entry carries one score."""

    name: str

    def update(self, score_XGE: Tensor, weights_XGRE: Tensor) -> Tensor:
        """The entries' scores after one more query.

        Args:
            score_XGE: before it; 0 for the entry of this query's own token.
            weights_XGRE: its attention weights (softmax), 0 in free columns.
        """
        ...

    def rank(
        self, score_XGE: Tensor, position_XGE: Tensor, newest_X: Tensor, budget_X: Tensor
    ) -> Tensor:
        """Among the entries, the one of lowest rank is evicted; infinite: never.

        Args:
            position_XGE: of each entry's token in its sequence; -1 in free columns, whose rank is not
                looked at.
            newest_X: position of the query's token.
            budget_X: entries that a head may keep.

        Returns:
            rank_XGE, in the dtype of the scores.
        """
        ...
