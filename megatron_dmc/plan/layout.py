"""Layout of a model over GPUs, and the rules for valid layouts."""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product

from torch.nn.functional import silu

from megatron_dmc.config import DMCConfig
from megatron_dmc.errors import UnsupportedConfig
from megatron_dmc.model.config import DMCTransformerConfig
from megatron_dmc.plan.arguments import RECOMPUTE
from megatron_dmc.plan.model import PlannedModel

MICRO_BATCH_SIZES = (1, 2, 4, 8)


@dataclass(frozen=True)
class Job:
    """Input of a plan: the machine and the batch."""

    gpus: int
    """GPUs of the whole job."""

    gpus_per_node: int = 8
    """GPUs joined by the fast links; tensor parallelism stays within them."""

    seq_length: int = 4096
    """Tokens of a sequence."""

    global_batch_size: int = 1024
    """Sequences of an optimizer step."""

    merge_delay: int = 0
    """Newest tokens of a head that stay raw; 0: decisions take effect at once."""

    def __post_init__(self) -> None:
        for name in ("gpus", "gpus_per_node", "seq_length", "global_batch_size"):
            if getattr(self, name) < 1:
                flag = "--" + name.replace("_", "-")
                raise UnsupportedConfig(f"{flag} {getattr(self, name)}: it must be at least 1")
        if self.merge_delay < 0:
            raise UnsupportedConfig(f"--dmc-merge-delay {self.merge_delay}: use 0 for none")

    @property
    def tokens_per_step(self) -> int:
        """Tokens of an optimizer step."""
        return self.seq_length * self.global_batch_size


@dataclass(frozen=True)
class Layout:
    """One spread; fields are named as Megatron's flags."""

    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    num_virtual_stages_per_pipeline_rank: int = 1
    """Model chunks of a pipeline rank; above 1 the schedule is interleaved."""
    context_parallel_size: int = 1
    data_parallel_size: int = 1
    micro_batch_size: int = 1
    sequence_parallel: bool = False
    use_distributed_optimizer: bool = True
    recompute_granularity: str = "none"

    @property
    def model_parallel_size(self) -> int:
        """GPUs of one replica: TP x PP x CP."""
        return (
            self.tensor_model_parallel_size
            * self.pipeline_model_parallel_size
            * self.context_parallel_size
        )

    def num_microbatches(self, job: Job) -> int:
        """Microbatches of a step on one replica."""
        return job.global_batch_size // (self.micro_batch_size * self.data_parallel_size)

    def flags(self, job: Job) -> list[str]:
        """As Megatron's command line takes it."""
        flags = [
            "--tensor-model-parallel-size", str(self.tensor_model_parallel_size),
            "--pipeline-model-parallel-size", str(self.pipeline_model_parallel_size),
            "--context-parallel-size", str(self.context_parallel_size),
            "--micro-batch-size", str(self.micro_batch_size),
            "--global-batch-size", str(job.global_batch_size),
            "--seq-length", str(job.seq_length),
            "--bf16",
        ]  # fmt: skip
        if self.num_virtual_stages_per_pipeline_rank > 1:
            flags += [
                "--num-virtual-stages-per-pipeline-rank",
                str(self.num_virtual_stages_per_pipeline_rank),
            ]
        if self.sequence_parallel:
            flags.append("--sequence-parallel")
        if self.use_distributed_optimizer:
            flags.append("--use-distributed-optimizer")
        if self.recompute_granularity != "none":
            flags += ["--recompute-granularity", self.recompute_granularity]
        if self.recompute_granularity == "full":
            flags += ["--recompute-method", "uniform", "--recompute-num-layers", "1"]
        return flags


def divisors(n: int) -> list[int]:
    """Of a positive integer, ascending."""
    return [d for d in range(1, n + 1) if n % d == 0]


