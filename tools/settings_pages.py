"""Write the pages that list settings: docs/flags.md and docs/settings.md.

    python tools/settings_pages.py

docs/flags.md is made from `megatron_dmc/training/flags.toml`, docs/settings.md from the fields and docstrings of
`EngineConfig`. tests/docs/test_docs.py fails where a page is out of date.
"""

import importlib.metadata
from pathlib import Path

from megatron_dmc.engine.config import Setting, settings
from megatron_dmc.training.flags import Group, flag_table

DOCS = Path(__file__).resolve().parent.parent / "docs"

FLAGS_HEAD = """# Flags of Megatron-LM

`pretrain_dmc.py` parses every flag of the pinned Megatron-LM, {version}. This is what it does with each, made from
`megatron_dmc/training/flags.toml` by `tools/settings_pages.py`. A flag that is listed as refused ends the run at its start,
with the reason, if it is set to anything but its default; so does a flag that is not listed. A few pairs of flags are
refused besides, by `check_combinations` in `megatron_dmc/training/flags.py`.
"""
SECTIONS = {
    "tested": "## Works, tested\n\nA test of this project runs with it.",
    "megatron": "## Works by Megatron's code\n\nCode of Megatron that a run reaches reads it. Not each was tried here, "
    "and none of them on a GPU.",
    "same": "## Taken, changes no result",
    "off": "## Only with `--dmc-stage off`\n\nModel and step are Megatron's own there, and the flag works by its code. "
    "With DMC, or with `--dmc-teacher`, it is refused.",
    "refused": "## Refused",
}

SETTINGS_HEAD = """# Settings of the engine

Keyword arguments of `LLM` and `AsyncLLM.from_model`, and flags of `megatron-dmc generate`, `serve`, `eval`,
`bench throughput` and `bench latency`. A flag is the name with dashes: `--max-model-len 4096`; one that is on or off
has a second form, `--no-enable-dmc`. Made from `megatron_dmc/engine/config.py` by `tools/settings_pages.py`.

| setting | default | |
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
            parts.append("\n".join(["| flags | why |", "| --- | --- |", *rows]) + "\n")
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
