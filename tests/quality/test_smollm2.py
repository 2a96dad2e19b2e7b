"""examples/smollm2 at toy scale: texts, the sandbox, HumanEval, needles, the report."""

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from text_models import byte_level_tokenizer, random_llama
from toy_texts import write_texts

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples"))

from megatron_dmc import LLM
from megatron_dmc.checkpoint.tokenizer import HuggingFaceTokenizer

import demo
from smollm2 import corpus, fetch, human_eval, needle, report, run
from smollm2.sandbox import passes
from smollm2.settings import Data, read_settings
from smollm2.steps import Run

SETTINGS = ROOT / "examples" / "smollm2" / "settings.toml"
PROBLEMS = [
    {
        "task_id": "toy/0", "entry_point": "double", "prompt": "def double(x):\n",
        "canonical_solution": "    return 2 * x\n",
        "test": "def check(candidate):\n    assert candidate(3) == 6\n",
    },
    {
        "task_id": "toy/1", "entry_point": "first", "prompt": "def first(xs):\n",
        "canonical_solution": "    return xs[0]\n",
        "test": "def check(candidate):\n    assert candidate('ab') == 'a'\n",
    },
]  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    byte_level_tokenizer(folder, adds_bos=False)
    random_llama(folder, 300).float().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llm(model):
    return LLM(model, max_model_len=256)


# --- the sandbox ----------------------------------------------------------------------------------


def test_a_program_passes_when_it_reaches_its_end():
    assert passes("x = 1\nassert x == 1")
    assert passes("print('a' * 5000)")


@pytest.mark.parametrize(
    "program",
    [
        "assert False",
        "def f(:",
        "import sys; sys.exit(0)",
        "import os; os._exit(0)",
        "while True: pass",
        "import time; time.sleep(60)",
        "x = bytearray(3 << 30)",
        "open('large', 'wb').write(b'x' * (4 << 20))",
        "input()",
    ],
)
def test_a_program_that_fails_or_takes_too_much_does_not(program):
    assert not passes(program, seconds=1)


def test_a_program_has_an_empty_folder_and_no_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("A_SECRET", "x")
    assert passes("import os; assert not os.listdir('.') and 'A_SECRET' not in os.environ")
    monkeypatch.chdir(tmp_path)
    passes("open('left', 'w').write('x')")
    assert not list(tmp_path.iterdir())


def test_nothing_of_a_program_outlives_it(tmp_path):
    late = f"""
import os, time
if os.fork() == 0:
    time.sleep(1)
    open({str(tmp_path / "late")!r}, "w").close()
"""
    passes(late)
    time.sleep(2)
    assert not (tmp_path / "late").exists()


# --- HumanEval ------------------------------------------------------------------------------------


def test_pass_at_1_counts_the_answers_that_pass():
    right = [p["prompt"] + p["canonical_solution"] for p in PROBLEMS]
    wrong = PROBLEMS[1]["prompt"] + "    return None\n"
    assert human_eval.pass_at_1(PROBLEMS, right) == 1.0
    assert human_eval.pass_at_1(PROBLEMS, [right[0], wrong]) == 0.5


def test_a_chat_model_is_asked_for_the_function():
    """The answer begins within the code block; imports before the function are the problem's."""
    asked = []
    inner = SimpleNamespace(
        chat_template="{{ messages }}", bos_token=None,
        apply_chat_template=lambda messages, **_: f"<{messages[0]['content']}>",
    )  # fmt: skip
    tokenizer = HuggingFaceTokenizer.__new__(HuggingFaceTokenizer)
    tokenizer.inner = inner
    tokenizer.encode = lambda text, **_: list(text.encode())
    outputs = [SimpleNamespace(outputs=[SimpleNamespace(text="def f(x):\n    return ceil(x)\n")])]
    llm = SimpleNamespace(
        engine=SimpleNamespace(tokenizer=tokenizer), get_tokenizer=lambda: tokenizer,
        generate=lambda prompts, params: asked.extend(prompts) or outputs,
    )  # fmt: skip
    problem = {
        "prompt": 'from math import ceil\n\ndef f(x):\n    """Round up."""\n', "entry_point": "f",
        "test": "def check(candidate):\n    assert candidate(1.5) == 2\n",
    }  # fmt: skip
    answers = human_eval.programs(llm, [problem], 8)
    text = bytes(asked[0]["prompt_token_ids"]).decode()
    assert text.startswith("<Write a Python function") and text.endswith("\n```>```python\n")
    assert human_eval.pass_at_1([problem], answers) == 1.0


