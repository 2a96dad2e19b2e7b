"""Rotation of the last RoPE pair, so that the channel that DMC borrows carries as little as possible.

RoPE turns channels D/2 - 1 and D - 1 of query and key as one plane, and rotations of a plane commute. A rotation of
that plane by phi, the same for a KV head's keys and for all queries of its group, therefore changes no attention
score at any position. It does change what zero-out takes away: the term `q[D-1] k[D-1]` of every score. Chosen is the phi
that minimises `E[q[D-1]^2] Var[k[D-1]]` on a sample of text: a term that is the same for all keys cancels in
the softmax. docs/method.md, section 10.
"""

import math

import torch
from torch import Tensor
from tqdm import tqdm

from megatron_dmc.checkpoint.convert import read_weights
from megatron_dmc.checkpoint.description import ModelDescription
from megatron_dmc.checkpoint.load import build_model, full_forward
from megatron_dmc.checkpoint.weights import WeightSource, megatron_shapes, read_tensor
from megatron_dmc.errors import DMCError, UnsupportedConfig
from megatron_dmc.model.attention import DMCSelfAttention

WINDOWS, LENGTH = 8, 512
"""Sample that the rotation is chosen on: windows, spread over the text, and tokens of each."""
MOST_TOKENS = 1_000_000
"""Of a dataset, the first that a caller reads for it."""
ANGLES = 360
"""Angles that are tried, in half a turn; the other half changes signs only."""


def pair_rows(qkv: Tensor, description: ModelDescription) -> tuple[Tensor, Tensor]:
    """Views of the last RoPE pair's rows in a fused QKV tensor (rows, ...).

    Returns:
        of the queries (G, N/G, 2, ...) and of the keys (G, 2, ...).
    """
    d = description
    per_group = d.num_attention_heads // d.num_query_groups
    heads = qkv.view(d.num_query_groups, per_group + 2, 2, d.kv_channels // 2, *qkv.shape[1:])
    last = heads[:, :, :, -1]
    return last[:, :per_group], last[:, per_group]


@torch.no_grad()
def pair_moments(
    description: ModelDescription, source: WeightSource, tokens: Tensor
) -> tuple[Tensor, Tensor]:
    """Second moments of the last RoPE pair on a sample, before RoPE.

    Args:
        tokens: [num_tokens] int64, at least two.

    Returns:
        E[q q^T] over tokens and the queries of a group, and the covariance of k: (L, G, 2, 2) float64 each.
    """
    dtype = torch.promote_types(torch.float32, description.dtype)
    model = build_model(description, dtype=dtype)
    state = model.state_dict()
    read_weights(source, {name: state[name] for name in megatron_shapes(description)})
    d = description
    q = torch.zeros(d.num_layers, d.num_query_groups, 2, 2, dtype=torch.float64)
    k, k_mean = torch.zeros_like(q), torch.zeros(q.shape[:3], dtype=torch.float64)
    count = 0

    def collect(layer: int, qkv: Tensor) -> None:
        rows = qkv.double().flatten(0, 1).T.contiguous()  # channels by tokens
        q_GR2X, k_G2X = pair_rows(rows, d)
        q[layer] += torch.einsum("grax,grbx->gab", q_GR2X, q_GR2X)
        k[layer] += k_G2X @ k_G2X.mT
        k_mean[layer] += k_G2X.sum(-1)

    for index, layer in enumerate(model.decoder.layers):
        attention = layer.self_attention
        assert isinstance(attention, DMCSelfAttention)
        attention.linear_qkv.register_forward_hook(
            lambda _module, _args, output, index=index: collect(index, output[0])
        )
    length = min(LENGTH, len(tokens))
    starts = torch.linspace(0, len(tokens) - length, WINDOWS).long().unique().tolist()
    for start in tqdm(starts, desc="calibrating", unit="window", disable=None):
        full_forward(model, tokens[None, start : start + length])
        count += length
    mean = k_mean / count
    per_group = d.num_attention_heads // d.num_query_groups
    return q / (count * per_group), k / count - mean[..., None] * mean[..., None, :]


def least_angles(q_LG22: Tensor, k_LG22: Tensor) -> Tensor:
    """Angle (L, G), float64, in [0, pi), that leaves the least in the pair's second channel."""
    phi = torch.arange(ANGLES, dtype=torch.float64) * math.pi / ANGLES
    second = torch.stack([-phi.sin(), phi.cos()], dim=-1)
    left = torch.einsum("pa,lgab,pb->lgp", second, q_LG22, second) * torch.einsum(
        "pa,lgab,pb->lgp", second, k_LG22, second
    )
    return phi[left.argmin(-1)]


class RotatedPairs:
    """Weights with the last RoPE pair of every KV head's query and key rotated: a `WeightSource`.

    Args:
        source: of the model as it is.
        angles_LG: of each layer and KV head, in radians.
    """

    def __init__(self, source: WeightSource, description: ModelDescription, angles_LG: Tensor):
        self._source, self._description, self._angles_LG = source, description, angles_LG

    def fill(self, name: str, out: Tensor) -> None:
        """See `WeightSource`. The rotation is computed in float32 or wider."""
        if ".linear_qkv." not in name or name.endswith("layer_norm_weight"):
            self._source.fill(name, out)
            return
        d = self._description
        dtype = torch.promote_types(torch.float32, d.dtype)
        qkv = read_tensor(self._source, name, megatron_shapes(d)[name], dtype)
        angles_G = self._angles_LG[int(name.split(".")[2])].to(dtype)
        for rows, lead in zip(pair_rows(qkv, d), (2, 1), strict=True):
            pair = rows.movedim(lead, 0)
            shape = (-1, *[1] * (pair.dim() - 2))
            cos, sin = angles_G.cos().view(shape), angles_G.sin().view(shape)
            pair.copy_(torch.stack([cos * pair[0] + sin * pair[1], cos * pair[1] - sin * pair[0]]))
        out.copy_(qkv)


def rotate_borrowed_pair(
    description: ModelDescription, source: WeightSource, *, tokens: Tensor
) -> tuple[ModelDescription, WeightSource]:
    """The same model with the least in its borrowed channels; neither argument changes.

    Memory: the whole model, in float32 at least.

    Args:
        tokens: [num_tokens] int64 of text that resembles the training data.

    Raises:
        UnsupportedConfig: the model has DMC, whose borrowed channels are in use, or QK-norm, whose weights
            differ between the two channels.
        DMCError: less than two tokens, or tokens of a larger vocabulary.
    """
    if description.dmc is not None:
        raise UnsupportedConfig(
            f"this is a DMC model (stage {description.dmc.stage}): its borrowed channels are in use; "
            "rotate the base model, then retrofit it"
        )
    if description.qk_layernorm:
        raise UnsupportedConfig(
            "the model normalises queries and keys (QK-norm), and a rotation would have to pass the "
            "norm's weights; convert it without --calibration-data"
        )
    if len(tokens) < 2:
        raise DMCError(f"{len(tokens)} tokens of calibration data; give some thousands")
    if int(tokens.max()) >= description.vocab_size:
        raise DMCError(
            f"calibration data: token {int(tokens.max())}, but the model's vocabulary has "
            f"{description.vocab_size}; tokenise the text with this model's tokenizer"
        )
    moments = pair_moments(description, source, tokens)
    return description, RotatedPairs(source, description, least_angles(*moments))
