"""`megatron-dmc eval`: lm-eval's tasks on the engine, with the measured CR of every result."""

import argparse
import importlib.util
import json
import logging
from pathlib import Path
from typing import Any

from megatron_dmc.engine.flags import add_engine_arguments, make_llm, model_path
from megatron_dmc.errors import DMCError
from megatron_dmc.quality.lm_eval.suite import (
    SUITE_FEWSHOT,
    SUITES,
    expand,
    load_tasks,
    task_manager,
)

_PARTS = ("results", "groups", "n-shot", "n-samples", "versions", "configs", "samples")
"""Of lm-eval's output, what is kept; each is by task."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the command, named as lm-eval's and the engine's."""
    add_engine_arguments(parser)
    group = parser.add_argument_group("evaluation")
    group.add_argument(
        "--tasks", default="local",
        help="comma-separated tasks of lm-eval, or a suite: "
        + "; ".join(f"{name} = {','.join(tasks)}" for name, tasks in SUITES.items()),
    )  # fmt: skip
    group.add_argument("--num-fewshot", type=int, help="default: the task's; for mmlu 5")
    group.add_argument(
        "--limit", type=float, help="documents of a task, or the part of them if less than 1"
    )
    group.add_argument("--output", metavar="FILE", help="write all results as JSON")
    group.add_argument("--log-samples", action="store_true", help="every answer too, in --output")
    group.add_argument("--include-path", metavar="DIR", help="folder with further tasks")
    group.add_argument("--apply-chat-template", action="store_true")
    group.add_argument("--system-instruction", metavar="TEXT")
    group.add_argument(
        "--fewshot-as-multiturn", action="store_true", help="examples as turns of the conversation"
    )
    group.add_argument(
        "--gen-kwargs", metavar="K=V,...", help="of generation tasks, as temperature=0.2,top_p=0.95"
    )
    group.add_argument("--max-gen-toks", type=int, default=256, help="where a task sets no limit")
    group.add_argument(
        "--confirm-run-unsafe-code", action="store_true",
        help="run the code that the model wrote, as humaneval must",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    if importlib.util.find_spec("lm_eval") is None:
        raise DMCError("lm-eval is not installed; pip install 'megatron-dmc[eval]'")
    names = expand([name.strip() for name in args.tasks.split(",") if name.strip()])
    if not names:
        raise DMCError(f"--tasks {args.tasks!r}: name a task, or a suite ({', '.join(SUITES)})")
    if args.include_path is not None and not Path(args.include_path).is_dir():
        raise DMCError(f"--include-path {args.include_path}: no such folder")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = task_manager(names, args.include_path)
    tasks = load_tasks(manager, names)
    for name, found in tasks.items():
        unsafe = any(_is_unsafe(task) for task in found)
        if unsafe and not args.confirm_run_unsafe_code:
            raise DMCError(
                f"--tasks {name}: runs code that the model writes; in a sandbox add "
                "--confirm-run-unsafe-code and set HF_ALLOW_CODE_EVAL=1"
            )

    from megatron_dmc.quality.lm_eval.model import MegatronDMC

    path = model_path(args)
    llm = make_llm(args)
    model = MegatronDMC(
        path, tokenizer=args.tokenizer, llm=llm, max_gen_toks=args.max_gen_toks,
        allow_pickle=args.allow_pickle, trust_remote_code=args.trust_remote_code,
        revision=args.revision,
    )  # fmt: skip
    results: dict[str, Any] = {key: {} for key in _PARTS}
    for name, found in tasks.items():
        _evaluate(args, model, manager, name, found, results)
    results["config"] = {"model": "megatron-dmc", "pretrained": path, **model.get_model_info()}
    print(table(results))
    if args.output is not None:
        from lm_eval.utils import handle_non_serializable

        text = json.dumps(results, indent=2, default=handle_non_serializable, ensure_ascii=False)
        Path(args.output).write_text(text + "\n", encoding="utf-8")
        print(f"\nresults: {args.output}")
    return 0


def _is_unsafe(task: Any) -> bool:
    members = task.get_all_tasks() if hasattr(task, "get_all_tasks") else [task]
    return any(getattr(member, "UNSAFE_CODE", False) for member in members)


def _evaluate(
    args: argparse.Namespace, model: Any, manager: Any, name: str, found: list[Any], results: dict
) -> None:
    """Add one requested task or group to `results`, with the CR of its own requests."""
    from lm_eval import simple_evaluate

    from megatron_dmc.engine.stats import decided_cr

    before = model.llm.stats()
    fewshot = args.num_fewshot if args.num_fewshot is not None else SUITE_FEWSHOT.get(name)
    output: dict[str, Any] | None = simple_evaluate(
        model=model, tasks=found, task_manager=manager, num_fewshot=fewshot, limit=args.limit,
        log_samples=args.log_samples, apply_chat_template=args.apply_chat_template,
        system_instruction=args.system_instruction,
        fewshot_as_multiturn=args.fewshot_as_multiturn, gen_kwargs=args.gen_kwargs,
        confirm_run_unsafe_code=args.confirm_run_unsafe_code, random_seed=args.seed,
        numpy_random_seed=args.seed, torch_random_seed=args.seed,
    )  # fmt: skip
    assert output is not None
    after = model.llm.stats()
    tokens = (after.seq_tokens - before.seq_tokens) * sum(map(len, after.entries_LG))
    entries = after.num_entries - before.num_entries
    for key in _PARTS:
        results[key].update(output.get(key) or {})
    for task in [name] if name in output["results"] else output["results"]:
        results["results"][task]["measured_cr"] = tokens / entries if entries else None
        results["results"][task]["decided_cr"] = decided_cr(after, before)


def table(results: dict[str, Any]) -> str:
    """Task, metric, value, standard error, CR of the cache and by the decisions; a group's members below it."""
    rows = [("task", "shots", "metric", "value", "stderr", "measured CR", "decided CR")]
    for task, metrics in results["results"].items():
        crs = [metrics.get(name) for name in ("measured_cr", "decided_cr")]
        for key, value in metrics.items():
            metric, _, filtered = key.partition(",")
            is_metric = isinstance(value, int | float) and filtered and "stderr" not in metric
            if not is_metric:
                continue
            error = metrics.get(f"{metric}_stderr,{filtered}")
            rows.append((
                task, str(results["n-shot"].get(task, "")),
                metric if filtered == "none" else f"{metric} ({filtered})", f"{value:.4f}",
                f"{error:.4f}" if isinstance(error, float) else "",
                *("" if cr is None else f"{cr:.3f}" for cr in crs),
            ))  # fmt: skip
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)
