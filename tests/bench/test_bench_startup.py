"""`bench startup` with stand-ins for the commands, and what start-up leaves out."""

import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from megatron_dmc.bench import startup
from megatron_dmc.checkpoint.tokenizer import load_tokenizer
from megatron_dmc.checkpoint.transformers_tokenizer import is_plain_folder
from megatron_dmc.cli.main import main
from megatron_dmc.startup import compiling_at_first_call

MODEL = Path(__file__).resolve().parents[2] / "examples" / "models" / "stdlib-llama-3m"
GENERATE = f"import time; print({startup._PROMPT!r} + ' x', flush=True); time.sleep(60)"
SERVE = """
import http.server, sys
class Answer(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        self.send_response(200); self.end_headers(); self.wfile.write(b"data: {}")
server = http.server.HTTPServer(("127.0.0.1", 0), Answer)
print("loading x", file=sys.stderr)
print(f"serving x at http://127.0.0.1:{server.server_port}: 5 pages", file=sys.stderr, flush=True)
server.serve_forever()
"""


def stand_in(program):
    return lambda model: [sys.executable, "-c", program, "generate"]


def test_times_of_both_commands(monkeypatch, capsys):
    monkeypatch.setattr(startup, "_generate", stand_in(GENERATE))
    monkeypatch.setattr(startup, "_serve", stand_in(SERVE))
    assert main(["bench", "startup", "--model", "x", "--repeats", "1"]) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["command"] for row in document["rows"]] == ["generate", "serve"]
    assert all(30 > row["seconds"] > 0 and row["cpu_seconds"] > 0 for row in document["rows"])


def test_a_command_that_ends_says_why(monkeypatch, capsys):
    monkeypatch.setattr(startup, "_generate", stand_in("raise SystemExit('no such model')"))
    assert main(["bench", "startup", "--model", "x"]) == 2
    assert "generate gave no token: no such model" in capsys.readouterr().err
    assert main(["bench", "startup", "--model", "x", "--repeats", "0"]) == 2


def test_an_engine_starts_without_a_compiler():
    program = (
        "import sys, torch; before = torch.compile\n"
        "from megatron_dmc import LLM\n"
        "assert torch.compile is before\n"
        "assert not {'torch._dynamo', 'torch._inductor'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=300)


def test_compiling_at_the_first_call(monkeypatch):
    compiled = []

    def at_once(function, **options):
        compiled.append((function.__name__, options))
        return lambda *a, **k: 10 * function(*a, **k)

    monkeypatch.setattr("torch.compile", at_once)
    with compiling_at_first_call():

        @torch.compile
        def plus(x):
            return x + 1

        @torch.compile(dynamic=True)
        def minus(x, *, y=1):
            """Of two."""
            return x - y

    assert torch.compile is at_once and not compiled
    assert plus(1) == plus(1) == 20 and minus(5, y=2) == 30 and minus.__doc__ == "Of two."
    assert compiled == [("plus", {}), ("minus", {"dynamic": True})]


def test_a_function_that_another_compiled_one_calls_is_a_part_of_it():
    sizes = []

    def backend(module, inputs):
        sizes.append(sum(node.op == "call_function" for node in module.graph.nodes))
        return module.forward

    with compiling_at_first_call():

        @torch.compile(backend=backend, fullgraph=True)
        def twice(x):
            return x * 2

        @torch.compile(backend=backend, fullgraph=True)
        def more(x):
            return twice(x + 1) - 3

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert more(torch.ones(1)) == 1
    assert twice(torch.ones(1)) == 2
    assert sizes == [3, 1]


@pytest.mark.parametrize(
    ("model_type", "changed", "is_plain"),
    [
        (None, {}, True),
        ("llama", {"tokenizer_class": "TokenizersBackend"}, True),
        ("llama", {"tokenizer_class": "LlamaTokenizer"}, False),
        ("llama", {"auto_map": {"AutoTokenizer": ["x.Y", None]}}, False),
        ("mistral", {}, False),
    ],
)
def test_folders_that_need_no_auto_tokenizer(tmp_path, model_type, changed, is_plain):
    config = json.loads((MODEL / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | changed))
    (tmp_path / "tokenizer.json").write_bytes((MODEL / "tokenizer.json").read_bytes())
    if model_type:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    assert is_plain_folder(tmp_path) is is_plain
    if is_plain:
        ours, auto = (
            load_tokenizer(tmp_path).inner,
            AutoTokenizer.from_pretrained(tmp_path),
        )
        assert type(ours) is type(auto) and ours.get_vocab() == auto.get_vocab()
        assert ours.special_tokens_map == auto.special_tokens_map
        assert ours.encode("def f(x):\n\treturn é") == auto.encode("def f(x):\n\treturn é")
