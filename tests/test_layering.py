"""The package keeps its layers: who may import whom, read from the sources without running them.

A module imports only modules of a lower level and of its own package, wherever in the file the
import stands. `megatron_dmc/__init__.py` alone may reach up, lazily: from within a function.
"""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "megatron_dmc"

LEVELS = {
    "errors": 0,
    "config": 0,
    "schedule": 0,
    "quiet": 0,
    "startup": 0,
    "_C": 0,  # the compiled csrc: part of the ops, and imports nothing
    "_cpu": 0,
    "plotting": 1,
    "ops": 1,
    "cache": 2,
    "model": 3,
    "checkpoint": 4,
    "engine": 5,
    "training": 5,
    "server": 6,
    "plan": 6,
    "bench": 6,
    "quality": 6,
    "cli": 7,
}
"""Level of every module and package directly under megatron_dmc."""

SAME_LEVEL = {
    ("config", "errors"),
    ("bench", "plan"),
    ("bench", "server"),
}
"""(importer, imported): the only imports within a level. Add none that closes a circle."""

WITHOUT_MEGATRON = {1, 2}
WITHOUT_CONFIG = {1}
MAY_GET_ARGS = ("megatron_dmc/training/", "pretrain_dmc.py", "examples/", "tools/")


def source_files(root: Path) -> list[Path]:
    files = [*root.glob("*.py")]
    for folder in (PACKAGE, "examples", "tools"):
        files += (root / folder).rglob("*.py")
    return sorted(files)


def module_name(file: Path, root: Path) -> str:
    parts = file.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def inside_functions(tree: ast.Module) -> set[ast.AST]:
    functions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
    return {inner for f in ast.walk(tree) if isinstance(f, functions) for inner in ast.walk(f)}


