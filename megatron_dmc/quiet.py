"""Warnings of Megatron and torch that say nothing to a user of this package.

They are about accelerator packages that are absent, which is normal, and about choices that are not the
user's. Entry points silence them for the process; the package only while it imports Megatron or loads a
model.
"""

import contextlib
import logging
import warnings
from collections.abc import Iterator

_MESSAGES = (
    (".*(Transformer Engine|transformer-engine|Apex)", UserWarning),
    ("full scope is deprecated", UserWarning),
    (r"\s*It is recommended to use a ModelConfig", UserWarning),
    ("MimoModelConfig is experimental", UserWarning),
    ("'pin_memory' argument is set as true but no accelerator", UserWarning),
)
_LOGGERS = ("torch.utils.cpp_extension", "megatron.core.models.gpt.gpt_model")


def _ignore() -> None:
    for message, category in _MESSAGES:
        warnings.filterwarnings("ignore", message=message, category=category)


def silence_optional_packages() -> None:
    """For the rest of the process; entry points call it, before they import Megatron."""
    _ignore()
    for name in _LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Within, other packages' warnings (of their import, of building a model) are not heard; afterwards
    filters and levels are as they were."""
    levels = {name: logging.getLogger(name).level for name in _LOGGERS}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"(?!megatron_dmc)")
        for name in _LOGGERS:
            logging.getLogger(name).setLevel(logging.ERROR)
        try:
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)
