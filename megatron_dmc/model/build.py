"""Build Megatron's GPTModel with DMC attention: for training, with the merge counts carried to the loss."""

from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megatron_dmc.model.config import DMCTransformerConfig
from megatron_dmc.model.decisions import DecisionRecorder, GateKey, append_counts, split_counts
from megatron_dmc.model.specs import dmc_layer_spec
from megatron_dmc.ops.gates import exchange_borrowed_pair


def order_rope_pairs(model: GPTModel, borrowed_pair: int | None) -> None:
    """Exchange the frequency of a RoPE pair with the last one's.

    Args:
        model: new, since Megatron keeps the angles of a forward; mutated.
        borrowed_pair: None: nothing changes.
    """
    if borrowed_pair is not None:
        rotary = model.rotary_pos_emb
        rotary.inv_freq = exchange_borrowed_pair(rotary.inv_freq, borrowed_pair)


class DMCGPTModel(GPTModel):
    """A GPTModel whose forward also sums the layers' merge counts.

    On the last pipeline stage `counts_LB` holds, after a forward, the counts of all layers of the
    model with the graph that leads back to them; on earlier stages the counts leave with the
    activation, in a few extra rows. Its RoPE pairs stand in the order of `config.borrowed_rope_pair`.

    Args (in addition to GPTModel's):
        recorder: the one that the attention layers report to.
    """

    def __init__(self, *args, recorder: DecisionRecorder, **kwargs):
        super().__init__(*args, **kwargs)
        self.recorder = recorder
        self.counts_LB: Tensor | None = None
        self._incoming_LB: Tensor | None = None
        order_rope_pairs(self, self.config.borrowed_rope_pair)

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor | None] | None) -> None:
        """Megatron's hook for the activation of the previous stage: hidden state and counts."""
        tensor = input_tensor[0] if isinstance(input_tensor, list) else input_tensor
        if tensor is not None:
            tensor, self._incoming_LB = split_counts(tensor, self.recorder.num_layers)
        super().set_input_tensor(tensor)

    def _postprocess(self, hidden_states, input_ids, position_ids, labels, *args, **kwargs):
        mask = kwargs.get("attention_mask")
        if mask is None:  # no GateKey: a plain forward, whose counts are not read
            return super()._postprocess(
                hidden_states, input_ids, position_ids, labels, *args, **kwargs
            )
        incoming, self._incoming_LB = self._incoming_LB, None
        if incoming is None:
            batch = hidden_states.shape[1]
            incoming = torch.zeros(
                self.recorder.num_layers, batch, dtype=torch.float32, device=hidden_states.device
            )
        hidden_states, counts = self.recorder.collect(
            hidden_states, incoming, GateKey.from_tensor(mask)[0], self.pg_collection.tp,
            self.pg_collection.cp,
        )  # fmt: skip
        if not self.post_process:
            return append_counts(hidden_states, counts)
        self.counts_LB = counts
        return super()._postprocess(hidden_states, input_ids, position_ids, labels, *args, **kwargs)

    def take_counts(self) -> Tensor:
        """counts_LB of the last forward, float32, with its graph. Last stage only; once a forward."""
        counts, self.counts_LB = self.counts_LB, None
        assert counts is not None, "take_counts() before a forward with a GateKey"
        return counts


def build_gpt(
    config: DMCTransformerConfig,
    *,
    recorder: DecisionRecorder | None = None,
    spec: Any = None,
    vp_stage: int | None = None,
    **options: Any,
) -> GPTModel:
    """A GPTModel whose attention is DMC's.

    Args:
        recorder: reads the decisions in training, and makes the model a `DMCGPTModel`.
        spec: in place of `dmc_layer_spec(config, ...)`.
        options: of `GPTModel`.
    """
    if spec is None:
        spec = dmc_layer_spec(config, recorder=recorder, vp_stage=vp_stage)
    options |= {"config": config, "transformer_layer_spec": spec, "vp_stage": vp_stage}
    if recorder is None:
        return GPTModel(**options)
    return DMCGPTModel(**options, recorder=recorder)
