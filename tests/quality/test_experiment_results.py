"""Measurements on the experiments' arms: budgets, eviction in whole windows against the engine,
classes of token, sizes over time; and the file, tables and figures made of it."""

import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from random_models import VOCAB, random_model, retrofitted

from megatron_dmc import LLM, SamplingParams
from megatron_dmc.checkpoint.load import LoadedModel
from megatron_dmc.checkpoint.tokenizer import load_tokenizer
from megatron_dmc.config import DMCConfig
from megatron_dmc.quality.likelihood import evaluate

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "examples" / "experiments"))

import plots

import analyse
import eviction
import measurements
import result_data
import result_tables
import texts
import token_classes


@pytest.fixture(scope="module")
def processor():
    from sentencepiece import SentencePieceProcessor

    file = ROOT / "examples" / "models" / "stdlib-llama-3m" / "tokenizer.model"
    return SentencePieceProcessor(model_file=str(file))


# --- budgets and eviction


@pytest.mark.parametrize("length,cr", [(256, 2), (256, 4), (256, 8), (512, 4), (7, 3), (10, 1)])
def test_budgets_solve_their_equations(length, cr):
    assert eviction.final_budget(length, cr) == max(1, round(length / cr))
    budget = eviction.mean_budget(length, cr)

    def off(b):
        return abs(sum(min(t, b) for t in range(1, length + 1)) - sum(range(length + 1)) / cr)

    assert 1 <= budget <= length
    assert off(budget) == min(off(b) for b in range(1, length + 1))
    sizes = sum(min(t, budget) for t in range(1, length + 1))
    final, mean = eviction.measured_crs(length, budget)
    assert final == length / budget
    assert mean == pytest.approx(length * (length + 1) / 2 / sizes)
    if length >= 256:
        assert mean == pytest.approx(cr, rel=0.04)
        # for long windows: B T - B^2 / 2 = T^2 / (2 CR)
        assert budget == pytest.approx(length * (1 - (1 - 1 / cr) ** 0.5), abs=1)


@pytest.mark.parametrize("policy", ["h2o", "tova", "window"])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_whole_windows_give_the_engines_log_likelihoods(policy, kv_heads):
    loaded = random_model(kv_heads)
    ids = torch.randint(0, VOCAB, (3, 29), generator=torch.Generator().manual_seed(2))
    for budget in (1, 7, 40):
        logits = eviction.evicting_forward(loaded.model, ids[:, :-1], policy, budget)
        found = logits[..., :VOCAB].log_softmax(-1)
        llm = LLM(loaded, cache_policy=policy, cache_budget=budget, device="cpu")
        params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
        prompts = [{"prompt_token_ids": row} for row in ids.tolist()]
        nll = 0.0
        for x, output in enumerate(llm.generate(prompts, params, use_tqdm=False)):
            for t in range(1, 29):
                want = output.prompt_logprobs[t][int(ids[x, t])].logprob
                assert abs(float(found[x, t - 1, ids[x, t]]) - want) < 1e-9
                nll -= want
        row = measurements.eviction(loaded, ids.numpy(), policy, budget, batch=2)
        assert row["perplexity"] == pytest.approx(np.exp(nll / (3 * 28)), rel=1e-5)


# --- sizes over time


@pytest.mark.parametrize("delay", [0, 1, 4])
def test_sizes_over_time_count_the_entries_that_are_there(delay):
    is_gone = torch.rand(2, 3, 17, 2, generator=torch.Generator().manual_seed(4)) < 0.6
    sizes = measurements.sizes_over_time(is_gone, delay)
    for index in np.ndindex(2, 3, 2):
        layer, x, head = index
        decisions = is_gone[layer, x, :, head].tolist()
        for t in range(17):
            alive = [j for j in range(t + 1) if not (decisions[j] and t - j >= delay)]
            assert sizes[layer, x, t, head] == len(alive)


