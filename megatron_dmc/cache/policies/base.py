"""What an eviction policy decides. Which entry of a head goes when its cache holds one too many.

Dimension letters: X requests, G key/value heads, R query heads of each, E columns of a cache that is being
worked on.
"""

from typing import Protocol

from torch import Tensor

from megatron_dmc.errors import UnsupportedConfig


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


def make_policy(name: str) -> EvictionPolicy:
    """The policy of this name.

    Raises:
        UnsupportedConfig: there is none.
    """
    from megatron_dmc.cache.policies.h2o import H2O
    from megatron_dmc.cache.policies.tova import TOVA
    from megatron_dmc.cache.policies.window import Window

    policies: dict[str, type[EvictionPolicy]] = {p.name: p for p in (H2O, TOVA, Window)}
    if name not in policies:
        raise UnsupportedConfig(f"cache_policy={name!r}: use one of {', '.join(policies)}")
    return policies[name]()
