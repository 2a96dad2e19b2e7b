"""Merge counts that attention reports to the loss, per microbatch and layer, and their gradients.

One `DecisionRecorder` is made by the training entry point and injected into every attention layer
with `ModuleSpec.params`; there is no global state.

The count of merges must reach the loss, and the loss's gradient must reach the gates, although

- activation recompute runs a layer's first forward without a graph, and
- a pipeline stage does not know the other stages' counts.

So values and gradients take different roads. In the forward, a layer *reports* its counts by key
(microbatch, layer): a recomputed forward overwrites them with the same numbers. At the end of a
model chunk, `collect` returns the sums through an autograd node that stands after all layers of
the chunk; in the backward that node runs first and stores the gradient of the counts; each layer's
`report` node then fetches its own from there. This is exact with any recompute setting, and the
collected sums can travel to the next pipeline stage like any activation.
"""

from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class GateKey:
    """Names one microbatch: all that the gates' noise may depend on besides layer, head and position,
    and how far the stage has come.

    It travels to the layers as a small CPU tensor in place of the attention mask (DMC's attention
    is causal and needs none), so that a recomputed forward sees its own microbatch's key; behind it
    stands where the documents of packed sequences start.
    """

    seed: int
    """The run's seed."""
    step: int
    """Training step, from 0."""
    microbatch: int
    """Index of the microbatch within the step, on this data-parallel rank."""
    first_sample: int
    """Index of the microbatch's first sequence within the step's global batch."""
    chunk: int = 0
    """Model chunk of this rank (virtual pipeline stage); the noise does not depend on it."""
    done: int = 0
    """Progress of the stage's ramp or fade, in steps or samples; the noise does not depend on it."""
    length: int = 0
    """The whole of it, in the same unit; 0: there is none, or it is over."""

    def to_tensor(self, starts: Sequence[Sequence[int]] | None = None) -> Tensor:
        """int64 on the CPU: the key, and for packed sequences where their documents start.

        Args:
            starts: for each sequence of the microbatch the first tokens of its documents but the
                first; None: no sequence is packed.
        """
        values = list(astuple(self))
        for row in starts or ():
            values += [len(row), *row]
        return torch.tensor(values, dtype=torch.int64, device="cpu")

    @classmethod
    def from_tensor(cls, tensor: Tensor) -> tuple["GateKey", list[list[int]] | None]:
        """Inverse of `to_tensor`: the key, and the documents' starts or None.

        Raises:
            ValueError: if it is no such tensor.
        """
        size = len(fields(cls))
        if tensor.dtype != torch.int64 or tensor.dim() != 1 or tensor.numel() < size:
            raise ValueError(
                f"not a GateKey: {tensor.dtype} of shape {tuple(tensor.shape)}, expected torch.int64 "
                f"of at least {size} values"
            )
        values = tensor.tolist()
        key, rest = cls(*values[:size]), values[size:]
        starts = []
        while rest:
            starts.append(rest[1 : 1 + rest[0]])
            rest = rest[1 + rest[0] :]
        return key, starts or None