@pytest.mark.parametrize(
    "settings",
    [{}, {"merge_delay": 5}, {"policy": "evict", "eviction_delay": 4}],
    ids=["merge", "delayed-merge", "evict"],
)
def test_the_final_size_is_what_the_engine_holds(settings):
    """Decisions by the full forward, slots counted by the engine; `evaluate` sums the same over time."""
    dmc = DMCConfig(stage="finetune", alpha_offset=0.3, target_cr=2.0, **settings)
    loaded = random_model(2, dmc=dmc)
    tokens = torch.randint(0, VOCAB, (161,), generator=torch.Generator().manual_seed(5))
    ids = tokens.unfold(0, 41, 40)
    llm = LLM(loaded, device="cpu")
    prompts = [{"prompt_token_ids": row[:-1]} for row in ids.tolist()]
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=1), use_tqdm=False)
    held = sum(output.metrics.num_entries for output in outputs)
    row = measurements.cache(loaded, ids.numpy())
    assert row["final_cr"] == pytest.approx(4 * 40 * 3 * 2 / held)
    assert 1.2 < row["final_cr"] != row["mean_cr"]
    found = evaluate(loaded, tokens.numpy(), length=40, progress=False)
    assert found.cache_cr == pytest.approx(row["mean_cr"])
    if dmc.decision_delay:
        assert found.cache_cr < found.measured_cr


# --- texts

SOURCE = '''import os


def read_lines(path, n=10):
    """Doc of it."""
    # a note
    if n > 0x1F:
        return f"x {path}" + 'é'
    return ""
'''


def test_classes_of_a_small_source(processor):
    by_character = token_classes.character_classes(SOURCE)

    def classes_of(text, start=0):
        at = SOURCE.index(text, start)
        return set(by_character[at : at + len(text)])

    assert classes_of("import") == classes_of("def") == classes_of("return") == {"keyword"}
    assert classes_of("read_lines") == {"name"} and classes_of("10") == {"number"}
    assert classes_of("0x1F") == {"number"} and classes_of("):") == {"operator"}
    assert classes_of('"""Doc of it."""') == {"docstring"} and classes_of("# a note") == {"comment"}
    assert classes_of("\n        ", SOURCE.index("0x1F")) == {"layout"}
    assert classes_of('f"x ') == classes_of("'é'") == {"string"}
    assert classes_of("path", SOURCE.index("{")) == {"name"}
    assert classes_of('""\n', SOURCE.rindex("return")) == {"string", "layout"}
    ids, classes, places = token_classes.classify(processor, SOURCE)
    assert ids == processor.encode(SOURCE)
    assert set(classes) <= set(token_classes.CLASSES)
    spans = [(first, end) for _, first, end in token_classes.pieces(processor, SOURCE)]
    at = {SOURCE[a:b].strip(): i for i, (a, b) in reversed(list(enumerate(spans)))}
    assert (classes[at["def"]], places[at["def"]]) == ("keyword", "first piece")
    inner = [i for i, (a, _) in enumerate(spans) if SOURCE[a - 2 : a].isalpha() and a > 1]
    assert inner and all(places[i] == "later piece" for i in inner if SOURCE[spans[i][0]].isalpha())
    assert all(places[i] == "no word" for i, c in enumerate(classes) if c in ("layout", "operator"))


def test_windows_and_repeats(processor):
    stream = np.arange(101)
    rows = texts.spaced_windows(stream, 10, 4)
    assert rows.shape == (4, 11) and rows[0, 0] == 0 and rows[-1, 0] == 90
    assert len(texts.spaced_windows(stream, 10, None)) == 10
    filler = np.array(processor.encode(SOURCE * 20))
    for variant in ("name", "code"):
        for distance in (32, 60, None):
            task = texts.repeats(variant, distance, filler, processor, length=96, count=5)
            assert task.ids_XT.shape == (5, 97)
            for row, scored in zip(task.ids_XT, task.scored, strict=True):
                assert 0 < len(scored) and scored.stop <= 97
                if distance is not None:
                    start = scored.start - (3 if variant == "name" else 4)
                    assert (row[start:] == row[start - distance : 97 - distance]).all()
                elif variant == "name":
                    earlier = [row[i : i + len(scored)].tolist() for i in range(scored.start - 8)]
                    assert row[list(scored)].tolist() not in earlier


