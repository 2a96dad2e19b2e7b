"""Names of tasks that stand for several, and tasks with their data.

The suite is that of Nawrot et al. (arXiv 2403.09636): MMLU, common-sense reasoning and HumanEval.
"""

from pathlib import Path
from typing import Any

from megatron_dmc.errors import DMCError

TASK_FOLDER = Path(__file__).with_name("tasks")

SUITES = {
    "paper": ("mmlu", "piqa", "boolq", "arc_challenge", "arc_easy", "hellaswag", "winogrande",
              "humaneval"),
    "local": ("dmc_next_line", "dmc_rest_of_line", "dmc_sources"),
}  # fmt: skip
"""`local` needs no download."""

SUITE_FEWSHOT = {"mmlu": 5}
"""Examples before the question where neither the task nor the user sets a number; else none."""


def expand(names: list[str]) -> list[str]:
    """Task names, suites replaced by their tasks, each once."""
    return list(dict.fromkeys(task for name in names for task in SUITES.get(name, (name,))))


def task_manager(names: list[str], include_path: str | None) -> Any:
    """lm-eval's `TaskManager` of the local tasks, a folder of the user's, and lm-eval's own tasks where
    one of these is asked for (reading their thousands of files takes a while)."""
    from lm_eval.tasks import TaskManager

    folders = [str(TASK_FOLDER), *([include_path] if include_path else [])]
    manager = TaskManager(include_path=folders, include_defaults=False)
    if all(name in manager.all_tasks for name in names):
        return manager
    return TaskManager(include_path=folders)


def load_tasks(manager: Any, names: list[str]) -> dict[str, list[Any]]:
    """Each name's tasks and groups (lm-eval objects) with their data, before anything is computed.

    Args:
        manager: of `task_manager`.

    Raises:
        DMCError: a task that does not exist, or whose data is unavailable.
    """
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown:
        near = [task for task in manager.all_tasks if task.startswith(unknown[0][:4])][:5]
        hint = f" (there are {', '.join(near)})" if near else ""
        raise DMCError(
            f"--tasks {unknown[0]}: lm-eval has no such task{hint}; `lm-eval ls tasks` lists them, and "
            "--include-path adds a folder of your own"
        )
    loaded: dict[str, list[Any]] = {}
    for name in names:
        try:
            found = manager.load([name])
        except Exception as e:  # datasets and the hub's client raise many kinds
            reason = " ".join(str(e).split())[:200] or type(e).__name__
            raise DMCError(
                f"--tasks {name}: its data is unavailable ({type(e).__name__}: {reason}); run once where "
                "there is a network and copy the folder HF_HOME here, or leave the task out "
                "(--tasks local needs no download)"
            ) from e
        groups = found["groups"]
        loaded[name] = [groups[name]] if name in groups else list(found["tasks"].values())
    return loaded
