"""The training model of this rank from Megatron's arguments, and the pipeline that carries its merge counts."""

from argparse import Namespace

from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

from megatron_dmc.model.build import DMCGPTModel, build_gpt
from megatron_dmc.model.config import DMCTransformerConfig
from megatron_dmc.model.decisions import DecisionRecorder, carry_rows


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
    model = build_gpt(
        config,
        recorder=recorder,
        vp_stage=vp_stage,
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
    )
    assert isinstance(model, DMCGPTModel)
    return model
