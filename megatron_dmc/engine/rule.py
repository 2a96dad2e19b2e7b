"""The compression rule implied by a model's DMC settings, and the combinations that are unsupported."""

from dataclasses import dataclass
from typing import Any

from megatron_dmc.engine.config import EngineConfig
from megatron_dmc.errors import UnsupportedConfig


@dataclass(frozen=True)
class CompressionRule:
    """The use that the cache makes of the borrowed channel. A plain model has no rule."""

    alpha_offset: float
    merge_window: int = 0
    shared_decisions: bool = False
    """The heads of a layer decide together (DMC-C)."""
    may_merge: bool = True
    """False: every token is appended (and none evicted), though the borrowed channel still carries no
    content."""
    eviction_delay: int | None = None
    """Tokens are evicted instead of merged (DMS), this number of tokens later."""
    merge_delay: int = 0
    """A decision takes effect this many tokens later."""

    @property
    def has_ring(self) -> bool:
        """Whether a head's latest tokens are kept apart, in slots that are written again."""
        return self.eviction_delay is not None or self.merge_delay > 0


def compression_rule(dmc: Any | None, enable_dmc: bool | None) -> CompressionRule | None:
    """The rule of a model's DMC settings; None for a plain model.

    Args:
        dmc: `DMCConfig`, or None.
        enable_dmc: the engine's setting.

    Raises:
        UnsupportedConfig: `enable_dmc` was requested for a model without DMC, or the cache does not support the
            model's variant.
    """
    merges = dmc is not None and dmc.compresses
    if enable_dmc and not merges:
        raise UnsupportedConfig("enable_dmc=True: the model was not retrofitted; leave it at None")
    if dmc is None or dmc.stage == "off":
        return None
    if dmc.pool_after_rope and merges and enable_dmc is not False:
        raise UnsupportedConfig(
            "the model was trained with --dmc-pool-after-rope, and the engine's open segments hold "
            "unrotated keys; evaluate it with megatron_dmc.quality.likelihood.evaluate, or run it without "
            "merging (enable_dmc=False)"
        )
    return CompressionRule(
        alpha_offset=dmc.alpha_offset,
        shared_decisions=dmc.shared_decisions,
        merge_window=dmc.merge_window,
        eviction_delay=dmc.eviction_delay if dmc.policy == "evict" else None,
        merge_delay=dmc.merge_delay if merges and enable_dmc is not False else 0,
        may_merge=merges and enable_dmc is not False,
    )


def check_combinations(config: EngineConfig, rule: CompressionRule | None) -> None:
    """Refuse settings that contradict the model.

    Raises:
        UnsupportedConfig: names the setting and the remedy.
    """
    if rule is not None and rule.has_ring and config.enable_prefix_caching:
        what = (
            f"merges after a delay (--dmc-merge-delay {rule.merge_delay})"
            if rule.eviction_delay is None
            else "evicts tokens (--dmc-policy evict)"
        )
        raise UnsupportedConfig(
            f"enable_prefix_caching=True: this model {what}, and a page whose slots are written again "
            "cannot be shared; switch it off"
        )
    if config.cache_policy is not None and rule is not None:
        raise UnsupportedConfig(
            f"cache_policy={config.cache_policy!r} with a DMC model: it compresses by itself; use the base "
            "model"
        )
