"""The settings of DMC in a `config.json`."""

from typing import Any

DEFAULTS: dict[str, Any] = {
    "stage": "off",  # off, zero-out, retrofit, finetune; tokens merge in the last two
    "target_cr": 4.0,  # tokens / cache entries to reach
    "ramp_steps": None,  # of the training run; not used here
    "cr_schedule": "linear",  # likewise
    "zero_out_steps": None,  # likewise
    "zero_out_fraction": 0.8,  # likewise
    "alpha_offset": 5.0,  # a zeroed channel means: append
    "temperature": 0.1,  # of the relaxed decisions in training
    "noise_scale": 1.0,  # factor on their noise
    "importance": "learned",  # constant: an entry is the plain mean of its tokens
    "shared_decisions": False,  # the heads of a layer decide together
    "policy": "merge",  # evict: the token before leaves the cache instead (DMS)
    "eviction_delay": 256,  # how many later tokens still see an evicted one
    "merge_window": 0,  # only the latest tokens of a segment count; 0: all
    "merge_delay": 0,  # newest tokens that stay raw: a decision takes effect this many tokens later
    "hinge": "sequence",  # where the compression loss stops at 0: per row, by their mean, nowhere
    "loss_weight": 1.0,  # of the compression loss relative to the language-model loss
}
CHOICES = {
    "stage": ("off", "zero-out", "retrofit", "finetune"),
    "importance": ("learned", "constant"),
    "policy": ("merge", "evict"),
    "hinge": ("sequence", "batch", "none"),
}
NOT_HERE = {"pool_after_rope": False}
"""Settings that this code knows only one value of."""


def complete_settings(dmc: dict[str, Any] | None) -> dict[str, Any]:
    """The `dmc` of a config.json with defaults filled in.

    Raises:
        ValueError: a setting or its value is unknown, or not supported by this code.
    """
    for name, only in NOT_HERE.items():
        value = (dmc or {}).get(name, only)
        if value != only:
            raise ValueError(
                f"dmc {name} {value!r}: this code knows only {only!r}; use megatron-dmc"
            )
    unknown = set(dmc or {}) - set(DEFAULTS) - set(NOT_HERE)
    if unknown:
        raise ValueError(
            f"config.json: unknown dmc settings {sorted(unknown)}; known: {', '.join(DEFAULTS)}"
        )
    settings = DEFAULTS | (dmc or {})
    for name, choices in CHOICES.items():
        if settings[name] not in choices:
            raise ValueError(f"dmc {name} {settings[name]!r}: choose one of {', '.join(choices)}")
    return settings
