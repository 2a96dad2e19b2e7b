"""The forward step of Megatron's loop: batch, gate key, model, loss, reports."""

import functools
import time
from argparse import Namespace
from collections.abc import Callable

import torch
from megatron.core import mpu
from megatron.core.num_microbatches_calculator import (
    get_current_global_batch_size,
    get_num_microbatches,
)
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.utils import get_attr_wrapped_model
from megatron.training import get_args, get_tensorboard_writer, get_timers, get_wandb_writer
from megatron.training.training import stimer
from torch import Tensor

from megatron_dmc.config import DMCConfig, Stage
from megatron_dmc.model.build import DMCGPTModel
from megatron_dmc.model.config import DMCTransformerConfig
from megatron_dmc.model.decisions import DecisionRecorder, GateKey
from megatron_dmc.model.sequence_layout import SequenceLayout
from megatron_dmc.schedule import target_cr
from megatron_dmc.training.data import keeps_documents_apart
from megatron_dmc.training.loss import compression_loss, measured_cr, merge_rate
from megatron_dmc.training.teacher import Teacher

SPIKY_LOSS_FACTOR = 10
"""Of the largest loss so far; the factor of Megatron's pretrain_gpt.py."""

type Finish = Callable[..., tuple[Tensor, Tensor, dict[str, Tensor]]]
"""(summed loss, its tokens, report, loss_mask_BT) -> the first three with the compression loss in them."""


def _core(model) -> DMCGPTModel:
    return get_attr_wrapped_model(model, "recorder", return_model_obj=True)


def document_starts(position_ids_BT: Tensor) -> list[list[int]]:
    """For each sequence the tokens, but the first, at which position ids start again at 0."""
    return [(row[1:] == 0).nonzero()[:, 0].add(1).tolist() for row in position_ids_BT.cpu()]


def micro_batch_size(args: Namespace, *, training: bool) -> int:
    """Sequences of a microbatch; evaluation may have its own number."""
    return args.micro_batch_size if training else args.eval_micro_batch_size


def get_batch(
    data_iterator, *, first_stage: bool, last_stage: bool, training: bool = True
) -> tuple[dict[str, Tensor | None], list[list[int]] | None]:
    """tokens_BT, labels_BT, loss_mask_BT, position_ids_BT of the next microbatch, and where the
    documents start that are packed into its sequences (None: kept together).

    Only what the stage needs is fetched; tensor-parallel rank 0 reads and the others receive. Under
    context parallelism T counts this rank's tokens; the documents' starts are those of the whole
    sequence.
    """
    empty: dict[str, Tensor | None] = dict.fromkeys(
        ("tokens", "labels", "loss_mask", "position_ids")
    )
    args = get_args()
    packed = keeps_documents_apart(args)
    if not (first_stage or last_stage or packed):
        return empty, None
    device = torch.cuda.current_device()
    layout = SequenceLayout(mpu.get_context_parallel_group())
    starts = None
    group = mpu.get_tensor_model_parallel_group()
    shape = (micro_batch_size(args, training=training), args.seq_length)
    data = next(data_iterator) if mpu.get_tensor_model_parallel_rank() == 0 else None
    dtypes = {"tokens": torch.int64, "labels": torch.int64, "loss_mask": torch.float32,
              "position_ids": torch.int64}  # fmt: skip
    wanted = [*(("tokens",) if first_stage else ()),
              *(("position_ids",) if first_stage or packed else ()),
              *(("labels", "loss_mask") if last_stage else ())]  # fmt: skip
    for name in wanted:
        if data is not None:
            tensor = (
                data[name].to(device=device, dtype=dtypes[name], non_blocking=True).contiguous()
            )
        else:
            tensor = torch.empty(shape, dtype=dtypes[name], device=device)
        if group.size() > 1:
            torch.distributed.broadcast(
                tensor, mpu.get_tensor_model_parallel_src_rank(), group=group
            )
        if name == "position_ids" and packed:
            starts = document_starts(tensor)
        empty[name] = layout.own(tensor.T).T.contiguous()
    return empty, starts


