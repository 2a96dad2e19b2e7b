"""Which policy, and what each head may keep."""

import math
from dataclasses import dataclass

from megatron_dmc.cache.policies.base import make_policy
from megatron_dmc.errors import UnsupportedConfig


@dataclass(frozen=True)
class EvictionRule:
    """Validated at construction: `UnsupportedConfig` names the engine's setting."""

    policy: str
    """Name of the method, see `make_policy`."""
    cache_budget: int | float
    """Entries that each head may keep; a float: as a part of the request's prompt."""

    def __post_init__(self) -> None:
        make_policy(self.policy)
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
