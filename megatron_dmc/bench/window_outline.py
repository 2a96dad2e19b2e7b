"""Stages of `megatron-dmc bench window`, in order, with their limits and the columns of their tables."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """A part of the window.

    Attributes:
        limit: seconds after which it is killed.
        columns: of its table: keys of the rows, and their titles.
        waits: for the CUDA extension's build.
        module: under `megatron_dmc.bench`, with the stage as a function of its name.
    """

    name: str
    title: str
    limit: float
    columns: dict[str, str]
    waits: bool = True
    module: str = "window_kernels"


_KERNEL = {
    "case": "case", "op": "op", "variant": "kernel", "median_ms": "ms",
    "fraction_of_copy": "of a copy", "time_over_attention": "over attention",
}  # fmt: skip
_ENGINE = {
    "case": "case", "engine": "engine", "measured_cr": "measured CR", "batch_size": "batch",
    "step_ms": "ms a step", "p10_ms": "p10", "p90_ms": "p90", "tokens_per_second": "tokens/s",
    "fraction_of_roofline": "of the roofline", "ratio": "ratio", "must_reach": "must reach",
}  # fmt: skip
ENGINE = "window_engine"
"""The module of the stages that run the model, for which megatron-core must be installed."""

STAGES = (
    Stage(
        "ceilings", "The machine and its ceilings", 60,
        {"case": "case", "value": "value", "unit": "unit"}, waits=False,
    ),
    Stage("cuda-cases", "Cases of the CUDA kernels", 90, {}),
    Stage("triton-cases", "Cases of the Triton kernels", 90, {}, waits=False),
    Stage("decode-kernels", "K4 and K5: attention and append of a decode step", 90, _KERNEL),
    Stage(
        "train-kernels", "K1 and K2: merge and training attention", 45,
        {"case": "case", "variant": "kernel", "direction": "direction", "merge_window": "window",
         "median_ms": "ms", "fraction_of_copy": "of a copy", "time_over_stock": "over stock"},
        waits=False,
    ),
    Stage(
        "prefill-kernels", "K6: prefill of one prompt", 60,
        {"case": "case", "op": "op", "variant": "kernel", "tokens": "tokens", "cr": "CR",
         "median_ms": "ms", "time_over_plain": "over no DMC", "time_over_flash": "over flash",
         "fraction_of_product": "of a product"},
    ),
    Stage(
        "engine-checks", "Captured decode steps equal eager ones; no hidden waits", 70,
        {"case": "case", "tokens": "tokens compared", "error": "error"}, module=ENGINE,
    ),
    Stage("throughput", "E1 and E2: decode throughput, Llama-2-7B's shape, largest batch", 110, _ENGINE,
          module=ENGINE),
    Stage("latency", "E3 and E7: a step at equal batch; paging against dense attention", 90, _ENGINE,
          module=ENGINE),
    Stage(
        "train-step", "K3: one layer, one training step", 45,
        {"case": "case", "part": "part", "dmc": "DMC", "median_ms": "ms",
         "time_over_plain": "over no DMC", "memory_over_plain": "memory over no DMC"},
        waits=False, module=ENGINE,
    ),
    Stage(
        "profile", "Kernels of one replayed decode step", 60,
        {"name": "kernel", "calls": "calls", "us": "µs", "fraction": "of the step's kernels"}, module=ENGINE,
    ),
)  # fmt: skip
