"""The page docs/flags.md: every flag of Megatron and what `pretrain_dmc.py` does with it.

    python tools/flags_page.py > docs/flags.md

from `megatron_dmc/training/flags.toml`; tests/training/test_flags.py fails where the page is not this one.
"""

import sys

from megatron_dmc.training.flags import Group, flag_table

HEAD = """# Flags of Megatron-LM

`pretrain_dmc.py` parses every flag of the pinned Megatron-LM, {version}. This is what it does with each, made from
`megatron_dmc/training/flags.toml` by `tools/flags_page.py`. A flag that is listed as refused ends the run at its start,
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
VERSION = "0.19.2"


def _flags(group: Group) -> str:
    return ", ".join(f"`{flag}`" for flag in group.flags)


def page() -> str:
    """The page's text."""
    parts = [HEAD.format(version=VERSION)]
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


if __name__ == "__main__":
    sys.stdout.write(page())
