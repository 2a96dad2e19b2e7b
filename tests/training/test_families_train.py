"""Converted folders with fast tokenizers: they keep their chat templates, and Megatron trains on them."""

import re
import shlex
from pathlib import Path

import pytest
from family_cases import CASES, save, weights
from tensor_parallel import launch, prompts
from training_runs import Forked
from transformers import AutoTokenizer

from megatron_dmc import LLM, SamplingParams
from megatron_dmc.checkpoint.convert import FLAGS_FILE, convert
from megatron_dmc.checkpoint.load import load_model
from megatron_dmc.checkpoint.tokenizer import (
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    load_tokenizer,
    megatron_tokenizer,
)
from megatron_dmc.errors import CheckpointError, UnsupportedConfig

TEMPLATE = "{% for m in messages %}<|turn|>{{ m['role'] }} {{ m['content'] }}{% endfor %}"
SENTENCES = ["one entry for every token", "a segment is a run of tokens", "pages go and come"] * 9


def fast_tokenizer(folder: Path, vocab: int = 90) -> None:
    """A byte-level BPE with a special token and a chat template, as Qwen's and Llama 3's are."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=["<|end|>", "<|turn|>"], show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)


def flags_of(folder: Path) -> list[str]:
    return shlex.split((folder / FLAGS_FILE).read_text())


def test_fast_tokenizer_and_chat_template_travel(tmp_path):
    save(CASES["qwen3"], tmp_path / "hf")
    fast_tokenizer(tmp_path / "hf")
    convert(None, "megatron", tmp_path / "hf", tmp_path / "m")
    convert(None, "hf", tmp_path / "m", tmp_path / "back")
    messages = [{"role": "user", "content": "pages go"}]
    expected = None
    for folder in (tmp_path / "hf", tmp_path / "m" / "tokenizer", tmp_path / "back"):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        ids = tokenizer.apply_chat_template(messages, tokenize=True)["input_ids"]
        expected = expected or ids
        assert ids == expected
        assert tokenizer.decode(ids) == "<|turn|>user pages go"
        assert isinstance(load_tokenizer(folder), HuggingFaceTokenizer)
    flags = flags_of(tmp_path / "m")
    assert flags[-4:] == ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model",
                          str(tmp_path / "m" / "tokenizer")]  # fmt: skip
    assert "--qk-layernorm" in flags


def test_the_tokenizer_that_knows_all_tokens_is_taken(tmp_path):
    """sentencepiece alone; with an additional fast tokenizer, which transformers reads, and Megatron trains
    with once it has more tokens."""
    import json

    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES), model_prefix=str(tmp_path / "tokenizer"), vocab_size=25,
        minloglevel=2,
    )  # fmt: skip
    file = tmp_path / "tokenizer.model"
    assert isinstance(load_tokenizer(tmp_path), SentencePieceTokenizer)
    assert megatron_tokenizer(tmp_path) == ("SentencePieceTokenizer", file)
    fast_tokenizer(tmp_path, vocab=60)
    assert isinstance(load_tokenizer(tmp_path), HuggingFaceTokenizer)
    assert megatron_tokenizer(tmp_path) == ("SentencePieceTokenizer", file)
    fast = tmp_path / "tokenizer.json"
    content = json.loads(fast.read_text())
    content["added_tokens"].append(content["added_tokens"][0] | {"id": 60, "content": "<|tool|>"})
    fast.write_text(json.dumps(content))
    tokenizer = load_tokenizer(tmp_path)
    assert isinstance(tokenizer, HuggingFaceTokenizer)
    assert tokenizer.encode("<|tool|>") == [60]
    assert megatron_tokenizer(tmp_path) == ("HuggingFaceTokenizer", tmp_path)
    assert isinstance(load_tokenizer(file), SentencePieceTokenizer), "a file is what was asked for"
    fast.write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: damaged"):
        megatron_tokenizer(tmp_path)
    with pytest.raises(CheckpointError, match="no tokenizer can be read"):
        load_tokenizer(tmp_path)


RARELY = [
    pytest.param(case, marks=pytest.mark.exhaustive)
    for case in ("llama3-tied", "mistral", "qwen2", "mixtral", "qwen3-moe")
]


@pytest.mark.dist
@pytest.mark.parametrize("case", ["qwen3", *RARELY])
def test_megatron_trains_what_was_converted(case, tmp_path):
    """The folder's flags are all that a run needs besides its data and schedule. Two steps of Adam
    move every tensor, and none further than two steps go."""
    save(CASES[case], tmp_path / "hf")
    fast_tokenizer(tmp_path / "hf")
    convert(None, "megatron", tmp_path / "hf", tmp_path / "m")
    run = Forked(
        *flags_of(tmp_path / "m"), "--pretrained-checkpoint", str(tmp_path / "m"),
        "--dmc-stage", "retrofit", "--dmc-target-cr", "2", "--dmc-no-stage-check", "--mock-data", "--seq-length", "32",
        "--micro-batch-size", "2", "--global-batch-size", "2", "--lr", "1e-3", "--train-iters", "2",
        "--weight-decay", "0", "--eval-iters", "0", "--eval-interval", "9", "--log-interval", "1",
        "--save", str(tmp_path / "saved"), "--save-interval", "2", "--ckpt-format", "torch_dist",
        model=[],
    ).wait()  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    losses = [float(x) for x in re.findall(r"lm loss: (\S+)", run.stdout)]
    assert len(losses) == 2 and all(0 < loss < 20 for loss in losses)
    description = convert(None, "hf", tmp_path / "saved", tmp_path / "back")
    assert description.dmc is not None and description.dmc.stage == "retrofit"
    before, after = weights(tmp_path / "hf"), weights(tmp_path / "back")
    assert set(before) == set(after)
    for name, tensor in before.items():
        assert 1e-5 < float((tensor - after[name]).abs().max()) < 3e-3, name


def test_experts_on_several_cpus_are_refused(tmp_path):
    save(CASES["mixtral"], tmp_path)
    with pytest.raises(
        UnsupportedConfig, match="tensor_parallel_size=2 with num_experts=4 on a CPU"
    ):
        load_model(tmp_path, tensor_parallel_size=2)


@pytest.mark.dist
@pytest.mark.exhaustive
@pytest.mark.parametrize("case", ["qwen2", "qwen3"])
def test_two_ranks_do_what_one_does(case, tmp_path):
    """Tensor parallel in the engine: biases and QK-norm are split as Megatron splits them."""
    save(CASES[case], tmp_path)
    llm = LLM(
        str(tmp_path), dtype="float64", block_size=4, max_model_len=64, max_num_seqs=4, device="cpu"
    )
    params = [
        SamplingParams(temperature=0, max_tokens=12)
        if i % 2
        else SamplingParams(max_tokens=12, seed=i)
        for i in range(6)
    ]
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts()], params, use_tqdm=False)
    result, codes, text = launch(tmp_path, 2, "plenty")
    assert codes == [0, 0], text
    assert result["tokens"] == [o.outputs[0].token_ids for o in outputs]
