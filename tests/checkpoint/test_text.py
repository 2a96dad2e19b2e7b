"""Text in and text out as transformers has them: special tokens, end tokens, characters of several tokens."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hf_models import model_of, save_with_code
from text_models import (
    SPECIAL,
    byte_level_tokenizer,
    generated,
    random_llama,
    sentencepiece_tokenizer,
)
from transformers import AutoTokenizer, LlamaForCausalLM

from megatron_dmc import LLM, SamplingParams
from megatron_dmc.checkpoint.chat_template import load_chat_template
from megatron_dmc.checkpoint.convert import convert
from megatron_dmc.checkpoint.tokenizer import (
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    as_tokenizer,
    load_tokenizer,
)
from megatron_dmc.engine import Logprob
from megatron_dmc.engine.detokenizer import IncrementalDetokenizer
from megatron_dmc.errors import CheckpointError, DMCError, InvalidRequest
from megatron_dmc.quality.lm_eval.model import MegatronDMC
from megatron_dmc.server.text import TokenPieces, TokenTexts, for_chat, for_completions

PROMPTS = ["the cache holds", " pages", "é and 🙂 a page", ""]
BYTES = "naïve 🙂🙂 日本 x"


def greedy(max_tokens=12, **options):
    return SamplingParams(temperature=0, max_tokens=max_tokens, **options)


def start(folder, **options):
    return LLM(folder, dtype="float64", device="cpu", num_pages=2000, **options)


@pytest.fixture(scope="module")
def llama3(tmp_path_factory):
    """(folder, transformers' model, transformers' tokenizer)"""
    folder = tmp_path_factory.mktemp("llama3")
    tokenizer = byte_level_tokenizer(folder)
    return folder, random_llama(folder, len(tokenizer)), tokenizer


@pytest.fixture(scope="module")
def llama2(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama2")
    sentencepiece_tokenizer(folder)
    model = random_llama(folder, 300, seed=1)
    return folder, model, AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def llm3(llama3):
    return start(llama3[0])


@pytest.fixture(scope="module")
def llm2(llama2):
    return start(llama2[0])


# Prompts


@pytest.mark.parametrize("family", ["llama3", "llama2"])
def test_completions_of_texts_are_transformers(family, request, llm2, llm3):
    """The begin-of-text token is there, and so all tokens and all characters are the same."""
    _, model, tokenizer = request.getfixturevalue(family)
    llm = {"llama3": llm3, "llama2": llm2}[family]
    # of a run of byte tokens that is no character transformers takes back what was certain before
    vocab = tokenizer.get_vocab()
    single = [i for piece, i in vocab.items() if piece.startswith("<0x")]
    others = sorted(set(vocab.values()) - set(single))
    params = greedy(ignore_eos=True, allowed_token_ids=others)
    outputs = llm.generate(PROMPTS, params, use_tqdm=False)
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        ids = tokenizer(prompt)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id
        assert output.prompt_token_ids == ids
        made = output.outputs[0].token_ids
        assert made == generated(model, ids, 12, eos_token_id=None, suppress_tokens=single or None)
        # what the completion adds to the prompt's text
        ids = [i for i in ids if i not in tokenizer.all_special_ids]
        before = tokenizer.decode(ids, skip_special_tokens=True)
        whole = tokenizer.decode(ids + made, skip_special_tokens=True)
        assert output.outputs[0].text == whole[len(before) :]


def test_special_tokens_can_be_left_out_of_a_prompt(llm3, llama3):
    plain = llama3[2].encode("the cache", add_special_tokens=False)
    asked = {"prompt": "the cache", "add_special_tokens": False}
    output = llm3.generate(asked, greedy(2), use_tqdm=False)[0]
    assert output.prompt_token_ids == plain and output.prompt == "the cache"
    assert llm3.get_tokenizer().encode("the cache") == plain


def test_a_tokenizer_that_adds_none_stays_so(tmp_path, llama3):
    """Also of a folder with nothing but a sentencepiece file, and the example model's own."""
    fast = byte_level_tokenizer(tmp_path, adds_bos=False)
    assert load_tokenizer(tmp_path).encode("a page", add_special_tokens=True) == fast.encode(
        "a page"
    )
    own = load_tokenizer("examples/models/stdlib-llama-3m")
    assert own.encode("import os", add_special_tokens=True) == own.encode("import os")


