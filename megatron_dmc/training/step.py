"""The forward step of Megatron's loop: batch, gate key, model, loss, reports.

Dimension letters: T tokens, B batch, L layers of the whole model.
"""

import functools
from argparse import Namespace

import torch
from megatron.core import mpu
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.utils import get_attr_wrapped_model
from megatron.training import get_args, get_tensorboard_writer, get_wandb_writer
from torch import Tensor

from megatron_dmc.config import DMCConfig, Stage
from megatron_dmc.decisions import DecisionRecorder, GateKey
from megatron_dmc.schedule import target_cr
from megatron_dmc.training.loss import compression_loss, measured_cr, merge_rate


def get_batch(data_iterator, *, first_stage: bool, last_stage: bool) -> dict[str, Tensor | None]:
    """tokens_BT, labels_BT, loss_mask_BT, position_ids_BT of the next microbatch.

    Only what the stage needs is fetched; tensor-parallel rank 0 reads and the others receive.
    """
    empty: dict[str, Tensor | None] = dict.fromkeys(
        ("tokens", "labels", "loss_mask", "position_ids")
    )
    if not (first_stage or last_stage):
        return empty
    args = get_args()
    device = torch.cuda.current_device()
    group = mpu.get_tensor_model_parallel_group()
    shape = (args.micro_batch_size, args.seq_length)
    data = next(data_iterator) if mpu.get_tensor_model_parallel_rank() == 0 else None
    dtypes = {"tokens": torch.int64, "labels": torch.int64, "loss_mask": torch.float32,
              "position_ids": torch.int64}  # fmt: skip
    wanted = [*(("tokens", "position_ids") if first_stage else ()),
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
        empty[name] = tensor
    return empty


class ForwardStep:
    """Megatron's `forward_step_func`, holding what it needs instead of globals.

    Args:
        dmc: settings.
        recorder: shared with the model's attention layers.
    """

    def __init__(self, dmc: DMCConfig, recorder: DecisionRecorder):
        self.dmc = dmc
        self.recorder = recorder
        self._step: tuple[int, bool] | None = None
        self._calls: dict[int, int] = {}
        self._layer_counts_L: Tensor | None = None
        self._layer_tokens = 0.0

    def __call__(self, data_iterator, model, *unused):
        """Returns the model's output and the loss function, as Megatron's schedules expect."""
        args = get_args()
        core = get_attr_wrapped_model(model, "recorder", return_model_obj=True)
        batch = get_batch(data_iterator, first_stage=core.pre_process, last_stage=core.post_process)
        key = self._next_key(args, core.vp_stage or 0, training=core.training)
        self.recorder.begin(key)
        output = model(
            batch["tokens"], batch["position_ids"], key.to_tensor(), labels=batch["labels"]
        )
        if not core.post_process:
            return output, None
        counts_LB = core.take_counts()
        loss = functools.partial(
            self._loss, batch["loss_mask"], counts_LB, core.config.num_query_groups, key,
            core.training,
        )  # fmt: skip
        return output, loss

    def _next_key(self, args: Namespace, chunk: int, *, training: bool) -> GateKey:
        step = getattr(args, "curr_iteration", 0)
        if self._step != (step, training):
            self._step, self._calls = (step, training), {}
        microbatch = self._calls.get(chunk, 0)
        self._calls[chunk] = microbatch + 1
        size = args.micro_batch_size
        samples = microbatch * size * mpu.get_data_parallel_world_size()
        first = samples + mpu.get_data_parallel_rank() * size
        # evaluation's keys must not meet those of the training step that it follows
        return GateKey(args.seed, step if training else -1 - step, microbatch, first, chunk)

    def _loss(
        self,
        loss_mask_BT: Tensor,
        counts_LB: Tensor,
        num_kv_heads: int,
        key: GateKey,
        training: bool,
        losses_BT: Tensor,
    ):
        mask = loss_mask_BT.view(-1).float()
        num_tokens = mask.sum().to(torch.int)
        lm_sum = (losses_BT.float().view(-1) * mask).sum()
        report = {"lm loss": torch.stack([lm_sum.detach(), num_tokens.float()])}
        loss = lm_sum
        if Stage(self.dmc.stage).compresses:
            length = losses_BT.shape[1]
            target = self.target_cr(key.step if key.step >= 0 else -1 - key.step)
            rate_B = merge_rate(counts_LB, num_tokens=length, num_kv_heads=num_kv_heads)
            hinge = compression_loss(rate_B, target_cr=target)
            loss = lm_sum + self.dmc.loss_weight * hinge * num_tokens
            batch = float(rate_B.numel())
            tokens, entries = measured_cr(counts_LB, num_tokens=length, num_kv_heads=num_kv_heads)
            one = torch.ones_like(tokens)
            report["compression loss"] = torch.stack([hinge.detach() * batch, one * batch])
            report["target cr"] = torch.stack([one * target, one])
            report["measured cr"] = torch.stack([tokens, entries])
            if training:
                self._log_layers(counts_LB.detach(), length * num_kv_heads, key)
        return loss, num_tokens, report

    def target_cr(self, step: int) -> float:
        """Target CR of a training step of this stage."""
        return target_cr(step, ramp_steps=self.dmc.ramp_steps or 0, target=self.dmc.target_cr)

    def _log_layers(self, counts_LB: Tensor, tokens_per_sequence: int, key: GateKey) -> None:
        """Measured CR of every layer to Megatron's writers, after a step's last microbatch."""
        args = get_args()
        if key.microbatch == 0 or self._layer_counts_L is None:
            self._layer_counts_L, self._layer_tokens = torch.zeros_like(counts_LB[:, 0]), 0.0
        self._layer_counts_L += counts_LB.sum(1)
        self._layer_tokens += float(tokens_per_sequence * counts_LB.shape[1])
        step = key.step + 1
        if key.microbatch + 1 < get_num_microbatches() or step % args.tensorboard_log_interval:
            return
        totals = torch.cat(
            [self._layer_counts_L, self._layer_counts_L.new_tensor([self._layer_tokens])]
        )
        torch.distributed.all_reduce(totals, group=mpu.get_data_parallel_group())
        values = (totals[-1] / (totals[-1] - totals[:-1])).tolist()
        writer, wandb = get_tensorboard_writer(), get_wandb_writer()
        for layer, cr in enumerate(values):
            if writer:
                writer.add_scalar(f"measured cr/layer {layer}", cr, step)
            if wandb:
                wandb.log({f"measured cr/layer {layer}": cr}, step)
