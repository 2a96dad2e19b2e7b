"""Defaults of Megatron's flags that depend on the machine: a GPU, Transformer Engine, Apex.

Megatron's own defaults ask for all three and stop where one is absent. `set_defaults` turns off what
cannot run here; `check` refuses what was asked for by name and cannot.
"""

from argparse import ArgumentParser, Namespace
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from megatron.core.extensions import transformer_engine
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.tensor_parallel import layers

from megatron_dmc.errors import UnsupportedConfig
from megatron_dmc.ops import cpu

NEED_TRANSFORMER_ENGINE = {
    "fp8": "--fp8-format",
    "fp4": "--fp4-format",
    "tp_comm_overlap": "--tp-comm-overlap",
    "use_te_activation_func": "--use-te-activation-func",
    "use_transformer_engine_op_fuser": "--use-transformer-engine-op-fuser",
    "te_rng_tracker": "--te-rng-tracker",
    "te_precision_config_file": "--te-precision-config-file",
    "fused_residual_rmsnorm": "--fused-residual-rmsnorm",
    "moe_permute_fusion": "--moe-permute-fusion",
    "moe_router_fusion": "--moe-router-fusion",
    "cpu_offloading_num_layers": "--cpu-offloading-num-layers",
    "fine_grained_activation_offloading": "--fine-grained-activation-offloading",
    "delay_wgrad_compute": "--delay-wgrad-compute",
}
"""Megatron's argument -> its flag; off by default, and Transformer Engine does the work."""


@dataclass(frozen=True)
class Accelerators:
    """The accelerators of this machine, by the checks that Megatron itself makes when it is imported."""

    gpu: bool
    transformer_engine: bool
    rope_fusion: bool
    """Transformer Engine's fused rotary embedding."""
    gradient_fusion: bool
    """Apex's `fused_weight_gradient_mlp_cuda`; Megatron's output layer wants it with Transformer Engine too."""
    softmax_fusion: bool
    """Apex's `scaled_upper_triang_masked_softmax_cuda`, of Megatron's own attention (stage off)."""
    cpu_kernels: bool
    """The extension for CPUs, in which SwiGLU is one kernel."""

    @classmethod
    def found(cls) -> "Accelerators":
        """Those of this process."""
        return cls(
            gpu=torch.cuda.is_available(),
            transformer_engine=transformer_engine.HAVE_TE,
            rope_fusion=rope_utils.fused_apply_rotary_pos_emb is not None,
            gradient_fusion=layers._grad_accum_fusion_available,
            softmax_fusion=find_spec("scaled_upper_triang_masked_softmax_cuda") is not None,
            cpu_kernels=not cpu.absence(),
        )

    def defaults(self) -> dict[str, Any]:
        """Arguments of Megatron whose defaults cannot run here, and what they are instead."""
        on_gpu = self.gpu
        wanted: dict[str, tuple[bool, Any]] = {
            "transformer_impl": (on_gpu and self.transformer_engine, "local"),
            "apply_rope_fusion": (on_gpu and self.rope_fusion, False),
            "gradient_accumulation_fusion": (on_gpu and self.gradient_fusion, False),
            "masked_softmax_fusion": (on_gpu and self.softmax_fusion, False),
            # compiled for a GPU by torch; a CPU runs them as they are
            "bias_gelu_fusion": (on_gpu, False),
            "bias_dropout_fusion": (on_gpu, False),
            "bias_swiglu_fusion": (on_gpu or self.cpu_kernels, False),  # `ops.cpu.swiglu.install`
            "distributed_backend": (on_gpu, "gloo"),
            "use_cpu_initialization": (on_gpu, True),
        }
        return {name: value for name, (fits, value) in wanted.items() if not fits}

    def describe(self) -> str:
        """One line: what is there, and which fusions are off for that."""
        if not self.gpu:
            fusions = "fusions but SwiGLU's" if self.cpu_kernels else "fusions"
            return f"no GPU: training on the CPU, without Transformer Engine and {fusions}"
        te = (
            "Transformer Engine"
            if self.transformer_engine
            else "the local layers, for want of Transformer Engine"
        )
        off = [
            name
            for name, there in (
                ("RoPE", self.rope_fusion),
                ("gradient accumulation", self.gradient_fusion),
                ("masked softmax", self.softmax_fusion),
            )
            if not there
        ]
        why = f"; fusions that are off for want of Transformer Engine or Apex: {', '.join(off)}"
        return f"training on {te}{why if off else ''}"


def set_defaults(parser: ArgumentParser) -> None:
    """Give Megatron's parser the defaults that this machine can run; call it when all flags are there."""
    parser.set_defaults(**Accelerators.found().defaults())


def check(args: Namespace) -> None:
    """Refuse what was asked for by name and is not installed.

    Args:
        args: Megatron's, parsed.

    Raises:
        UnsupportedConfig: names the flag and the remedy.
    """
    if args.transformer_impl != "local" and not torch.cuda.is_available():
        raise UnsupportedConfig(
            f"--transformer-impl {args.transformer_impl} needs a GPU; use --transformer-impl local"
        )
    if transformer_engine.HAVE_TE:
        return
    remedy = "install it (the extra `[te]`, or NVIDIA's PyTorch container)"
    if args.transformer_impl != "local":
        raise UnsupportedConfig(
            f"--transformer-impl {args.transformer_impl} needs Transformer Engine, which cannot be "
            f"imported here; {remedy}, or leave the flag out"
        )
    asked = [flag for name, flag in NEED_TRANSFORMER_ENGINE.items() if getattr(args, name, None)]
    if asked:
        raise UnsupportedConfig(
            f"{', '.join(asked)}: needs Transformer Engine, which cannot be imported here; {remedy}, "
            "or leave it out"
        )
