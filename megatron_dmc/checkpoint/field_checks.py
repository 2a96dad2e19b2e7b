"""Types and bounds of what describes a model, looked at as a whole before anything is allocated.

The bounds are far above every model that is known; they keep a typing error or a hostile file from taking
the machine's memory before weights and sizes are compared.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from megatron_dmc.errors import CheckpointError

CONFIG_BYTES = 4 * 2**20
"""A `config.json` is refused above this; known ones have some KB."""
MOST_EXPERTS = 2**17
"""Experts of all layers together."""


class Bounds(NamedTuple):
    """Allowed values of a field."""

    kind: type
    least: float = 0
    most: float = 0
    hf: str = ""
    """`config.json`'s key, where it has another name."""
    optional: bool = False
    """It may be None."""


BOUNDS = {
    "num_layers": Bounds(int, 1, 4096, "num_hidden_layers"),
    "hidden_size": Bounds(int, 1, 2**20),
    "ffn_hidden_size": Bounds(int, 1, 2**22, "intermediate_size"),
    "num_attention_heads": Bounds(int, 1, 2**16),
    "num_query_groups": Bounds(int, 1, 2**16, "num_key_value_heads"),
    "kv_channels": Bounds(int, 1, 2**14, "head_dim"),
    "vocab_size": Bounds(int, 1, 2**24),
    "padded_vocab_size": Bounds(int, 0, 2**25),
    "max_position_embeddings": Bounds(int, 1, 2**31 - 1),
    "rotary_base": Bounds(float, 1, 1e15, "rope_theta"),
    "layernorm_epsilon": Bounds(float, 0, 1, "rms_norm_eps"),
    "init_method_std": Bounds(float, 0, 1e3, "initializer_range"),
    "share_embeddings_and_output_weights": Bounds(bool, hf="tie_word_embeddings"),
    "add_qkv_bias": Bounds(bool),
    "qk_layernorm": Bounds(bool),
    "moe_router_pre_softmax": Bounds(bool),
    "rope_scaling_factor": Bounds(float, 1e-3, 1e6, "rope_scaling.factor", optional=True),
    "rope_linear_factor": Bounds(int, 1, 10**6, "rope_scaling.factor", optional=True),
    "borrowed_rope_pair": Bounds(int, 0, 2**13 - 1, optional=True),
    "num_experts": Bounds(int, 1, 2**14, optional=True),
    "moe_router_topk": Bounds(int, 1, 2**14, "num_experts_per_tok"),
    "moe_ffn_hidden_size": Bounds(int, 1, 2**22, "moe_intermediate_size", optional=True),
}
"""Of `ModelDescription`'s fields."""


def shown(value: Any) -> str:
    """A value of whatever a file holds, short enough for an error message."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits, lists in lists
        text = f"a {type(value).__name__}"
    return text if len(text) <= 60 else text[:57] + "..."


def problem(name: str, value: Any, bounds: Bounds) -> str | None:
    """The error in a value; None if it is valid."""
    if value is None and bounds.optional:
        return None
    kind, least, most = bounds.kind, bounds.least, bounds.most
    if kind is bool:
        fits, rule = isinstance(value, bool), "true or false"
    else:
        number = isinstance(value, int) or (
            isinstance(value, float) and math.isfinite(value) and kind is float
        )
        fits = number and not isinstance(value, bool) and least <= value <= most
        rule = f"a {'whole' if kind is int else 'finite'} number from {least:.10g} to {most:.10g}"
    also = f" ({bounds.hf})" if bounds.hf else ""
    return None if fits else f"{name}={shown(value)}{also} must be {rule}"


def token_problem(name: str, value: Any, *, several: bool) -> str | None:
    """The error in a special token's id (`several`: or a list of ids)."""
    ids = value if several and isinstance(value, list) else [value]
    if all(i is None or (type(i) is int and -1 <= i < 2**31) for i in ids) and len(ids) <= 1000:
        return None
    return f"{name}={shown(value)} must be a token id{' or a list of them' if several else ''}"


def field_problems(values: Mapping[str, Any]) -> list[str]:
    """All errors in the fields of a `ModelDescription`: types, bounds, divisibility."""
    found = {
        name: text
        for name, bounds in BOUNDS.items()
        if name in values and (text := problem(name, values[name], bounds))
    }
    problems = list(found.values())
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        text = token_problem(name, values.get(name), several=name == "eos_token_id")
        problems += [text] if text else []

    def sound(*names: str) -> bool:
        return not any(name in found or values.get(name) is None for name in names)

    if sound("num_attention_heads", "num_query_groups"):
        heads, groups = values["num_attention_heads"], values["num_query_groups"]
        if heads % groups:
            problems.append(
                f"num_attention_heads={heads} is not a multiple of num_query_groups={groups} "
                "(num_key_value_heads)"
            )
    if sound("kv_channels") and values["kv_channels"] % 2:
        problems.append(
            f"kv_channels={values['kv_channels']} (head dim) is odd: RoPE rotates pairs"
        )
    if sound("kv_channels", "borrowed_rope_pair"):
        pair, pairs = values["borrowed_rope_pair"], values["kv_channels"] // 2
        if pair >= pairs:
            problems.append(
                f"borrowed_rope_pair={pair}: a head of kv_channels={values['kv_channels']} has the RoPE "
                f"pairs 0 to {pairs - 1}"
            )
    if sound("rotary_base") and int(values["rotary_base"]) != values["rotary_base"]:
        problems.append(
            f"rotary_base={values['rotary_base']}: Megatron's --rotary-base is a positive integer"
        )
    if sound("num_experts", "num_layers"):
        experts, layers = values["num_experts"], values["num_layers"]
        if experts * layers > MOST_EXPERTS:
            problems.append(
                f"num_experts={experts} in num_layers={layers} are more than {MOST_EXPERTS} together"
            )
        if sound("moe_router_topk") and values.get("moe_router_topk", 2) > experts:
            problems.append(
                f"moe_router_topk={values['moe_router_topk']} (num_experts_per_tok) must be 1 to "
                f"num_experts={experts}"
            )
    if sound("padded_vocab_size", "vocab_size"):
        padded, vocab = values["padded_vocab_size"], values["vocab_size"]
        if 0 < padded < vocab:
            problems.append(f"padded_vocab_size={padded} is below vocab_size={vocab}")
    return problems


def read_json_object(file: Path, *, most_bytes: int = CONFIG_BYTES) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        CheckpointError: it cannot be read, is too large, or holds something else.
    """
    try:
        size = file.stat().st_size
        if size > most_bytes:
            raise CheckpointError(f"{file}: {size} bytes, more than {most_bytes}: not such a file")
        value = json.loads(file.read_text(encoding="utf-8"))
    except OSError as e:
        raise CheckpointError(f"{file}: cannot be read ({e.strerror or e})") from e
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as e:
        raise CheckpointError(f"{file}: not valid JSON ({e}); copy the file again") from e
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: holds {type(value).__name__}, not a JSON object")
    return value
