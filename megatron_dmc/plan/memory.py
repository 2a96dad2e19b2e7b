"""Bytes on a GPU: parameters exactly, the rest by counting what training keeps.

Activations follow the counting of Korthikanti et al., "Reducing Activation Recomputation in Large
Transformer Models" (arXiv 2205.05198), sections 4 and 5, for a layer with RMSNorm, RoPE, grouped
queries, SwiGLU, no dropout and flash attention; for DMC the attention part is what
`DMCSelfAttention` saves for its backward. Numbers in the formulas are bytes: 2 for bfloat16, 4 for
float32.

Letters: h hidden size, f MLP width, N query heads, G key/value heads, D head dim, all of one rank
(of the whole model for h).
"""

from dataclasses import dataclass, fields, replace

from megatron_dmc.plan.layout import Job, Layout
from megatron_dmc.plan.model import PlannedModel, layer_parameters

WEIGHT_BYTES = 2
"""bfloat16."""
GRADIENT_BYTES = 4
"""Megatron accumulates and reduces gradients in float32 with --bf16."""
OPTIMIZER_BYTES = 12
"""float32 master weight and Adam's two moments."""


def stage_parameters(model: PlannedModel, layout: Layout, stage: int) -> int:
    """Parameters that one rank of a pipeline stage holds, exactly as Megatron builds it.

    Args:
        stage: pipeline rank, from 0.
    """
    tp, pp = layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size
    count = model.num_layers // pp * layer_parameters(model, tp)
    vocabulary = model.padded_vocab_size // tp * model.hidden_size
    first, last = stage == 0, stage == pp - 1
    if first:
        count += vocabulary
    if last:
        count += model.hidden_size  # final norm
        if not (first and model.share_embeddings_and_output_weights):
            count += vocabulary
    return count


@dataclass
class LayerActivations:
    """Tensors that one layer saves for its backward, in bytes of one rank for one microbatch."""

    layer_input: float
    """Input of the layer, all that full recompute keeps."""
    norms_and_inputs: float
    """Second norm's input, and the inputs of the QKV projection and the MLP."""
    attention: float
    """From the projected queries, keys and values to the attention's output."""
    dmc: float
    """Addition of DMC to `attention`."""
    mlp: float
    """Gate and up projection, and their product."""

    @property
    def total(self) -> float:
        """All of it."""
        return sum(getattr(self, f.name) for f in fields(self))


def plain_attention_bytes(heads: int, groups: int, dim: int) -> int:
    """Saved per token by flash attention and the output projection: q, k, v, output, log-sum-exp."""
    return 2 * dim * (heads + 2 * groups) + 2 * heads * dim + 4 * heads


_CARRY_TOKENS = 32
"""Of a tile of unlimited merging, `ops.triton.merge.default_tiling`: its running sum is kept for the backward."""


def dmc_attention_bytes(
    heads: int,
    groups: int,
    dim: int,
    *,
    recompute: bool,
    context_parallel: int = 1,
    delayed: bool = False,
) -> float:
    """Saved by `DMCSelfAttention` in the retrofit stage for each of a rank's own tokens, except for
    the RoPE tables. With the Triton kernels and unlimited merging; other ways to merge are not counted.

    Args:
        recompute: selective recompute: only what enters the attention is kept, and its output.
        context_parallel: ranks of a sequence; every one merges the keys and values of all of it.
        delayed: with a merge delay: the raw tokens.
    """
    projected = 2 * dim * (heads + 2 * groups)
    if recompute:
        # queries of a group do not lie together in the projection, so they are a copy
        return projected + (2 * heads * dim if heads != groups else 0) + 2 * heads * dim
    channels = 2 * dim * groups  # of keys, or of values
    carry = 4 * groups * (2 * dim + 1) / _CARRY_TOKENS
    merge = channels + 4 * groups * 2 + carry  # keys before it, alpha and omega: float32
    gates = 4 * groups * 4  # sigmoids and the log-sigmoid, float32
    keys = 2 * channels  # merged keys, rotated, and merged values
    if delayed:
        keys += channels  # raw keys, rotated; raw values are those before the merge
    whole = merge + gates + keys
    own = 2 * dim * heads + 2 * heads * dim + 4 * heads  # queries, output, log-sum-exp
    if context_parallel == 1:
        return whole + own + projected  # a view of which are the values before the merge
    whole += channels  # those values, from all ranks
    # the two chunks of a rank are attended one by one: each has its keys, the outputs are joined
    whole += channels / (2 * context_parallel)
    return context_parallel * whole + own + 2 * heads * dim


