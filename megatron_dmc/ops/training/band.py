"""Causal attention within a band of n tokens: the raw tokens that a query sees under a delay.

    score_ij = scale q_i . k_j      i - n < j <= i

The back ends of `BAND` are PyTorch's flash kernel with its own sliding window, on a GPU, and batched matrix
products over blocks of queries, anywhere. As those of `ops.training.flash` they return (out, log-sum-exp,
state) and run backward from any (out, log-sum-exp). Tensors come as (B, heads, T, D) views with contiguous
channels; queries are those of the last tokens.

Local letters: C blocks of S queries, X = S + n - 1 keys that a block sees, Q = R S query rows of a group.
"""

import functools

import torch
from torch import Tensor

from megatron_dmc.ops.backends import Backend, Op
from megatron_dmc.ops.tensors import accumulator_dtype
from megatron_dmc.ops.training import flash_check
from megatron_dmc.ops.training.flash import Kernel

_QUERY_BLOCK = 32
"""The smallest S: fewer queries waste a matrix product's setup, more its masked scores."""
_CHECKED_BAND = 21

aten = torch.ops.aten


# --- batched matrix products ------------------------------------------------------------------------


def _rows(x_BHTD: Tensor, first: int, count: int, dtype: torch.dtype) -> Tensor:
    """Rows `first` to `first + count`, zeros where x has none, in `dtype`."""
    last = first + count
    real = x_BHTD[:, :, max(first, 0) : last].to(dtype)
    return torch.nn.functional.pad(real, (0, 0, max(-first, 0), max(last - x_BHTD.shape[2], 0)))