def test_a_sentencepiece_file_follows_the_configuration_beside_it(llama2, tmp_path):
    folder, _, tokenizer = llama2
    ours = load_tokenizer(folder / "tokenizer.model")
    assert isinstance(ours, SentencePieceTokenizer)
    assert isinstance(load_tokenizer(folder), HuggingFaceTokenizer)
    ids = tokenizer.encode("the cache 🙂")
    assert ours.encode("the cache 🙂", add_special_tokens=True) == ids
    assert ours.encode("the cache 🙂") == ids[1:]
    for skip in (True, False):
        for tokens in (ids, [*ids, 2, *ids]):
            expected = tokenizer.decode(tokens, skip_special_tokens=skip)
            assert ours.decode(tokens, skip_special_tokens=skip) == expected
    (tmp_path / "tokenizer.model").write_bytes((folder / "tokenizer.model").read_bytes())
    alone = load_tokenizer(tmp_path)
    assert alone.encode("the cache", add_special_tokens=True) == alone.encode("the cache")


def test_the_rules_travel_through_a_megatron_checkpoint(llama2, tmp_path):
    folder, _, tokenizer = llama2
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    try:
        convert("hf", "megatron", folder, tmp_path / "m")
        convert("megatron", "hf", tmp_path / "m", tmp_path / "back")
    finally:
        (folder / "generation_config.json").unlink()
    for place in (tmp_path / "m", tmp_path / "back"):
        llm = start(place)
        output = llm.generate("the cache", greedy(1), use_tqdm=False)[0]
        assert output.prompt_token_ids == tokenizer.encode("the cache")
        assert llm.engine.eos_ids == {2, 7}


def test_a_tokenizer_with_more_tokens_than_the_model(tmp_path, llama3, caplog):
    """A padding token that was added later: accepted, and refused where it is used."""
    folder, model, _ = llama3
    padded = tmp_path / "padded"
    fast = byte_level_tokenizer(padded, pad_token="<pad>")
    assert fast.pad_token_id == model.config.vocab_size
    model.save_pretrained(padded)
    llm = start(padded)
    assert "prompts with a token from 300 on are refused" in caplog.text
    same = start(folder).generate("the cache", greedy(5), use_tqdm=False)[0]
    again = llm.generate("the cache", greedy(5), use_tqdm=False)[0]
    assert again.outputs[0].token_ids == same.outputs[0].token_ids
    for prompt in ("the <pad> cache", [5, 300]):
        with pytest.raises(InvalidRequest, match=r"token id 300 \('<pad>'\).*vocabulary of 300"):
            llm.generate([prompt], greedy(5), use_tqdm=False)
    convert("hf", "megatron", padded, tmp_path / "m")
    assert start(tmp_path / "m").engine.description.vocab_size == 300


# End of an answer