def test_a_model_that_copies_is_right_and_one_that_guesses_is_not(processor):
    """The first has the string's tokens by looking the distance back; without a first occurrence there is
    nothing to find."""
    filler = np.array(processor.encode(SOURCE * 20))

    def copies(back):
        def forward(ids_XT):
            guess = ids_XT.roll(back - 1, dims=1)
            return torch.nn.functional.one_hot(guess, processor.vocab_size()) * 20.0, None

        return forward

    for distance in measurements.DISTANCES[:2]:
        found = measurements.copying(copies(distance), filler, processor, length=256, count=3)
        for variant in ("name", "code"):
            assert found[variant][str(distance)]["accuracy"] == 1.0
            assert found[variant][str(distance)]["loss"] < 1e-4
            assert found[variant][str(distance)]["standard_error"] == 0.0
            assert found[variant]["128"]["accuracy"] < 0.5
        assert found["name"]["none"]["accuracy"] < 0.3


def test_kinds_sum_over_layers_heads_and_classes(processor):
    """On a random model: classes and places share out the same tokens and merges."""
    loaded = random_model(2, dmc=retrofitted())
    draw = np.random.default_rng(0)
    ids = draw.integers(0, VOCAB, (5, 25))
    classes, places = draw.integers(0, 3, (5, 25)), draw.integers(0, 2, (5, 25))
    found = measurements.kinds(loaded, {"library code": texts.Windows(ids, classes, places)})
    decided = {
        part: sum(
            row["merge_rate"] * int((labels[:, 1:-1] == i).sum())
            for i, row in enumerate(found[part].values())
            if "merge_rate" in row
        )
        for part, labels in (("classes", classes), ("places", places))
    }
    assert decided["classes"] == pytest.approx(decided["places"])
    cr = found["kinds"]["library code"]["measured_cr"]
    # the first token of each of five windows of 24 does not merge
    assert decided["classes"] / (5 * 24) == pytest.approx(1 - 1 / cr)
    assert cr > 1.2


def test_sample_and_gates_of_a_model(processor):
    loaded = random_model(2, dmc=retrofitted())
    tokenizer = load_tokenizer(ROOT / "examples" / "models" / "stdlib-llama-3m")
    loaded = LoadedModel(loaded.model, loaded.description, tokenizer)
    ids = torch.randint(3, VOCAB, (30,), generator=torch.Generator().manual_seed(7)).tolist()
    found = measurements.sample(loaded, ids)
    assert "".join(found["tokens"]) == tokenizer.decode(ids).rstrip("\ufffd")
    assert len(found["merge_share"]) == len(found["starts"]) == 30
    assert found["merge_share"][0] == 0 and found["starts"][0]
    row = measurements.cache(loaded, np.array([[*ids, 3]]))
    assert 1 / (1 - np.mean(found["merge_share"])) == pytest.approx(row["final_cr"], rel=1e-3)
    both = measurements.gates(loaded, np.array([*ids, 3]), length=10, limit=None)
    assert both["hard"]["perplexity"] != both["soft"]["perplexity"]
    assert both["hard"]["measured_cr"] > 1.2


# --- what is measured already


def test_nothing_is_measured_twice_and_parts_are_kept(tmp_path, monkeypatch):
    calls = []

    def whole(run, bench):
        calls.append("whole")
        return {"value": 1}

    def parts(run, bench, done):
        for name in ("a", "b", "c"):
            if name not in done:
                calls.append(name)
                if name == "b" and calls.count("b") == 1:
                    raise KeyboardInterrupt
                yield name, {"value": name}

    measures = {"whole": (whole, None, ("windows",)), "eviction": (parts, None, ("windows",))}
    monkeypatch.setattr(analyse, "MEASURES", measures)
    args = analyse.argparse.Namespace(analysis=tmp_path, windows=4)
    bench = analyse.Bench(tmp_path, args)
    (tmp_path / "dmc-4x-seed1").mkdir()
    metrics = tmp_path / "dmc-4x-seed1" / "metrics.json"
    metrics.write_text("{}")
    run = analyse.Run("dmc-4x-seed1", metrics.parent / "finetune", {"name": "dmc-4x"})
    for _ in range(2):
        analyse.measure("whole", run, bench)
    assert calls == ["whole"]
    args.windows = 8
    analyse.measure("whole", run, bench)
    metrics.write_text('{"another": "training"}')
    analyse.measure("whole", run, bench)
    assert calls == ["whole"] * 3, "other settings, other weights: other figures"
    with pytest.raises(KeyboardInterrupt):
        analyse.measure("eviction", run, bench)
    assert (
        "eviction"
        not in result_data.collect(tmp_path / "none", tmp_path)["measured"]["dmc-4x-seed1"]
    )
    for _ in range(2):
        analyse.measure("eviction", run, bench)
    assert calls[3:] == ["a", "b", "b", "c"]
    found = result_data.collect(tmp_path / "none", tmp_path)["measured"]["dmc-4x-seed1"]
    assert list(found["eviction"]) == ["a", "b", "c"] and found["whole"] == {"value": 1}


