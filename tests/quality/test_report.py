"""The report: data, curves from event files, figures, page."""

import dataclasses
import json
import math
import random
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import matplotlib
import pytest

from megatron_dmc.quality.report import ReportData, plots
from megatron_dmc.quality.report.curves import read_tensorboard
from megatron_dmc.quality.report.page import render, write_report

STEPS = {"zero-out": 30, "retrofit": 140, "finetune": 60}
SOURCE = '''\
def read_config(path, *, strict=True):
    """Read a TOML file and check its keys."""
    with open(path, "rb") as file:
        values = tomllib.load(file)
    unknown = sorted(set(values) - KNOWN)
    if unknown and strict:
        raise ValueError(f"{path}: unknown keys {unknown}")
    for name, default in DEFAULTS.items():
        values.setdefault(name, default)
    return Config(**values)


class Cache:
    """Entries by key, oldest first."""

    def __init__(self, size: int):
        self.size = size
        self._entries = {}

    def get(self, key, default=None):
        if key not in self._entries:
            return default
        value = self._entries.pop(key)
        self._entries[key] = value
        return value
'''


def plausible(*, layers: int = 4, heads: int = 4, num_tokens: int = 120, seed: int = 0):
    """A report with numbers as a small retrofit gives them."""
    rng = random.Random(seed)
    tokens = re.findall(r"\n[ \n]*|[A-Za-z]+|.", SOURCE)[:num_tokens]
    rates = [[rng.uniform(0.5, 0.88) for _ in range(heads)] for _ in range(layers)]
    starts = [
        [[t == 0 or rng.random() > rate for t in range(len(tokens))] for rate in row]
        for row in rates
    ]
    crs = [[1 / (1 - rate) for rate in row] for row in rates]
    measured = layers * heads / sum(1 / cr for row in crs for cr in row)
    curves, validation, base = [], [], math.log(7.9)
    for stage, steps in STEPS.items():
        for step in range(1, steps + 1):
            ramp = {"zero-out": 0, "retrofit": step / steps, "finetune": 1}[stage]
            noise = rng.gauss(0, 0.03)
            lm_loss = base + 0.04 + 0.15 * ramp * math.exp(-2 * (stage == "finetune") * step / 20)
            cr = None if stage == "zero-out" else 1 + 3.2 * ramp + rng.uniform(0, 0.2)
            per_layer = cr and [max(1.0, cr * rng.uniform(0.8, 1.2)) for _ in range(layers)]
            curves.append({
                "stage": stage, "step": step, "lm_loss": lm_loss + noise,
                "compression_loss": None if cr is None else max(0.0, rng.gauss(0, 0.004)),
                "target_cr": None if cr is None else 1 + 3 * ramp,
                "measured_cr": cr, "measured_cr_per_layer": per_layer,
            })  # fmt: skip
            if step % 10 == 0:
                validation.append({"stage": stage, "step": step, "lm_loss": lm_loss + 0.01,
                                   "measured_cr": cr})  # fmt: skip
    return ReportData(
        title="Retrofitting a small code model",
        model_name="llama-tiny-python (5.5 M parameters)",
        base_perplexity=7.9012, dmc_perplexity=8.1437, base_continued_perplexity=7.7741,
        target_cr=4.0, measured_cr=measured, cache_cr=3.7071, measured_cr_per_layer_head=crs,
        engine_vs_full_forward_max_abs_diff=3.1471e-06,
        cache_bytes=1_289_748, cache_bytes_uncompressed=5_242_880,
        tokens_per_second=412.67, tokens_per_second_base=388.21, seconds=331.4,
        steps=dict(STEPS), curves=curves, validation=validation,
        sample={"tokens": tokens, "starts": starts, "layer_head": [layers // 2, 1 % heads]},
        completions=[
            {"prompt": "def mean(values):\n    ", "dmc_cr": 3.94,
             "base": 'return sum(values) / len(values)\n\n\ndef median(values):\n    """The middle '
             'one."""\n    return sorted(values)[len(values) // 2]',
             "dmc": 'if not values:\n        raise ValueError("no values")\n    '
             "return sum(values) / len(values)"},
            {"prompt": "import os\n\nfor name in ", "dmc_cr": None,
             "base": 'os.listdir("."):\n    if name.endswith(".py"):\n        print(name)',
             "dmc": "os.listdir(path):\n    print(os.path.join(path, name))"},
        ],
        settings={"merge window": 12, "learning rate": 1e-3, "global batch": 16,
                  "sequence length": 256},
        environment={"device": "CPU, 2 cores", "torch": "2.9.0", "megatron-core": "0.19.0",
                     "commit": "0123abc"},
        commands=["make setup", "make demo"],
    )  # fmt: skip


def bare(**changes):
    """A report with the necessary fields only."""
    values = dict(title="t", model_name="m", base_perplexity=8.0, dmc_perplexity=8.2,
                  target_cr=4, measured_cr=4.1, measured_cr_per_layer_head=[[4.1]])  # fmt: skip
    return ReportData(**{**values, **changes})


def sample(**changes):
    return {"tokens": ["a", "b"], "starts": [[[True, False]]], "layer_head": [0, 0], **changes}


def point(**changes):
    return {"stage": "retrofit", "step": 1, "lm_loss": 2.0, "compression_loss": None,
            "target_cr": None, "measured_cr": None, **changes}  # fmt: skip


# --- data ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [plausible(), bare()], ids=["full", "bare"])
def test_json(tmp_path, data):
    path = tmp_path / "new" / "report.json"
    data.to_json(path)
    assert [p.name for p in path.parent.iterdir()] == ["report.json"]
    dumped = json.loads(path.read_text())
    assert dumped == dataclasses.asdict(data)
    assert {"base_perplexity", "measured_cr_per_layer_head", "seconds"} <= dumped.keys()


def test_an_interrupted_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "report.json"
    bare().to_json(path)
    before = path.read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        plausible().to_json(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]


@pytest.mark.parametrize("name", ["measured_cr", "dmc_perplexity", "seconds"])
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_number_that_is_not_finite_is_named(name, value):
    with pytest.raises(ValueError, match=f"{name} is {value}"):
        bare(**{name: value})


def test_a_layers_cr_is_total_over_total():
    data = bare(measured_cr_per_layer_head=[[2.0, 4.0], [1.0, 1.0]])
    # 8 tokens and two heads: 4 + 2 entries
    assert data.measured_cr_per_layer == pytest.approx([16 / 6, 1.0])


# --- curves -------------------------------------------------------------------------------------


def write_events(folder, steps, *, compresses=True, shift=0.0, suffix=""):
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder), filename_suffix=suffix) as writer:
        for step in steps:
            writer.add_scalar("lm loss", 2.0 + step / 100 + shift, step)
            writer.add_scalar("lm loss vs samples", 9.0, step * 16)
            if compresses:
                writer.add_scalar("compression loss", 0.25, step)
                writer.add_scalar("target cr", 1 + step / 10, step)
                writer.add_scalar("measured cr", 1.5 + step / 10, step)
                for layer in (0, 1, 10):
                    writer.add_scalar(f"measured cr/layer {layer}", 2.0 + layer, step)
            if step % 5 == 0:
                writer.add_scalar("lm loss validation", 3.0, step)
                writer.add_scalar("measured cr validation", 3.5, step)


