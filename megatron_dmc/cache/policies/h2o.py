"""H2O, heavy-hitter oracle: Zhang et al., arXiv 2306.14048.

A head keeps the most recent tokens and the heavy hitters: those whose attention weights, summed over all
queries so far, are largest. The budget is shared equally between the two, as in the paper's experiments; of
an odd budget the recent ones get one more. The weights are those of the reduced cache, since an evicted
token is gone for good. With grouped queries a KV head sums over its query heads.

Dimension letters as in `cache.policies.base`.
"""

from torch import Tensor


class H2O:
    """Evicts the entry with the least accumulated attention that is not among the most recent."""

    name = "h2o"

    def update(self, score_XGE: Tensor, weights_XGRE: Tensor) -> Tensor:
        return score_XGE + weights_XGRE.sum(2)

    def rank(
        self, score_XGE: Tensor, position_XGE: Tensor, newest_X: Tensor, budget_X: Tensor
    ) -> Tensor:
        num_recent_X = budget_X - budget_X // 2
        is_recent = position_XGE > (newest_X - num_recent_X)[:, None, None]
        return score_XGE.masked_fill(is_recent, float("inf"))
