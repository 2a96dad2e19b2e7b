"""The settings that select a cache strategy."""

import math
from dataclasses import dataclass

from megatron_dmc.errors import UnsupportedConfig


@dataclass(frozen=True)
class CompressionRule:
    """The meaning of the borrowed channel for the cache; a plain model has no rule."""

    alpha_offset: float
    merge_window: int = 0
    shared_decisions: bool = False
    """The heads of a layer decide together (DMC-C)."""
    may_merge: bool = True
    """False: every token is appended, though the borrowed channel still carries no content."""
    eviction_delay: int | None = None
    """Tokens do not merge but leave the cache (DMS), this many tokens later."""
    merge_delay: int = 0
    """A decision takes effect this many tokens later."""

    @property
    def merges(self) -> bool:
        """False: tokens are evicted."""
        return self.eviction_delay is None

    @property
    def num_ring_slots(self) -> int:
        """Latest tokens of a head that stay raw; 0: decisions take effect at once. A token is evicted by a
        decision that the token after it makes."""
        return self.merge_delay if self.eviction_delay is None else self.eviction_delay + 1

    @property
    def strategy(self) -> str:
        """Key of `strategies.BY_MODEL`."""
        return "delayed" if self.num_ring_slots else "merging"


@dataclass(frozen=True)
class BudgetRule:
    """A strategy that the user selects, and what each head may keep. Validated at construction:
    `UnsupportedConfig` names the engine's setting."""

    policy: str
    """Key of `strategies.BY_NAME`."""
    cache_budget: int | float
    """Entries that each head may keep; a float: as a part of the request's prompt."""

    def __post_init__(self) -> None:
        from megatron_dmc.cache.strategies import BY_NAME

        if self.policy not in BY_NAME:
            raise UnsupportedConfig(
                f"cache_policy={self.policy!r}: use one of {', '.join(BY_NAME)}"
            )
        budget = self.cache_budget
        is_part = isinstance(budget, float) and 0 < budget <= 1
        is_count = isinstance(budget, int) and not isinstance(budget, bool) and budget >= 1
        if not (is_part or is_count):
            raise UnsupportedConfig(
                f"cache_budget={budget!r}: use a number of entries, or a part of the prompt as a float "
                "above 0, at most 1.0"
            )

    def budget(self, num_prompt_tokens: int) -> int:
        """Entries that a head may keep of a request with such a prompt."""
        if isinstance(self.cache_budget, float):
            return max(1, math.ceil(self.cache_budget * num_prompt_tokens))
        return self.cache_budget
