"""Distillation: a plain model, frozen, whose distribution over the vocabulary the trained one learns."""

import copy
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import torch
from megatron.core import dist_checkpointing, mpu
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from megatron_dmc.checkpoint.torch_dist import check_whole, iteration_folder, read_common
from megatron_dmc.config import DMCConfig, Stage
from megatron_dmc.errors import CheckpointError
from megatron_dmc.model.build import DMCGPTModel
from megatron_dmc.model.config import DMCTransformerConfig
from megatron_dmc.model.decisions import DecisionRecorder, GateKey
from megatron_dmc.training.loss import vocab_parallel_kl
from megatron_dmc.training.model import build_model
from megatron_dmc.training.teacher_states import HiddenStates

SAME = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "kv_channels",
        "normalization", "layernorm_epsilon", "swiglu", "add_bias_linear", "add_qkv_bias",
        "qk_layernorm", "num_experts", "untie_embeddings_and_output_weights",
        "position_embedding_type", "rotary_base", "rotary_percent", "use_rope_scaling",
        "rotary_seq_len_interpolation_factor")  # fmt: skip
"""Arguments of Megatron in which teacher and student agree. The number of KV heads is not among them, nor is
the order of RoPE pairs: a teacher has its own."""


class Teacher:
    """The frozen model, and the loss that a student has from it.

    It is neither in Megatron's data-parallel wrapper nor in an optimizer or a checkpoint.

    Args:
        model: plain, in evaluation mode, in the student's tensor-parallel layout.
        weight: part of the KL in the loss, 0 to 1; the language-model loss has the rest.
        states: hidden states of microbatches that it has seen; None: it computes every one.
    """

    def __init__(self, model: DMCGPTModel, weight: float = 1.0, states: HiddenStates | None = None):
        self.model = model
        self.weight = weight
        self.states = states

    def losses(
        self, tokens_BT: Tensor, position_ids_BT: Tensor, mask: Tensor
    ) -> Callable[..., Tensor]:
        """The teacher's logits of a microbatch, and what makes losses of the student's on it.

        Args:
            tokens_BT, position_ids_BT, mask: as the student gets them.

        Returns:
            what the student's forward takes as its `output_processor`. Its output is then, instead of
            the language-model losses, a tensor [2, B, T], at least float32: the language-model loss
            of every token, without gradient where `weight` is 1, and KL(teacher || student).
        """
        with torch.no_grad():
            teacher_TBV = self._logits(tokens_BT, position_ids_BT, mask)
        group = self.model.pg_collection.tp

        def processor(*, labels: Tensor, compute_language_model_loss, **outputs) -> Tensor:
            logits_TBV = _logits(**outputs)
            kl_TB = vocab_parallel_kl(logits_TBV, teacher_TBV, group)
            # last, because Megatron's cross entropy writes into float32 logits
            with torch.set_grad_enabled(torch.is_grad_enabled() and self.weight < 1):
                lm_BT = compute_language_model_loss(labels, logits_TBV)
            return torch.stack([lm_BT.to(kl_TB.dtype), kl_TB.T])

        return processor

    def _logits(self, tokens_BT: Tensor, position_ids_BT: Tensor, mask: Tensor) -> Tensor:
        """logits_TBV, of this rank's columns."""
        model, states = self.model, self.states
        if states is None:
            return model(tokens_BT, position_ids_BT, mask, output_processor=_logits)
        file = states.file_of(tokens_BT, position_ids_BT, GateKey.from_tensor(mask)[1])
        if (hidden_states := states.load(file, tokens_BT.device)) is not None:
            is_tied = model.share_embeddings_and_output_weights
            return _logits(
                hidden_states=hidden_states, output_layer=model.output_layer,
                output_weight=model.shared_embedding_or_output_weight() if is_tied else None,
                scale_logits=model._scale_logits, runtime_gather_output=None,
            )  # fmt: skip

        def processor(*, hidden_states: Tensor, **outputs) -> Tensor:
            states.save(file, hidden_states)
            return _logits(hidden_states=hidden_states, **outputs)

        return model(tokens_BT, position_ids_BT, mask, output_processor=processor)

    def combine(self, lm_loss: Tensor, kl: Tensor) -> Tensor:
        """`weight * kl + (1 - weight) * lm_loss`."""
        return kl if self.weight == 1 else self.weight * kl + (1 - self.weight) * lm_loss