def layer_activations(
    model: PlannedModel, layout: Layout, job: Job, *, dmc: bool = True
) -> LayerActivations:
    """Tensors that one layer saves for one microbatch, with none or selective recompute.

    Args:
        dmc: False counts the same model with plain flash attention.
    """
    tp, cp = layout.tensor_model_parallel_size, layout.context_parallel_size
    positions = job.seq_length / cp
    tokens = positions * layout.micro_batch_size
    hidden = 2 * model.hidden_size * tokens / (tp if layout.sequence_parallel else 1)
    heads, groups = model.num_attention_heads // tp, model.num_query_groups // tp
    dim = model.kv_channels
    plain = plain_attention_bytes(heads, groups, dim)
    extra = 0.0
    if dmc:
        recompute = layout.recompute_granularity == "selective"
        per_token = dmc_attention_bytes(
            heads, groups, dim, recompute=recompute, context_parallel=cp,
            delayed=job.merge_delay > 0,
        )  # fmt: skip
        saved = per_token * tokens
        if not recompute:
            keys = 2 if job.merge_delay else 1  # merged ones, and raw ones
            saved += 4 * dim * (positions + keys * job.seq_length)  # cosines and sines, of q and k
        extra = saved - plain * tokens
    if model.qk_layernorm:
        plain += 2 * dim * (heads + groups)
    return LayerActivations(
        layer_input=hidden,
        norms_and_inputs=3 * hidden,
        attention=plain * tokens,
        dmc=extra,
        mlp=6 * model.ffn_hidden_size / tp * tokens,
    )


@dataclass
class CacheSize:
    """The cache of one sequence at inference, in bfloat16; raw tokens of a merge delay are in it."""

    plain_bytes: float
    """Uncompressed, with all tokens."""
    end_bytes: float
    """With all tokens."""
    decided_cr: float
    """Tokens / entries by the decisions: the target."""
    cache_cr: float
    """Uncompressed slots / slots in use, each summed over the tokens of the sequence."""


def cache_size(model: PlannedModel, job: Job, cr: float) -> CacheSize:
    """The cache of a sequence of `job.seq_length` tokens. Entries and pages are not rounded up.

    Args:
        cr: the decided CR, reached in every head and layer alike.
    """
    tokens, raw = job.seq_length, min(job.merge_delay, job.seq_length)
    others = tokens - raw
    slot = 2 * WEIGHT_BYTES * model.kv_channels * model.num_query_groups * model.num_layers
    all_slots = tokens * (tokens + 1) / 2
    # t slots until the ring is full, then those of the ring and the entries behind it
    used = raw * (raw + 1) / 2 + others * raw + others * (others + 1) / 2 / cr
    return CacheSize(tokens * slot, (raw + others / cr) * slot, cr, all_slots / used)


def chunks_in_flight(layout: Layout, job: Job, stage: int) -> int:
    """Model chunks whose activations a pipeline rank holds at once, at most.

    1F1B: one for each later stage and its own; interleaved: as Megatron's warm-up counts them.
    """
    pp, vp = layout.pipeline_model_parallel_size, layout.num_virtual_stages_per_pipeline_rank
    microbatches = layout.num_microbatches(job)
    if vp == 1:
        return min(microbatches, pp - stage)
    return min(microbatches * vp, 2 * (pp - stage - 1) + (vp - 1) * pp + 1)