def check_loss(loss: Tensor) -> None:
    """Megatron's fault detection on a microbatch's loss, as its pretrain_gpt.py has it: NaN, infinity and,
    with `--check-for-spiky-loss`, a jump. What is rejected is run again (`--rerun-mode`)."""
    args, machine = get_args(), get_rerun_state_machine()
    # it is kept and compared with the repeated one's, and Megatron's schedule divides the loss in place
    loss = loss.detach().clone()
    if args.check_for_nan_in_loss_and_grad:
        for rejects, what in ((torch.isnan, "NaN"), (torch.isinf, "Inf")):
            machine.validate_result(
                result=loss,
                rejection_func=rejects,
                message=f"found {what} in the loss of a microbatch",
                tolerance=0.0,  # the forward pass is deterministic
                fatal=True,
            )
    if args.check_for_spiky_loss:
        machine.validate_result(
            result=loss,
            rejection_func=functools.partial(
                machine.is_unexpectedly_large, threshold=SPIKY_LOSS_FACTOR, context="loss"
            ),
            message="spiky loss",
            tolerance=0.0,
            fatal=False,
        )


class CompressionLoss:
    """DMC's part of a forward step: names the microbatch, adds the compression loss, reports.

        mask = compression.begin(model)
        output = model(tokens, position_ids, mask, labels=labels)
        finish = compression.end(model)                    # None but on the last pipeline stage
        ...
        return finish(loss_sum, num_tokens, {"lm loss": ...}, loss_mask)

    Args:
        dmc: settings.
        recorder: shared with the model's attention layers.
    """

    def __init__(self, dmc: DMCConfig, recorder: DecisionRecorder):
        self.dmc = dmc
        self.recorder = recorder
        self._step: tuple[int, bool] | None = None
        self._progress: tuple[int, int] | None = None
        self._calls: dict[int, int] = {}
        self._open: tuple[GateKey, list[list[int]] | None] | None = None
        self._layer_counts_L: Tensor | None = None
        self._layer_tokens = 0.0
        self._last_step: tuple[int, float] | None = None

    def begin(self, model, starts: list[list[int]] | None = None) -> Tensor:
        """Before the model's forward.

        Args:
            model: a chunk, wrapped or not.
            starts: of packed documents, see `document_starts`; None: kept together.

        Returns:
            what the model takes as its attention mask.
        """
        core = _core(model)
        key = self._next_key(get_args(), core.vp_stage or 0, training=core.training)
        self.recorder.begin(key)
        self._open = key, starts
        return key.to_tensor(starts)

    def end(self, model) -> Finish | None:
        """After the model's forward: the function that finishes the loss, on the last stage."""
        assert self._open is not None, "end() without begin()"
        (key, starts), self._open = self._open, None
        core = _core(model)
        if not core.post_process:
            return None
        counts_LB = core.take_counts()
        return functools.partial(self._finish, counts_LB, core.config, starts, key, core.training)

    def target_cr(self, key: GateKey) -> float:
        """Target CR of a microbatch."""
        dmc = self.dmc
        return target_cr(
            key.done, ramp_steps=key.length, target=dmc.target_cr, schedule=dmc.cr_schedule
        )

    def progress(self, args: Namespace, step: int) -> tuple[int, int]:
        """(done, whole) of this stage's ramp or fade before a training step.

        In steps; in samples where the run's length is given so (`--train-samples`) and the ramp's or
        fade's is not given at all. Read at each step: Megatron computes `args.train_iters` from the
        samples, and counts `args.consumed_train_samples`, after the flags are parsed.
        """
        stage = Stage(self.dmc.stage)
        fades = stage is Stage.ZERO_OUT
        given = self.dmc.zero_out_steps if fades else self.dmc.ramp_steps
        if given is not None:
            return step, given
        if not fades and stage is not Stage.RETROFIT:
            return 0, 0
        if getattr(args, "train_samples", None):
            return args.consumed_train_samples, args.train_samples
        return step, getattr(args, "train_iters", None) or 0

    def _next_key(self, args: Namespace, chunk: int, *, training: bool) -> GateKey:
        # without training steps (--skip-train) it is where the checkpoint stopped
        step = getattr(args, "curr_iteration", getattr(args, "iteration", 0))
        if self._step != (step, training):
            self._step, self._calls = (step, training), {}
            if training or self._progress is None:
                self._progress = self.progress(args, step)
        microbatch = self._calls.get(chunk, 0)
        self._calls[chunk] = microbatch + 1
        if training:  # Megatron's fault detection may run a step again, with the same noise
            microbatch %= get_num_microbatches()
        size = micro_batch_size(args, training=training)
        samples = microbatch * size * mpu.get_data_parallel_world_size()
        first = samples + mpu.get_data_parallel_rank() * size
        # evaluation's keys must not meet those of the training step that it follows
        step = step if training else -1 - step
        assert self._progress is not None
        return GateKey(args.seed, step, microbatch, first, chunk, *self._progress)

    def _finish(
        self,
        counts_LB: Tensor,
        config: DMCTransformerConfig,
        starts: list[list[int]] | None,
        key: GateKey,
        training: bool,
        loss: Tensor,
        num_tokens: Tensor,
        report: dict[str, Tensor],
        loss_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        if training:
            self._log_speed(key)
        if not Stage(self.dmc.stage).compresses:
            return loss, num_tokens, report
        assert config.num_query_groups is not None
        num_kv_heads = config.num_query_groups
        length = get_args().seq_length
        target = self.target_cr(key)
        documents_B = None
        if starts is not None:
            documents_B = counts_LB.new_tensor([1.0 + len(row) for row in starts])
        rate_B = merge_rate(
            counts_LB, num_tokens=length, num_kv_heads=num_kv_heads, num_documents_B=documents_B
        )
        weight_B = self._weights(rate_B, num_tokens, loss_mask, config)
        hinge = compression_loss(rate_B, target_cr=target, hinge=self.dmc.hinge, weight_B=weight_B)
        # Megatron divides the sum by all microbatches' tokens, or else by this one's (at least 1)
        divisor = weight_B.sum() if config.calculate_per_token_loss else num_tokens.clamp_min(1)
        loss = loss + self.dmc.loss_weight * hinge * divisor
        tokens, entries = measured_cr(counts_LB, num_tokens=length, num_kv_heads=num_kv_heads)
        one = torch.ones_like(tokens)
        report = dict(report)
        report["compression loss"] = torch.stack([hinge.detach() * weight_B.sum(), weight_B.sum()])
        report["target cr"] = torch.stack([one * target, one])
        report["measured cr"] = torch.stack([tokens, entries])
        if training:
            self._log_layers(counts_LB.detach(), length * num_kv_heads, key)
        return loss, num_tokens, report

    @staticmethod
    def _weights(
        rate_B: Tensor, num_tokens: Tensor, loss_mask: Tensor | None, config: DMCTransformerConfig
    ) -> Tensor:
        """weight_B of the sequences in the compression loss.

        Each counts the same; with `--calculate-per-token-loss` as its tokens that the loss mask counts,
        so that every counted token's loss has its own sequence's hinge, however sequences are spread
        over microbatches. The ranks of a sequence (context parallelism) share its tokens evenly.
        """
        if not config.calculate_per_token_loss:
            return torch.ones_like(rate_B)
        batch = rate_B.numel()
        if loss_mask is None:
            weight_B = (num_tokens.float() / batch).expand(batch)
        else:
            weight_B = loss_mask.view(batch, -1).float().sum(1)
        if config.context_parallel_size > 1:
            weight_B = weight_B.clone()
            torch.distributed.all_reduce(weight_B, group=mpu.get_context_parallel_group())
        return weight_B / config.context_parallel_size

    def _log_speed(self, key: GateKey) -> None:
        """Tokens per second and GPU to Megatron's writers, after a step's last microbatch.

        From one step's end to the next one's; a step that waited for a checkpoint or an evaluation
        is left out. Megatron itself writes TFLOP/s per GPU (`--log-throughput`).
        """
        if key.microbatch + 1 < get_num_microbatches():
            return
        args, now, last = get_args(), time.monotonic(), self._last_step
        self._last_step = key.step, now
        if (key.step + 1) % args.tensorboard_log_interval or last is None:
            return
        waited = any(n and key.step % n == 0 for n in (args.save_interval, args.eval_interval))
        if waited or last[0] + 1 != key.step:
            return
        tokens = args.seq_length * get_current_global_batch_size()
        self._write("tokens per second per GPU", tokens / (now - last[1]) / args.world_size, key)

    @staticmethod
    def _write(name: str, value: float, key: GateKey) -> None:
        """To TensorBoard and W&B, on the rank that has them."""
        writer, wandb = get_tensorboard_writer(), get_wandb_writer()
        if writer:
            writer.add_scalar(name, value, key.step + 1)
        if wandb:
            wandb.log({name: value}, key.step + 1)

    def _log_layers(self, counts_LB: Tensor, tokens_per_sequence: int, key: GateKey) -> None:
        """Measured CR of every layer to Megatron's writers, after a step's last microbatch."""
        args = get_args()
        if key.microbatch == 0 or self._layer_counts_L is None:
            self._layer_counts_L, self._layer_tokens = torch.zeros_like(counts_LB[:, 0]), 0.0
        self._layer_counts_L += counts_LB.sum(1)
        self._layer_tokens += float(tokens_per_sequence * counts_LB.shape[1])
        if key.microbatch + 1 < get_num_microbatches():
            return
        if (key.step + 1) % args.tensorboard_log_interval:
            return
        totals = torch.cat(
            [self._layer_counts_L, self._layer_counts_L.new_tensor([self._layer_tokens])]
        )
        torch.distributed.all_reduce(totals, group=mpu.get_data_parallel_group())
        values = (totals[-1] / (totals[-1] - totals[:-1])).tolist()
        for layer, cr in enumerate(values):
            self._write(f"measured cr/layer {layer}", cr, key)


class ForwardStep:
    """Megatron's `forward_step_func`, holding what it needs instead of globals.

    Args:
        compression: shared with the model through its recorder.
        teacher: whose distribution over the vocabulary the model is to have; None: the data is learned.
    """

    def __init__(self, compression: CompressionLoss, teacher: Teacher | None = None):
        self.compression = compression
        self.teacher = teacher

    def __call__(self, data_iterator, model, *unused):
        """Returns the model's output and the loss function, as Megatron's schedules expect."""
        core, timers = _core(model), get_timers()
        timers("batch-generator", log_level=2).start()
        with stimer(bdata=True):
            batch, starts = get_batch(
                data_iterator, first_stage=core.pre_process, last_stage=core.post_process,
                training=core.training,
            )  # fmt: skip
        timers("batch-generator").stop()
        mask = self.compression.begin(model, starts)
        options = {}
        if self.teacher is not None:
            options["output_processor"] = self.teacher.losses(
                batch["tokens"], batch["position_ids"], mask
            )
        with stimer:
            output = model(
                batch["tokens"], batch["position_ids"], mask, labels=batch["labels"], **options
            )
        finish = self.compression.end(model)
        if finish is None:
            return output, None
        return output, functools.partial(self._loss, batch["loss_mask"], finish)

    def _loss(self, loss_mask_BT: Tensor, finish: Finish, losses: Tensor):
        """Args:
        losses: of every token: the language model's losses_BT or, with a teacher, `Teacher.losses`.
        """
        mask = loss_mask_BT.view(-1).float()
        num_tokens = mask.sum().to(torch.int)
        names = ("lm loss",) if self.teacher is None else ("lm loss", "distillation loss")
        sums = (losses.float().view(len(names), -1) * mask).sum(1)
        report = {
            name: torch.stack([value, num_tokens.float()])
            for name, value in zip(names, sums.detach(), strict=True)
        }
        loss = sums[0] if self.teacher is None else self.teacher.combine(sums[0], sums[1])
        result = finish(loss, num_tokens, report, loss_mask_BT)
        check_loss(result[0])
        return result
