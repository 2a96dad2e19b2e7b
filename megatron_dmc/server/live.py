"""Data of the live page at `/`: a snapshot of the engine between two steps."""

import time
from typing import Any

from megatron_dmc import __version__
from megatron_dmc.engine import EngineStats
from megatron_dmc.server.service import Service

MAX_REQUESTS_SHOWN = 100


def snapshot(service: Service, stats: EngineStats, now: float) -> dict[str, Any]:
    """A JSON document.

    Args:
        now: seconds since 1970; the difference of two documents gives rates.
    """
    unfinished = service.llm.unfinished()
    requests = []
    for stream in unfinished[:MAX_REQUESTS_SHOWN]:
        metrics = stream.metrics
        requests.append(
            {
                "id": stream.request_id,
                "age_seconds": time.monotonic() - stream.arrival_time,
                "prompt_tokens": len(stream.prompt_token_ids),
                "generated_tokens": len(stream.token_ids),
                "pages": 0 if metrics is None else metrics.num_pages,
                "preemptions": 0 if metrics is None else metrics.num_preemptions,
                "measured_cr": None if metrics is None else metrics.measured_cr,
            }
        )
    config = service.llm.info.config
    return {
        "version": __version__,
        "models": list(service.model_names),
        "time": now,
        "uptime_seconds": now - service.started,
        "max_model_len": service.max_model_len,
        "max_num_seqs": config.max_num_seqs,
        "page_size": config.block_size,
        "page_bytes": stats.page_bytes,
        "plain_entry_bytes": stats.plain_entry_bytes,
        "num_pages": stats.num_pages,
        "num_pages_in_use": stats.num_pages_in_use,
        "peak_pages_in_use": stats.peak_pages_in_use,
        "num_running": stats.num_running,
        "num_waiting": stats.num_waiting,
        "num_finished": stats.num_finished,
        "num_preemptions": stats.num_preemptions,
        "num_prompt_tokens": stats.num_prompt_tokens,
        "num_generated_tokens": stats.num_generated_tokens,
        "num_in_progress": service.concurrency.current,
        "measured_cr": stats.measured_cr,
        "measured_cr_LG": stats.measured_cr_LG,
        "has_chat": service.chat_template is not None and service.chat_template.exists,
        "num_requests": len(unfinished),
        "requests": requests,
    }
