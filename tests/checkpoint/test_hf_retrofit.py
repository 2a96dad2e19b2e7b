"""`examples/hf_retrofit.py`: three stages of the demo model with transformers' Trainer, on a CPU."""

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_dmc import LLM, SamplingParams
from megatron_dmc.checkpoint.hf_config import from_hf_folder
from megatron_dmc.checkpoint.remote_code import load_as_dmc
from megatron_dmc.config import DMCConfig
from megatron_dmc.errors import UnsupportedConfig

pytest.importorskip("accelerate")  # Trainer wants it
pytestmark = pytest.mark.usefixtures("remote_modules")
ROOT = Path(__file__).parents[2]
MODEL = ROOT / "examples" / "models" / "stdlib-llama-3m"
sys.path.insert(0, str(ROOT / "examples"))

import hf_retrofit


@pytest.fixture
def data(tmp_path) -> Path:
    text = (ROOT / "tools" / "build_corpus.py").read_text()
    (tmp_path / "train.jsonl").write_text(json.dumps({"text": text}) + "\n")
    return tmp_path / "train.jsonl"


@pytest.mark.parametrize("lora_rank,lr", [(0, 2e-3), (8, 1e-2)])
def test_retrofit(tmp_path, data, lora_rank, lr):
    """The loss falls, CR rises to its target, and transformers and the engine agree on the result."""
    if lora_rank:
        pytest.importorskip("peft")
    out = tmp_path / "dmc"
    flags = (
        f"--model {MODEL} --data {data} --output {out} --heldout {data} --heldout-windows 8 "
        "--zero-out-steps 2 --retrofit-steps 8 --finetune-steps 20 --target-cr 2 "
        f"--seq-length 64 --batch-size 4 --lr {lr} --logging-steps 2 "
        "--alpha-offset 0.2 --temperature 0.1 --noise-scale 0.25 --finetune-noise-scale 0 "
        f"--loss-weight 3 --lora-rank {lora_rank}"
    )
    history = hf_retrofit.main(flags.split())
    stages = {
        s: [h for h in history if h["stage"] == s] for s in ("zero-out", "retrofit", "finetune")
    }
    assert "measured_cr" not in stages["zero-out"][0]
    assert [h["target_cr"] for h in stages["retrofit"]] == [1.125, 1.375, 1.625, 1.875]
    assert {h["target_cr"] for h in stages["finetune"]} == {2.0}
    first, last = (
        sum(h["loss"] for h in part) / len(part)
        for part in (stages["finetune"][:2], stages["finetune"][-4:])
    )
    assert last < 0.9 * first
    assert stages["retrofit"][0]["measured_cr"] < 1.6
    assert all(h["measured_cr"] > 1.9 for h in stages["finetune"][-4:])

    description = from_hf_folder(out)
    assert description.dmc is not None
    assert (description.dmc.stage, description.dmc.noise_scale) == ("finetune", 0.0)
    assert description.dtype == torch.bfloat16
    card = (out / "README.md").read_text()
    assert "train.jsonl: 30 steps of 4 x 64 tokens" in card and "| Evaluation | perplexity" in card

    model = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(out, trust_remote_code=True)
    prompt = tokenizer("def read(self, name):\n    ").input_ids
    result = model.generate(
        torch.tensor([prompt]), max_new_tokens=40, do_sample=False, return_dict_in_generate=True
    )
    llm = LLM(out, dtype="float32", device="cpu")
    outputs = llm.generate(
        [{"prompt_token_ids": prompt}], SamplingParams(temperature=0, max_tokens=40), use_tqdm=False
    )
    assert result.sequences[0, len(prompt) :].tolist() == outputs[0].outputs[0].token_ids
    assert result.past_key_values.num_entries() == outputs[0].metrics.num_entries
    assert outputs[0].cr > 1.3


def test_what_cannot_be_retrofitted(tmp_path, data):
    (tmp_path / "config.json").write_text('{"architectures": ["GPT2LMHeadModel"]}')
    with pytest.raises(UnsupportedConfig, match="GPT2LMHeadModel"):
        load_as_dmc(tmp_path, DMCConfig())
    flags = f"--model {MODEL} --data {data} --output {tmp_path / 'out'} --seq-length 1000000"
    with pytest.raises(SystemExit, match="fewer than one window"):
        hf_retrofit.main(flags.split())
