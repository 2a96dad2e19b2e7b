"""Write the pages that list settings: docs/flags.md and docs/settings.md.

    python tools/settings_pages.py

docs/flags.md is generated from `megatron_dmc/training/flags.toml`, docs/settings.md from the fields and docstrings of
`EngineConfig`. tests/docs/test_docs.py fails if a page is out of date.
"""

import importlib.metadata
from pathlib import Path

from megatron_dmc.engine.config import Setting, settings
from megatron_dmc.training.flags import Group, flag_table

DOCS = Path(__file__).resolve().parent.parent / "docs"

FLAGS_HEAD = """# Flags of Megatron-LM

`pretrain_dmc.py` parses every flag of the pinned Megatron-LM, {version}. This page lists its treatment of each; it is
generated from `megatron_dmc/training/flags.toml` by `tools/settings_pages.py`. A refused flag that differs from its
default ends the run at its start, with the reason; so does a flag that is not listed. In addition `check_combinations` in
`megatron_dmc/training/flags.py` refuses a few pairs of flags.
"""
SECTIONS = {
    "tested": "## Supported and tested\n\nA test of this project runs with the flag.",
    "megatron": "## Supported by Megatron's code\n\nMegatron code that a run reaches reads the flag. Not every flag "
    "was tried here, and none of them on a GPU.",
    "same": "## Accepted without effect",
    "off": "## Only with `--dmc-stage off`\n\nThere, model and step are Megatron's own, and the flag works by its code. "
    "With DMC, or with `--dmc-teacher`, it is refused.",
    "refused": "## Refused",
}

SETTINGS_HEAD = """# Settings of the engine

Keyword arguments of `LLM` and `AsyncLLM.from_model`, and flags of `megatron-dmc generate`, `serve`, `eval`,
`bench throughput` and `bench latency`. A flag is the name with dashes: `--max-model-len 4096`; a boolean flag has a
negative form, `--no-enable-dmc`. Generated from `megatron_dmc/engine/config.py` by `tools/settings_pages.py`.

| setting | default | meaning |
| --- | --- | --- |
"""


def _flags(group: Group) -> str:
    return ", ".join(f"`{flag}`" for flag in group.flags)


def flags_page() -> str:
    """The text of docs/flags.md."""
    parts = [FLAGS_HEAD.format(version=importlib.metadata.version("megatron-core"))]
    for status, head in SECTIONS.items():
        groups = [group for group in flag_table() if group.status == status]
        parts.append(head + "\n")
        if status in ("tested", "megatron"):
            for group in groups:
                remark = f" ({group.why})" if group.why else ""
                parts.append(f"{_flags(group)}{remark}\n")
        else:
            rows = [f"| {_flags(group)} | {group.why} |" for group in groups]
            parts.append("\n".join(["| flags | reason |", "| --- | --- |", *rows]) + "\n")
    return "\n".join(parts)


def _row(setting: Setting) -> str:
    choices = f" One of {', '.join(setting.choices)}." if setting.choices else ""
    return f"| `{setting.name}` | `{setting.default}` | {setting.description}{choices} |\n"


def settings_page() -> str:
    """The text of docs/settings.md."""
    return SETTINGS_HEAD + "".join(_row(setting) for setting in settings() if setting.has_flag)


PAGES = {"flags.md": flags_page, "settings.md": settings_page}


if __name__ == "__main__":
    for name, page in PAGES.items():
        (DOCS / name).write_text(page())
