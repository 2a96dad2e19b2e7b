"""What changes from step to step: target CR, merge rate, zero-out scale. docs/method.md, sections 4 and 5.

Steps count from 0: step s is the (s + 1)-th optimizer step of the stage. No torch.
"""


def target_cr(step: int, *, ramp_steps: int, target: float) -> float:
    """Target CR of a step: rises linearly from 1 to `target` over `ramp_steps`, then stays.

    `ramp_steps = 0` is the constant target of the finetune stage.
    """
    if ramp_steps <= 0 or step >= ramp_steps:
        return float(target)
    return 1.0 + (target - 1.0) * max(step, 0) / ramp_steps


def target_merge_rate(cr: float) -> float:
    """Merge rate at which tokens / entries is `cr`: 1 - 1 / cr."""
    return 1.0 - 1.0 / cr


def zero_out_scale(step: int, *, steps: int, fraction: float) -> float:
    """Factor on the borrowed channels: falls linearly from 1 to 0 over the first `fraction` of `steps`."""
    span = fraction * steps
    return 0.0 if span <= 0 else max(0.0, 1.0 - step / span)
