"""The engine's settings, declared once.

From the fields of `EngineConfig` come the keyword arguments of `LLM` and `AsyncLLM.from_model`, the flags of
every command that builds an engine (`engine.flags`), and docs/settings.md. This module imports neither torch
nor Megatron, so that `--help` is quick.
"""

import ast
import difflib
import functools
import inspect
import math
import types
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import (
    TYPE_CHECKING,
    Any,
    Literal,
    NamedTuple,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from megatron_dmc.errors import UnsupportedConfig

if TYPE_CHECKING:
    from megatron_dmc.cache.strategies import BudgetRule

KVCacheDtype = Literal["auto", "fp8", "fp8_e4m3", "int8"]

_MAX_INT = 2**31 - 1
_LIMITS = {
    "block_size": 2**16,
    "max_num_seqs": 2**16,
    "max_num_batched_tokens": 2**24,
    "kv_cache_memory_bytes": 2**50,
    "tensor_parallel_size": 2**16,
}
"""Largest values, where they are not 2^31 - 1; memory sets lower limits."""


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Settings of the engine, with the names of vLLM's where it has them.

    Raises:
        UnsupportedConfig: at construction; the message names the setting, its value and what it may be.
    """

    revision: str | None = None
    """Branch, tag or commit of a model of the Hugging Face Hub. Default: its main branch."""

    trust_remote_code: bool = False
    """Run the code of a tokenizer that comes with its own. A model's code is never run."""

    generation_config: str = "auto"
    """Source of the sampling defaults and end-of-text tokens: "auto" is the model's generation_config.json,
    "vllm" takes only the end-of-text tokens from it, a path names another file or folder."""

    dtype: str = "auto"
    """Dtype of the model: "auto" (as stored), "float32", "bfloat16", "float16" or "float64"."""

    device: str | None = None
    """Device of the model. Default: where a loaded model's weights are, else the GPU if there is one."""

    allow_pickle: bool = False
    """Let a Megatron checkpoint run the code in its pickles. Only for a checkpoint that you trust."""

    verify_checkpoint: bool = True
    """Compare the checkpoint's files with the checksums stored with them, if any. Reads the files twice."""

    enable_dmc: bool | None = None
    """True refuses a model that does not compress, False appends every token whatever the model decides.
    Default: as the model."""

    max_model_len: int | None = None
    """Longest sequence, prompt and completion together. Default: the model's."""

    max_num_seqs: int | None = None
    """Requests that run at a time. Default: 256; down to 64 where their page tables would take more than
    1/32 of the cache's memory; no more than the pages can hold a token of."""

    max_num_batched_tokens: int = 2048
    """Tokens computed in a step. Longer prompts are computed in chunks."""

    async_scheduling: bool | None = None
    """Launch a step before the last one's tokens are read: the host's work is hidden behind the device's.
    Default: on a GPU in one process."""

    scheduling_policy: Literal["fcfs", "priority"] = "fcfs"
    """Order of requests: first come, first served, or "priority", where a lower `priority` goes first."""

    priority_reach: int = 256
    """Earlier requests that one level of priority lets a request pass."""

    block_size: int = 16
    """Slots per page of the cache."""

    num_pages: int | None = None
    """Size of the cache in pages, over all layers and KV heads of a rank. Default: from its memory."""

    kv_cache_memory_bytes: int | None = None
    """Size of the cache in bytes, where `num_pages` is not given. Default: on a GPU from
    `gpu_memory_utilization`, on a CPU at most 1 GiB."""

    gpu_memory_utilization: float = 0.9
    """Fraction of the GPU's memory to use, model included."""

    kv_cache_dtype: KVCacheDtype = "auto"
    """Storage of keys and values in pages. "auto" is the model's dtype."""

    enable_prefix_caching: bool = False
    """Share the pages of equal prefixes between requests."""

    prefix_block_size: int = 256
    """Tokens between two positions at which a shared prefix can end. Each such position costs a page per
    layer and KV head."""

    count_flipped_decisions: bool = False
    """After a preemption, compare the merge decisions with the first ones, which takes the host's time in every
    step."""

    cache_policy: str | None = None
    """Evict entries instead of merging, for comparisons: "h2o", "tova" or "window". For a plain model in one
    process, without cached prefixes."""

    cache_budget: int | float | None = None
    """Entries that each head keeps under `cache_policy`; a float is a fraction of the request's prompt."""

    tensor_parallel_size: int = 1
    """Processes that share the heads, started by this one or by torchrun."""

    distributed_timeout_seconds: float = 60.0
    """Longest time for a rank's part of a step. When it is exceeded, the engine fails."""

    enforce_eager: bool = False
    """Run decode steps without CUDA graphs, and on a CPU without recorded steps."""

    cudagraph_capture_sizes: Sequence[int] | None = None
    """Batch sizes whose decode steps become CUDA graphs. Default: 1, 2, 4, 8, 16, 24, ... up to
    `max_num_seqs`."""

    seed: int = 0
    """Seed of requests that bring none."""

    poison: bool = field(default=False, metadata={"flag": False})
    """Fill free pages with NaN. For tests."""

    def __post_init__(self) -> None:
        for setting in settings():
            setting.check(getattr(self, setting.name))
        if not 0 < self.gpu_memory_utilization <= 1:
            raise UnsupportedConfig(
                f"gpu_memory_utilization={self.gpu_memory_utilization}: use a number above 0, at most 1"
            )
        if self.distributed_timeout_seconds <= 0:
            raise UnsupportedConfig(
                f"distributed_timeout_seconds={self.distributed_timeout_seconds}: use a positive number"
            )
        if self.async_scheduling and self.tensor_parallel_size > 1:
            raise UnsupportedConfig(
                f"async_scheduling=True with tensor_parallel_size={self.tensor_parallel_size}: the ranks wait "
                "for one another after every step; leave it at its default, or use one process"
            )
        self._check_capture_sizes()
        self._check_budget()

    def _check_capture_sizes(self) -> None:
        sizes = self.cudagraph_capture_sizes
        if sizes is None:
            return
        if not (sizes and all(type(n) is int and n > 0 for n in sizes)):
            raise UnsupportedConfig(
                f"cudagraph_capture_sizes={sizes!r}: use positive whole numbers, or enforce_eager=True "
                "for none"
            )
        if self.max_num_seqs is not None and min(sizes) > self.max_num_seqs:
            raise UnsupportedConfig(
                f"cudagraph_capture_sizes={sizes!r}: all are larger than max_num_seqs="
                f"{self.max_num_seqs}; choose smaller ones, or enforce_eager=True"
            )

    def _check_budget(self) -> None:
        policy = f"cache_policy={self.cache_policy!r}"
        if (self.cache_policy is None) != (self.cache_budget is None):
            raise UnsupportedConfig(
                f"{policy} with cache_budget={self.cache_budget!r}: give both or neither"
            )
        if self.budget_rule is None:
            return
        if self.enable_prefix_caching:
            raise UnsupportedConfig(
                f"{policy} with enable_prefix_caching=True: which entries are evicted depends on the whole "
                "prompt; switch prefix caching off"
            )
        if self.kv_cache_dtype != "auto":
            raise UnsupportedConfig(
                f"{policy} with kv_cache_dtype={self.kv_cache_dtype!r}: the policies are compared in the "
                "model's dtype; use kv_cache_dtype='auto'"
            )
        if self.tensor_parallel_size > 1:
            raise UnsupportedConfig(
                f"{policy} with tensor_parallel_size={self.tensor_parallel_size}: use one process"
            )

    @classmethod
    def from_settings(cls, values: dict[str, Any]) -> "EngineConfig":
        """A configuration from keyword arguments.

        Raises:
            UnsupportedConfig: an unknown name, with the close matches; or an invalid value.
        """
        known = [setting.name for setting in settings()]
        for name, value in values.items():
            if name not in known:
                close = difflib.get_close_matches(name, known)
                hint = f"did you mean {' or '.join(close)}?" if close else "see docs/settings.md"
                raise UnsupportedConfig(f"{name}={value!r}: no such engine setting; {hint}")
        return cls(**values)

    @property
    def budget_rule(self) -> "BudgetRule | None":
        """The policy and its budget, if any."""
        if self.cache_policy is None or self.cache_budget is None:
            return None
        from megatron_dmc.cache.strategies import BudgetRule

        return BudgetRule(self.cache_policy, self.cache_budget)

    def capture_sizes(self) -> list[int]:
        """Batch sizes whose decode steps become CUDA graphs, none larger than `max_num_seqs`. The default
        is vLLM's: 1, 2, 4, multiples of 8 up to 256 and of 16 up to 512; and `max_num_seqs`, which is set."""
        sizes, most = self.cudagraph_capture_sizes, self.max_num_seqs
        assert most is not None
        if sizes is None:
            sizes = [1, 2, 4, *range(8, 257, 8), *range(272, 513, 16), min(most, 512)]
        return sorted({size for size in sizes if size <= most})


class Setting(NamedTuple):
    """A field of `EngineConfig`, as flags and documentation need it."""

    name: str
    kind: type
    """bool, int, float, str, or list for several whole numbers."""
    default: Any
    optional: bool
    """None is a value."""
    choices: tuple[str, ...]
    """Empty: any."""
    has_flag: bool
    description: str

    def check(self, value: Any) -> None:
        """Raises:
        UnsupportedConfig: the value is not of this setting's type, or out of its range.
        """
        if value is None and self.optional:
            return
        remedy = ""
        if self.choices:
            if value not in self.choices:
                remedy = f"use one of {', '.join(self.choices)}"
        elif self.kind is bool:
            if not isinstance(value, bool):
                remedy = "use True or False"
        elif self.name == "seed":
            if type(value) is not int:
                remedy = "use a whole number"
        elif self.kind is int:
            most = _LIMITS.get(self.name, _MAX_INT)
            if not (type(value) is int and 1 <= value <= most):
                remedy = f"use a positive whole number, at most {most}"
        elif self.kind is float:
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if not (is_number and math.isfinite(value)):
                remedy = "use a finite number"
        if remedy:
            raise UnsupportedConfig(f"{self.name}={value!r}: {remedy}")


@functools.cache
def settings() -> list[Setting]:
    """The fields of `EngineConfig` in order, with the docstring under each."""
    body = ast.parse(inspect.getsource(EngineConfig)).body[0]
    assert isinstance(body, ast.ClassDef)
    descriptions = {
        above.target.id: " ".join(ast.literal_eval(below.value).split())
        for above, below in zip(body.body, body.body[1:], strict=False)
        if isinstance(above, ast.AnnAssign) and isinstance(above.target, ast.Name)
        and isinstance(below, ast.Expr)
    }  # fmt: skip
    hints = get_type_hints(EngineConfig)
    found = []
    for f in fields(EngineConfig):
        kinds = [hints[f.name]]
        if get_origin(hints[f.name]) in (Union, types.UnionType):
            kinds = list(get_args(hints[f.name]))
        optional = types.NoneType in kinds
        kind = [k for k in kinds if k is not types.NoneType][-1]
        choices = get_args(kind) if get_origin(kind) is Literal else ()
        if choices:
            kind = str
        elif get_origin(kind) is not None:
            kind = list
        flag = f.metadata.get("flag", True)
        found.append(
            Setting(f.name, kind, f.default, optional, choices, flag, descriptions[f.name])
        )
    return found
