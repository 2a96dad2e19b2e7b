"""Command-line flags of the engine, generated from `EngineConfig`. Imports neither torch nor Megatron."""

import argparse
import os
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from megatron_dmc.checkpoint.hub import local_path
from megatron_dmc.engine.config import Setting, settings
from megatron_dmc.errors import DMCError
from megatron_dmc.startup import without_garbage_collector

if TYPE_CHECKING:
    from megatron_dmc.engine.llm import LLM

CHECKPOINT_SETTINGS = ("allow_pickle", "verify_checkpoint", "trust_remote_code")
"""The settings of commands that read a checkpoint and build no engine."""
_SHORT = {"tensor_parallel_size": ["-tp"]}


def add_engine_arguments(parser: argparse.ArgumentParser, **defaults: Any) -> None:
    """Add the model, its tokenizer and a flag for every setting of the engine.

    Args:
        defaults: instead of those of `EngineConfig`.
    """
    group = parser.add_argument_group("engine")
    group.add_argument(
        "model_path", metavar="MODEL", nargs="?",
        help="Hugging Face folder or Hub id, Megatron checkpoint, or GGUF file",
    )  # fmt: skip
    group.add_argument("--model", metavar="PATH", help="alternative spelling of MODEL")
    group.add_argument("--tokenizer", metavar="PATH", help="or Hub id; default: the model's own")
    add_settings(group)
    parser.set_defaults(**defaults)


def add_settings(
    group: argparse._ActionsContainer, only: Collection[str] | None = None
) -> None:  # fmt: skip
    """Add a flag for every setting of the engine, or for some, by name."""
    for setting in settings():
        if setting.has_flag if only is None else setting.name in only:
            flags = ["--" + setting.name.replace("_", "-"), *_SHORT.get(setting.name, [])]
            group.add_argument(*flags, **_options(setting))


def _options(setting: Setting) -> dict[str, Any]:
    """Keyword arguments of `add_argument`. Values are checked by `EngineConfig`, not here."""
    text = setting.description.replace("%", "%%")
    if not setting.optional:
        text += f" Default: {_shown(setting.default)}."
    options: dict[str, Any] = {"default": setting.default, "help": text}
    if setting.kind is bool:
        return options | {"action": argparse.BooleanOptionalAction}
    if setting.kind is list:
        return options | {"type": int, "nargs": "+", "metavar": "N"}
    metavar = {int: "N", float: "X", str: "VALUE"}[setting.kind]
    if setting.choices:
        metavar = "{" + ",".join(setting.choices) + "}"
    kind: Any = _number if setting.name == "cache_budget" else setting.kind
    return options | {"type": kind, "metavar": metavar}


def _shown(default: Any) -> str:
    return ("yes" if default else "no") if isinstance(default, bool) else f"{default}"


def _number(text: str) -> int | float:
    """A whole number, or with a decimal point a float."""
    return float(text) if "." in text else int(text)


def engine_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The settings in parsed flags, as keyword arguments of `LLM`."""
    return {setting.name: getattr(args, setting.name) for setting in settings() if setting.has_flag}


def model_path(args: argparse.Namespace) -> str:
    """The model, in either spelling.

    Raises:
        DMCError: neither was given, or both.
    """
    given = [path for path in (args.model_path, args.model) if path is not None]
    if len(given) != 1:
        raise DMCError("give the model once: MODEL or --model PATH")
    return given[0]


def tokenizer_path(args: argparse.Namespace) -> str | None:
    """The path after --tokenizer; None: the model's own.

    Raises:
        DMCError: it does not exist.
    """
    if args.tokenizer is None:
        return None
    place = local_path(args.tokenizer, with_weights=False)
    if not place.exists():
        raise DMCError(f"--tokenizer {args.tokenizer}: no such folder or file")
    return str(place)


def is_follower(args: argparse.Namespace) -> bool:
    """Whether torchrun started this process as a rank other than 0, which runs `make_llm(args).follow()`.

    Raises:
        DMCError: torchrun started several processes without --tensor-parallel-size.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if args.tensor_parallel_size == 1 < world_size:
        raise DMCError(
            f"{world_size} processes were started (WORLD_SIZE={world_size}), and each would load the "
            f"model for itself; add --tensor-parallel-size {world_size}"
        )
    return args.tensor_parallel_size > 1 and int(os.environ.get("RANK", "0")) > 0


def make_llm(args: argparse.Namespace) -> "LLM":
    """The `LLM` of the flags.

    Raises:
        DMCError: the model cannot be read, or a setting is invalid.
    """
    with without_garbage_collector():
        from megatron_dmc.engine.llm import LLM

        return LLM(model_path(args), tokenizer_path(args), **engine_settings(args))
