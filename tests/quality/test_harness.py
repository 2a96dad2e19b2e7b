"""lm-eval on the engine: the same numbers as lm-eval's own `hf` model, and as a full forward where the
cache is compressed."""

import functools
import importlib.metadata
import json
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

pytest.importorskip("lm_eval")  # in the extra "eval", which the tests' own extra contains

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from text_models import byte_level_tokenizer, random_llama

from megatron_dmc import LLM
from megatron_dmc.checkpoint.load import full_forward, load_model
from megatron_dmc.cli import main as cli
from megatron_dmc.cli.eval import table
from megatron_dmc.config import DMCConfig
from megatron_dmc.errors import DMCError
from megatron_dmc.quality.lm_eval.model import MegatronDMC
from megatron_dmc.quality.lm_eval.suite import SUITES, TASK_FOLDER, expand, load_tasks, task_manager

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "examples" / "models" / "stdlib-llama-3m"
CODE = (ROOT / "megatron_dmc" / "engine" / "scheduler.py").read_text()


def instances(kind, *arguments):
    return [
        Instance(request_type=kind, doc={}, arguments=a, idx=i) for i, a in enumerate(arguments)
    ]


def pairs():
    lines = CODE.splitlines(keepends=True)
    usual = [("".join(lines[i : i + 6]), lines[i + 6]) for i in range(30, 120, 30)]
    # no context; a context that ends in spaces; one longer than the model's
    return [*usual, ("", "import os"), ("def f(x):\n    ", "return x"), (CODE[:4000], "    return")]


@pytest.fixture(scope="module")
def plain():
    return MegatronDMC(str(MODEL), dtype="float32", device="cpu", max_num_batched_tokens=256)


@pytest.fixture(scope="module")
def huggingface(plain):
    return HFLM(
        pretrained=str(MODEL), dtype="float32", device="cpu", max_length=plain.max_length,
        batch_size=4,
    )  # fmt: skip


@pytest.fixture(scope="module")
def compressed():
    # an offset at which the base model's channel, never trained to decide, merges about half
    dmc = DMCConfig(stage="finetune", target_cr=2.0, alpha_offset=0.05)
    loaded = load_model(MODEL, dmc=dmc, dtype=torch.float64)
    return MegatronDMC(str(MODEL), llm=LLM(loaded, max_num_batched_tokens=100, device="cpu"))


def test_log_likelihoods_are_those_of_lm_evals_hf(plain, huggingface):
    requests = instances("loglikelihood", *pairs())
    ours = plain.loglikelihood(requests, disable_tqdm=True)
    theirs = huggingface.loglikelihood(requests, disable_tqdm=True)
    for (score, greedy), (their_score, their_greedy) in zip(ours, theirs, strict=True):
        assert score == pytest.approx(their_score, abs=1e-4)
        assert greedy is their_greedy
    texts = instances("loglikelihood_rolling", (CODE[:2500],), ("x = 1\n",))
    assert plain.loglikelihood_rolling(texts, disable_tqdm=True) == pytest.approx(
        huggingface.loglikelihood_rolling(texts, disable_tqdm=True), abs=1e-2, rel=1e-6
    )


def test_completions_are_those_of_lm_evals_hf(plain, huggingface):
    settings = {"until": ["\n\n", "def "], "max_gen_toks": 24, "do_sample": False}
    requests = instances("generate_until", *((context, settings) for context, _ in pairs()[:3]))
    ours = plain.generate_until(requests, disable_tqdm=True)
    assert ours == huggingface.generate_until(requests, disable_tqdm=True)
    assert any(ours)


def test_a_task_scores_as_with_lm_evals_hf(plain, huggingface):
    results = []
    for model in (plain, huggingface):
        manager = task_manager(["dmc_next_line"], None)
        results.append(
            simple_evaluate(
                model=model,
                tasks=["dmc_next_line"],
                task_manager=manager,
                limit=6,
                log_samples=True,
                bootstrap_iters=0,
            )
        )
    ours, theirs = (r["results"]["dmc_next_line"] for r in results)
    assert ours["acc,none"] == theirs["acc,none"]
    assert ours["acc_norm,none"] == theirs["acc_norm,none"]
    for a, b in zip(*(r["samples"]["dmc_next_line"] for r in results), strict=True):
        for (score, _), (their_score, _) in zip(
            a["filtered_resps"], b["filtered_resps"], strict=True
        ):
            assert float(score) == pytest.approx(float(their_score), abs=1e-4)


