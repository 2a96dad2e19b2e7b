"""Megatron's GPT, with the merge counts carried to the last pipeline stage.

Dimension letters: T tokens, B batch, H hidden channels, L layers of the whole model.
"""

from argparse import Namespace

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from torch import Tensor

from megatron_dmc.config import DMCTransformerConfig
from megatron_dmc.model.decisions import (
    DecisionRecorder,
    GateKey,
    append_counts,
    carry_rows,
    split_counts,
)
from megatron_dmc.model.specs import dmc_layer_spec


class DMCGPTModel(GPTModel):
    """A GPTModel whose forward also sums the layers' merge counts.

    On the last pipeline stage `counts_LB` holds, after a forward, the counts of all layers of the
    model with the graph that leads back to them; on earlier stages the counts leave with the
    activation, in a few extra rows.

    Args (beside GPTModel's):
        recorder: the one that the attention layers report to.
    """

    def __init__(self, *args, recorder: DecisionRecorder, **kwargs):
        super().__init__(*args, **kwargs)
        self.recorder = recorder
        self.counts_LB: Tensor | None = None
        self._incoming_LB: Tensor | None = None

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor | None] | None) -> None:
        """Megatron's hook for the activation of the previous stage: hidden state and counts."""
        tensor = input_tensor[0] if isinstance(input_tensor, list) else input_tensor
        if tensor is not None:
            tensor, self._incoming_LB = split_counts(tensor, self.recorder.num_layers)
        super().set_input_tensor(tensor)

    def _postprocess(self, hidden_states, input_ids, position_ids, labels, *args, **kwargs):
        mask = kwargs.get("attention_mask")
        if mask is None:  # no GateKey: a plain forward, nobody reads counts
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


class CarryingCommunicator(P2PCommunicator):
    """Megatron's pipeline communicator with room for the counts' rows on the wire."""

    def __init__(self, pp_group, config: DMCTransformerConfig):
        super().__init__(pp_group, config)
        assert config.pipeline_dtype is not None
        self._rows = carry_rows(config.num_layers, config.hidden_size, config.pipeline_dtype)

    def _communicate(self, *, tensor_shape, **kwargs):
        if tensor_shape is not None:
            tensor_shape = (tensor_shape[0] + self._rows, *tensor_shape[1:])
        return super()._communicate(tensor_shape=tensor_shape, **kwargs)


def build_model(
    args: Namespace,
    config: DMCTransformerConfig,
    recorder: DecisionRecorder,
    *,
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
    pg_collection=None,
) -> DMCGPTModel:
    """One model chunk of this rank, as Megatron's `model_provider` does."""
    return DMCGPTModel(
        config=config,
        transformer_layer_spec=dmc_layer_spec(config, recorder=recorder, vp_stage=vp_stage),
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        pre_process=pre_process,
        post_process=post_process,
        fp16_lm_cross_entropy=args.fp16_lm_cross_entropy,
        parallel_output=True,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        rotary_percent=args.rotary_percent,
        rotary_base=args.rotary_base,
        rope_scaling=args.use_rope_scaling,
        rope_scaling_factor=args.rope_scaling_factor,
        seq_len_interpolation_factor=args.rotary_seq_len_interpolation_factor,
        pg_collection=pg_collection,
        vp_stage=vp_stage,
        recorder=recorder,
    )
