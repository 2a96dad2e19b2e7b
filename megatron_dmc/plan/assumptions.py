"""Assumptions of an estimate about GPUs and links. No torch."""

from dataclasses import dataclass

from megatron_dmc.errors import UnsupportedConfig


@dataclass(frozen=True)
class GPU:
    """Figures of the vendor's data sheets."""

    bf16_tflops: float
    """Dense bfloat16 peak, TFLOP/s."""
    memory_gb: float
    """1e9 bytes."""
    link_gb_s: float
    """Links within a node: GB/s per GPU in one direction."""
    network_gb_s: float
    """Network between nodes: GB/s per GPU in one direction; the usual adapter for it."""


GPUS = {
    "a100": GPU(312, 80, 300, 25),
    "h100": GPU(989, 80, 450, 50),
    "h200": GPU(989, 141, 450, 50),
    "b200": GPU(2250, 180, 900, 50),
}
"""Boards with the fast links (SXM, HGX)."""


@dataclass(frozen=True)
class Assumptions:
    """Everything that an estimate assumes; each has a flag."""

    gpu: str = "h100"
    """Key of `GPUS`."""
    peak_tflops: float = 989.0
    """Dense bfloat16 peak."""
    efficiency: float = 0.5
    """Part of the peak that computing reaches, communication and bubble not counted."""
    intra_node_bandwidth: float = 360.0
    """GB/s per GPU in one direction within a node, as reached."""
    inter_node_bandwidth: float = 40.0
    """GB/s per GPU in one direction between nodes, as reached."""
    dmc_overhead: float = 0.05
    """Time that DMC adds to computing, as a part of it: the aim, not a measurement."""
    reserved_memory: float = 6e9
    """Bytes kept free for the CUDA context, communication buffers and fragmentation."""

    def __post_init__(self) -> None:
        for name in ("peak_tflops", "efficiency", "intra_node_bandwidth", "inter_node_bandwidth"):
            if not getattr(self, name) > 0:
                flag = "--" + name.replace("_", "-")
                raise UnsupportedConfig(f"{flag} {getattr(self, name)}: it must be positive")
        if self.efficiency > 1:
            raise UnsupportedConfig(
                f"--efficiency {self.efficiency}: a part of the peak, so at most 1"
            )
        if self.dmc_overhead < 0:
            raise UnsupportedConfig(f"--dmc-overhead {self.dmc_overhead}: it must not be negative")