def test_compressed_log_likelihoods_are_those_of_a_full_forward(compressed):
    model = compressed.llm.engine.runner.model
    vocab = compressed.llm.engine.description.vocab_size
    before = compressed.llm.stats()
    requests = [
        (None, compressed.tok_encode(context), compressed.tok_encode(continuation))
        for context, continuation in pairs()
        if context
    ]
    found = compressed._loglikelihood_tokens(requests, disable_tqdm=True)
    for (_, context, continuation), (score, greedy) in zip(requests, found, strict=True):
        tokens = (context + continuation)[-(compressed.max_length + 1) :]
        logits = full_forward(model, torch.tensor([tokens]))[0, :-1, :vocab]
        last = logits[-len(continuation) :].log_softmax(-1)
        chosen = torch.tensor(continuation)
        assert score == pytest.approx(float(last.gather(1, chosen[:, None]).sum()), abs=1e-8)
        assert greedy is bool((last.argmax(-1) == chosen).all())
    after = compressed.llm.stats()
    assert after.num_entries - before.num_entries < 0.9 * 32 * (
        after.seq_tokens - before.seq_tokens
    ), "the case must merge to mean anything"
    info = compressed.get_model_info()
    assert info["measured_cr"] == after.measured_cr > 1.1
    assert info["num_cached_tokens"] == after.seq_tokens


def test_special_tokens_and_names(compressed):
    bos, plain = compressed.prefix_token_id, compressed.tok_encode("x = 1")
    assert bos == 1 and plain[0] != bos
    assert compressed.tok_encode("x = 1", add_special_tokens=False) == plain
    assert compressed.tokenizer_name.startswith("stdlib-llama-3m-")
    before = compressed.tokenizer_name
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    turns = [{"role": "user", "content": "2 + 2"}]
    with pytest.raises(DMCError, match="no chat template"):
        compressed.apply_chat_template(turns)
    compressed.tokenizer.chat_template = template
    try:
        assert compressed.apply_chat_template(turns) == "[user]2 + 2"
        assert compressed.chat_template(True) == template
        assert compressed.tokenizer_name != before
    finally:
        compressed.tokenizer.chat_template = None


def test_generation_arguments_that_the_engine_lacks(plain):
    for bad in ({"num_beams": 4}, {"no_repeat_ngram_size": 2}, {"typical_p": 0.5}):
        with pytest.raises(DMCError, match=next(iter(bad))):
            plain.generate_until(instances("generate_until", ("x", {"until": ["\n"], **bad})))
    harmless = {"until": [], "num_beams": 1, "max_gen_toks": 2, "temperature": 0.5, "top_p": 0.9}
    requests = instances("generate_until", ("def ", harmless))
    assert len(plain.generate_until(requests, disable_tqdm=True)) == 1


def test_penalties_are_those_of_lm_evals_hf(plain, huggingface):
    settings = {"until": [], "max_gen_toks": 24, "repetition_penalty": 1.3}
    requests = instances("generate_until", *((context, settings) for context, _ in pairs()[:2]))
    ours = plain.generate_until(requests, disable_tqdm=True)
    assert ours == huggingface.generate_until(requests, disable_tqdm=True)
    without = instances(
        "generate_until",
        (pairs()[0][0], settings | {"repetition_penalty": 1.0, "do_sample": False}),
    )
    assert plain.generate_until(without, disable_tqdm=True)[0] != ours[0]
    # vLLM's, which `hf` lacks
    others = {
        "presence_penalty": 2.0,
        "frequency_penalty": 1.0,
        "min_tokens": 3,
        "bad_words": ["x"],
    }
    asked = instances("generate_until", (pairs()[0][0], settings | others))
    assert plain.generate_until(asked, disable_tqdm=True)[0] not in ("", ours[0])