@dataclass
class Rules:
    """Layouts that Megatron and DMC accept, for one model and job."""

    model: PlannedModel
    job: Job
    _dmc: dict[tuple[int, int, bool], str | None] = field(default_factory=dict)

    def refusal(self, layout: Layout) -> str | None:
        """Reason why a layout cannot run, naming flags and values; None if it can."""
        model, job = self.model, self.job
        tp, pp = layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size
        cp, vp = layout.context_parallel_size, layout.num_virtual_stages_per_pipeline_rank
        if tp > job.gpus_per_node:
            return (
                f"--tensor-model-parallel-size {tp} exceeds --gpus-per-node {job.gpus_per_node}: "
                "tensor parallelism wants the links within a node"
            )
        for what, size in [
            ("num_attention_heads", model.num_attention_heads),
            ("num_query_groups (KV heads)", model.num_query_groups),
            ("ffn_hidden_size", model.ffn_hidden_size),
            ("padded_vocab_size", model.padded_vocab_size),
        ]:
            if size % tp:
                return (
                    f"the model's {what}={size} is not a multiple of "
                    f"--tensor-model-parallel-size {tp}"
                )
        if model.num_layers % (pp * vp):
            return (
                f"the model's num_layers={model.num_layers} is not a multiple of "
                f"--pipeline-model-parallel-size x --num-virtual-stages-per-pipeline-rank = "
                f"{pp} x {vp}"
            )
        if job.gpus != layout.model_parallel_size * layout.data_parallel_size:
            return (
                f"--gpus {job.gpus} is not a multiple of TP x PP x CP = {tp} x {pp} x {cp} = "
                f"{layout.model_parallel_size}"
            )
        if job.seq_length > model.max_position_embeddings:
            return (
                f"--seq-length {job.seq_length} exceeds the model's max_position_embeddings="
                f"{model.max_position_embeddings}"
            )
        split = (2 * cp if cp > 1 else 1) * (tp if layout.sequence_parallel else 1)
        if job.seq_length % split:
            return (
                f"--seq-length {job.seq_length} is not a multiple of {split}, as "
                f"--context-parallel-size {cp} and --tensor-model-parallel-size {tp} want"
            )
        per_pass = layout.micro_batch_size * layout.data_parallel_size
        if job.global_batch_size % per_pass:
            return (
                f"--global-batch-size {job.global_batch_size} is not a multiple of "
                f"--micro-batch-size x data parallel size = {layout.micro_batch_size} x "
                f"{layout.data_parallel_size}"
            )
        if layout.sequence_parallel and tp == 1:
            return "--sequence-parallel needs --tensor-model-parallel-size above 1"
        if vp > 1 and pp == 1:
            return (
                f"--num-virtual-stages-per-pipeline-rank {vp} needs "
                "--pipeline-model-parallel-size above 1"
            )
        microbatches = layout.num_microbatches(job)
        if vp > 1 and microbatches % pp:
            return (
                f"--num-virtual-stages-per-pipeline-rank {vp} needs the microbatches of a step "
                f"({microbatches}) to be a multiple of --pipeline-model-parallel-size {pp}"
            )
        return self._dmc_refusal(tp, cp, vp > 1)

    def _dmc_refusal(self, tp: int, cp: int, interleaved: bool) -> str | None:
        """Result of DMC's own validation, so that a plan never offers what training refuses."""
        key = (tp, cp, interleaved)
        if key not in self._dmc:
            self._dmc[key] = None
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Megatron's, about choices that are not made here
                try:
                    self._config(tp, cp, interleaved)
                except UnsupportedConfig as e:
                    self._dmc[key] = str(e)
        return self._dmc[key]

    def _config(self, tp: int, cp: int, interleaved: bool) -> DMCTransformerConfig:
        model, pp = self.model, 4 if interleaved else 1
        return DMCTransformerConfig(
            num_layers=2 * pp,
            hidden_size=model.hidden_size,
            ffn_hidden_size=model.ffn_hidden_size,
            num_attention_heads=model.num_attention_heads,
            num_query_groups=model.num_query_groups,
            kv_channels=model.kv_channels,
            normalization="RMSNorm",
            gated_linear_unit=True,
            activation_func=silu,
            add_bias_linear=False,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            qk_layernorm=model.qk_layernorm,
            tensor_model_parallel_size=tp,
            context_parallel_size=cp,
            pipeline_model_parallel_size=pp,
            virtual_pipeline_model_parallel_size=2 if interleaved else None,
            pipeline_dtype=model.dtype,
            params_dtype=model.dtype,
            dmc=DMCConfig(stage="retrofit"),
        )


def candidates(model: PlannedModel, job: Job, fixed: dict[str, int | bool | str]):
    """Every layout worth a look: the fields in `fixed` as given, the others over their range.

    Args:
        fixed: fields of `Layout` that the user chose; data_parallel_size follows from the rest.

    Yields:
        layouts, in a fixed order; `Rules.refusal` says which of them can run.
    """

    def values(name: str, default):
        return [fixed[name]] if name in fixed else default

    sizes = product(
        values(
            "tensor_model_parallel_size",
            [t for t in divisors(job.gpus) if t <= job.gpus_per_node],
        ),
        values(
            "pipeline_model_parallel_size",
            [p for p in divisors(model.num_layers) if p <= job.gpus],
        ),
        # Only where it is asked for: every rank of a group merges the whole sequence, which pays
        # when the activations of one would not fit.
        values("context_parallel_size", [1]),
    )
    for tp, pp, cp in sizes:
        dp = max(1, job.gpus // (tp * pp * cp))
        chunks = divisors(max(1, model.num_layers // pp)) if pp > 1 else [1]
        for vp, micro, recompute in product(
            values("num_virtual_stages_per_pipeline_rank", chunks),
            values("micro_batch_size", MICRO_BATCH_SIZES),
            values("recompute_granularity", RECOMPUTE),
        ):
            yield Layout(
                tp, pp, vp, cp, dp, micro,
                sequence_parallel=bool(fixed.get("sequence_parallel", tp > 1)),
                use_distributed_optimizer=bool(fixed.get("use_distributed_optimizer", True)),
                recompute_granularity=recompute,
            )  # fmt: skip


def valid_layouts(
    model: PlannedModel, job: Job, fixed: dict[str, int | bool | str] | None = None
) -> Iterator[Layout]:
    """Layouts that can run.

    Raises:
        UnsupportedConfig: if there are none; says what stands against the choices that were made.
    """
    rules = Rules(model, job)
    reasons: dict[str, int] = {}
    found = False
    for layout in candidates(model, job, fixed or {}):
        reason = rules.refusal(layout)
        if reason is None:
            found = True
            yield layout
        else:
            reasons[reason] = reasons.get(reason, 0) + 1
    if not found:
        common = max(reasons, key=lambda r: reasons[r])
        raise UnsupportedConfig(
            f"no layout of {model.name or 'this model'} over {job.gpus} GPUs can run: {common}; "
            "change that value, or leave the flag out to have it chosen"
        )
