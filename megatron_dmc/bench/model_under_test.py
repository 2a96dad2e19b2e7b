"""The model that a benchmark of the engine runs, by path or by name, and engines around it.

Dimension letters: L layers, G key/value heads.
"""

import argparse
import functools
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from megatron_dmc.bench.baselines import DenseContext
from megatron_dmc.bench.measure import Settings
from megatron_dmc.checkpoint.description import ModelDescription
from megatron_dmc.checkpoint.load import LoadedModel, build_model, check_divisible, load_model
from megatron_dmc.checkpoint.tokenizer import load_tokenizer
from megatron_dmc.config import DMCConfig
from megatron_dmc.engine import LLM
from megatron_dmc.engine.config import settings
from megatron_dmc.engine.context import PagedContext
from megatron_dmc.engine.flags import engine_settings, model_path, tokenizer_path
from megatron_dmc.engine.imposed import (
    ImposedDecisions,
    ImposingContext,
    profile_weights,
    spread_weights,
)
from megatron_dmc.engine.sizes import model_dtype, pages_in_memory
from megatron_dmc.errors import DMCError
from megatron_dmc.ops.paged.kv_pages import entry_bytes, parse_kv_cache_dtype
from megatron_dmc.plan.model import find_model

DEVIATIONS = 3.0
"""Standard deviations of the pages that imposed decisions need, for which `--max-num-seqs auto` leaves room."""


@dataclass(frozen=True)
class Point:
    """One point of a sweep."""

    cr: float | None
    """Imposed; 1: the engine without DMC; None: as the model itself decides."""
    max_num_seqs: int | None
    """None: the largest batch that fits."""
    input_len: int
    output_len: int

    @property
    def num_cached(self) -> int:
        """Tokens of a request that enter the cache: the last one never does."""
        return self.input_len + self.output_len - 1


def slice_of(description: Any, ranks: int) -> Any:
    """One tensor-parallel rank's share: its heads, its part of the MLP and of the vocabulary.

    Raises:
        UnsupportedConfig: something does not divide.
    """
    check_divisible(description, ranks)
    part = description.padded_vocab_size // ranks
    return replace(
        description,
        num_attention_heads=description.num_attention_heads // ranks,
        num_query_groups=description.num_query_groups // ranks,
        ffn_hidden_size=description.ffn_hidden_size // ranks,
        vocab_size=part,
        padded_vocab_size=part,
    )


def llama2_7b(
    settings: Settings, *, num_layers: int, length: int, **on_cpu: int
) -> ModelDescription:
    """Llama-2-7B's shape with other layers and another context, and on a CPU with the sizes `on_cpu`."""
    sizes: dict[str, Any] = {} if settings.on_gpu else {**on_cpu, "padded_vocab_size": 0}
    return replace(
        find_model("llama2-7b"), num_layers=num_layers, max_position_embeddings=length,
        dtype=settings.dtype, **sizes,
    )  # fmt: skip


def draw_weights(model: torch.nn.Module) -> None:
    """Draw all weights, normal with 0.02; norms get 1."""
    generator = torch.Generator(device=next(model.parameters()).device).manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.02, generator=generator)
            else:
                parameter.fill_(1.0)


def random_model(description: Any, device: torch.device) -> LoadedModel:
    """A model with random weights, drawn on the device."""
    with torch.device(device):  # the weights are made where they stay
        model = build_model(description, device=device, dtype=description.dtype)
    draw_weights(model)
    return LoadedModel(model, description, None)


