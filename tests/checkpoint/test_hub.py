"""Models named by a Hub id, from a stand-in of the Hub on this machine."""

import json
import os
import subprocess
import sys

import pytest
from hub_server import hub
from text_models import byte_level_tokenizer, random_llama

from megatron_dmc import LLM, SamplingParams
from megatron_dmc.checkpoint.hub import local_path
from megatron_dmc.checkpoint.tokenizer import load_tokenizer
from megatron_dmc.cli.main import main
from megatron_dmc.errors import CheckpointError

RESOLVE = """
import json, sys
from megatron_dmc.checkpoint.hub import local_path
from megatron_dmc.errors import CheckpointError
for name, revision, with_weights in json.loads(sys.argv[1]):
    try:
        path = local_path(name, revision=revision, with_weights=with_weights)
        found = [str(path), sorted(file.name for file in path.rglob("*"))]
    except CheckpointError as e:
        found = str(e)
    print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of one model at two revisions, with files that are not for us, and its server."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("main", "v2")}
    for seed, folder in enumerate(folders.values()):
        vocab_size = len(byte_level_tokenizer(folder))
        random_llama(folder, vocab_size, seed=seed).float().save_pretrained(folder)
        for name in ("README.md", "consolidated.safetensors", "pytorch_model.bin", "model.gguf"):
            (folder / name).write_bytes(b"-")
    with hub({"owner/tiny": folders}) as (address, asked):
        yield folders, address, asked


def resolve(address, home, *cases, **environment):
    """Results of a process of its own with these variables."""
    out = subprocess.run(
        [sys.executable, "-c", RESOLVE, json.dumps(cases)], check=True, capture_output=True, text=True,
        env=os.environ | {"HF_ENDPOINT": address, "HF_HOME": str(home)} | environment,
    )  # fmt: skip
    return [json.loads(line) for line in out.stdout.splitlines()]


def test_downloads_once_and_then_needs_no_network(models, tmp_path):
    _, address, asked = models
    tokenizer, whole, older = resolve(
        address, tmp_path,
        ("owner/tiny", None, False), ("owner/tiny", None, True), ("owner/tiny", "v2", True),
    )  # fmt: skip
    wanted = ["config.json", "tokenizer.json", "tokenizer_config.json"]
    assert set(wanted) < set(tokenizer[1]) and "model.safetensors" not in tokenizer[1]
    assert set(whole[1]) == {*tokenizer[1], "model.safetensors"}, "and none of the others"
    assert whole[0] != older[0] and whole[0].startswith(str(tmp_path))
    asked.clear()
    offline = resolve(
        address,
        tmp_path,
        ("owner/tiny", None, True),
        ("owner/tiny", "v2", True),
        HF_HUB_OFFLINE="1",
    )
    assert offline == [whole, older] and not asked


def test_what_cannot_be_had_is_one_clear_error(models, tmp_path):
    _, address, _ = models
    cases = [("owner/none", None, True), ("gated/x", None, True), ("owner/tiny", "v9", True)]
    none, gated, revision = resolve(address, tmp_path, *cases)
    assert none.startswith("owner/none: neither a path here nor a model at " + address)
    assert "consent" in gated and f"{address}/gated/x" in gated and "HF_TOKEN" in gated
    assert "no revision v9" in revision
    part = ("owner/tiny", None, False)
    resolve(address, tmp_path, part)
    again, offline = resolve(
        address, tmp_path, part, ("owner/other", None, True), HF_HUB_OFFLINE="1"
    )
    assert isinstance(again, list), "what was asked for is cached"
    assert "HF_HUB_OFFLINE is set" in offline and str(tmp_path) in offline
    (dead,) = resolve("http://127.0.0.1:9", tmp_path, ("owner/other", None, True))
    assert "127.0.0.1:9" in dead and "check the connection, or give a folder" in dead


def test_paths_are_taken_as_they_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "tiny").mkdir(parents=True)
    for name in ("owner/tiny", "./no/such", "demo", str(tmp_path), "a/b/c"):
        assert str(local_path(name)) == name.removeprefix("./")
    with pytest.raises(CheckpointError, match="revision v2: owner/tiny is a path"):
        local_path("owner/tiny", revision="v2")


def test_every_command_takes_an_id(models, tmp_path, monkeypatch, capsys):
    from huggingface_hub import constants

    folders, address, _ = models
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(
        constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        address + "/{repo_id}/resolve/{revision}/{filename}",
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    greedy = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)

    def generated(model, **options):
        llm = LLM(model, **options)
        return llm.generate("the cache", greedy, use_tqdm=False)[0].outputs[0].text

    texts = {name: generated(folder) for name, folder in folders.items()}
    assert texts["main"] != texts["v2"]
    assert generated("owner/tiny", tokenizer="owner/tiny") == texts["main"]
    assert generated("owner/tiny", revision="v2") == texts["v2"]
    assert load_tokenizer("owner/tiny").encode("keys") == load_tokenizer(folders["main"]).encode(
        "keys"
    )
    run = ["generate", "owner/tiny", "--revision", "v2", "--prompt", "the cache", "--max-tokens", "8",
           "--ignore-eos"]  # fmt: skip
    assert main(run) == 0
    assert "the cache" + texts["v2"] in capsys.readouterr().out
    out = tmp_path / "megatron"
    assert main(["convert", "--to", "megatron", "owner/tiny", str(out), "--revision", "v2"]) == 0
    assert generated(out) == texts["v2"]
    assert main(["plan", "--model", "owner/tiny", "--gpus", "1", "--seq-length", "64"]) == 0
    assert "owner/tiny" in capsys.readouterr().out
    assert main(["generate", "owner/none", "--prompt", "a"]) == 2
    assert "neither a path here nor a model" in capsys.readouterr().err