def test_reads_what_megatron_writes(tmp_path):
    write_events(tmp_path, range(1, 11))
    curves, validation = read_tensorboard(tmp_path, "retrofit")
    assert [p["step"] for p in curves] == list(range(1, 11))
    assert curves[3] == {
        "stage": "retrofit", "step": 4, "lm_loss": 2.04, "compression_loss": 0.25,
        "target_cr": 1.4, "measured_cr": 1.9, "measured_cr_per_layer": [2.0, 3.0, 12.0],
    }  # fmt: skip
    assert validation == [
        {"stage": "retrofit", "step": step, "lm_loss": 3.0, "measured_cr": 3.5} for step in (5, 10)
    ]
    bare(curves=curves, validation=validation)


def test_a_stage_without_compression(tmp_path):
    write_events(tmp_path, range(1, 4), compresses=False)
    curves, _ = read_tensorboard(tmp_path, "zero-out")
    assert len(curves) == 3
    assert all(p["measured_cr"] is p["measured_cr_per_layer"] is None for p in curves)


def test_a_resumed_run_goes_on_from_its_checkpoint(tmp_path):
    write_events(tmp_path / "a", range(1, 9))
    write_events(tmp_path / "b", range(6, 11), shift=1.0)
    run = tmp_path / "run"
    run.mkdir()
    # as text, 900 would sort after 1000
    for part, seconds in (("a", 900), ("b", 1000)):
        (file,) = (tmp_path / part).iterdir()
        file.rename(run / f"events.out.tfevents.{seconds}.host.1.0")
    curves, _ = read_tensorboard(run, "retrofit")
    assert [p["step"] for p in curves] == list(range(1, 11))
    assert [p["lm_loss"] > 3 for p in curves] == [False] * 5 + [True] * 5


