"""Makes a Hugging Face folder of a DMC model one that transformers runs without this package.

The folder gets the modeling files of `checkpoint.remote` (for `trust_remote_code=True`), a
`config.json` that names them, and a model card. Its `model_type` is `dmc_llama` instead of `llama`:
loaded as the plain model it would compute something else, so without the code it is refused.
"""

import importlib.abc
import importlib.util
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from megatron_dmc import config as settings
from megatron_dmc import errors
from megatron_dmc.checkpoint import remote
from megatron_dmc.checkpoint.description import ModelDescription
from megatron_dmc.checkpoint.families import FAMILIES, Family
from megatron_dmc.checkpoint.hf_config import DMC_CLASS, DMC_TYPE, plain_config
from megatron_dmc.checkpoint.model_card import model_card
from megatron_dmc.config import DMCConfig
from megatron_dmc.errors import UnsupportedConfig
from megatron_dmc.ops import gates

SOURCES = Path(__file__).parent / "remote"
TEMPLATE = SOURCES / "modeling_dmc_llama.py"
"""Llama's file, which is every family's with the names replaced."""
SUPPORTED = {family.architecture: family for family in FAMILIES if family.remote_code}
"""Families that transformers can run with DMC, by architecture."""

SHARED = ("modeling_dmc.py", "attention_dmc.py", "ops_dmc.py", "cache_dmc.py")
"""Files of `checkpoint.remote` that every exported folder has."""
COPIES = {gates: "gates_dmc.py", settings: "configuration_dmc.py", errors: "errors_dmc.py"}
"""The package's own modules that every exported folder has, by another name."""


def dmc_config(config: dict[str, Any]) -> dict[str, Any]:
    """Inverse of `plain_config`. What there is no code for has no `auto_map`."""
    config = plain_config(config)
    architecture = config["architectures"][0]
    named = config | {
        "architectures": [DMC_CLASS + architecture],
        "model_type": DMC_TYPE + config["model_type"],
    }
    family = SUPPORTED.get(architecture)
    dmc = config.get("dmc", {})
    if family and not dmc.get("pool_after_rope"):
        prefix = f"{module_name(family)}.{DMC_CLASS}{family.name}"
        named["auto_map"] = {
            "AutoConfig": f"{prefix}Config",
            "AutoModelForCausalLM": f"{prefix}ForCausalLM",
        }
    return named


def module_name(family: Family) -> str:
    """The module of a family's classes, in this package and in an exported folder."""
    return f"modeling_dmc_{family.model_type}"


def source_of(family: Family) -> str:
    """The contents of that module."""
    source = TEMPLATE.read_text(encoding="utf-8")
    return source.replace("Llama", family.name).replace("llama", family.model_type)


def standalone(file: Path) -> str:
    """The contents of a file, with imports of `COPIES` from its own folder."""
    source = file.read_text(encoding="utf-8")
    for module, name in COPIES.items():
        source = source.replace(f"from {module.__name__} import", f"from .{Path(name).stem} import")
    return source


class _FamilyLoader(importlib.abc.InspectLoader):
    def __init__(self, family: Family):
        self.family = family

    def get_source(self, fullname: str) -> str:
        return source_of(self.family)


def module_of(family: Family) -> ModuleType:
    """That module, imported."""
    name = f"{remote.__name__}.{module_name(family)}"
    if name not in sys.modules:
        loader = _FamilyLoader(family)
        spec = importlib.util.spec_from_loader(name, loader)
        assert spec is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        loader.exec_module(sys.modules[name])
    return sys.modules[name]


def load_as_dmc(folder: str | Path, dmc: DMCConfig, **options: Any) -> Any:
    """A transformers model with DMC from a Hugging Face folder of a plain or a DMC model.

    Args:
        dmc: settings; in place of the folder's own.
        options: passed to `from_pretrained` (`dtype`, `device_map`, ...).

    Raises:
        UnsupportedConfig: there is no code for the architecture.
    """
    config = plain_config(json.loads((Path(folder) / "config.json").read_text()))
    architecture = (config.get("architectures") or ["none"])[0]
    if architecture not in SUPPORTED:
        raise UnsupportedConfig(
            f"{folder}: {architecture} has no DMC code for transformers; {', '.join(SUPPORTED)} have"
        )
    model_class = getattr(module_of(SUPPORTED[architecture]), DMC_CLASS + architecture)
    settings = model_class.config_class.from_dict(
        config | {"dmc": dmc.to_dict(), "model_type": model_class.config_class.model_type}
    )
    return model_class.from_pretrained(folder, config=settings, **options)


def write_remote_code(
    folder: str | Path,
    description: ModelDescription,
    *,
    facts: Mapping[str, str] | None = None,
) -> None:
    """Add code and model card to a folder that holds `config.json` and weights.

    A folder of a plain model (`description.dmc` is None) is left as it is.

    Args:
        folder: changed; an existing README.md is kept.
        description: of the model in it.
        facts: see `model_card`.
    """
    if description.dmc is None:
        return
    folder = Path(folder)
    file = folder / "config.json"
    config = dmc_config(json.loads(file.read_text()))
    file.write_text(json.dumps(config, indent=2) + "\n")
    if "auto_map" in config:
        family = SUPPORTED[config["architectures"][0].removeprefix(DMC_CLASS)]
        sources = {name: standalone(SOURCES / name) for name in SHARED}
        sources |= {name: standalone(Path(str(module.__file__))) for module, name in COPIES.items()}
        sources[f"{module_name(family)}.py"] = source_of(family)
        for name, source in sources.items():
            (folder / name).write_text(source, encoding="utf-8")
    card = folder / "README.md"
    if not card.exists():
        card.write_text(model_card(description, config, facts=facts))