@pytest.fixture
def with_ends(llama3, tmp_path):
    """The model with two more end tokens, which it makes in the middle of an answer."""
    folder, model, tokenizer = llama3
    ids = tokenizer.encode("the cache holds")
    made = generated(model, ids, 16, eos_token_id=None)
    at = next(i for i in range(3, 16) if made[i] not in made[:i])
    for file in folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    return tmp_path, ids, made, at


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_every_end_token_ends_an_answer(with_ends, file):
    folder, ids, made, at = with_ends
    ends = [1, 299, made[at]]
    place = folder / file
    content = json.loads(place.read_text()) if place.is_file() else {}
    place.unlink(missing_ok=True)
    place.write_text(json.dumps(content | {"eos_token_id": ends}))
    theirs = generated(LlamaForCausalLM.from_pretrained(folder).double(), ids, 16)
    assert theirs == made[: at + 1]
    llm = start(folder)

    def run(**options):
        return llm.generate("the cache holds", greedy(16, **options), use_tqdm=False)[0].outputs[0]

    out = run()
    assert (out.token_ids, out.finish_reason, out.stop_reason) == (theirs, "stop", made[at])
    assert run(ignore_eos=True).token_ids == made
    longer = run(min_tokens=at + 1)
    assert longer.token_ids[:at] == made[:at] and len(longer.token_ids) > at
    assert not set(longer.token_ids[: at + 1]) & set(ends)
    # the tokenizer's own has no stop reason
    own = run(allowed_token_ids=[1])
    assert (own.token_ids, own.finish_reason, own.stop_reason) == ([1], "stop", None)


def test_sampling_defaults_of_the_model(llama3, tmp_path):
    folder, _, _ = llama3
    for file in folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    file = tmp_path / "generation_config.json"
    values = {"temperature": 0.6, "top_p": 0.9, "top_k": 50, "max_new_tokens": 7, "do_sample": True}
    file.write_text(json.dumps(values | {"eos_token_id": [1, 3]}))
    llm = start(tmp_path)
    params = llm.get_default_sampling_params()
    assert (params.temperature, params.top_p, params.top_k, params.max_tokens) == (0.6, 0.9, 50, 7)
    assert llm.generate("a", use_tqdm=False)[0].outputs[0].num_tokens <= 7
    plain = start(tmp_path, generation_config="vllm")
    assert plain.get_default_sampling_params() == SamplingParams()
    assert plain.engine.eos_ids == {1, 3}, "the end tokens stay"
    other = tmp_path / "other"
    other.mkdir()
    (other / "generation_config.json").write_text('{"temperature": 0.1, "eos_token_id": 9}')
    third = start(tmp_path, generation_config=other)
    assert third.get_default_sampling_params().temperature == 0.1
    assert third.engine.eos_ids == {1, 9}
    for text, message in (
        ('{"temperature": "hot"}', "temperature='hot'"),
        ('{"eos_token_id": "</s>"}', "eos_token_id='</s>'"),
        ("[", "not valid JSON"),
    ):
        file.write_text(text)
        with pytest.raises(DMCError, match=rf"generation_config\.json.*{message}"):
            start(tmp_path)
    with pytest.raises(CheckpointError, match="nowhere"):
        start(folder, generation_config="nowhere")


# Special tokens in the answer


def test_special_tokens_show_and_stop(llm3, llama3):
    _, _, tokenizer = llama3
    start_id, eot = 2, 3

    def run(bias=None, **options):
        options = {"allowed_token_ids": [start_id, 20], "logit_bias": {start_id: 100}} | options
        return llm3.generate("the cache", greedy(3, **options), use_tqdm=False)[0].outputs[0]

    hidden, shown = run(), run(skip_special_tokens=False)
    assert hidden.token_ids == shown.token_ids == [start_id] * 3
    assert hidden.text == "" and shown.text == "<|start|>" * 3
    assert shown.text == tokenizer.decode(shown.token_ids, skip_special_tokens=False)
    for options in (
        dict(stop=["<|start|>"]),
        dict(stop=["<|start|>"], skip_special_tokens=False),
        dict(stop=["rt|><|"], skip_special_tokens=False),
    ):
        out = run(**options)
        assert (out.finish_reason, out.stop_reason) == ("stop", options["stop"][0])
        assert out.num_tokens == (1 if options["stop"] == ["<|start|>"] else 2)
    assert run(stop=["rt|><|"], skip_special_tokens=False).text == "<|sta"
    out = run(allowed_token_ids=[eot], logit_bias=None, stop=[SPECIAL[3]], min_tokens=2)
    assert out.num_tokens == 3, "not before min_tokens"