@dataclass
class Memory:
    """Bytes on the fullest GPU of a layout."""

    weights: float
    """bfloat16 weights."""
    gradients: float
    """float32 gradient buffer."""
    optimizer: float
    """float32 master weights and Adam's moments, this rank's part."""
    activations: float
    """Kept for the backward passes of the microbatches in flight."""
    temporaries: float
    """Working memory of one layer, or of the logits."""
    reserved: float
    """CUDA context, communication buffers, fragmentation: an assumption."""
    parameters: int
    """Number of parameters on that GPU."""
    stage: int
    """Its pipeline rank."""
    dmc_activations: float
    """The part of `activations` that DMC adds."""

    @property
    def total(self) -> float:
        """Bytes of all of it."""
        parts = ("weights", "gradients", "optimizer", "activations", "temporaries", "reserved")
        return sum(getattr(self, part) for part in parts)


def _layer_temporaries(model: PlannedModel, layout: Layout, job: Job) -> float:
    """Working memory of one layer's backward in addition to its saved tensors.

    The input gathered over sequence-parallel ranks and its gradient; the gradient of the MLP's
    projection; and for DMC the eight float32 buffers of the merge's scan over the whole sequence.
    """
    tp, cp = layout.tensor_model_parallel_size, layout.context_parallel_size
    tokens = job.seq_length / cp * layout.micro_batch_size
    gathered = 2 * 2 * model.hidden_size * tokens
    mlp = 2 * 3 * model.ffn_hidden_size / tp * tokens
    merge = 8 * 4 * (2 * model.kv_channels + 1) * model.num_query_groups / tp * tokens * cp
    return gathered + max(mlp, merge)


def estimate_memory(
    model: PlannedModel, layout: Layout, job: Job, *, reserved: float = 0.0, dmc: bool = True
) -> Memory:
    """Memory of the pipeline stage that needs most.

    Args:
        reserved: bytes that are kept free on every GPU.
        dmc: False: the same training without DMC.
    """
    stages = (
        _stage_memory(model, layout, job, stage, reserved, dmc)
        for stage in range(layout.pipeline_model_parallel_size)
    )
    return max(stages, key=lambda memory: memory.total)


def _stage_memory(
    model: PlannedModel, layout: Layout, job: Job, stage: int, reserved: float, dmc: bool
) -> Memory:
    tp, pp = layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size
    parameters = stage_parameters(model, layout, stage)
    # Megatron shards the optimizer over data and context parallel ranks together
    shards = layout.data_parallel_size * layout.context_parallel_size
    layer = layer_activations(model, layout, job, dmc=dmc)
    layers = model.num_layers // (pp * layout.num_virtual_stages_per_pipeline_rank)
    in_flight = layers * chunks_in_flight(layout, job, stage)
    temporaries = _layer_temporaries(model, layout, job)
    if layout.recompute_granularity == "full":
        activations, extra = in_flight * layer.layer_input, 0.0
        temporaries += layer.total - layer.layer_input
    else:
        activations, extra = in_flight * layer.total, in_flight * max(0.0, layer.dmc)
        if dmc and layout.recompute_granularity == "selective":
            none = replace(layout, recompute_granularity="none")
            temporaries += max(0.0, layer_activations(model, none, job).total - layer.total)
    if stage == pp - 1:
        tokens = job.seq_length / layout.context_parallel_size * layout.micro_batch_size
        hidden = 2 * model.hidden_size * tokens / (tp if layout.sequence_parallel else 1)
        logits = model.padded_vocab_size / tp * tokens
        activations += 2 * hidden + 4 * logits  # final norm, output layer, softmax in float32
        temporaries = max(temporaries, (2 + 2) * logits)  # bfloat16 logits and their gradient
    return Memory(
        weights=WEIGHT_BYTES * parameters,
        gradients=GRADIENT_BYTES * parameters,
        optimizer=OPTIMIZER_BYTES
        * parameters
        / (shards if layout.use_distributed_optimizer else 1),
        activations=activations,
        temporaries=temporaries,
        reserved=reserved,
        parameters=parameters,
        stage=stage,
        dmc_activations=extra,
    )
