"""A Transformer layer and a full training step with and without DMC (K3).

Regime: Megatron's model in one process, Llama-2-7B's layer shape (a small one on a CPU), random weights
and tokens, unlimited merging, no activation recompute. Both sides run the same code on the same
stock attention kernel; without DMC the merge, the gates and the compression loss are left out.
The step is forward, loss, backward and AdamW. Metric: median milliseconds and peak memory, and
their ratios. Before timing, both models must give finite losses, and with the borrowed channels
zero, where nothing merges, the same ones.

Dimension letters: T tokens, B batch, L layers.
"""

import argparse
import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_dmc.bench.measure import (
    Settings,
    as_row,
    document,
    measure_time,
    peak_memory,
    release_memory,
    rows_of,
)
from megatron_dmc.bench.model_under_test import draw_weights, llama2_7b
from megatron_dmc.bench.output import Case, Panel, Result, Row
from megatron_dmc.checkpoint.description import ModelDescription
from megatron_dmc.checkpoint.load import rotary_embedding, transformer_config
from megatron_dmc.checkpoint.single_process import ensure_single_process
from megatron_dmc.config import DMCConfig, Stage
from megatron_dmc.errors import DMCError
from megatron_dmc.model.build import DMCGPTModel, build_gpt
from megatron_dmc.model.decisions import DecisionRecorder, GateKey
from megatron_dmc.ops import gates
from megatron_dmc.training.loss import compression_loss, merge_rate

TARGET_CR = 4.0


def describe(settings: Settings, *, num_layers: int, length: int) -> ModelDescription:
    """Llama-2-7B with fewer layers, or something small for a CPU."""
    return llama2_7b(
        settings, num_layers=num_layers, length=length, hidden_size=64, ffn_hidden_size=128,
        num_attention_heads=4, num_query_groups=4, kv_channels=16, vocab_size=256,
    )  # fmt: skip


def build(description: ModelDescription, settings: Settings, *, dmc: bool) -> DMCGPTModel:
    """The model for training; weights depend on their names' order alone, so both sides agree."""
    ensure_single_process()
    stage = Stage.RETROFIT if dmc else Stage.OFF
    config = transformer_config(
        description, dmc=DMCConfig(stage=stage.value, target_cr=TARGET_CR), dtype=settings.dtype
    )
    recorder = DecisionRecorder(description.num_layers)
    model = build_gpt(
        config,
        recorder=recorder,
        vocab_size=description.padded_vocab_size,
        max_sequence_length=description.max_position_embeddings,
        share_embeddings_and_output_weights=False,
        position_embedding_type="rope",
        rotary_base=description.rotary_base,
    )
    assert isinstance(model, DMCGPTModel)
    model.rotary_pos_emb = rotary_embedding(description, settings.device)
    model.to(device=settings.device, dtype=settings.dtype).train()
    draw_weights(model)
    for name, parameter in model.named_parameters():
        if name.endswith("linear_qkv.weight"):
            gates.zero_channel_rows(
                parameter, num_kv_heads=description.num_query_groups,
                queries_per_group=description.num_attention_heads // description.num_query_groups,
                head_dim=description.kv_channels,
            )  # fmt: skip
    return model


def loss_of(model: DMCGPTModel, tokens_BT: Tensor, *, dmc: bool) -> tuple[Tensor, Tensor]:
    """The language model's loss, and the loss that is trained on."""
    key = GateKey(seed=1, step=0, microbatch=0, first_sample=0)
    model.recorder.begin(key)
    positions = torch.arange(tokens_BT.shape[1], device=tokens_BT.device).expand_as(tokens_BT)
    lm = model(tokens_BT, positions, key.to_tensor(), labels=tokens_BT.roll(-1, 1)).float().mean()
    counts_LB = model.take_counts()
    if not dmc:
        return lm, lm
    rate_B = merge_rate(
        counts_LB, num_tokens=tokens_BT.shape[1], num_kv_heads=model.config.num_query_groups
    )
    return lm, lm + compression_loss(rate_B, target_cr=TARGET_CR)