class DecisionRecorder:
    """Merge counts of the microbatches in flight, and their gradients.

    Args:
        num_layers: L of the whole model, over all pipeline stages.
    """

    def __init__(self, num_layers: int):
        self.num_layers = num_layers
        self._counts: dict[GateKey, dict[int, Tensor]] = {}
        self._gradients: dict[GateKey, Tensor] = {}
        self._awaiting: dict[GateKey, int] = {}

    def begin(self, key: GateKey) -> None:
        """Open a microbatch's record; reports for keys that are not open are ignored."""
        self._counts[key] = {}

    def report(self, carrier: Tensor, alpha_hat_TBG: Tensor, key: GateKey, layer: int) -> Tensor:
        """Report a layer's decisions; call it in the layer's forward.

        Args:
            carrier: the layer's attention output, any shape; it takes the gradient's node along.
            alpha_hat_TBG: straight-through decisions, 0 or 1, of this rank's heads.
            key: the microbatch.
            layer: global layer index, from 0.

        Returns:
            `carrier`, unchanged in value.
        """
        return _Report.apply(carrier, alpha_hat_TBG, self, key, layer)

    def collect(
        self,
        hidden: Tensor,
        incoming_LB: Tensor,
        key: GateKey,
        tensor_group: torch.distributed.ProcessGroup | None = None,
        context_group: torch.distributed.ProcessGroup | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Close a chunk's record: add its layers' counts to those of earlier pipeline stages.

        Every context-parallel rank has the loss of the whole sequence but the gates of its own
        tokens, and Megatron averages the ranks' gradients as if each computed a sequence of its own; so
        the gates' gradients are multiplied by the number of these ranks.

        Args:
            hidden: the chunk's last hidden state.
            incoming_LB: float32 counts of earlier stages (zeros on the first); may need a gradient.
            key: the microbatch.
            tensor_group: over which the heads' counts are summed.
            context_group: over which the tokens' counts are summed.

        Returns:
            hidden, unchanged in value, and counts_LB, float32, summed over heads and tokens.
        """
        counts = self._counts.pop(key, {})
        own_LB = torch.zeros_like(incoming_LB)
        for layer, count_B in counts.items():
            own_LB[layer] = count_B
        for group in (tensor_group, context_group):
            if group is not None and group.size() > 1:
                torch.distributed.all_reduce(own_LB, group=group)
        if torch.is_grad_enabled() and counts:
            self._awaiting[key] = len(counts)
        copies = 1 if context_group is None else context_group.size()
        return _Collect.apply(hidden, incoming_LB, own_LB, self, key, copies)

    def in_flight(self) -> int:
        """Microbatches whose record or gradient is still held; 0 between steps."""
        return len(self._counts) + len(self._gradients)

    def _put(self, key: GateKey, layer: int, count_B: Tensor) -> None:
        if key in self._counts:
            self._counts[key][layer] = count_B

    def _take_gradient(self, key: GateKey, layer: int) -> Tensor:
        gradient = self._gradients[key][layer]
        self._awaiting[key] -= 1
        if self._awaiting[key] == 0:
            del self._awaiting[key], self._gradients[key]
        return gradient


class _Report(torch.autograd.Function):
    @staticmethod
    def forward(ctx, carrier, alpha_hat_TBG, recorder, key, layer):
        recorder._put(key, layer, alpha_hat_TBG.detach().float().sum(dim=(0, 2)))
        ctx.recorder, ctx.key, ctx.layer = recorder, key, layer
        ctx.shape, ctx.dtype = alpha_hat_TBG.shape, alpha_hat_TBG.dtype
        return carrier.view_as(carrier)

    @staticmethod
    def backward(ctx, grad):
        g_B = ctx.recorder._take_gradient(ctx.key, ctx.layer)
        return grad, g_B.to(ctx.dtype)[None, :, None].expand(ctx.shape), None, None, None


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, incoming_LB, own_LB, recorder, key, copies):
        ctx.recorder, ctx.key, ctx.copies = recorder, key, copies
        return hidden.view_as(hidden), incoming_LB + own_LB

    @staticmethod
    def backward(ctx, grad_hidden, grad_LB):
        if ctx.key in ctx.recorder._awaiting:
            ctx.recorder._gradients[ctx.key] = grad_LB * ctx.copies
        return grad_hidden, grad_LB, None, None, None, None


# --- the counts on the wire between pipeline stages ---------------------------------------------


def _parts(dtype: torch.dtype) -> int:
    """Number of values of `dtype` that hold a float32 exactly: its 24 bits in pieces."""
    return {torch.float16: 3, torch.bfloat16: 3}.get(dtype, 1)


def carry_rows(num_layers: int, hidden_size: int, dtype: torch.dtype) -> int:
    """Rows that `append_counts` adds to a hidden state of `hidden_size` channels."""
    return -(-num_layers * _parts(dtype) // hidden_size)


def _split(x_LB: Tensor, hidden: Tensor) -> Tensor:
    """float32 (L, B) -> rows (R, B, H) in the hidden state's dtype; the sum of the parts is exact."""
    pieces, rest = [], x_LB
    for _ in range(_parts(hidden.dtype)):
        piece = rest.to(hidden.dtype)
        pieces.append(piece)
        rest = rest - piece.to(rest.dtype)
    flat = torch.cat(pieces)
    width = hidden.shape[-1]
    rows = carry_rows(x_LB.shape[0], width, hidden.dtype)
    flat = torch.cat([flat, flat.new_zeros(rows * width - flat.shape[0], flat.shape[1])])
    return flat.view(rows, width, -1).transpose(1, 2)


def _join(rows_RBH: Tensor, num_layers: int) -> Tensor:
    flat = rows_RBH.transpose(1, 2).flatten(0, 1)[: num_layers * _parts(rows_RBH.dtype)]
    return flat.float().view(-1, num_layers, rows_RBH.shape[1]).sum(0)


class _Append(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, counts_LB):
        ctx.num_layers = counts_LB.shape[0]
        rows = _split(counts_LB, hidden)
        ctx.rows = rows.shape[0]
        return torch.cat([hidden, rows])

    @staticmethod
    def backward(ctx, grad):
        return grad[: -ctx.rows], _join(grad[-ctx.rows :], ctx.num_layers)


class _Detach(torch.autograd.Function):
    @staticmethod
    def forward(ctx, wire, num_layers):
        rows = carry_rows(num_layers, wire.shape[-1], wire.dtype)
        return wire[:-rows].clone(), _join(wire[-rows:], num_layers)

    @staticmethod
    def backward(ctx, grad_hidden, grad_LB):
        return torch.cat([grad_hidden, _split(grad_LB, grad_hidden)]), None


def append_counts(hidden_TBH: Tensor, counts_LB: Tensor) -> Tensor:
    """Append the counts to a hidden state that leaves for the next pipeline stage.

    Values and gradients cross exactly, in bfloat16 too (three pieces each).

    Returns:
        (T + R, B, H), R from `carry_rows`.
    """
    return _Append.apply(hidden_TBH, counts_LB)


def split_counts(wire: Tensor, num_layers: int) -> tuple[Tensor, Tensor]:
    """Inverse of `append_counts`: hidden_TBH and float32 counts_LB."""
    return _Detach.apply(wire, num_layers)