def imports(tree: ast.Module, file: Path, root: Path) -> list[tuple[ast.AST, str]]:
    """(node, full dotted name) of every import statement and import call, relative ones resolved."""
    package = module_name(file, root).split(".")
    if file.name != "__init__.py":
        package = package[:-1]
    found: list[tuple[ast.AST, str]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found += [(node, f"{module}.{alias.name}") for alias in node.names]
        elif isinstance(node, ast.Call) and node.args:
            called = node.func.attr if isinstance(node.func, ast.Attribute) else None
            called = node.func.id if isinstance(node.func, ast.Name) else called
            target = node.args[0]
            if called in ("import_module", "__import__") and isinstance(target, ast.Constant):
                name = str(target.value)
                dots = len(name) - len(name.lstrip("."))
                base = package[: len(package) - dots + 1] if dots else []
                found.append((node, ".".join([*base, name.lstrip(".")])))
    return found


def uses_get_args(tree: ast.Module) -> list[ast.AST]:
    """Uses of Megatron's get_args; the one of `typing` is another function."""
    found: list[ast.AST] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module not in ("typing", "typing_extensions"):
            if any(alias.name == "get_args" for alias in node.names):
                found.append(node)
        elif isinstance(node, ast.Attribute) and node.attr == "get_args":
            owner = node.value.id if isinstance(node.value, ast.Name) else ""
            if not owner.startswith("typing"):
                found.append(node)
    return found


def check_import(importer: str, imported: str, *, lazy: bool) -> str | None:
    """The error in module `importer` importing `imported` (both full names), or None."""
    head = imported.split(".")[0]
    own = importer.split(".")[1] if "." in importer else None  # None: megatron_dmc/__init__.py
    if head == "megatron":
        if own is None:
            return "importing the package must not import Megatron"
        if LEVELS[own] in WITHOUT_MEGATRON:
            return f"'{own}' is of level {LEVELS[own]}, which knows no Megatron"
        return None
    if head != PACKAGE:
        return None
    other = imported.split(".")[1] if "." in imported else None
    if other == "__version__":
        return None
    if own is None:
        if lazy or LEVELS.get(other, 1) == 0:
            return None
        return "the package's __init__ imports its modules lazily, from within a function"
    if other not in LEVELS:
        return (
            f"'{imported}' is no module of the table of levels; "
            f"inside the package import a name from the module that defines it"
        )
    if other == own:
        return None
    level, other_level = LEVELS[own], LEVELS[other]
    if other == "config" and level in WITHOUT_CONFIG:
        return f"'{own}' is of level {level}, which gets numbers, not a config"
    if other_level < level or (own, other) in SAME_LEVEL:
        return None
    return f"'{own}' of level {level} imports '{other}' of level {other_level}"


def violations(root: Path) -> list[str]:
    found = []
    for file in source_files(root):
        path = file.relative_to(root).as_posix()
        name = module_name(file, root)
        tree = ast.parse(file.read_text(encoding="utf-8"), filename=str(file))
        if not path.startswith(MAY_GET_ARGS):
            found += [
                f"{path}:{node.lineno}: get_args() belongs to training and entry points"
                for node in uses_get_args(tree)
            ]
        if name.split(".")[0] != PACKAGE:
            continue  # entry points, tools and examples stand above every level
        if "." in name and name.split(".")[1] not in LEVELS:
            found.append(
                f"{path}: '{name.split('.')[1]}' has no level; add it to LEVELS in "
                f"tests/test_layering.py"
            )
            continue
        lazy = inside_functions(tree)
        for node, imported in imports(tree, file, root):
            message = check_import(name, imported, lazy=node in lazy)
            if message:
                found.append(f"{path}:{node.lineno}: {message}")
    return found


def test_levels():
    assert source_files(ROOT)
    found = violations(ROOT)
    assert not found, "\n" + "\n".join(found)


# --- the checker itself ---------------------------------------------------------------------------


def write_tree(root: Path, files: dict[str, str]) -> None:
    for path, text in files.items():
        file = root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


BAD = {
    "upwards": ("cache/pool.py", "from megatron_dmc.engine import Engine", "imports 'engine'"),
    "plain import": (
        "model/attention.py",
        "import megatron_dmc.cache.pool\nimport megatron_dmc.checkpoint.load",
        ":2",
    ),
    "from the package": ("cache/a.py", "from megatron_dmc import model", "imports 'model'"),
    "same level": ("server/a.py", "from megatron_dmc import plan", "imports 'plan' of level 6"),
    "engine to training": ("engine/a.py", "import megatron_dmc.training.loss", "'training'"),
    "training to engine": ("training/a.py", "from megatron_dmc.engine import a", "'engine'"),
    "inside a function": ("ops/merge.py", "def f():\n    from megatron_dmc import model", ":2"),
    "for types only": (
        "ops/merge.py",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import megatron_dmc.model.decisions",
        ":3",
    ),
    "same level, the other way": ("plan/a.py", "from megatron_dmc.bench import a", "'bench'"),
    "relative": ("cache/pool.py", "from ..engine.request import Request", "imports 'engine'"),
    "relative, of the package": ("cache/__init__.py", "from .. import engine", "imports 'engine'"),
    "import call": (
        "ops/merge.py",
        "import importlib\nimportlib.import_module('megatron_dmc.model.specs')",
        "imports 'model'",
    ),
    "megatron in level 1": ("ops/merge.py", "from megatron.core import mpu", "no Megatron"),
    "megatron in level 2": ("cache/pool.py", "def f():\n    import megatron.core", "no Megatron"),
    "config in level 1": ("ops/merge.py", "from megatron_dmc.config import DMCConfig", "a config"),
    "name of the package": ("engine/a.py", "from megatron_dmc import LLM", "that defines it"),
    "the whole package": ("engine/a.py", "import megatron_dmc", "that defines it"),
    "get_args": ("model/a.py", "from megatron.training import get_args", "get_args"),
    "get_args of a module": (
        "model/a.py",
        "import megatron.training as t\nt.get_args()",
        "get_args",
    ),
    "unknown module": ("newcomers/a.py", "", "add it to LEVELS"),
    "eager package": ("__init__.py", "from megatron_dmc.engine import LLM", "lazily"),
    "package with Megatron": ("__init__.py", "import megatron.core", "must not import Megatron"),
}


@pytest.mark.parametrize("case", BAD)
def test_checker_finds(case, tmp_path):
    path, text, message = BAD[case]
    write_tree(tmp_path, {f"{PACKAGE}/__init__.py": "", f"{PACKAGE}/{path}": text})
    found = violations(tmp_path)
    assert len(found) == 1, found
    assert found[0].startswith(f"{PACKAGE}/{path}:") and message in found[0]


def test_checker_lets_pass(tmp_path):
    good = {
        "__init__.py": "__version__ = '1'\ndef __getattr__(name):\n    import megatron_dmc.engine",
        "config.py": "from typing import get_args\nimport megatron.core\nimport megatron_dmc.errors",
        "ops/__init__.py": "from megatron_dmc import _C\nfrom megatron_dmc.ops.training.merge import merge",
        "ops/merge.py": "import typing\ntyping.get_args(int)\nfrom . import gates\nimport torch",
        "cache/pool.py": "from megatron_dmc.errors import OutOfPages\nfrom megatron_dmc import ops",
        "training/loss.py": "from megatron.training import get_args\nfrom megatron_dmc import model",
        "engine/engine.py": "from megatron_dmc import __version__\nfrom ..cache import pool",
        "checkpoint/load.py": "from megatron_dmc.model.specs import dmc_layer_spec",
        "cli/main.py": "from megatron_dmc import quality, server",
    }
    files = {f"{PACKAGE}/{path}": text for path, text in good.items()}
    files["pretrain_dmc.py"] = "from megatron.training import get_args"
    files["tools/convert.py"] = "from megatron_dmc import LLM\nfrom megatron_dmc import engine"
    write_tree(tmp_path, files)
    assert violations(tmp_path) == []


# --- what importing does --------------------------------------------------------------------------


def run_python(script: str, *args: str) -> subprocess.CompletedProcess:
    search_path = os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH", "")) if p)
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, *args],
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": search_path},
    )


