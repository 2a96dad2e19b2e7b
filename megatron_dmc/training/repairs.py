"""Where Megatron 0.19.2 falls short of what it is asked to do here; entry points call these.

Each is an explicit call; importing this module changes nothing.
"""


def skip_needless_compilation() -> None:
    """Megatron runs `make` for its dataset helper, which the wheel ships compiled and without a
    Makefile; where the helper imports, there is nothing to compile."""
    from megatron.core.datasets import utils

    try:
        import megatron.core.datasets.helpers_cpp  # noqa: F401
    except ImportError:
        return
    utils.compile_helpers = lambda: None
