"""The model card (README.md) of an exported DMC model, from what its checkpoint and the caller say of it."""

import json
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_dmc.checkpoint.description import ModelDescription
from megatron_dmc.checkpoint.field_checks import read_json_object
from megatron_dmc.config import DMCConfig
from megatron_dmc.errors import CheckpointError

UNKNOWN = "unknown"

BASE_MODEL, LICENCE = "Base model", "Licence"
"""Facts that stand in the card's metadata too, for the Hub."""

_STAGES = {
    "off": "off: plain attention",
    "zero-out": "zero-out: the borrowed channels fade; nothing merges yet",
    "retrofit": "retrofit: rising target CR",
    "finetune": "finetune: constant target CR",
}
"""Training section of a card: the checkpoint records only the stage that it was saved in."""


def training_facts(args: Namespace, iteration: int) -> dict[str, str]:
    """Rows of the card from the arguments that Megatron saved: of the last stage alone.

    Paths are those of another machine, so of each only the last part is taken.
    """
    facts = {}
    paths = getattr(args, "train_data_path", None) or getattr(args, "data_path", None) or []
    names = [Path(str(path)).name for path in paths if not _is_number(path)]
    if names:
        facts["Data"] = f"{', '.join(names)} (last stage)"
    batch, length = getattr(args, "global_batch_size", None), getattr(args, "seq_length", None)
    if iteration and batch and length:
        facts["Training"] = (
            f"last stage: {iteration:,} steps of {batch:,} x {length:,} tokens, learning rate "
            f"{getattr(args, 'lr', None) or UNKNOWN}"
        )
        if teacher := getattr(args, "dmc_teacher", None):
            facts["Training"] += f", distilled from {Path(teacher).name}"
    return facts


def report_facts(file: str | Path) -> dict[str, str]:
    """Rows of the card from the `report.json` of `megatron-dmc report`.

    Raises:
        CheckpointError: it is missing, or is none.
    """
    found = read_json_object(Path(file))
    try:
        base, dmc, cr = (
            float(found[name]) for name in ("base_perplexity", "dmc_perplexity", "measured_cr")
        )
    except (KeyError, TypeError, ValueError) as e:
        raise CheckpointError(f"{file}: not a report.json of `megatron-dmc report` ({e})") from e
    return {
        "Measured compression ratio": f"{cr:.2f}",
        "Evaluation": f"held-out perplexity {dmc:.3f}, of the base model {base:.3f}",
    }


def _is_number(text: Any) -> bool:
    return str(text).replace(".", "", 1).isdigit()


def _method(dmc: DMCConfig) -> str:
    parts = [
        "one decision per layer" if dmc.shared_decisions else "every KV head decides for itself",
        *(["an entry is the plain mean of its tokens"] if dmc.importance == "constant" else []),
        *(["keys are merged after RoPE"] if dmc.pool_after_rope else []),
        *([f"the latest {dmc.merge_delay} tokens stay raw"] if dmc.merge_delay else []),
        f"the latest {dmc.merge_window} tokens of a segment count"
        if dmc.merge_window
        else "all tokens of a segment count",
    ]
    return "; ".join(parts)


def _usage(dmc: DMCConfig, config: Mapping[str, Any]) -> str:
    engine = """```sh
megatron-dmc serve FOLDER
```"""
    if "auto_map" not in config:
        if dmc.pool_after_rope:
            return (
                "There is no code for this model in transformers; megatron-dmc trains and evaluates it, but "
                "its engine does not run it."
            )
        return f"There is no code for this model in transformers; megatron-dmc runs it:\n\n{engine}"
    return f"""With megatron-dmc's paged engine, which frees the memory:

{engine}

With transformers:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(FOLDER, trust_remote_code=True)
inputs = tokenizer("...", return_tensors="pt", return_token_type_ids=False)
outputs = model.generate(**inputs, max_new_tokens=64, return_dict_in_generate=True)
print(outputs.past_key_values.compression_ratio())
```

`gates_dmc.py` and `ops_dmc.py` hold the method, `cache_dmc.py` the compressed cache; the code needs transformers 5
and torch. In training mode the model decides with noise and adds the compression loss to `loss`."""


def model_card(
    description: ModelDescription,
    config: Mapping[str, Any],
    *,
    facts: Mapping[str, str] | None = None,
) -> str:
    """README.md of the folder: what is known of the model, what is not, and how to load it.

    Args:
        config: the contents of its `config.json`.
        facts: rows in place of "unknown", or further ones.
    """
    dmc = description.dmc
    assert dmc is not None
    rows = {
        BASE_MODEL: UNKNOWN,
        LICENCE: UNKNOWN,
        "Target compression ratio": f"{dmc.target_cr:g} (tokens / KV-cache entries)",
        "Measured compression ratio": f"{UNKNOWN}; `megatron-dmc report` measures it",
        "Last stage": _STAGES[dmc.stage],
        "Method": _method(dmc),
        "Model": description.summary(),
        "Training": UNKNOWN,
        "Data": UNKNOWN,
        "Evaluation": UNKNOWN,
    } | dict(facts or {})
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    metadata = [f"license: {json.dumps(rows[LICENCE])}"]
    if rows[BASE_MODEL] != UNKNOWN:
        metadata.append(f"base_model: {json.dumps(rows[BASE_MODEL])}")
    return f"""---
library_name: transformers
pipeline_tag: text-generation
{"\n".join(metadata)}
tags: [dynamic-memory-compression, kv-cache, megatron-dmc]
---

# A language model with a compressed KV cache

{config["architectures"][0]}: Dynamic Memory Compression (Nawrot et al., ICML 2024, arXiv 2403.09636).

| | |
| --- | --- |
{table}

{_usage(dmc, config)}
"""