def present_modules() -> list[str]:
    """Every module of the package but training.run, which is an entry point."""
    names = [module_name(file, ROOT) for file in (ROOT / PACKAGE).rglob("*.py")]
    entry_points = f"{PACKAGE}.training.run"
    return sorted(n for n in names if n != entry_points and not n.endswith("__main__"))


IMPORT_AND_COMPARE = """
import importlib, inspect, json, os, sys, types

THEIRS = '''
    argparse builtins logging warnings numpy
    torch torch.autograd torch.cuda torch.cuda.random torch.distributed torch.nn
    torch.nn.functional torch.overrides torch.utils.checkpoint
    megatron.training megatron.training.arguments megatron.training.checkpointing
    megatron.training.global_vars megatron.training.initialize megatron.training.training
    megatron.training.utils
    megatron.core megatron.core.parallel_state megatron.core.utils
    megatron.core.datasets.utils megatron.core.fusions.fused_softmax
    megatron.core.models.gpt megatron.core.models.gpt.gpt_layer_specs
    megatron.core.models.gpt.gpt_model megatron.core.pipeline_parallel.p2p_communication
    megatron.core.pipeline_parallel.schedules megatron.core.tensor_parallel
    megatron.core.tensor_parallel.layers megatron.core.tensor_parallel.random
    megatron.core.transformer.attention megatron.core.transformer.dot_product_attention
    megatron.core.transformer.spec_utils megatron.core.transformer.transformer_block
    megatron.core.transformer.transformer_config megatron.core.transformer.transformer_layer
'''.split()
OPTIONAL = {"fastapi", "uvicorn", "uvloop", "httptools", "prometheus_client", "lm_eval", "flash_attn",
            "transformer_engine", "matplotlib", "jinja2", "triton", "llama_cpp", "vllm"}

def public(owner):
    return {name: value for name, value in vars(owner).items()
            if not name.startswith("_") or name in ("__init__", "__new__", "__call__", "__dict__")}

def state():
    # The values themselves are kept, so that no freed object's id is given to another.
    seen = {}
    for module_name in THEIRS:
        module = sys.modules[module_name]
        for name, value in public(module).items():
            seen[module_name, name] = value
            if inspect.isclass(value) and value.__module__.split(".")[0] in ("torch", "megatron"):
                for key, member in public(value).items():
                    seen[module_name, name, key] = member
    return seen

for name in THEIRS:
    importlib.import_module(name)
try:
    import lm_eval  # sets a variable for the hub's client; megatron_dmc.quality.lm_eval.model cannot but import it
except ImportError:
    pass
environment, hooks = dict(os.environ), (sys.excepthook, sys.argv[:1])
before = state()
skipped = []
for name in json.loads(sys.argv[1]):
    try:
        importlib.import_module(name)
    except ImportError as error:
        if (error.name or "").split(".")[0] not in OPTIONAL:
            raise
        skipped.append(name)
{damage}
after = state()

missing = object()
changed = sorted(
    ".".join(key) for key in before.keys() | after.keys()
    if id(before.get(key, missing)) != id(after.get(key, missing))
    # a submodule that was imported for the first time becomes an attribute of its package
    and not (key not in before and isinstance(after[key], types.ModuleType))
)
if environment != dict(os.environ):
    changed.append("os.environ")
if hooks != (sys.excepthook, sys.argv[:1]):
    changed.append("hooks of sys")
print(json.dumps({"changed": changed, "skipped": skipped}))
"""


def changed_by_imports(modules: list[str], damage: str = "") -> list[str]:
    script = IMPORT_AND_COMPARE.replace("{damage}", damage)
    result = run_python(script, json.dumps(modules))
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])["changed"]


def test_importing_changes_nobody_elses_module():
    assert changed_by_imports(present_modules()) == []


def test_a_change_would_be_seen():
    damage = """
import torch, megatron.core.transformer.attention as attention
torch.cuda.current_device = lambda: "cpu"
attention.SelfAttention.forward = lambda self: None
attention.extra = 1
"""
    found = changed_by_imports([PACKAGE], damage)
    assert {
        "torch.cuda.current_device",
        "megatron.core.transformer.attention.SelfAttention.forward",
        "megatron.core.transformer.attention.extra",
    } <= set(found)


def test_low_levels_load_no_megatron():
    """Not even through a module that they may import."""
    low = [
        name
        for name in present_modules()
        if name == PACKAGE or LEVELS.get(name.split(".")[1]) in WITHOUT_MEGATRON
    ]
    script = (
        "import importlib, json, sys\n"
        "for name in json.loads(sys.argv[1]):\n"
        "    importlib.import_module(name)\n"
        "print([n for n in sys.modules if n.split('.')[0] == 'megatron'])"
    )
    result = run_python(script, json.dumps(low))
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "[]"
