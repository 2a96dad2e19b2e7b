"""Settings of DMC and their validation. Exported models hold a copy of this file (`checkpoint.remote_code`)."""

import enum
import math
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from megatron_dmc.errors import UnsupportedConfig


class Stage(enum.StrEnum):
    """Stages of a retrofit, and OFF for the same model without DMC."""

    OFF = "off"
    ZERO_OUT = "zero-out"
    RETROFIT = "retrofit"
    FINETUNE = "finetune"

    @property
    def compresses(self) -> bool:
        """True where tokens may merge."""
        return self in (Stage.RETROFIT, Stage.FINETUNE)


@dataclass
class DMCConfig:
    """Dynamic Memory Compression."""

    stage: Literal["off", "zero-out", "retrofit", "finetune"] = "off"
    """Stage of the retrofit. off: plain attention. zero-out: DMC off, the borrowed channels fade to
    zero. retrofit: the target CR rises from 1. finetune: constant target CR."""

    target_cr: float = 4.0
    """Compression ratio (tokens / cache entries) to reach, at least 1."""

    ramp_steps: int | None = None
    """Steps over which the retrofit stage raises the target CR. Default: all steps of the stage."""

    cr_schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Shape of the target CR's rise in the retrofit stage. cosine: half a cosine, slow at both ends.
    constant: no rise, the stage has its target from the first step."""

    zero_out_steps: int | None = None
    """Length of the zero-out stage in steps. Default: all steps of the stage."""

    zero_out_fraction: float = 0.8
    """Part of the zero-out stage after which the borrowed channels are exactly zero."""

    alpha_offset: float = 5.0
    """Offset of the decision logit; a zeroed channel then means: append."""

    temperature: float = 0.1
    """Temperature of the relaxed decisions in training."""

    noise_scale: float = 1.0
    """Factor on the noise of the decisions in training; 1 is the paper's. 0: decisions as in inference,
    with the relaxed gate's gradient."""

    importance: Literal["learned", "constant"] = "learned"
    """Weight of a token in its entry. learned: read from the queries. constant: the same for all, so
    that an entry is the plain mean of its tokens."""

    shared_decisions: bool = False
    """The KV heads of a layer decide together, by the mean of their logits, so that their cache
    lengths agree (DMC-C of the paper). Each head keeps its own importances."""

    policy: Literal["merge", "evict"] = "merge"
    """Effect of the decision. merge: the token is merged into the newest entry (DMC). evict: the token
    before it leaves the cache, some tokens later (Dynamic Memory Sparsification, DMS)."""

    eviction_delay: int = 256
    """With the policy evict: how many later tokens still see an evicted one."""

    merge_window: int = 0
    """Only the latest tokens of a segment, this many, contribute to its entry. 0: all of them."""

    merge_delay: int = 0
    """Number of newest tokens that stay raw: a decision takes effect this many tokens later.
    0: at once, the paper's method."""

    pool_after_rope: bool = False
    """An entry's key is the mean of keys that are already rotated, each at its own position. Training
    and full-sequence evaluation only; the inference engine has no such entries."""

    hinge: Literal["sequence", "batch", "none"] = "sequence"
    """Scope of the clip at 0 in the compression loss. sequence: each sequence that has reached the target
    CR. batch: microbatches that have, by their mean. none: no clip, more merging always lowers it."""

    loss_weight: float = 1.0
    """Weight of the compression loss relative to the language-model loss per token."""

    def __post_init__(self) -> None:
        choices = [s.value for s in Stage]
        if self.stage not in choices:
            raise UnsupportedConfig(
                f"--dmc-stage={self.stage!r} is not a stage; choose one of {', '.join(choices)}"
            )
        self.stage = Stage(self.stage).value  # type: ignore[assignment]
        self._require("target_cr", self.target_cr >= 1 and math.isfinite(self.target_cr),
                      "a compression ratio is tokens / entries, so it is at least 1")  # fmt: skip
        self._require("alpha_offset", self.alpha_offset > 0, "it must be positive")
        self._require("temperature", self.temperature > 0, "it must be positive")
        self._require("noise_scale", 0 <= self.noise_scale <= 1, "use 0 (none) to 1 (the paper's)")
        self._require("merge_window", self.merge_window >= 0, "use 0 for unlimited")
        self._require("policy", self.policy in ("merge", "evict"), "choose merge or evict")
        self._require("merge_window", self.merge_window == 0 or self.policy == "merge",
                      "nothing merges with --dmc-policy evict; leave it at 0")  # fmt: skip
        self._require("merge_delay", self.merge_delay >= 0, "use 0 for none")
        self._require("merge_delay", self.merge_delay == 0 or self.policy == "merge",
                      "nothing merges with --dmc-policy evict; set --dmc-eviction-delay")  # fmt: skip
        self._require("pool_after_rope", not self.pool_after_rope or self.policy == "merge",
                      "nothing merges with --dmc-policy evict; leave it out")  # fmt: skip
        self._require("cr_schedule", self.cr_schedule in ("linear", "cosine", "constant"),
                      "choose linear, cosine or constant")  # fmt: skip
        self._require("importance", self.importance in ("learned", "constant"),
                      "choose learned or constant")  # fmt: skip
        self._require("importance", self.importance == "learned" or self.policy == "merge",
                      "nothing merges with --dmc-policy evict; leave it out")  # fmt: skip
        self._require("hinge", self.hinge in ("sequence", "batch", "none"),
                      "choose sequence, batch or none")  # fmt: skip
        self._require("eviction_delay", self.eviction_delay >= 0, "it must not be negative")
        self._require("loss_weight", self.loss_weight >= 0, "it must not be negative")
        self._require("zero_out_fraction", 0 <= self.zero_out_fraction <= 1, "use 0 to 1")
        for name in ("ramp_steps", "zero_out_steps"):
            value = getattr(self, name)
            self._require(name, value is None or value >= 0, "it must not be negative")

    def _require(self, name: str, holds: bool, why: str) -> None:
        if not holds:
            flag = "--dmc-" + name.replace("_", "-")
            raise UnsupportedConfig(f"{flag}={getattr(self, name)}: {why}")

    @property
    def compresses(self) -> bool:
        """True where tokens may merge (retrofit, finetune, and every model made by them)."""
        return Stage(self.stage).compresses

    @property
    def decision_delay(self) -> int:
        """Tokens until a decision takes effect in the cache, under either policy."""
        return self.eviction_delay if self.policy == "evict" else self.merge_delay

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as stored in checkpoints and in a Hugging Face `config.json`."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "DMCConfig":
        """Inverse of `to_dict`.

        Raises:
            UnsupportedConfig: for a name that this version does not know, or a value of another type.
        """
        if not isinstance(values, dict):
            raise UnsupportedConfig(f"DMC settings are a {type(values).__name__}, not an object")
        unknown = set(values) - {f.name for f in fields(cls)}
        if unknown:
            names = ", ".join(sorted(map(str, unknown)))[:200]
            raise UnsupportedConfig(f"unknown DMC settings: {names}")
        for f in fields(cls):
            kind = int if f.default is None else type(f.default)
            value = values.get(f.name, f.default)
            fits = isinstance(value, (int, float) if kind is float else kind)
            fits = fits and isinstance(value, bool) == (kind is bool)
            if isinstance(value, int | float):
                fits = fits and abs(value) < 1e15  # NaN is not
            if not fits and not (value is None and f.default is None):
                raise UnsupportedConfig(
                    f"DMC setting {f.name}={repr(value)[:60]}: it must be a finite {kind.__name__}"
                )
        return cls(**values)