# --- the file, the tables, the figures


def runs_on_disk(folder: Path) -> None:
    """Finished arms as run.py leaves them, with made-up figures."""
    draw = random.Random(1)
    arms = [("continued", "quality", "plain", {}), ("gqa-4x", "quality", "plain", {"kv_heads": 2}),
            ("dmc-4x", "quality", "dmc", {"target_cr": 4.0}),
            ("dms-4x", "quality", "dmc", {"target_cr": 4.0, "policy": "evict"}),
            ("ablation-control", "ablation", "dmc", {}),
            ("ablation-window-0", "ablation", "dmc", {"merge_window": 0})]  # fmt: skip
    for name, group, kind, extra in arms:
        for seed in (1, 2):
            cr = extra.get("target_cr", 1.0)
            point = {"perplexity": 5.0 + seed / 2 + (cr - 1) / 10, "measured_cr": cr,
                     "measured_cr_per_layer_head": [[cr + draw.random() for _ in range(8)]] * 4}  # fmt: skip
            run = {"arm": {"name": name, "group": group, "kind": kind, **extra}, "seed": seed,
                   "lengths": {"256": point}, "curve": {"310": point, "620": point},
                   "environment": {"device": "CPU"}}  # fmt: skip
            (folder / f"{name}-seed{seed}").mkdir(parents=True)
            (folder / f"{name}-seed{seed}" / "metrics.json").write_text(json.dumps(run))
    (folder / "unfinished-seed1").mkdir()

    def analysis(run: str, measure: str, result: dict, done: bool = True) -> None:
        file = folder / "analysis" / run / f"{measure}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"settings": {}, "done": done, "result": result}))

    rows = {"none": {"perplexity": 5.5, "final_cr": 1.0, "mean_cr": 1.0}}
    for policy in ("h2o", "tova", "window"):
        rows[f"{policy} mean 4"] = {
            "policy": policy, "equal": "mean", "cr": 4, "budget": 34, "perplexity": 6.6,
            "final_cr": 7.53, "mean_cr": 4.04,
        }  # fmt: skip
    analysis("continued-seed1", "eviction", rows)
    analysis("base", "eviction", rows, done=False)
    for run, perplexity in (("continued-seed1", 5.5), ("dmc-4x-seed1", 5.9), ("dms-4x-seed1", 5.8)):
        cr = 1.0 if run == "continued-seed1" else 3.9
        analysis(
            run, "cache", {"perplexity": perplexity, "final_cr": cr, "mean_cr": cr, "windows": 4}
        )


def test_file_and_tables_of_a_folder(tmp_path):
    runs_on_disk(tmp_path)
    data = result_data.collect(tmp_path, tmp_path / "analysis")
    result_data.save(data, tmp_path / "metrics.json")
    data = result_data.load(tmp_path / "metrics.json")
    assert set(data["arms"]["dmc-4x"]["runs"]) == {"1", "2"}
    assert "eviction" not in data["measured"].get("base", {}), "an unfinished measurement"
    assert len(data["arms"]["dmc-4x"]["runs"]["1"]["heads"]) == 4
    assert (tmp_path / "metrics.json").stat().st_size < 20_000
    table = result_tables.group_table(data, "quality").splitlines()
    assert (
        table[0]
        == "| arm | seeds | CR at 256 | cache CR at 256 | perplexity at 256 | / continued |"
    )
    assert "| gqa-4x | 2 | 4.00 ± 0.00 | 4.00 ± 0.00 | 5.750 ± 0.354 | 1.000 |" in table
    assert "| dmc-4x | 2 | 4.00 ± 0.00 | 4.00 ± 0.00 | 6.050 ± 0.354 | 1.052 |" in table
    assert "ablation" not in " ".join(table)
    rows = result_tables.group_table(data, "ablation").splitlines()
    assert rows[0].endswith("/ ablation-control |") and len(rows) == 4
    lines = result_tables.baselines_table(data).splitlines()
    assert "| continued | tova, 34 entries | 4.04 | 7.53 | 6.600 | 1.200 |" in lines
    assert "| dmc-4x | trained | 3.90 | 3.90 | 5.900 | 1.073 |" in lines
    assert set(result_tables.tables(data)) == {"quality", "ablation", "baselines"}