@dataclass
class ModelUnderTest:
    """A model, loaded once for all cases of a benchmark, and engines around it.

    Attributes:
        settings: of its engines, by the names of `EngineConfig`.
        weights_LG: how imposed decisions spread over the heads; None: `spread_weights`.
        has_fixed_lengths: requests have the lengths that a point says.
        most_requests: as many as there are; None: no limit.
        is_random: its weights are.
    """

    loaded: LoadedModel
    settings: dict[str, Any]
    weights_LG: Tensor | None = None
    has_fixed_lengths: bool = True
    most_requests: int | None = None
    is_random: bool = True

    def __post_init__(self) -> None:
        self.settings = {setting.name: setting.default for setting in settings()} | self.settings

    @classmethod
    def from_args(cls, args: argparse.Namespace, longest: int) -> "ModelUnderTest":
        """The model that the flags of `bench throughput` name.

        Args:
            longest: tokens of a sequence, at most.

        Raises:
            DMCError: it cannot be loaded, or flags contradict each other.
        """
        if (size := args.tensor_parallel_size) > 1:
            raise DMCError(
                f"--tensor-parallel-size {size}: this benchmark uses one process; measure several with "
                f"`serve --tensor-parallel-size {size}` and `bench serve`, or one rank's part with "
                f"--tensor-parallel-slice {size} --load-format dummy"
            )
        is_random = args.load_format == "dummy"
        if args.tensor_parallel_slice > 1 and not is_random:
            raise DMCError("--tensor-parallel-slice takes random weights: add --load-format dummy")
        device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        loaded = _random(args, longest, device) if is_random else _loaded(args, device)
        d, profile = loaded.description, args.simulate_cr_profile
        weights = None
        if profile is not None:
            weights = profile_weights(profile, d.num_layers, d.num_query_groups)
        return cls(
            loaded, engine_settings(args) | {"device": device}, weights,
            has_fixed_lengths=not args.dataset_path, most_requests=args.num_prompts,
            is_random=is_random,
        )  # fmt: skip

    @property
    def description(self) -> ModelDescription:
        return self.loaded.description

    @property
    def heads(self) -> int:
        """KV heads over all layers."""
        return self.description.num_layers * self.description.num_query_groups

    @property
    def device(self) -> torch.device:
        return next(self.loaded.model.parameters()).device

    def release(self) -> None:
        """Let go of the weights."""
        self.loaded = replace(self.loaded, model=None)

    def decisions(self, point: Point) -> ImposedDecisions | None:
        """Decisions to impose on the model; None: none."""
        if point.cr is None or point.cr == 1:
            return None
        d, weights = self.description, self.weights_LG
        if weights is None:
            weights = spread_weights(d.num_layers, d.num_query_groups)
        shared = d.dmc is not None and d.dmc.shared_decisions
        return ImposedDecisions.of(weights, point.cr, num_tokens=point.num_cached, shared=shared)

    def pages_of(self, point: Point) -> int:
        """Pages of its requests where nothing merges; the largest number if it says no batch."""
        if point.max_num_seqs is None:
            return sys.maxsize
        pages = -(-(point.num_cached + 1) // self.settings["block_size"])
        return point.max_num_seqs * self.heads * pages

    def share_pages(self, points: Sequence[Point]) -> None:
        """Fix the number of pages, the same for all points: what the memory holds now, but not more
        than any of them can use."""
        given, d = self.settings, self.description
        if given["num_pages"] is not None:
            return
        is_known = self.has_fixed_lengths and given["max_model_len"] is None
        dtype = parse_kv_cache_dtype(given["kv_cache_dtype"]) or d.dtype
        in_memory = pages_in_memory(
            2 * given["block_size"] * entry_bytes(d.kv_channels, dtype),
            kv_cache_memory_bytes=given["kv_cache_memory_bytes"],
            gpu_memory_utilization=given["gpu_memory_utilization"],
            device=self.device,
        )
        used = max(map(self.pages_of, points)) if is_known else sys.maxsize
        given["num_pages"] = min(in_memory, used)

    def largest_batch(self, point: Point) -> int:
        """Number of requests of this length that the cache holds when they end (`--max-num-seqs auto`).

        Raises:
            DMCError: none.
        """
        num_pages, page_size = self.settings["num_pages"], self.settings["block_size"]
        assert num_pages is not None, "share_pages comes first"
        heads, num_cached, decisions = self.heads, point.num_cached, self.decisions(point)
        per_request, deviation = float(heads * -(-num_cached // page_size)), 0.0
        if decisions is not None:
            # a step needs room for one more entry of every head; where a head stands within its last page
            # is unknown: half a page on average
            rate, entries = decisions.rate_LG, decisions.expected_entries(num_cached).sum().item()
            per_request = (entries + heads) / page_size + heads * (1 - 1 / page_size) / 2
            drawn = (rate * (1 - rate)).sum().item() * num_cached / page_size**2
            deviation = math.sqrt(heads / 12 + drawn)
        # batch * per_request + DEVIATIONS * sqrt(batch) * deviation = num_pages
        half = DEVIATIONS * deviation / 2
        root = (math.sqrt(half**2 + per_request * num_pages) - half) / per_request
        if (batch := int(root**2 + 1e-9)) < 1:
            raise DMCError(
                f"--max-num-seqs auto: the cache of {num_pages} pages holds no request of {num_cached + 1} "
                f"tokens, which needs {per_request:.0f}; give it more memory"
            )
        return batch if self.most_requests is None else min(batch, self.most_requests)

    def engine(
        self, point: Point, *, is_dense: bool = False, **further: Any
    ) -> tuple[LLM, ImposedDecisions | None]:
        """An engine for the point, with nothing in it.

        Args:
            is_dense: with dense attention over contiguous caches.
            further: settings.

        Raises:
            DMCError: no request fits into the cache.
        """
        decisions, options = self.decisions(point), self.settings | further
        batch = self.largest_batch(point) if point.max_num_seqs is None else point.max_num_seqs
        if options["max_model_len"] is None and self.has_fixed_lengths:
            options["max_model_len"] = point.input_len + point.output_len
        # every running request decodes one token, and a prompt needs room in addition
        most_tokens = max(options["max_num_batched_tokens"], batch + 1)
        options |= {"max_num_seqs": batch, "max_num_batched_tokens": most_tokens}
        dmc = None if point.cr == 1 else self.description.dmc
        make_context: Any = PagedContext
        if decisions is not None:
            if dmc is None or not dmc.compresses:
                dmc = DMCConfig(stage="finetune", target_cr=decisions.cr)
            make_context = functools.partial(
                ImposingContext, decisions=decisions, max_num_batched_tokens=most_tokens
            )
        if is_dense:
            if point.cr not in (None, 1) or dmc is not None:
                raise DMCError("--dense-baseline is for CR 1: use --simulate-cr 1")
            make_context = DenseContext
        loaded = replace(self.loaded, description=replace(self.description, dmc=dmc))
        return LLM(loaded, make_context=make_context, **options), decisions


def _random(args: argparse.Namespace, longest: int, device: torch.device) -> LoadedModel:
    found: Any = find_model(model_path(args), revision=args.revision)
    if args.tensor_parallel_slice > 1:
        found = slice_of(found, args.tensor_parallel_slice)
    # random weights know no longest context
    context = max(found.max_position_embeddings, longest)
    dtype = model_dtype(args.dtype) or found.dtype
    return random_model(replace(found, dtype=dtype, max_position_embeddings=context), device)


def _loaded(args: argparse.Namespace, device: torch.device) -> LoadedModel:
    trusted = args.trust_remote_code
    loaded = load_model(
        model_path(args), revision=args.revision, device=device, dtype=model_dtype(args.dtype),
        allow_pickle=args.allow_pickle, verify_checkpoint=args.verify_checkpoint,
        trust_remote_code=trusted,
    )  # fmt: skip
    if (place := tokenizer_path(args)) is None:
        return loaded
    return replace(loaded, tokenizer=load_tokenizer(place, trust_remote_code=trusted))
