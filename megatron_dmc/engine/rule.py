"""The compression rule implied by a model's DMC settings, and the combinations that are unsupported."""

from typing import Any

from megatron_dmc.cache.strategies import CompressionRule
from megatron_dmc.engine.config import EngineConfig
from megatron_dmc.errors import UnsupportedConfig


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
    compresses = merges and enable_dmc is not False
    evicts = compresses and dmc.policy == "evict"
    return CompressionRule(
        alpha_offset=dmc.alpha_offset,
        shared_decisions=dmc.shared_decisions,
        merge_window=dmc.merge_window,
        eviction_delay=dmc.eviction_delay if evicts else None,
        merge_delay=dmc.merge_delay if compresses else 0,
        may_merge=compresses,
    )


def check_combinations(config: EngineConfig, rule: CompressionRule | None) -> None:
    """Refuse settings that contradict the model.

    Raises:
        UnsupportedConfig: names the setting and the remedy.
    """
    slots = 0 if rule is None else rule.num_ring_slots
    if rule is not None and config.enable_prefix_caching and slots % config.block_size:
        setting = "--dmc-merge-delay" if rule.merges else "--dmc-eviction-delay plus 1"
        raise UnsupportedConfig(
            f"enable_prefix_caching=True: the latest {slots} tokens of this model stay raw ({setting}), and "
            f"must fill whole pages of block_size={config.block_size}; use a block_size that divides it, or "
            "switch prefix caching off"
        )
    if config.cache_policy is not None and rule is not None:
        raise UnsupportedConfig(
            f"cache_policy={config.cache_policy!r} with a DMC model: it compresses by itself; use the base "
            "model"
        )