def test_special_tokens_that_no_attribute_names(llama3):
    """Llama 3 has hundreds that are only flagged in its tokenizer.json."""
    folder, _, tokenizer = llama3
    assert tokenizer.all_special_ids == [0, 1]
    ours = load_tokenizer(folder)
    assert ours.special_ids == {0, 1, 2, 3, 4}
    ids = [0, 2, 40, 3, 50, 4, 1]
    assert ours.decode(ids) == tokenizer.decode(ids, skip_special_tokens=True)
    assert tokenizer.decode(ids, skip_special_tokens=True) == tokenizer.decode([40, 50])


# Tokens that are part of a character


@pytest.mark.parametrize("family", ["llama3", "llama2"])
@pytest.mark.parametrize("reader", ["folder", "file"])
def test_bytes_and_offsets_of_parts_of_characters(family, reader, request):
    folder = request.getfixturevalue(family)[0]
    if reader == "file" and family == "llama3":
        pytest.skip("there is no sentencepiece file")
    tokenizer = load_tokenizer(folder / "tokenizer.model" if reader == "file" else folder)
    texts = TokenTexts(tokenizer)
    ids = tokenizer.encode(BYTES, add_special_tokens=True)
    rows = [{i: Logprob(-1.0, 1)} for i in ids]
    pieces = TokenPieces(texts, skip_special_tokens=True, known=BYTES)
    found = for_completions(pieces, ids, rows, 1)
    # the text is that of the tokens but the first, and the offsets lead into it
    assert found["tokens"][0] == tokenizer.decode(ids[:1], skip_special_tokens=False) != ""
    assert "".join(found["tokens"][1:]) == BYTES and "" in found["tokens"][1:]
    for token, offset in zip(found["tokens"][1:], found["text_offset"][1:], strict=True):
        assert BYTES[offset:].startswith(token)
    assert found["text_offset"][:2] == [0, 0] and found["text_offset"][-1] == len(BYTES) - 1
    assert found["text_offset"] == sorted(found["text_offset"])
    pieces = TokenPieces(texts, skip_special_tokens=True, known=BYTES)
    content = for_chat(texts, pieces, ids, rows, 1)["content"]
    data = b"".join(bytes(entry["bytes"]) for entry in content[1:])
    assert data.decode().removeprefix(" ") == BYTES, "sentencepiece writes a space in front"
    parts = [bytes(entry["bytes"]) for entry in content[1:] if not entry["token"]]
    assert parts and all(part for part in parts), "parts of characters have bytes"


def test_a_completion_goes_on_where_its_prompt_ends(llama3):
    """The pieces are those of the detokenizer, whatever the tokens, also where bytes are no characters."""
    tokenizer = load_tokenizer(llama3[0])
    texts = TokenTexts(tokenizer)
    generator = torch.Generator().manual_seed(3)
    for skip in (True, False):
        for _ in range(20):
            prompt, ids = torch.randint(0, 300, (2, 12), generator=generator).tolist()
            prompt += tokenizer.encode(" a")  # whole characters
            detokenizer = IncrementalDetokenizer(tokenizer, prompt, skip_special_tokens=skip)
            pieces = TokenPieces(texts, skip_special_tokens=skip, prompt_token_ids=prompt)
            for token_id in ids:
                name = pieces.name(token_id)
                before = detokenizer.text
                detokenizer.add(token_id)
                assert pieces.num_chars == len(before)
                pieces.add(token_id)
                assert pieces.num_chars == len(detokenizer.text)
                if token_id not in tokenizer.special_ids:
                    assert detokenizer.text == before + name
                elif not skip:
                    assert detokenizer.text.endswith(name)