def check(models: dict[bool, DMCGPTModel], tokens_BT: Tensor) -> dict[str, float]:
    """Losses with and without DMC where nothing merges.

    Raises:
        DMCError: they are not finite or do not agree.
    """
    losses = {}
    for dmc, model in models.items():
        model.eval()  # no noise: zeroed channels mean that every token is appended
        with torch.no_grad():
            losses[dmc] = loss_of(model, tokens_BT, dmc=dmc)[0].item()
        model.train()
    if not abs(losses[True] - losses[False]) <= 2e-2 * abs(losses[False]):
        raise DMCError(f"losses with and without DMC disagree where nothing merges: {losses}")
    return {"with DMC": losses[True], "without DMC": losses[False]}


def measure(settings: Settings, length: int, num_layers: int) -> Iterator[Row]:
    """Rows of one length, as they are measured: the layer and the step, with DMC and without, each with the
    losses that were compared first.

    Raises:
        DMCError: as `check`.
    """
    batch = max(1, 4096 // length) if settings.on_gpu else 1
    description = describe(settings, num_layers=num_layers, length=length)
    generator = torch.Generator(device=settings.device).manual_seed(2)
    tokens_BT = torch.randint(
        description.vocab_size, (batch, length), generator=generator, device=settings.device
    )
    losses = check({dmc: build(description, settings, dmc=dmc) for dmc in (False, True)}, tokens_BT)
    plain: dict[str, Row] = {}
    for dmc in (False, True):
        # one at a time: the other one's weights are no part of its peak
        model = build(description, settings, dmc=dmc)
        for row in measure_model(settings, model, tokens_BT, dmc=dmc):
            base = plain.setdefault(row["part"], row)
            memory, plain_memory = row["peak_memory_bytes"], base["peak_memory_bytes"]
            yield {
                **row, "dmc": dmc, "num_tokens": length, "batch": batch,
                "time_over_plain": row["median_ms"] / base["median_ms"],
                "memory_over_plain": memory / plain_memory if memory and plain_memory else None,
                "losses_where_nothing_merges": losses,
            }  # fmt: skip
        del model
        release_memory()


def measure_model(
    settings: Settings, model: DMCGPTModel, tokens_BT: Tensor, *, dmc: bool
) -> Iterator[Row]:
    """Rows of the first layer, forward and backward, and of the whole step."""
    batch, length = tokens_BT.shape
    num_layers, key = model.config.num_layers, GateKey(seed=1, step=0, microbatch=0, first_sample=0)
    layer, freqs = model.decoder.layers[0], model.rotary_pos_emb(length)
    shape = (length, batch, model.config.hidden_size)
    hidden = torch.randn(shape, device=settings.device, dtype=settings.dtype, requires_grad=True)
    no_counts = torch.zeros(num_layers, batch, device=settings.device)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=3e-5, betas=(0.9, 0.95), weight_decay=0.1, fused=settings.on_gpu
    )

    def run_layer() -> None:
        model.recorder.begin(key)
        out, _ = layer(hidden, attention_mask=key.to_tensor(), rotary_pos_emb=freqs)
        out, counts = model.recorder.collect(out, no_counts, key)
        loss = out.float().square().mean() + counts.mean()
        torch.autograd.grad(loss, [hidden, *layer.parameters()])

    def run_step() -> None:
        loss_of(model, tokens_BT, dmc=dmc)[1].backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    for part, function in (("layer", run_layer), ("step", run_step)):
        timing = measure_time(function, settings.device, repeats=settings.repeats)
        memory = peak_memory(function, settings.device)
        if memory is not None and part == "step":
            # weights and optimizer state belong to a step's peak
            memory = torch.cuda.max_memory_allocated(settings.device)
        depth = num_layers if part == "step" else 1
        yield as_row(timing, part=part, num_layers=depth, peak_memory_bytes=memory)


def cases(settings: Settings, num_layers: int) -> list[Case]:
    """K3 of the settings' lengths."""
    return [
        Case(f"T={length}", functools.partial(measure, settings, length, num_layers))
        for length in settings.lengths
    ]


def run(args: argparse.Namespace) -> Result:
    """`megatron-dmc bench train-step`."""
    settings = Settings.from_args(args, gpu=(4096,), cpu=(64,))
    num_layers = args.layers or (8 if settings.on_gpu else 2)
    rows = rows_of(cases(settings, num_layers))
    result = document("train-step", settings, lengths=settings.lengths, rows=rows)
    title, labels = "Forward and backward", ("num_tokens", "part", "dmc")
    return Result(result, settings.output, [Panel(title, "ms", rows, "median_ms", labels)])
