"""A learning rate of their own for the rows of QKV projections that feed the borrowed channels.

They are rows of a larger tensor, which no parameter group of an optimizer can name. So the optimizer's update of
these rows is multiplied after each of its steps; where an update is proportional to the learning rate (Adam's
and its weight decay's are), that is a multiple of the learning rate.
"""

from argparse import Namespace
from math import isfinite
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from megatron_dmc.errors import DMCError
from megatron_dmc.ops import gates


def check_borrowed_lr(args: Namespace) -> None:
    """Raises:
    DMCError: `--dmc-borrowed-lr-mult` is out of range, or cannot be combined with another flag.
    """
    flag = f"--dmc-borrowed-lr-mult {args.dmc_borrowed_lr_mult:g}"
    if not (isfinite(args.dmc_borrowed_lr_mult) and args.dmc_borrowed_lr_mult > 0):
        raise DMCError(f"{flag}: use a positive number")
    if args.dmc_borrowed_lr_mult == 1:
        return
    if args.dmc_stage == "off":
        raise DMCError(f"{flag} with --dmc-stage off: nothing is borrowed; leave it out")
    if args.use_distributed_optimizer:
        raise DMCError(
            f"{flag} with --use-distributed-optimizer: its ranks hold parts of tensors, in which the rows cannot "
            "be identified; leave out one of the two"
        )


def scale_updates(model: Any, factor: float) -> None:
    """From now on every optimizer multiplies its updates of the model's borrowed rows by `factor`.

    Args:
        model: a chunk of the model, in which optimizers look for `main_param` as Megatron's do.
    """
    rows = [
        (parameter, _rows_of(layer.self_attention).to(parameter.device))
        for layer in model.decoder.layers
        for parameter in (
            layer.self_attention.linear_qkv.weight,
            layer.self_attention.linear_qkv.bias,
        )
        if parameter is not None
    ]
    before: dict[int, Tensor] = {}

    def updated(optimizer: Optimizer):
        """The tensors of this optimizer that hold borrowed rows, and which rows."""
        own = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for parameter, index in rows:
            main = getattr(parameter, "main_param", parameter)
            if id(main) in own:
                yield main, index

    @torch.no_grad()
    def keep(optimizer: Optimizer, *_: Any) -> None:
        before.update({id(main): main[index] for main, index in updated(optimizer)})

    @torch.no_grad()
    def scale(optimizer: Optimizer, *_: Any) -> None:
        for main, index in updated(optimizer):
            main[index] = torch.lerp(before.pop(id(main)), main[index], factor)

    register_optimizer_step_pre_hook(keep)
    register_optimizer_step_post_hook(scale)


def _rows_of(attention: Any) -> Tensor:
    groups = attention.num_query_groups_per_partition
    return gates.borrowed_rows(
        num_kv_heads=groups,
        queries_per_group=attention.num_attention_heads_per_partition // groups,
        head_dim=attention.hidden_size_per_attention_head,
    )
