"""The tolerance of every comparison with float64: twice the error of an honest version in the same dtype."""

from collections.abc import Sequence

from torch import Tensor

from megatron_dmc.errors import DMCError


def errors_within_twice_the_yardstick(
    names: Sequence[str],
    ours: Sequence[Tensor],
    exact: Sequence[Tensor],
    honest: Sequence[Tensor],
) -> dict[str, float]:
    """Relative error of each tensor, none above twice that of an honest version in its dtype.

    Raises:
        DMCError: a result is wrong: nothing may be timed.
    """
    errors = {}
    for name, a, b, c in zip(names, ours, exact, honest, strict=True):
        scale = b.norm().item() + 1e-30
        error, yardstick = ((x.double() - b).norm().item() / scale for x in (a, c))
        if not error <= 2 * yardstick + 1e-5:
            raise DMCError(
                f"{name} is wrong: relative error {error:.2e}, an honest version's {yardstick:.2e}"
            )
        errors[name] = error
    return errors
