"""The model that `bench throughput` and `bench latency` run, by path or by name, and engines around it.

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

from megatron_dmc.bench.baselines import DenseContext
from megatron_dmc.bench.imposed import (
    ImposedDecisions,
    ImposingContext,
    profile_weights,
    spread_weights,
)
from megatron_dmc.bench.measure import Settings
from megatron_dmc.checkpoint.description import ModelDescription
from megatron_dmc.checkpoint.load import LoadedModel, build_model, check_divisible, load_model
from megatron_dmc.checkpoint.tokenizer import load_tokenizer
from megatron_dmc.config import DMCConfig
from megatron_dmc.engine import LLM
from megatron_dmc.engine.context import PagedContext
from megatron_dmc.engine.flags import engine_settings, model_path, tokenizer_path
from megatron_dmc.engine.sizes import model_dtype, pages_in_memory
from megatron_dmc.errors import DMCError
from megatron_dmc.ops.paged.kv_pages import entry_bytes, parse_kv_cache_dtype
from megatron_dmc.plan.model import find_model

DEVIATIONS = 3.0
"""Standard deviations of the pages that imposed decisions need, for which `--max-num-seqs auto` leaves room."""


@dataclass(frozen=True)
class Case:
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


def requests_that_fit(
    num_pages: int, heads: int, page_size: int, num_cached: int, decisions: ImposedDecisions | None
) -> int:
    """Number of requests of `num_cached` tokens each that a cache holds.

    Args:
        heads: KV heads over all layers.
        decisions: None: nothing merges.

    Raises:
        DMCError: none.
    """
    if decisions is None:
        per_request, deviation = float(heads * -(-num_cached // page_size)), 0.0
    else:
        # a step needs room for one more entry of every head; where a head stands within its last page
        # is unknown: half a page on average
        rate, entries = decisions.rate_LG, decisions.expected_entries(num_cached)
        per_request = (entries.sum().item() + heads) / page_size + heads * (1 - 1 / page_size) / 2
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
    return batch


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


class ModelUnderTest:
    """The model that the flags name, loaded once for all cases.

    Raises:
        DMCError: it cannot be loaded, or flags contradict each other.
    """

    def __init__(self, args: argparse.Namespace, longest: int):
        if args.tensor_parallel_size > 1:
            size = args.tensor_parallel_size
            raise DMCError(
                f"--tensor-parallel-size {size}: this benchmark uses one process; measure several with "
                f"`serve --tensor-parallel-size {size}` and `bench serve`, or one rank's part with "
                f"--tensor-parallel-slice {size} --load-format dummy"
            )
        self.args = args
        self.device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        dtype = model_dtype(args.dtype)
        self.is_random = args.load_format == "dummy"
        if self.is_random:
            found: Any = find_model(model_path(args), revision=args.revision)
            if args.tensor_parallel_slice > 1:
                found = slice_of(found, args.tensor_parallel_slice)
            description = replace(
                found,
                dtype=dtype or found.dtype,
                # random weights know no longest context
                max_position_embeddings=max(found.max_position_embeddings, longest),
            )
            self.loaded = random_model(description, self.device)
        elif args.tensor_parallel_slice > 1:
            raise DMCError("--tensor-parallel-slice takes random weights: add --load-format dummy")
        else:
            trusted = args.trust_remote_code
            self.loaded = load_model(
                model_path(args), revision=args.revision, device=self.device, dtype=dtype,
                allow_pickle=args.allow_pickle, verify_checkpoint=args.verify_checkpoint, trust_remote_code=trusted,
            )  # fmt: skip
            if (place := tokenizer_path(args)) is not None:
                self.loaded = replace(
                    self.loaded, tokenizer=load_tokenizer(place, trust_remote_code=trusted)
                )

    @property
    def description(self) -> ModelDescription:
        return self.loaded.description

    def release(self) -> None:
        """Let go of the weights."""
        self.loaded = replace(self.loaded, model=None)

    def decisions(self, case: Case) -> ImposedDecisions | None:
        """Decisions to impose on the model; None: none."""
        if case.cr is None or case.cr == 1:
            return None
        d, profile = self.description, self.args.simulate_cr_profile
        shape = (d.num_layers, d.num_query_groups)
        weights = spread_weights(*shape) if profile is None else profile_weights(profile, *shape)
        shared = d.dmc is not None and d.dmc.shared_decisions
        return ImposedDecisions.of(weights, case.cr, num_tokens=case.num_cached, shared=shared)

    def share_pages(self, cases: Sequence[Case]) -> None:
        """Fix the number of pages, the same for all cases: what the memory holds now, but not more
        than any of them can use."""
        args, d = self.args, self.description
        if args.num_pages is not None:
            return
        heads, size = d.num_layers * d.num_query_groups, args.block_size
        worst = [
            sys.maxsize
            if case.max_num_seqs is None
            else case.max_num_seqs * heads * -(-(case.num_cached + 1) // size)
            for case in cases
        ]
        if args.dataset_path or args.max_model_len is not None:
            worst = [sys.maxsize]  # longer requests than the cases say
        dtype = parse_kv_cache_dtype(args.kv_cache_dtype) or d.dtype
        args.num_pages = pages_in_memory(
            2 * size * entry_bytes(d.kv_channels, dtype),
            worst_case=max(worst),
            kv_cache_memory_bytes=args.kv_cache_memory_bytes,
            gpu_memory_utilization=args.gpu_memory_utilization,
            device=self.device,
        )

    def engine(self, case: Case) -> tuple[LLM, ImposedDecisions | None]:
        """An engine for the case, with nothing in it.

        Raises:
            DMCError: no request fits into the cache.
        """
        decisions = self.decisions(case)
        options = engine_settings(self.args)
        batch = case.max_num_seqs
        if batch is None:
            batch = self.largest_batch(case, decisions)
        if options["max_model_len"] is None and not self.args.dataset_path:
            options["max_model_len"] = case.input_len + case.output_len
        # every running request decodes one token, and a prompt needs room in addition
        options["max_num_batched_tokens"] = max(options["max_num_batched_tokens"], batch + 1)
        options["max_num_seqs"], options["device"] = batch, self.device
        dmc = self.description.dmc
        make_context: Any = PagedContext
        if case.cr == 1:
            dmc = None
        elif decisions is not None:
            if dmc is None or not dmc.compresses:
                dmc = DMCConfig(stage="finetune", target_cr=decisions.cr)
            make_context = functools.partial(
                ImposingContext, decisions=decisions,
                max_num_batched_tokens=options["max_num_batched_tokens"],
            )  # fmt: skip
        if self.args.dense_baseline:
            if case.cr not in (None, 1) or dmc is not None:
                raise DMCError("--dense-baseline is for CR 1: use --simulate-cr 1")
            make_context = DenseContext
        loaded = replace(self.loaded, description=replace(self.description, dmc=dmc))
        return LLM(loaded, make_context=make_context, **options), decisions

    def largest_batch(self, case: Case, decisions: ImposedDecisions | None) -> int:
        """Number of requests of this length that the cache holds when they end (`--max-num-seqs auto`).

        Raises:
            DMCError: none.
        """
        args, d = self.args, self.description
        assert args.num_pages is not None, "share_pages comes first"
        batch = requests_that_fit(
            args.num_pages, d.num_layers * d.num_query_groups, args.block_size, case.num_cached,
            decisions,
        )  # fmt: skip
        return batch if args.num_prompts is None else min(batch, args.num_prompts)