def test_missing_empty_and_damaged_event_files(tmp_path):
    assert read_tensorboard(tmp_path / "nowhere", "retrofit") == ([], [])
    assert read_tensorboard(tmp_path, "retrofit") == ([], [])
    write_events(tmp_path, range(1, 21))
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    for size, least, most in (
        (len(whole) - 3, 20, 20), (len(whole) // 2, 6, 14), (10, 0, 0), (0, 0, 0)
    ):  # fmt: skip
        file.write_bytes(whole[:size])
        curves, _ = read_tensorboard(tmp_path, "retrofit")
        assert least <= len(curves) <= most
        assert [p["step"] for p in curves] == list(range(1, len(curves) + 1))
    file.write_bytes(whole[: len(whole) // 2] + b"\xff" * 100)
    curves, _ = read_tensorboard(tmp_path, "retrofit")
    assert 5 < len(curves) < 15


def test_a_loss_that_is_not_finite_is_a_gap(tmp_path):
    write_events(tmp_path, [1, 2], shift=math.nan)
    curves, _ = read_tensorboard(tmp_path, "retrofit")
    assert [p["lm_loss"] for p in curves] == [None, None]
    plots.training_curves(bare(curves=curves))


# --- figures ------------------------------------------------------------------------------------


def test_figures_are_svg_that_may_share_a_page():
    data = plausible()
    before = dict(matplotlib.rcParams)
    figures = [
        plots.training_curves(data), plots.training_curves(data, width=400), plots.heat_map(data),
        plots.perplexity_bars(data), plots.cache_bars(data), plots.speed_bars(data),
    ]  # fmt: skip
    assert dict(matplotlib.rcParams) == before
    ids = []
    for figure in figures:
        root = ElementTree.fromstring(figure)
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        own = [element.get("id") for element in root.iter() if element.get("id")]
        assert set(re.findall(r"(?:url\(|href=\")#([\w-]+)", figure)) <= set(own)
        ids += own
    assert len(ids) == len(set(ids))
    assert figures[2] == plots.heat_map(data), "the same data gives the same bytes"
    for row in data.measured_cr_per_layer_head:
        assert all(f">{cr:.2f}<" in figures[2] for cr in row)
    for name in STEPS:
        assert f">{name}<" in figures[0]


@pytest.mark.parametrize(
    "data",
    [bare(), bare(measured_cr_per_layer_head=[[3.0 + g for g in range(8)]] * 80),
     bare(curves=[point(stage="$x^{2}$")], measured_cr_per_layer_head=[[1.0]], measured_cr=1)],
    ids=["bare", "80 layers", "one point"],
)  # fmt: skip
def test_unusual_data_can_be_drawn(tmp_path, data):
    for figure in (plots.training_curves(data), plots.heat_map(data), plots.perplexity_bars(data)):
        ElementTree.fromstring(figure)
    assert plots.cache_bars(data) is None
    assert plots.speed_bars(data) is None
    write_report(data, tmp_path)


def test_picture(tmp_path):
    path = tmp_path / "picture.png"
    plots.picture(plausible(), path)
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    assert [int.from_bytes(content[i : i + 4], "big") for i in (16, 20)] == [1600, 900]
    assert len(content) < 300_000


@pytest.mark.parametrize(
    ("count", "text"),
    [(1, "1 B"), (1023, "1023 B"), (1024, "1.00 KiB"), (1_289_748, "1.23 MiB"),
     (5 << 40, "5.00 TiB"), (5000 << 40, "5000.00 TiB")],
)  # fmt: skip
def test_human_bytes(count, text):
    assert plots.human_bytes(count) == text


def test_verdict_is_made_of_the_numbers():
    assert plots.verdict(bare()) == "The KV cache is 4.1x smaller at 1.02x the perplexity"
    delayed = plots.verdict(bare(settings={"merge_delay": 16}))
    assert delayed == "4.1 tokens share a cache entry at 1.02x the perplexity"
    assert "not smaller" in plots.verdict(bare(measured_cr=1.0))


# --- page ---------------------------------------------------------------------------------------


class Walk(HTMLParser):
    """Checks that tags are balanced and ids unique; collects text and tags."""

    VOID = {"meta", "input", "br", "link", "img", "hr"}

    def __init__(self, page: str):
        super().__init__()
        self.open, self.tags, self.text, self.ids = [], [], [], []
        self.feed(page)
        self.close()
        assert self.open == []
        assert len(self.ids) == len(set(self.ids))

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.ids += [value for name, value in attrs if name == "id"]

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> at {self.getpos()}"

    def handle_data(self, text):
        self.text.append(text)


def test_page_holds_every_number():
    data = plausible()
    walk = Walk(render(data))
    text = re.sub(r"\s+", " ", "".join(walk.text))
    expected = [
        plots.verdict(data), "7.901", "7.774", "8.144", "1.031x", "4x", f"{data.measured_cr:.3f}x",
        "1.23 MiB (1,289,748 bytes)", "5.00 MiB (5,242,880 bytes)", "412.7 tokens/s",
        "388.2 tokens/s", "3.15e-06", "331.4 s (5 min 31 s)", "30 steps", "140 steps", "60 steps",
        "0.001", "CR 3.94x", "0123abc", "make demo", data.title, data.model_name,
    ]  # fmt: skip
    assert [value for value in expected if value not in text] == []
    for row in data.measured_cr_per_layer_head:
        assert all(f"{cr:.2f}" in text for cr in row)
    assert "not measured" not in text


def test_page_shows_the_text_as_it_is():
    data = plausible()
    page = render(data)
    (block,) = re.findall(r'<pre class="box sample" id="sample">\n(.*?)</pre>', page, re.DOTALL)
    walk = Walk(block)
    assert "".join(walk.text).removesuffix("\n") == "".join(data.sample["tokens"])
    spans = [attributes for tag, attributes in walk.tags if tag == "span"]
    layer, head = data.sample["layer_head"]
    flags = data.sample["starts"][layer][head]
    assert [span["class"].endswith(" s") for span in spans] == flags
    counts = [sum(f[i] for row in data.sample["starts"] for f in row) for i in range(len(flags))]
    assert [int(span["data-n"]) for span in spans] == counts


def test_what_was_not_measured_is_called_so():
    page = render(bare())
    text = "".join(Walk(page).text)
    assert text.count("not measured") == 8
    for words in ("No training curves", "No sample text", "No completions", "Not recorded"):
        assert words in text


def test_everything_is_escaped():
    evil = '</script><script>alert("x")</script></pre>&amp;'
    data = bare(
        title=evil, model_name=evil, steps={evil: 1}, curves=[point(stage=evil)],
        sample=sample(tokens=[evil, evil]), settings={evil: evil}, environment={evil: evil},
        completions=[{"prompt": evil, "base": evil, "dmc": evil, "dmc_cr": 2.0}], commands=[evil],
    )  # fmt: skip
    page = render(data)
    walk = Walk(page)
    assert [tag for tag, _ in walk.tags].count("script") == 1
    assert "<script>alert" not in page
    assert "".join(walk.text).count(evil) >= 13


def test_page_loads_nothing():
    page = render(plausible())
    for tag, attributes in Walk(page).tags:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base")
        assert "src" not in attributes
        assert attributes.get("href", "#").startswith("#")
    without_namespaces = re.sub(r' xmlns="http://www.w3.org/2000/svg"', "", page)
    assert not re.search(r"https?://|@import|url\((?!#)", without_namespaces)


def test_write_report(tmp_path):
    paths = write_report(plausible(), tmp_path / "demo")
    assert sorted(paths) == ["html", "json", "png"]
    assert sorted(p.name for p in (tmp_path / "demo").iterdir()) == [
        "report.html", "report.json", "report.png"
    ]  # fmt: skip
    assert (tmp_path / "demo" / "report.html").stat().st_size < 500_000