@pytest.mark.parametrize("asked", [511, 512, 513, 100_000])
def test_a_task_may_ask_for_more_tokens_than_the_context_has(plain, asked, caplog):
    """The prompt keeps what fits, and the rest of the context is generated."""
    longest = plain.llm.engine.max_model_len
    assert longest == 512
    settings = {"until": ["\n"], "max_gen_toks": asked}
    contexts = ["def f(x):\n    return", CODE[:6000], ""]
    requests = instances("generate_until", *((context, settings) for context in contexts))
    texts = plain.generate_until(requests, disable_tqdm=True)
    assert len(texts) == 3 and "lost their beginning" in caplog.text
    if asked >= longest:
        short = {"until": ["\n"], "max_gen_toks": 20}
        want = plain.generate_until(
            instances("generate_until", (contexts[0], short)), disable_tqdm=True
        )
        assert texts[0][:20] == want[0][:20], "the short prompt is whole"


def test_begin_of_text_as_lm_evals_hf_has_it(tmp_path):
    folder = tmp_path / "model"
    random_llama(folder, len(byte_level_tokenizer(folder)))
    texts = ["the cache", "<|begin_of_text|>the cache", "", " a page"]
    llm = LLM(folder, device="cpu", num_pages=2000, dtype="float32")
    requests = instances("loglikelihood", ("the cache", " holds keys"), ("", "a page"))
    rolling = instances("loglikelihood_rolling", ("pages go and pages come",))
    for add_bos in (None, True, False):
        ours = MegatronDMC(str(folder), llm=llm, add_bos_token=add_bos)
        theirs = HFLM(
            pretrained=str(folder), device="cpu", add_bos_token=add_bos, max_length=ours.max_length,
            dtype="float32",
        )  # fmt: skip
        for text in texts:
            for add in (None, True, False):
                assert ours.tok_encode(text, add_special_tokens=add) == theirs.tok_encode(
                    text, add_special_tokens=add
                ), (add_bos, text, add)
        found, want = (m.loglikelihood(requests, disable_tqdm=True) for m in (ours, theirs))
        for (score, greedy), (their_score, their_greedy) in zip(found, want, strict=True):
            assert score == pytest.approx(their_score, abs=1e-4) and greedy is their_greedy
        found, want = (m.loglikelihood_rolling(rolling, disable_tqdm=True) for m in (ours, theirs))
        assert found == pytest.approx(want, abs=1e-3)


def test_the_extra_has_what_lm_evals_clients_of_servers_need():
    """`local-completions` against this project's server."""
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert any(line.startswith("lm-eval[api]") for line in extra["eval"])
    pinned = {line.split("==")[0].lower() for line in (ROOT / "constraints.txt").open()}
    needed = [r for r in importlib.metadata.requires("lm_eval") if 'extra == "api"' in r]
    assert "tenacity" in {r.split(";")[0].strip() for r in needed}
    assert {r.split(";")[0].strip() for r in needed} <= pinned


def test_the_eval_command(tmp_path, capsys):
    output = tmp_path / "results.json"
    code = cli.main([
        "eval", str(MODEL), "--tasks", "dmc_next_line,dmc_rest_of_line", "--limit", "3",
        "--device", "cpu", "--output", str(output), "--log-samples",
    ])  # fmt: skip
    printed = capsys.readouterr().out
    assert code == 0, printed
    results = json.loads(output.read_text())
    assert 0 <= results["results"]["dmc_next_line"]["acc,none"] <= 1
    assert "exact_match,none" in results["results"]["dmc_rest_of_line"]
    assert results["results"]["dmc_next_line"]["measured_cr"] == 1.0
    assert results["config"]["measured_cr"] == 1.0
    assert len(results["samples"]["dmc_next_line"]) == 3
    assert table(results) in printed


def test_lm_evals_own_command_line(tmp_path, monkeypatch, capsys):
    assert get_model("megatron-dmc") is MegatronDMC
    # its own thousands of task files would take most of the test's time
    short = functools.partialmethod(TaskManager.__init__, include_defaults=False)
    monkeypatch.setattr(TaskManager, "__init__", short)
    monkeypatch.setattr(sys, "argv", [
        "lm_eval", "--model", "megatron-dmc",
        "--model_args", f"pretrained={MODEL},dtype=float32,max_num_seqs=8", "--device", "cpu",
        "--tasks", "dmc_next_line", "--include_path", str(TASK_FOLDER), "--limit", "2",
        "--output_path", str(tmp_path),
    ])  # fmt: skip
    runpy.run_module("megatron_dmc.quality.lm_eval", run_name="__main__")
    assert "dmc_next_line" in capsys.readouterr().out
    (file,) = tmp_path.rglob("results_*.json")
    assert json.loads(file.read_text())["config"]["measured_cr"] == 1.0


