"""Texts through the server, in this process: special tokens, chat templates, log-probabilities, Unicode."""

import argparse
import json
from contextlib import contextmanager

import pytest
from starlette.testclient import TestClient
from text_models import CHAT, byte_level_tokenizer, generated, random_llama

from megatron_dmc.checkpoint.chat_template import load_chat_template
from megatron_dmc.checkpoint.convert import convert
from megatron_dmc.checkpoint.tokenizer import load_tokenizer
from megatron_dmc.cli.serve import add_arguments, make_app
from megatron_dmc.errors import DMCError

TURNS = [{"role": "user", "content": "the cache"}]
DEFAULTS = {"eos_token_id": [1, 3, 4], "temperature": 1.3, "top_k": 1, "max_new_tokens": 9}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """(folder, transformers' model, transformers' tokenizer)"""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = byte_level_tokenizer(folder, pad_token="<pad>")
    llama = random_llama(folder, 300)
    (folder / "generation_config.json").write_text(json.dumps(DEFAULTS))
    return folder, llama, tokenizer


@contextmanager
def serving(folder, *flags):
    """post(path, **body) -> (status, document)"""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    sizes = ["--device", "cpu", "--num-pages", "2000", "--dtype", "float64"]
    app, service = make_app(parser.parse_args([str(folder), *sizes, *flags]))
    try:
        with TestClient(app, raise_server_exceptions=False) as client:

            def post(path, **body):
                # json= would not take lone surrogates
                answer = client.post(
                    f"/v1/{path}", content=json.dumps(body),
                    headers={"Content-Type": "application/json"},
                )  # fmt: skip
                if body.get("stream"):
                    lines = answer.text.splitlines()
                    events = [line.removeprefix("data: ") for line in lines if line]
                    return answer.status_code, [json.loads(e) for e in events if e != "[DONE]"]
                return answer.status_code, answer.json()

            yield post
    finally:
        service.llm.shutdown(timeout=30)


@pytest.fixture(scope="module")
def post(model):
    with serving(model[0]) as post:
        yield post


def choice(post, path="completions", **body):
    status, document = post(path, **body)
    assert status == 200, document
    return document["choices"][0] | {"num_prompt": document["usage"]["prompt_tokens"]}


def test_texts_begin_as_with_transformers(post, model):
    _, llama, tokenizer = model
    ids = tokenizer.encode("the cache")
    ask = dict(prompt="the cache", max_tokens=6, temperature=0, ignore_eos=True)
    found = choice(post, **ask)
    assert found["num_prompt"] == len(ids) and ids[0] == 0
    made = generated(llama, ids, 6, eos_token_id=None)
    plain = tokenizer.decode(ids, skip_special_tokens=True)
    whole = tokenizer.decode(ids + made, skip_special_tokens=True)
    assert found["text"] == whole[len(plain) :]
    without = choice(post, **ask, add_special_tokens=False)
    assert without["num_prompt"] == len(ids) - 1
    assert without["text"] == choice(post, **ask | {"prompt": ids[1:]})["text"]


def test_a_chat_has_one_begin_of_text(post, model):
    num = len(model[2].apply_chat_template(TURNS, add_generation_prompt=True)["input_ids"])
    for add in (True, False):
        found = choice(
            post, "chat/completions", messages=TURNS, max_tokens=1, add_special_tokens=add
        )
        assert found["num_prompt"] == num
    tokenizer = load_tokenizer(model[0])
    bare = load_chat_template(tokenizer, "{% for m in messages %}{{ m.content }}{% endfor %}")
    for add in (True, False):
        ids = bare.token_ids(
            TURNS, add_generation_prompt=False, arguments=None, add_special_tokens=add
        )
        assert ids == tokenizer.encode("the cache", add_special_tokens=add)


