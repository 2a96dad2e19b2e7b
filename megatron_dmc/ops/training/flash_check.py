"""Check that a stock attention kernel computes attention on this machine: compare its results for a few tokens,
forward and backward, with a dense computation in float32.
"""

import functools
from typing import Any

import torch
from torch import Tensor

NUM_TOKENS = 145
"""More than a tile of any kernel, and a multiple of none."""
_NUM_QUERIES = 33
TOLERANCE = {torch.float16: 0.01, torch.bfloat16: 0.03, torch.float32: 0.003}
"""Largest error of a head, relative to its norm. Rounding stays far below it; one wrong token does not."""


@functools.cache
def fault(
    kernel: Any, dense: Any, device: torch.device, dtype: torch.dtype, num_heads: int,
    num_kv_heads: int, head_dim: int, causal: bool,
) -> str:  # fmt: skip
    """The error of a kernel on tensors of this kind; "" if there is none. Waits for the device, once for
    each kind.

    Args:
        kernel, dense: `ops.training.flash.Kernel`s; the second is trusted.
        num_heads, num_kv_heads: N, G.
        causal: also check the causal mask; without it, as with it, all keys and fewer queries.
    """
    generator = torch.Generator().manual_seed(0)

    def shifted(heads: int, num_tokens: int) -> Tensor:
        # a view behind the first token of (T, B, heads, D): as training has them
        x = torch.randn(num_tokens + 1, 2, heads, head_dim, generator=generator)
        return x.to(device, dtype).permute(1, 2, 0, 3)[:, :, 1:]

    k, v = (shifted(num_kv_heads, NUM_TOKENS) for _ in "kv")
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            for masked in (True, False) if causal else (False,):
                q = shifted(num_heads, NUM_TOKENS if masked else _NUM_QUERIES)
                if kernel.takes(q, k, v, masked):
                    continue
                for name, error in _errors(kernel, dense, q, k, v, masked).items():
                    if not error <= TOLERANCE[dtype]:
                        return f"its {name} differs by {error:.2g} of a head's norm"
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # noqa: BLE001 another release's signature, a build for another machine
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return ""


def _errors(
    kernel: Any, dense: Any, q: Tensor, k: Tensor, v: Tensor, causal: bool
) -> dict[str, float]:
    """Of the outputs, and where these are right of the gradients."""
    scale = q.shape[-1] ** -0.5
    wide = [x.float() for x in (q, k, v)]
    exact, exact_lse, _ = dense.forward(*wide, scale, causal)
    out, lse, state = kernel.forward(q, k, v, scale, causal)
    errors = {"output": _error(out, exact), "log-sum-exp": _error(lse, exact_lse)}
    if max(errors.values()) > TOLERANCE[q.dtype]:
        return errors
    grad_out = torch.arange(out.numel(), device=q.device).sin().view(out.shape).to(q.dtype)
    grads = kernel.backward(grad_out, q, k, v, out, lse, state, scale, causal)
    wanted = dense.backward(
        grad_out.float(), *wide, exact, exact_lse, None, scale, causal
    )  # fmt: skip
    for name, grad, exact_grad in zip(("dq", "dk", "dv"), grads, wanted, strict=True):
        errors[name] = _error(grad, exact_grad)
    return errors


def _error(x_BNTD: Tensor, exact_BNTD: Tensor) -> float:
    """The largest error of a head; infinite where something is not finite."""
    if x_BNTD.shape != exact_BNTD.shape:
        raise ValueError(
            f"a result of shape {tuple(x_BNTD.shape)}, expected {tuple(exact_BNTD.shape)}"
        )
    x, exact = x_BNTD.double().flatten(2), exact_BNTD.double().flatten(2)
    relative = (x - exact).norm(dim=-1) / exact.norm(dim=-1)
    return float(relative.nan_to_num(nan=float("inf")).max())
