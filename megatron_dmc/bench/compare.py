"""Another engine on the same model, lengths and machine: transformers' paged continuous batching.

Two passes over the same requests with one manager; the second is timed (the first sizes the cache and captures
graphs). Greedy, full-length completions, no prefix sharing.
"""

import logging
import time
from pathlib import Path
from typing import Any

import torch

from megatron_dmc.bench.engine_run import Asked, synchronize
from megatron_dmc.bench.measure import Settings
from megatron_dmc.bench.output import Row
from megatron_dmc.checkpoint.hf_config import to_hf_config

logger = logging.getLogger(__name__)


def transformers_row(
    description: Any,
    asked: Asked,
    settings: Settings,
    *,
    path: Path | None,
    cache_tokens: int | None,
) -> Row:
    """Figures of `generate_batch`, or `skipped` with the reason.

    Args:
        description: the model's sizes, for random weights.
        asked: prompts as token ids; all ask for as many tokens as the first.
        path: a Hugging Face folder with the weights; None: random ones.
        cache_tokens: size of the cache in tokens; None: as transformers chooses.
    """
    try:
        from transformers import (
            AutoConfig,
            AutoModelForCausalLM,
            ContinuousBatchingConfig,
            GenerationConfig,
        )
    except ImportError as e:
        return {"skipped": f"transformers has no continuous batching here: {e}"}
    if any(isinstance(prompt, str) for prompt, _ in asked):
        return {"skipped": "prompts are texts; compare with random token ids"}
    attention = "flash_attention_2" if _has_flash_attention(settings) else "sdpa"
    try:
        with torch.device(settings.device):
            if path is not None:
                model = AutoModelForCausalLM.from_pretrained(
                    path, dtype=settings.dtype, attn_implementation=attention,
                    trust_remote_code=False,
                )  # fmt: skip
            else:
                values = to_hf_config(description)
                config = AutoConfig.for_model(values.pop("model_type"), **values)
                model = AutoModelForCausalLM.from_config(
                    config, dtype=settings.dtype, attn_implementation=attention
                )
        model.eval().requires_grad_(False)
        page_size = 256 if settings.on_gpu else 16
        num_new = asked[0][1]
        options = {
            "generation_config": GenerationConfig(
                max_new_tokens=num_new, do_sample=False, eos_token_id=-1, pad_token_id=0
            ),
            "continuous_batching_config": ContinuousBatchingConfig(
                page_size=page_size,
                num_blocks=None if cache_tokens is None else -(-cache_tokens // page_size),
                allow_block_sharing=False,
                max_batch_tokens=None if settings.on_gpu else 2048,
            ),
            "record_timestamps": True,
            "persistent_manager": True,
        }
        prompts = [list(prompt) for prompt, _ in asked]
        for _ in range(2):
            synchronize()
            began = time.perf_counter()
            outputs = model.generate_batch(prompts, **options)
            synchronize()
            seconds = time.perf_counter() - began
        model.destroy_cached_continuous_batching_manager()
    except Exception as e:  # another package's fault is a line in the table, not the end of the run
        logger.info("transformers failed", exc_info=True)
        return {"skipped": f"failed: {type(e).__name__}: {e}".splitlines()[0]}
    return _figures(list(outputs.values()), len(asked), num_new, seconds, attention)


def _has_flash_attention(settings: Settings) -> bool:
    from transformers.utils import is_flash_attn_2_available

    return settings.on_gpu and bool(is_flash_attn_2_available())


def _figures(outputs: list[Any], count: int, num_new: int, seconds: float, attention: str) -> Row:
    num_out = sum(len(output.generated_tokens) for output in outputs)
    if len(outputs) != count or num_out != count * num_new:
        return {
            "skipped": f"failed: {len(outputs)} of {count} requests came back, with {num_out} of "
            f"{count * num_new} tokens"
        }
    num_in = sum(len(output.prompt_ids) for output in outputs)
    row: Row = {
        "attention": attention,
        "elapsed_time": seconds,
        "num_requests": count,
        "total_num_tokens": num_in + num_out,
        "total_output_tokens": num_out,
        "requests_per_second": count / seconds,
        "tokens_per_second": (num_in + num_out) / seconds,
        "output_tokens_per_second": num_out / seconds,
        "repeats": 1,
        "measured_cr": 1.0,
    }
    # while all of them decoded
    stamps = [output.timestamps for output in outputs]
    if all(stamps):
        first, last = max(s[0] for s in stamps), min(s[-1] for s in stamps)
        between = sum(first < t <= last for s in stamps for t in s)
        if between and last > first:
            row["decode_tokens_per_second"] = between / (last - first)
    return row