def test_the_models_defaults_and_what_goes_before_them(post, model):
    greedy = choice(post, prompt="a page", temperature=0, max_tokens=9, ignore_eos=True)["text"]
    ask = dict(prompt="a page", ignore_eos=True)
    default = choice(post, **ask, logprobs=0)
    assert default["text"] == greedy, "top_k=1 of generation_config.json"
    assert len(default["logprobs"]["tokens"]) == 9, "max_new_tokens limits every request"
    assert len(choice(post, **ask, logprobs=0, max_tokens=100)["logprobs"]["tokens"]) == 9
    assert len(choice(post, **ask, logprobs=0, max_tokens=4)["logprobs"]["tokens"]) == 4
    assert choice(post, **ask, top_k=0, temperature=2.0, seed=1)["text"] != greedy
    chat = choice(post, "chat/completions", messages=TURNS, logprobs=True, ignore_eos=True)
    assert len(chat["logprobs"]["content"]) == 9
    for end, reason in ((1, None), (3, 3), (4, 4)):
        ended = choice(post, prompt="a page", allowed_token_ids=[end])
        assert (ended["finish_reason"], ended["stop_reason"]) == ("stop", reason)
    with serving(model[0], "--generation-config", "vllm") as plain:
        assert len(choice(plain, **ask, logprobs=0)["logprobs"]["tokens"]) == 16
        assert choice(plain, prompt="a page", allowed_token_ids=[4])["stop_reason"] == 4


@pytest.mark.parametrize("skip", [True, False])
def test_log_probabilities_of_parts_of_characters(post, skip):
    """Offsets index the text, bytes add up to it, special tokens have names; streams agree."""
    prompt = "naïve 🙂 <|start|>日本"
    ask = dict(
        prompt=prompt, echo=True, logprobs=3, max_tokens=8, temperature=0, ignore_eos=True,
        skip_special_tokens=skip, logit_bias={"2": 30, "40": 31}, frequency_penalty=2.0,
    )  # fmt: skip
    found = choice(post, **ask)
    logprobs, whole = found["logprobs"], found["text"]
    assert whole.startswith(prompt) and logprobs["tokens"][0] == "<|begin_of_text|>"
    assert "<|start|>" in logprobs["tokens"] and "" in logprobs["tokens"]
    for token, offset in zip(logprobs["tokens"][1:], logprobs["text_offset"][1:], strict=True):
        hidden = skip and token == "<|start|>" and offset >= len(prompt)
        assert hidden or whole.startswith(token, offset), (token, offset)
    assert logprobs["text_offset"] == sorted(logprobs["text_offset"])
    assert all(top is None or len(top) <= 4 for top in logprobs["top_logprobs"])
    _, events = post("completions", **ask, stream=True)
    joined = {name: [] for name in logprobs}
    for event in events:
        for name, values in (event["choices"][0]["logprobs"] or {}).items():
            joined[name] += values
    assert joined["tokens"] == logprobs["tokens"]
    assert joined["text_offset"] == logprobs["text_offset"]


def test_bytes_of_a_chats_tokens(post, model):
    """An emoji of several tokens, made token by token."""
    ids = load_tokenizer(model[0]).encode("🙂")
    assert len(ids) == 4
    found = choice(
        post, "chat/completions", messages=TURNS, logprobs=True, top_logprobs=2, max_tokens=4,
        allowed_token_ids=ids, ignore_eos=True, temperature=0,
    )  # fmt: skip
    content = found["logprobs"]["content"]
    parts = {tuple("🙂".encode()[i : i + 1]) for i in range(4)}
    assert all(tuple(entry["bytes"]) in parts for entry in content)
    tops = [tuple(t["bytes"]) for entry in content for t in entry["top_logprobs"]]
    assert len(tops) == 8 and all(tops)


def test_special_tokens_as_stops(post):
    ask = dict(prompt="a page", temperature=0, logit_bias={"2": 100}, max_tokens=4)
    found = choice(post, **ask, stop=["<|start|>"])
    assert (found["text"], found["stop_reason"]) == ("", "<|start|>")
    shown = choice(post, **ask, skip_special_tokens=False, ignore_eos=True)
    assert shown["text"] == "<|start|>" * 4


