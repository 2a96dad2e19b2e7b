"""Values that change from step to step: target CR, merge rate, zero-out scale. docs/method.md, sections 4 and 5.

Steps count from 0: step s is the (s + 1)-th optimizer step of the stage. No torch.
"""

import math
from typing import Literal


def target_cr(
    step: int,
    *,
    ramp_steps: int,
    target: float,
    schedule: Literal["linear", "cosine", "constant"] = "linear",
) -> float:
    """Target CR of a step: rises from 1 to `target` over `ramp_steps`, then stays.

    `ramp_steps = 0` is the constant target of the finetune stage.

    Args:
        step, ramp_steps: optimizer steps; or, both of them, samples.
        schedule: linear; cosine: `1 + (target - 1) (1 - cos(pi step / ramp_steps)) / 2`; constant:
            `target` at every step.
    """
    if schedule == "constant" or ramp_steps <= 0 or step >= ramp_steps:
        return float(target)
    done = max(step, 0)
    if schedule == "cosine":
        return 1.0 + (target - 1.0) * 0.5 * (1.0 - math.cos(math.pi * done / ramp_steps))
    return 1.0 + (target - 1.0) * done / ramp_steps


def target_merge_rate(cr: float) -> float:
    """Merge rate at which tokens / entries is `cr`: 1 - 1 / cr."""
    return 1.0 - 1.0 / cr


def zero_out_scale(step: int, *, steps: int, fraction: float) -> float:
    """Factor on the borrowed channels: falls linearly from 1 to 0 over the first `fraction` of `steps`."""
    span = fraction * steps
    return 0.0 if span <= 0 else max(0.0, 1.0 - step / span)