def _logits(
    *, hidden_states, output_layer, output_weight, scale_logits, runtime_gather_output, **others
) -> Tensor:
    """Megatron's `output_processor` that returns logits_TBV, of this rank's columns."""
    logits_TBV, _ = output_layer(
        hidden_states, weight=output_weight, runtime_gather_output=runtime_gather_output
    )
    return scale_logits(logits_TBV)


def load_teacher(args: Namespace, config: DMCTransformerConfig) -> Teacher:
    """The teacher of a run, from `--dmc-teacher`. Collective over all ranks.

    Call it when Megatron is initialised; every rank reads its own shards, whatever layout saved them.

    Args:
        args: Megatron's and DMC's, validated.
        config: the student's; not changed.

    Raises:
        CheckpointError: the checkpoint is damaged, or of another model; names the difference.
    """
    folder = iteration_folder(args.dmc_teacher)
    check_whole(folder)
    common = read_common(folder, allow_pickle=True)  # Megatron's own loading below has no guard
    saved = common.get("args")
    if saved is None:
        raise CheckpointError(f"--dmc-teacher {folder}: holds no saved arguments")
    _check_model(args, saved)
    plain = copy.copy(config)
    plain.dmc = DMCConfig()
    plain.num_query_groups = (
        saved.num_query_groups if saved.group_query_attention else saved.num_attention_heads
    )
    plain.borrowed_rope_pair = getattr(saved, "dmc_borrowed_rope_pair", None)
    plain.perform_initialization = False
    plain.recompute_granularity = None
    plain.tp_comm_overlap = False  # its buffers are of the student's sizes
    plain.fp8 = None
    model = build_model(
        args, plain, DecisionRecorder(plain.num_layers),
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
    )  # fmt: skip
    model.requires_grad_(False)
    for parameter in model.parameters():
        parameter.zero_()  # rows that pad the vocabulary further than the checkpoint does
    model = model.to(device=torch.cuda.current_device(), dtype=config.params_dtype).eval()
    metadata = dict(dist_checkpointing.load_content_metadata(preloaded_state_dict=common) or {})
    metadata["dp_cp_group"] = mpu.get_data_parallel_group(with_context_parallel=True)
    try:
        state = dist_checkpointing.load(
            {"model": model.sharded_state_dict(metadata=metadata)}, str(folder)
        )
        found = model.load_state_dict(state["model"], strict=False)
    except CheckpointException as e:  # a BaseException, with all ranks' tracebacks in its text
        cause = next(iter(e.failures.values()))[0]
        raise CheckpointError(f"--dmc-teacher {folder}: cannot be loaded ({cause})") from e
    except Exception as e:
        raise CheckpointError(f"--dmc-teacher {folder}: cannot be loaded ({e})") from e
    missing = [name for name in found.missing_keys if "_extra_state" not in name]
    if missing:
        raise CheckpointError(f"--dmc-teacher {folder}: has no {', '.join(missing[:5])}")
    states = None
    if args.dmc_teacher_cache:
        states = HiddenStates(Path(args.dmc_teacher_cache), folder, config.params_dtype)
    return Teacher(model, args.dmc_teacher_weight, states)


def _check_model(args: Namespace, saved: Namespace) -> None:
    """Raises CheckpointError where a checkpoint's saved arguments are of no teacher for this run."""
    name = f"--dmc-teacher {args.dmc_teacher}"
    if getattr(saved, "dmc_stage", Stage.OFF) != Stage.OFF:
        raise CheckpointError(
            f"{name}: was trained with --dmc-stage {saved.dmc_stage}; a teacher is a plain model, "
            "such as the one that the retrofit starts from"
        )
    # how far a vocabulary is padded depends on the layout too
    vocab = "vocab_size" if args.vocab_size and saved.vocab_size else "padded_vocab_size"
    for setting in (vocab, *SAME):
        theirs, ours = getattr(saved, setting, None), getattr(args, setting)
        if (theirs or ours) and theirs != ours:
            hint = (
                "; is it the padding alone, give --vocab-size" if setting.startswith("pad") else ""
            )
            raise CheckpointError(
                f"{name}: {setting} is {theirs}, and this run's {ours}; the teacher must have the "
                f"model's architecture and vocabulary (KV heads may differ){hint}"
            )