def test_a_token_that_the_model_lacks(post):
    for prompt in ("a <pad> page", [5, 300]):
        status, document = post("completions", prompt=prompt)
        assert status == 400 and "'<pad>'" in document["error"]["message"]
    turns = [{"role": "user", "content": "<pad>"}]
    status, document = post("chat/completions", messages=turns)
    assert status == 400 and "vocabulary of 300" in document["error"]["message"]


BAD = "a\ud83d"


@pytest.mark.parametrize(
    "path, body",
    [
        ("completions", {"prompt": BAD}),
        ("completions", {"prompt": ["x", BAD]}),
        ("completions", {"prompt": "x", "stop": [BAD]}),
        ("completions", {"prompt": "x", "bad_words": [BAD]}),
        ("completions", {"prompt": "x", "user": BAD}),
        ("completions", {"prompt": "x", "model": BAD}),
        ("completions", {"prompt": "x", BAD: 1}),
        ("chat/completions", {"messages": [{"role": "user", "content": BAD}]}),
        ("chat/completions", {"messages": [{"role": BAD, "content": "x"}]}),
        ("chat/completions", {"messages": [{"role": "user", "content": "x", "name": BAD}]}),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "text", "text": BAD}]}]},
        ),
        ("chat/completions", {"messages": TURNS, "chat_template_kwargs": {"x": [BAD]}}),
        ("chat/completions", {"messages": TURNS, "chat_template_kwargs": {BAD: 1}}),
    ],
)
def test_lone_surrogates_are_refused(post, path, body):
    status, document = post(path, **body)
    assert status == 400, document
    assert "nicode" in document["error"]["message"]


# Chat templates


def rendered(folder, template=None):
    tokenizer = load_tokenizer(folder)
    chat = load_chat_template(tokenizer, template)
    ids = chat.token_ids(TURNS, add_generation_prompt=False, arguments=None)
    return tokenizer.decode(ids)


NAMED = {"default": "D {{ messages[0].content }}", "tool_use": "T {{ messages[0].content }}"}


def test_named_templates(tmp_path):
    folder = tmp_path / "list"
    byte_level_tokenizer(folder, chat_template=None)
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text())
    listed = [{"name": name, "template": text} for name, text in NAMED.items()]
    file.write_text(json.dumps(config | {"chat_template": listed}))
    assert rendered(folder) == "D the cache"
    assert rendered(folder, "tool_use") == "T the cache"
    assert rendered(folder, "X {{ messages[0].role }}") == "X user"
    own = tmp_path / "own.jinja"
    own.write_text("F {{ messages[0].content }}")
    assert rendered(folder, str(own)) == "F the cache"
    with pytest.raises(DMCError, match="no such file.*default, tool_use"):
        load_chat_template(load_tokenizer(folder), "rag")
    file.write_text(json.dumps(config | {"chat_template": listed[1:]}))
    with pytest.raises(DMCError, match="tool_use, none of them the default.*--chat-template NAME"):
        load_chat_template(load_tokenizer(folder), None)
    assert rendered(folder, "tool_use") == "T the cache"


def test_templates_in_files_travel(tmp_path):
    """As transformers 5 saves them: chat_template.jinja, and a folder for the others."""
    folder = tmp_path / "hf"
    byte_level_tokenizer(folder, chat_template=NAMED)
    assert (folder / "chat_template.jinja").is_file()
    assert (folder / "additional_chat_templates" / "tool_use.jinja").is_file()
    random_llama(folder, 300)
    convert("hf", "megatron", folder, tmp_path / "m")
    for place in (folder, tmp_path / "m" / "tokenizer"):
        assert rendered(place) == "D the cache"
        assert rendered(place, "tool_use") == "T the cache"


def test_a_server_with_named_templates(tmp_path):
    folder = tmp_path / "model"
    byte_level_tokenizer(folder, chat_template={"default": CHAT, "tool_use": "T"})
    random_llama(folder, 300)
    nums = []
    for flags in ((), ("--chat-template", "tool_use")):
        with serving(folder, *flags) as post:
            found = choice(post, "chat/completions", messages=TURNS, max_tokens=1)
            nums.append(found["num_prompt"])
    assert nums[0] > nums[1] == 1