def test_a_folder_adds_to_a_file(tmp_path):
    runs_on_disk(tmp_path)
    data = result_data.collect(tmp_path, tmp_path / "analysis")
    known = json.loads(json.dumps(data))
    del known["arms"]["dmc-4x"]["runs"]["2"], known["arms"]["gqa-4x"]
    known["measured"].pop("dmc-4x-seed1")
    result_data.add(known, data)
    assert known == data | {"arms": known["arms"], "measured": known["measured"]}
    assert {n: set(e["runs"]) for n, e in known["arms"].items()} == {
        n: set(e["runs"]) for n, e in data["arms"].items()
    }
    assert known["measured"]["dmc-4x-seed1"] == data["measured"]["dmc-4x-seed1"]
    known["arms"]["dmc-4x"]["arm"]["target_cr"] = 2.0
    with pytest.raises(SystemExit, match="dmc-4x: the settings of the file differ"):
        result_data.add(known, data)


def test_cache_cr_of_an_arm_with_a_delay():
    at_256 = {"256": {"perplexity": 5.0, "cr": 4.0, "cache_cr": 3.0}}
    old = {"256": {"perplexity": 5.0, "cr": 4.0}, "512": {"perplexity": 5.0, "cr": 4.0}}
    dms = {"group": "quality", "kind": "dmc", "policy": "evict", "merge_window": 0}
    data = {
        "arms": {
            "new": {"arm": {"group": "quality", "kind": "dmc"}, "runs": {"1": {"lengths": at_256}}},
            "dmc": {"arm": {"group": "quality", "kind": "dmc"}, "runs": {"1": {"lengths": old}}},
            "dms": {"arm": dms, "runs": {"1": {"lengths": old}}},
        },
        "measured": {"dms-seed1": {"cache": {"mean_cr": 2.9}}},
    }
    assert result_data.cache_crs(data, "new", 256) == [3.0]
    assert result_data.cache_crs(data, "dmc", 512) == [4.0], "no delay: the decisions are the cache"
    assert result_data.cache_crs(data, "dms", 256) == [2.9]
    assert result_data.cache_crs(data, "dms", 512) == [], "not measured"
    rows = result_tables.group_table(data | {"num_kv_heads": 8}, "quality").splitlines()
    assert rows[0].startswith("| arm | seeds | CR at 256 | cache CR at 256 | perplexity at 256 |")
    assert any(row.startswith("| dms | 1 | 4.00 | 2.90 | 5.000 |") for row in rows)


def test_figures_are_drawn_or_named(tmp_path):
    runs_on_disk(tmp_path)
    data = result_data.collect(tmp_path, tmp_path / "analysis")
    skipped = plots.draw(data, tmp_path / "pictures", ["quality", "ablations", "sample", "length"])
    drawn = {file.name: file.read_text() for file in (tmp_path / "pictures").iterdir()}
    assert set(drawn) == {"results-quality.svg", "results-ablations.svg"}
    assert [line.split(":")[0] for line in skipped] == ["sample", "length"]
    for text in ("DMC", "GQA", "TOVA, untrained", "windows of 512", "perplexity / uncompressed"):
        assert text in drawn["results-quality.svg"], text
    assert "window-0" in drawn["results-ablations.svg"]
    again = tmp_path / "again"
    plots.draw(data, again, ["quality"])
    assert (again / "results-quality.svg").read_text() == drawn["results-quality.svg"]
