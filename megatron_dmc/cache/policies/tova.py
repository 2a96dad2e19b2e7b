"""TOVA, token omission via attention: Oren et al., arXiv 2401.06104.

When the cache is full, the token goes that the newest query gives the least attention, be it the newest token
itself. The weights are averaged over all query heads of a layer, so its heads keep the same tokens.

Dimension letters as in `cache.policies.base`.
"""

from torch import Tensor


class TOVA:
    """Evicts the entry of least attention weight in the newest query."""

    name = "tova"

    def update(self, score_XGE: Tensor, weights_XGRE: Tensor) -> Tensor:
        return weights_XGRE.mean(dim=(1, 2))[:, None].expand_as(score_XGE)

    def rank(
        self, score_XGE: Tensor, position_XGE: Tensor, newest_X: Tensor, budget_X: Tensor
    ) -> Tensor:
        return score_XGE