class _Blocks:
    """Blocks of queries, those of the last tokens, and the keys that each sees."""

    def __init__(self, q_BNTD: Tensor, k_BGTD: Tensor, n: int):
        self.n, self.size = n, max(n, _QUERY_BLOCK)
        self.num_queries, self.num_keys = q_BNTD.shape[2], k_BGTD.shape[2]
        self.num_kv_heads = k_BGTD.shape[1]
        self.count = -(-self.num_queries // self.size)
        self.past = self.num_keys - self.num_queries
        self.acc = accumulator_dtype(q_BNTD.dtype)

    def queries(self, x_BNTX: Tensor) -> Tensor:
        """(B, G, C, R S, X), a group's heads one after the other."""
        x = _rows(x_BNTX, 0, self.count * self.size, self.acc)
        x = x.unflatten(2, (self.count, self.size)).unflatten(1, (self.num_kv_heads, -1))
        return x.transpose(2, 3).flatten(3, 4)

    def from_queries(self, x_BGCQX: Tensor) -> Tensor:
        """The inverse: (B, N, T, X)."""
        x = x_BGCQX.unflatten(3, (-1, self.size)).transpose(2, 3).flatten(3, 4)
        return x.flatten(1, 2)[:, :, : self.num_queries]

    def keys(self, x_BGTD: Tensor) -> Tensor:
        """(B, G, C, X, D): a block's keys and the n - 1 before it."""
        x = _rows(x_BGTD, self.past - self.n + 1, self.count * self.size + self.n - 1, self.acc)
        return x.unfold(2, self.size + self.n - 1, self.size).transpose(3, 4)

    def from_keys(self, dx_BGCXD: Tensor) -> Tensor:
        """The gradient of `keys`: (B, G, T, D), summed where blocks overlap."""
        batch, dim = dx_BGCXD.shape[0], dx_BGCXD.shape[-1]
        # a block of rows before the first block of queries holds the keys before it
        shape = batch, self.num_kv_heads, self.count + 1, self.size, dim
        dx = dx_BGCXD.new_zeros(shape)
        dx[:, :, 1:] = dx_BGCXD[:, :, :, self.n - 1 :]
        if self.n > 1:
            dx[:, :, :-1, :, :][:, :, :, self.size - self.n + 1 :] += dx_BGCXD[
                :, :, :, : self.n - 1
            ]
        origin = self.past - self.size
        real = dx.flatten(2, 3)[:, :, max(-origin, 0) : self.num_keys - origin]
        return torch.nn.functional.pad(real, (0, 0, self.num_keys - real.shape[2], 0))

    def scores(self, q_BGCQD: Tensor, k_BGCXD: Tensor, scale: float) -> Tensor:
        """(B, G, C, R S, X), -inf outside of the band."""
        scores = (scale * q_BGCQD) @ k_BGCXD.transpose(3, 4)
        num_keys, device = scores.shape[-1], scores.device
        distance = torch.arange(self.size, device=device)[:, None] + self.n - 1
        distance = distance - torch.arange(num_keys, device=device)
        outside = (distance < 0) | (distance >= self.n)
        by_head = scores.unflatten(3, (-1, self.size))
        by_head.masked_fill_(outside, float("-inf"))
        # keys before the first token: only the first block's window holds any
        by_head[:, :, 0, ..., : max(0, self.n - 1 - self.past)] = float("-inf")
        return scores


def _exp_(x: Tensor) -> Tensor:
    """exp(x), in place, for x of at most 0; where x is below -87 that of -87, 2e-38. On a CPU results below the normal
    float32 numbers take up to fifty times as long as others, and minus infinity four times."""
    return x.clamp_(min=-87.0).exp_()


class Matmul:
    """Batched matrix products in the accumulator's dtype. Memory is linear in T: S + n - 1 scores a query."""

    @staticmethod
    def refusal(q: Tensor, k: Tensor, v: Tensor) -> str:
        return ""

    @staticmethod
    def forward(q, k, v, n, scale):
        blocks = _Blocks(q, k, n)
        scores = blocks.scores(blocks.queries(q), blocks.keys(k), scale)
        most = scores.amax(-1, keepdim=True)  # every query sees its own key
        weights = _exp_(scores.sub_(most))
        total = weights.sum(-1, keepdim=True)
        out = (weights @ blocks.keys(v)).div_(total)
        return blocks.from_queries(out), blocks.from_queries(most + total.log())[..., 0], None

    @staticmethod
    def backward(grad_out, q, k, v, out, lse, state, n, scale):
        blocks = _Blocks(q, k, n)
        q_blocks, k_blocks, g = blocks.queries(q), blocks.keys(k), blocks.queries(grad_out)
        p = blocks.scores(q_blocks, k_blocks, scale)
        p = _exp_(p.sub_(blocks.queries(lse[..., None])))
        delta = (g * blocks.queries(out)).sum(-1, keepdim=True)
        dscores = (g @ blocks.keys(v).transpose(3, 4)).sub_(delta).mul_(p).mul_(scale)
        return (
            blocks.from_queries(dscores @ k_blocks),
            blocks.from_keys(dscores.transpose(3, 4) @ q_blocks),
            blocks.from_keys(p.transpose(3, 4) @ g),
        )


# --- PyTorch's flash attention with a sliding window ------------------------------------------------


class Flash:
    """One call of the kernel, whose own window skips the tiles outside of the band."""

    @staticmethod
    def refusal(q: Tensor, k: Tensor, v: Tensor) -> str:
        if not q.is_cuda or q.dtype not in (torch.float16, torch.bfloat16):
            return "only half precision on a GPU"
        if q.shape[-1] % 8 or q.shape[-1] > 256:
            return f"head dim {q.shape[-1]}: a multiple of 8, at most 256"
        if torch.cuda.get_device_capability(q.device)[0] < 8:
            return "GPUs before compute capability 8.0"
        if torch.cuda.is_current_stream_capturing():
            return ""  # nothing can be read here; what ran before the capture was checked
        kind = (q.device, q.dtype, q.shape[1], k.shape[1], q.shape[3])
        return flash_check.fault(_of_checked_band(Flash), _of_checked_band(Matmul), *kind, True)

    @staticmethod
    def forward(q, k, v, n, scale):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out, lse, rng_state, unused, _ = aten._flash_attention_forward(
            q, k, v, None, None, q.shape[1], k.shape[1], 0.0, True, False, scale=scale,
            window_size_left=n - 1, window_size_right=0,
        )  # fmt: skip
        return out.transpose(1, 2), lse, (rng_state, unused)

    @staticmethod
    def backward(grad_out, q, k, v, out, lse, state, n, scale):
        grad_out, q, k, v, out = (x.transpose(1, 2) for x in (grad_out, q, k, v, out))
        grads = aten._flash_attention_backward(
            grad_out, q, k, v, out, lse.contiguous(), None, None, q.shape[1], k.shape[1], 0.0, True,
            *state, scale=scale, window_size_left=n - 1, window_size_right=0,
        )  # fmt: skip
        return tuple(x.transpose(1, 2) for x in grads)


@functools.cache
def _of_checked_band(kernel: type[Matmul] | type[Flash]) -> Kernel:
    """The kernel with a fixed band in place of the causal mask, as `flash_check` calls it."""

    def forward(q, k, v, scale, causal):
        return kernel.forward(q, k, v, _CHECKED_BAND, scale)

    def backward(grad_out, q, k, v, out, lse, state, scale, causal):
        return kernel.backward(grad_out, q, k, v, out, lse, state, _CHECKED_BAND, scale)

    return Kernel(kernel.__name__, lambda q, k, v, causal: "", forward, backward)


BAND = Op("band", flash=Backend(lambda op: Flash, "cuda"), matmul=Backend(lambda op: Matmul))
"""Attention within a band. The arguments are (q, k, v)."""


def choose_band(q_BNTD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor) -> type[Matmul] | type[Flash]:
    """The kernel of `BAND` that runs these tensors; see `ops.backends.Op.choose`."""
    return BAND.kernels(BAND.choose(q_BNTD, k_BGTD, v_BGTD))
