"""The compression loss (docs/method.md, section 4), and the distillation loss."""

from typing import Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_dmc.schedule import target_merge_rate


def merge_rate(
    counts_LB: Tensor, *, num_tokens: int, num_kv_heads: int, num_documents_B: Tensor | None = None
) -> Tensor:
    """Merge rate of each sequence over all layers, KV heads and tokens that may merge.

    Args:
        counts_LB: merges, summed over heads (of all ranks) and tokens.
        num_tokens: T of the sequences.
        num_kv_heads: KV heads of a layer, over all ranks.
        num_documents_B: documents packed into each sequence; their first tokens cannot merge.
            None: one.

    Returns:
        merge_rate_B.
    """
    if num_documents_B is None:
        num_documents_B = torch.ones_like(counts_LB[0])
    mergeable_B = (num_tokens - num_documents_B.to(counts_LB)).clamp_min(1)
    return counts_LB.sum(0) / (counts_LB.shape[0] * num_kv_heads * mergeable_B)


def compression_loss(
    merge_rate_B: Tensor,
    *,
    target_cr: float,
    hinge: Literal["sequence", "batch", "none"] = "sequence",
    weight_B: Tensor | None = None,
) -> Tensor:
    """Shortfall of the merge rate from its target (scalar). With `target = 1 - 1 / target_cr`:

        sequence    mean over sequences of max(0, target - merge_rate)
        batch       max(0, target - mean over sequences of merge_rate)
        none        mean over sequences of target - merge_rate; negative beyond the target

    Args:
        hinge: "batch" is over the sequences given. Training gives those of one microbatch on one
            data-parallel rank, so the loss depends on `--micro-batch-size` and the data-parallel
            size; that of the other two does not.
        weight_B: of the sequences in the mean, not negative; None: all the same. Where their sum is 0
            the loss is 0.
    """
    if weight_B is None:
        weight_B = torch.ones_like(merge_rate_B)
    part_B = weight_B / weight_B.sum().clamp_min(torch.finfo(weight_B.dtype).tiny)
    short_B = target_merge_rate(target_cr) - merge_rate_B
    if hinge == "sequence":
        return (torch.relu(short_B) * part_B).sum()
    mean = (short_B * part_B).sum()
    return torch.relu(mean) if hinge == "batch" else mean


def measured_cr(counts_LB: Tensor, *, num_tokens: int, num_kv_heads: int) -> tuple[Tensor, Tensor]:
    """(tokens, entries) over all sequences, layers and KV heads; their quotient is the CR.

    Returns:
        two float32 scalars, to be summed over microbatches and ranks before dividing.
    """
    tokens = torch.tensor(
        float(num_tokens * num_kv_heads * counts_LB.numel()), device=counts_LB.device
    )
    return tokens, tokens - counts_LB.detach().sum()


def vocab_parallel_kl(
    student_TBV: Tensor,
    teacher_TBV: Tensor,
    tensor_group: torch.distributed.ProcessGroup | None = None,
) -> Tensor:
    """`KL(teacher || student) = sum over v of p_v (log p_v - log q_v)` of every token, without gathering.

    p and q are the softmax over all columns of all ranks. Those that pad the vocabulary are among
    them, as in Megatron's cross entropy. Its gradient with respect to the student's logits is q - p.

    Args:
        student_TBV: this rank's columns, any floating-point dtype; with gradient.
        teacher_TBV: the same columns; gets no gradient.
        tensor_group: over whose ranks the columns are spread; None: one rank has them all.

    Returns:
        kl_TB, at least float32 (computed in that), on every rank the same.
    """
    return _VocabParallelKL.apply(student_TBV, teacher_TBV, tensor_group)


def _log_softmax(logits_TBV: Tensor, group: torch.distributed.ProcessGroup | None) -> Tensor:
    """Over all ranks' columns, as a new tensor of at least float32."""
    x = logits_TBV.to(torch.promote_types(logits_TBV.dtype, torch.float32))
    log_sum = x.logsumexp(-1, keepdim=True)
    if group is not None and group.size() > 1:
        largest = log_sum.clone()
        torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX, group=group)
        total = (log_sum - largest).exp()
        torch.distributed.all_reduce(total, group=group)
        log_sum = largest + total.log()
    return x - log_sum


class _VocabParallelKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student_TBV, teacher_TBV, group):
        log_q, log_p = _log_softmax(student_TBV, group), _log_softmax(teacher_TBV, group)
        p = log_p.exp()
        kl_TB = log_p.sub_(log_q).mul_(p).sum(-1)
        if group is not None and group.size() > 1:
            torch.distributed.all_reduce(kl_TB, group=group)
        ctx.save_for_backward(log_q.exp_().sub_(p))
        ctx.dtype = student_TBV.dtype
        return kl_TB

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_TB):
        (difference,) = ctx.saved_tensors
        # in place, like Megatron's cross entropy: one tensor of the logits' size less at the peak
        return difference.mul_(grad_TB.unsqueeze(-1)).to(ctx.dtype), None, None