def test_bytes_of_single_tokens(llama3, llama2):
    for folder, _, _ in (llama3, llama2):
        tokenizer = load_tokenizer(folder)
        for text in ("日本語 🙂", "the cache", "\n\t"):
            data = b"".join(map(tokenizer.token_bytes, tokenizer.encode(text)))
            assert data.decode().removeprefix(" ") == text.removeprefix(" ")
        assert tokenizer.token_bytes(0).decode() == tokenizer.inner.convert_ids_to_tokens(0)


# Objects in a tokenizer's place; threads


def test_tokenizers_of_other_makes(llama3):
    ours = as_tokenizer(llama3[2])
    assert isinstance(ours, HuggingFaceTokenizer) and as_tokenizer(ours) is ours
    assert ours.encode("a page", add_special_tokens=True) == llama3[2].encode("a page")
    assert as_tokenizer(None) is None


def test_many_threads_share_a_tokenizer(llama3):
    tokenizer = load_tokenizer(llama3[0])
    text = "the cache of the model " * 200
    want = tokenizer.encode(text, add_special_tokens=True)

    def work(i):
        add = bool(i % 2)
        ids = tokenizer.encode(text, add_special_tokens=add)
        return ids == (want if add else want[1:]) and tokenizer.decode(ids) == text

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(60)))


# Code in a folder


@pytest.fixture
def nobody_answers(monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked at the keyboard"))


@pytest.mark.usefixtures("nobody_answers", "remote_modules")
def test_code_in_a_tokenizers_folder(llama3, tmp_path):
    """Its code runs only if it is trusted, and there is no prompt."""
    folder = tmp_path / "own"
    folder.mkdir()
    for file in llama3[0].iterdir():
        if file.name != "tokenizer_config.json":
            (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((llama3[0] / "tokenizer_config.json").read_text())
    config |= {"auto_map": {"AutoTokenizer": ["mine.Mine", None]}, "tokenizer_class": "Mine"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    marker = tmp_path / "it ran"
    (folder / "mine.py").write_text(
        "from pathlib import Path\nfrom transformers import PreTrainedTokenizerFast\n"
        f"Path({str(marker)!r}).touch()\n"
        "class Mine(PreTrainedTokenizerFast):\n    pass\n"
    )
    for use in (start, load_tokenizer):
        with pytest.raises(CheckpointError, match="--trust-remote-code"):
            use(folder)
    with pytest.raises(CheckpointError, match="--trust-remote-code"):
        convert("hf", "megatron", folder, tmp_path / "m")
    assert not marker.exists()
    convert("hf", "megatron", folder, tmp_path / "m", trust_remote_code=True)
    assert marker.exists()
    llm = start(folder, trust_remote_code=True)
    prompt = llm.generate("a page", greedy(1), use_tqdm=False)[0].prompt_token_ids
    assert prompt == llama3[2].encode("a page")


@pytest.mark.usefixtures("nobody_answers")
def test_an_export_is_served_without_its_code(tmp_path, monkeypatch):
    """`convert --to hf`, then everything that opens a folder; transformers must load no module."""
    from transformers import dynamic_module_utils

    for name in ("get_class_from_dynamic_module", "get_class_in_module"):
        monkeypatch.setattr(dynamic_module_utils, name, lambda *_, **__: pytest.fail("code is run"))
    folder = tmp_path / "export"
    save_with_code(model_of(sizes={"vocab_size": 300}), folder)
    byte_level_tokenizer(folder)
    assert "auto_map" in (folder / "config.json").read_text() and list(folder.glob("*.py"))
    llm = LLM(folder, device="cpu", num_pages=2000)
    assert llm.engine.description.dmc is not None
    template = load_chat_template(llm.get_tokenizer(), None)
    turns = [{"role": "user", "content": "a page"}]
    ids = template.token_ids(turns, add_generation_prompt=True, arguments=None)
    assert ids[0] == 0 and 0 not in ids[1:]
    assert MegatronDMC(str(folder), llm=llm).tok_encode("a page")[0] == 0