def test_bits_per_byte_are_the_models_own(llm, model):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    reference = AutoModelForCausalLM.from_pretrained(model)
    bits = 0.0
    for problem in PROBLEMS:
        before = tokenizer.encode(problem["prompt"])
        ids = torch.tensor([before + tokenizer.encode(problem["canonical_solution"])])
        with torch.no_grad():
            logprobs = reference(ids).logits[0, :-1].log_softmax(-1)
        chosen = logprobs.gather(1, ids[0, 1:, None])[len(before) - 1 :]
        bits -= float(chosen.sum()) / np.log(2)
    expected = bits / sum(len(p["canonical_solution"]) for p in PROBLEMS)
    assert human_eval.bits_per_byte(llm, PROBLEMS) == pytest.approx(expected, rel=1e-4)
    assert len(human_eval.programs(llm, PROBLEMS, 8)) == 2


# --- needles --------------------------------------------------------------------------------------


def test_a_needle_lies_at_every_depth_of_a_text_of_the_length(llm):
    tokenizer = llm.get_tokenizer()
    filler = np.array(tokenizer.encode("pages come and go, " * 200))
    rows = needle.prompts(tokenizer, filler, 200, 5)
    places = []
    for ids, number in rows:
        text = tokenizer.decode(ids)
        assert len(ids) == 200 and text.count(f" is {number}.") == 1 and text.endswith(" is")
        places.append(text.index(number) / len(text))
    assert places == sorted(places) and places[0] < 0.2 and places[-1] > 0.5
    assert needle.prompts(tokenizer, filler, 200, 5) == rows, "the same in every run"
    assert 0 <= needle.accuracy(llm, filler, 200, 2) <= 1


# --- texts ----------------------------------------------------------------------------------------


def test_documents_are_of_one_side_and_kind(tmp_path):
    english, code = write_texts(tmp_path)
    data = Data(megabytes=0.03, heldout_documents=0.3, validation_documents=0.2)
    texts = {"english": corpus.read_texts(english), "code": corpus.code_texts([code])}
    sizes = corpus.write_corpus(texts, tmp_path / "out", data)
    found = {
        file.stem: [json.loads(line)["path"] for line in file.read_text().splitlines()]
        for file in (tmp_path / "out").glob("*.jsonl")
    }
    assert set(found) == set(sizes) == {"train", "validation", "heldout-english", "heldout-code"}
    names = [path for paths in found.values() for path in paths]
    assert len(names) == len(set(names)) and not {"other.rst", "picture.png"} & set(names)
    assert ("copy.rst" in names) != ("3.rst" in names), "no copies"
    assert all(name.startswith("code/part/") for name in found["heldout-code"])
    assert 0 < sizes["train"] <= 2 * 30_000
    kinds = [name.startswith("code/") for name in found["train"]]
    assert 2 < sum(kinds) < len(kinds) - 2
    assert kinds != sorted(kinds) and kinds != sorted(kinds, reverse=True), "mixed"


def test_missing_packages_are_one_clear_error(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="apt-cache is not there.*--english"):
        list(corpus.debian_texts(tmp_path / "debian"))
    monkeypatch.setattr(fetch.sys, "executable", "/bin/false")
    with pytest.raises(ValueError, match="pip download nothing==1"):
        fetch.download("nothing==1", "0", tmp_path)
    (tmp_path / "nothing-1.whl").write_bytes(b"another")
    with pytest.raises(ValueError, match="not the file that was meant"):
        fetch.download("nothing==1", "0", tmp_path)


# --- settings, steps, report ----------------------------------------------------------------------


def test_settings_are_read_and_checked(tmp_path):
    settings = read_settings(SETTINGS)
    assert settings.arms["control"].target_cr is None and settings.arms["8x"].target_cr == 8
    file = tmp_path / "s.toml"
    file.write_text(SETTINGS.read_text().replace("batch =", "bach ="))
    with pytest.raises(ValueError, match=r"s\.toml.*bach"):
        read_settings(file)


