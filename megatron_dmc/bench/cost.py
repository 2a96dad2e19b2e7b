"""Bytes and operations of a decode step: the model states its own cost.

Bytes: every weight but the token embedding's table once (of that a row per request), and key and value of every
live entry once. The floor is these bytes over the bandwidth of a plain copy on the same machine, or the
arithmetic over the rate of a large matrix product, whichever is longer. Activations, logits, block tables and
open segments come on top and are not counted.
"""

from dataclasses import dataclass
from typing import Any

import torch

from megatron_dmc.bench.measure import (
    Settings,
    copy_bandwidth,
    matrix_product_rate,
    release_memory,
)


@dataclass(frozen=True)
class ModelCost:
    """Cost of decoding with a model, or with one rank's share of it."""

    weight_bytes: int
    """Read in every step."""
    entry_bytes: int
    """Key and value of one entry of one KV head."""
    flops_per_token: int
    """Products with weights."""
    flops_per_entry: int
    """Scores and weighted values of one entry, of all the query heads of its group."""
    num_heads: int
    """KV heads over all layers."""

    @classmethod
    def of(cls, model: torch.nn.Module, description: Any, entry_bytes: int) -> "ModelCost":
        """Count a model's parameters.

        Args:
            model: GPTModel.
            description: `num_layers, num_attention_heads, num_query_groups, kv_channels,
                share_embeddings_and_output_weights`.
            entry_bytes: as the cache stores them.
        """
        weight_bytes = flops = 0
        for name, parameter in model.named_parameters():
            if "word_embeddings" in name and not description.share_embeddings_and_output_weights:
                continue
            weight_bytes += parameter.numel() * parameter.element_size()
            flops += 2 * parameter.numel() if parameter.ndim == 2 else 0
        group = description.num_attention_heads // description.num_query_groups
        return cls(
            weight_bytes,
            entry_bytes,
            flops,
            4 * description.kv_channels * group,
            description.num_layers * description.num_query_groups,
        )

    def step_bytes(self, live_entries: float) -> float:
        """Bytes of a decode step over `live_entries`, of all heads and requests together."""
        return self.weight_bytes + live_entries * self.entry_bytes

    def step_flops(self, num_requests: int, live_entries: float) -> float:
        """Floating-point operations of the same."""
        return num_requests * self.flops_per_token + live_entries * self.flops_per_entry


@dataclass(frozen=True)
class Ceilings:
    """The machine's ceilings, measured in this run."""

    bytes_per_second: float
    """A plain copy, bytes read and bytes written both counted."""
    flops_per_second: float
    """A large square matrix product in the model's dtype."""

    @classmethod
    def measure(cls, settings: Settings) -> "Ceilings":
        """Time the copy and the product, and release their memory."""
        ceilings = cls(copy_bandwidth(settings), matrix_product_rate(settings))
        release_memory()
        return ceilings

    def floor(self, cost: ModelCost, num_requests: int, live_entries: float) -> dict[str, float]:
        """Seconds that a decode step takes at least: `memory`, `arithmetic`, and the longer, `roofline`."""
        memory = cost.step_bytes(live_entries) / self.bytes_per_second
        arithmetic = cost.step_flops(num_requests, live_entries) / self.flops_per_second
        return {"memory": memory, "arithmetic": arithmetic, "roofline": max(memory, arithmetic)}