def test_the_eval_command_with_an_eviction_policy(tmp_path):
    output = tmp_path / "results.json"
    arguments = [
        "eval", str(MODEL), "--tasks", "dmc_next_line", "--limit", "2", "--device", "cpu",
        "--output", str(output), "--cache-policy", "tova",
    ]  # fmt: skip
    assert cli.main([*arguments, "--cache-budget", "0.5"]) == 0
    results = json.loads(output.read_text())
    assert 1.9 < results["results"]["dmc_next_line"]["measured_cr"] <= 2.0
    assert (results["config"]["cache_policy"], results["config"]["cache_budget"]) == ("tova", 0.5)


@pytest.mark.parametrize(
    "arguments,named",
    [
        (["--tasks", ","], "--tasks"),
        (["--tasks", "broken"], "broken: its data is unavailable"),
        (["--tasks", "local", "--include-path", "nowhere"], "nowhere"),
        (["--tasks", "unsafe"], "--confirm-run-unsafe-code"),
    ],
)
def test_mistakes_are_told_before_the_model_is_loaded(tmp_path, capsys, arguments, named):
    task = {
        "task": "broken", "dataset_path": "json", "output_type": "generate_until",
        "test_split": "test", "doc_to_text": "x", "doc_to_target": "x",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "missing.jsonl")}},
    }  # fmt: skip
    (tmp_path / "broken.yaml").write_text(json.dumps(task))
    (tmp_path / "data.jsonl").write_text('{"x": 1}\n')
    task |= {"task": "unsafe", "unsafe_code": True}
    task["dataset_kwargs"] = {"data_files": {"test": str(tmp_path / "data.jsonl")}}
    (tmp_path / "unsafe.yaml").write_text(json.dumps(task))
    if "--include-path" not in arguments:
        arguments = [*arguments, "--include-path", str(tmp_path)]
    assert cli.main(["eval", "no-such-model", *arguments]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("megatron-dmc: error:") and named in error


def test_tasks_from_any_sources(tmp_path):
    for out in ("a", "b"):
        subprocess.run(
            [sys.executable, ROOT / "tools" / "build_eval_tasks.py", tmp_path / out, "--count", "2",
             "--sources", ROOT / "megatron_dmc" / "engine", "--name", "own"],
            check=True, cwd=tmp_path,
        )  # fmt: skip
    for kind in ("next_line", "rest_of_line", "recall", "sources"):
        documents = (tmp_path / "a" / f"{kind}.jsonl").read_text()
        assert documents == (tmp_path / "b" / f"{kind}.jsonl").read_text()
        assert documents.count("\n") == 2
    recall = json.loads((tmp_path / "a" / "recall.jsonl").read_text().splitlines()[0])
    name = recall["context"].split()[-2]
    assert f"{name} = {recall['choices'][recall['answer']]}\n" in recall["context"]
    output = tmp_path / "results.json"
    names = "own_recall,own_sources"
    arguments = ["--include-path", str(tmp_path / "a"), "--tasks", names, "--output", str(output)]
    assert cli.main(["eval", str(MODEL), *arguments, "--device", "cpu"]) == 0
    results = json.loads(output.read_text())["results"]
    assert set(results) == set(names.split(","))
    assert 0.5 < results["own_sources"]["bits_per_byte,none"] < 4


def test_suites_and_unknown_names():
    assert expand(["local", "piqa", "dmc_sources"]) == [*SUITES["local"], "piqa"]
    manager = task_manager(["hellasgaw"], None)
    assert set(SUITES["paper"]) | set(SUITES["local"]) <= set(manager.all_tasks)
    with pytest.raises(DMCError, match=r"hellasgaw: .*hellaswag"):
        load_tasks(manager, ["hellasgaw"])