def test_control_and_retrofit_differ_in_dmc_alone():
    settings = read_settings(SETTINGS)
    settings.training.borrowed_lr_mult = 10.0
    control = run.stage_flags(settings.arms["control"], "retrofit", settings)
    retrofit = run.stage_flags(settings.arms["4x"], "retrofit", settings)
    assert control == ["--dmc-stage", "off", "--dmc-teacher-weight", "1.0"]
    assert retrofit[retrofit.index("--dmc-merge-delay") + 1] == str(settings.training.merge_delay)
    assert retrofit[retrofit.index("--dmc-borrowed-lr-mult") + 1] == "10.0"
    assert settings.arms["control"].stages == settings.arms["4x"].stages


def test_a_killed_trainer_is_noticed_though_its_worker_lives_on(tmp_path):
    """A worker of a checkpoint outlives a trainer that is out of memory, and holds its output open."""
    code = ("import os, subprocess, sys; print(' iteration 1/2', flush=True);"
            "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(30)']); os.kill(os.getpid(), 9)")  # fmt: skip
    lines, began = [], time.monotonic()
    assert demo.follow([sys.executable, "-c", code], tmp_path / "log", lines.append) == -9
    assert time.monotonic() - began < 20 and lines == [" iteration 1/2"]


def figures(perplexity, cr):
    kinds = {kind: {"perplexity": perplexity, "measured_cr": cr} for kind in corpus.KINDS}
    return {
        "perplexity": {"perplexity": perplexity, "measured_cr": cr, "cache_cr": cr * 0.9, "kinds": kinds,
                       "measured_cr_per_layer_head": [[cr, cr], [1.0, cr]]},
        "long_perplexity": {"perplexity": perplexity + 1, "measured_cr": cr, "cache_cr": cr * 0.95},
        "human_eval": {"bits_per_byte": 0.5, "pass_at_1": 0.125},
        "needle": {"512": 1.0, "1024": 0.5},
        "chat": ["```python\nyes\n```"] * 20,
        "cache": {"512": {"english": 1e6, "code": 2e6, "uncompressed": 4e6}},
        "speed": {"512": 12.0},
    }  # fmt: skip


def test_the_report_holds_every_figure(tmp_path):
    settings = read_settings(SETTINGS)
    results = {"base": figures(9.0, 1.0), "control": figures(10.0, 1.0), "4x": figures(10.2, 4.0),
               "8x": figures(10.5, 8.0), "dms-4x": figures(10.4, 4.0)}  # fmt: skip
    counts = {"train": 20_000_000, "heldout-english": 1000, "heldout-code": 2000}
    for what in ("human_eval", "chat", "needle", "cache", "speed"):
        del results["dms-4x"][what]
    for what in ("needle", "cache", "speed"):
        del results["control"][what]
    rows = [{"budget": 60, "cache_cr": 3.0, "perplexity": 12.0}]
    evicted = {"perplexity": 10.0, "policies": {"h2o": rows, "tova": rows, "window": rows}}
    report.write(tmp_path, settings, results, evicted, counts, {"model": 1.0}, [Run(7, 600.0, 2)])
    found = json.loads((tmp_path / "smollm2.json").read_text())
    assert found["base_perplexity"] == 9.0 and found["control_perplexity"] == 10.0
    assert found["targets"]["8"] == {
        "perplexity": 10.5, "measured_cr": 8.0, "cache_cr": 7.2, "long_perplexity": 11.5, "long_cache_cr": 7.6,
        "human_eval_bits_per_byte": 0.5, "human_eval_pass_at_1": 0.125,
    }  # fmt: skip
    text = (tmp_path / "README.md").read_text()
    assert found["dms"]["4"]["perplexity"] == 10.4 and found["eviction"] == evicted
    assert "| 8x | 11.50 | +4.5 % | 8.00 | 7.60 |" in text, "longer windows"
    assert "7 steps in 10 minutes, 2 at a time" in text
    assert "| H2O | 60 | 3.00 | +20.0 % |" in text
    assert "+2.0 %" in text and "+5.0 %" in text and "12.5 %" in text and "20,000,000" in text
    assert text.count("```") == 2 * 4 * 20, "an answer's own fences do not end the quotation"
    assert {f.name for f in tmp_path.glob("*.svg")} == {"overview.svg", "heads.svg"}
    assert sum(f.stat().st_size for f in tmp_path.iterdir()) < 2_000_000
