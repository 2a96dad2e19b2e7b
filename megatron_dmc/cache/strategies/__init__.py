"""Cache strategies, one file each: what becomes of the tokens in the paged cache.

docs/architecture.md has a recipe for a new one.
"""

from megatron_dmc.cache.policies import POLICIES
from megatron_dmc.cache.strategies.base import LayerStore, Step, Storage
from megatron_dmc.cache.strategies.budget import BudgetStore
from megatron_dmc.cache.strategies.delayed import DelayedStore
from megatron_dmc.cache.strategies.merging import MergingStore
from megatron_dmc.cache.strategies.rules import BudgetRule, CompressionRule

BY_MODEL: dict[str, type[LayerStore]] = {
    "merging": MergingStore,
    "delayed": DelayedStore,
}
"""Strategies that the model's DMC settings select; a plain model merges nothing."""

BY_NAME: dict[str, type[LayerStore]] = {**dict.fromkeys(POLICIES, BudgetStore)}
"""Strategies that the setting `cache_policy` selects."""


def store_class(
    rule: CompressionRule | None, budget_rule: BudgetRule | None = None
) -> type[LayerStore]:
    """The strategy of these rules, of which at most one is given."""
    if budget_rule is not None:
        return BY_NAME[budget_rule.policy]
    return BY_MODEL["merging" if rule is None else rule.strategy]


__all__ = [
    "BY_MODEL",
    "BY_NAME",
    "BudgetRule",
    "CompressionRule",
    "LayerStore",
    "Step",
    "Storage",
    "store_class",
]
