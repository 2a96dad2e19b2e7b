"""Seconds of an optimizer step, from arithmetic, the pipeline's bubble and bytes on the links.

An estimate: it knows no kernel, no topology beyond "within a node" and "between nodes", and no
overlap of communication and computation.
"""

from dataclasses import dataclass

from megatron_dmc.errors import UnsupportedConfig
from megatron_dmc.plan.assumptions import Assumptions
from megatron_dmc.plan.layout import Job, Layout
from megatron_dmc.plan.memory import stage_parameters
from megatron_dmc.plan.model import PlannedModel


@dataclass
class StepTime:
    """Seconds of a step, by cause."""

    compute: float
    """Arithmetic of all microbatches on the slowest stage."""
    tensor_parallel: float
    """Its all-gathers and reduce-scatters (or all-reduces)."""
    context_parallel: float
    """Keys and values gathered from the sequence's ranks, and their gradients' reduce-scatter."""
    pipeline_transfers: float
    """Activations and gradients between stages."""
    bubble: float
    """Waiting for the pipeline to fill and drain."""
    data_parallel: float
    """Gradient reduce-scatter and parameter all-gather."""
    model_flops: float
    """Floating-point operations of the step over all GPUs, recompute not counted."""

    @property
    def total(self) -> float:
        """Seconds."""
        return (
            self.compute
            + self.tensor_parallel
            + self.context_parallel
            + self.pipeline_transfers
            + self.bubble
            + self.data_parallel
        )


def layer_forward_flops(model: PlannedModel, seq_length: int) -> tuple[float, float]:
    """Per token and layer: (matrix products with weights, causal attention)."""
    h, d = model.hidden_size, model.kv_channels
    heads, groups = model.num_attention_heads, model.num_query_groups
    weights = h * (heads + 2 * groups) * d + heads * d * h + 3 * h * model.ffn_hidden_size
    # scores and weighted values, each 2 T D per query and head, half of it masked
    return 2.0 * weights, 2.0 * seq_length * heads * d


def output_forward_flops(model: PlannedModel) -> float:
    """Per token: the output layer."""
    return 2.0 * model.hidden_size * model.padded_vocab_size


def model_flops_per_token(model: PlannedModel, seq_length: int) -> float:
    """Forward and backward (twice the forward), without recompute."""
    products, attention = layer_forward_flops(model, seq_length)
    return 3 * (model.num_layers * (products + attention) + output_forward_flops(model))


def estimate_step(
    model: PlannedModel, layout: Layout, job: Job, assumptions: Assumptions, *, dmc: bool = True
) -> StepTime:
    """Time of a step.

    Args:
        dmc: False leaves `assumptions.dmc_overhead` out.
    """
    tp, pp = layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size
    cp, dp = layout.context_parallel_size, layout.data_parallel_size
    microbatches = layout.num_microbatches(job)
    tokens = layout.micro_batch_size * job.seq_length  # of a microbatch, over all of TP x CP
    layers = model.num_layers / pp
    products, attention = layer_forward_flops(model, job.seq_length)
    passes = 4 if layout.recompute_granularity == "full" else 3
    attention_passes = 3 if layout.recompute_granularity == "none" else 4

    speed = assumptions.peak_tflops * 1e12 * assumptions.efficiency
    per_rank = tokens / (tp * cp) / speed * (1 + (assumptions.dmc_overhead if dmc else 0))
    compute = layers * (attention * attention_passes + products * passes) * per_rank
    compute += 3 * output_forward_flops(model) * per_rank  # the last stage is the slowest

    hidden_bytes = 2.0 * tokens / cp * model.hidden_size
    # two in the forward and two in the backward of a layer; ring all-reduce, or its two halves
    ring = 2 * (tp - 1) / tp * hidden_bytes
    tensor = layers * (6 if passes == 4 else 4) * ring / _rate(assumptions, job, tp)

    kv_bytes = 2 * 2.0 * tokens / cp * model.kv_channels * model.num_query_groups / tp
    # gathered in every forward, their gradients scattered once: a pass less than attention's own
    sent = layers * (attention_passes - 1) * (cp - 1) * kv_bytes
    context = sent / _rate(assumptions, job, tp * cp)

    boundary = hidden_bytes / (tp if layout.sequence_parallel else 1)
    transfers = 0.0
    if pp > 1:
        hops = 2 * layout.num_virtual_stages_per_pipeline_rank
        transfers = hops * boundary / _rate(assumptions, job, job.gpus)
    one = compute + tensor + context + transfers
    bubble = one * (pp - 1) / layout.num_virtual_stages_per_pipeline_rank

    parameters = max(stage_parameters(model, layout, s) for s in range(pp))
    ranks = dp * cp
    # float32 gradients reduced, bfloat16 parameters gathered; all-reduce without sharding
    reduce_bytes = (4 + 2 if layout.use_distributed_optimizer else 2 * 4) * parameters
    data = (ranks - 1) / ranks * reduce_bytes / _rate(assumptions, job, tp * cp * dp)
    return StepTime(
        compute=microbatches * compute,
        tensor_parallel=microbatches * tensor,
        context_parallel=microbatches * context,
        pipeline_transfers=microbatches * transfers,
        bubble=bubble,
        data_parallel=data,
        model_flops=model_flops_per_token(model, job.seq_length) * job.tokens_per_step,
    )


def _rate(assumptions: Assumptions, job: Job, span: int) -> float:
    """Bytes per second for a group whose ranks spread over `span` neighbouring GPUs."""
    inside = span <= job.gpus_per_node
    rate = assumptions.intra_node_bandwidth if inside else assumptions.inter_node_bandwidth
    return rate * 1e9


@dataclass
class Schedule:
    """Steps and tokens of a retrofit, by stage: docs/method.md, section 5.

    The paper counts steps of 1024 x 4096 tokens; other batches take as many tokens.
    """

    zero_out_steps: int
    retrofit_steps: int
    finetune_steps: int
    tokens: float

    @property
    def steps(self) -> int:
        """All three stages."""
        return self.zero_out_steps + self.retrofit_steps + self.finetune_steps


PAPER_TOKENS_PER_STEP = 1024 * 4096


def retrofit_schedule(job: Job, target_cr: float, *, steps_per_cr: int = 3000) -> Schedule:
    """Zero-out 250 steps, retrofit `steps_per_cr` for each unit that the CR rises above 1,
    finetune 2,000, scaled to the job's tokens per step.

    Raises:
        UnsupportedConfig: for a target CR below 1 or above 1,000, or no steps.
    """
    if not 1 <= target_cr <= 1000:
        raise UnsupportedConfig(
            f"--dmc-target-cr {target_cr}: a compression ratio is tokens / entries; use at least 1, "
            "at most 1000"
        )
    if steps_per_cr < 1:
        raise UnsupportedConfig(f"--steps-per-cr {steps_per_cr}: it must be at least 1")

    def scaled(steps: float) -> int:
        return max(1, round(steps * PAPER_TOKENS_PER_STEP / job.tokens_per_step))

    stages = (scaled(250), scaled(steps_per_cr * (target_cr - 1)), scaled(2000))
    return Schedule(*stages, tokens=float(sum(stages)) * job.tokens_per_step)
