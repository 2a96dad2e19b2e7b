"""Isolation of requests over HTTP, in one process with the engine, so that a test can inject failures: a client
gets the error of its own request, and others are unaffected; chunks of tokens without text; cache salts."""

import asyncio
import gc
import json
import logging
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from types import SimpleNamespace

import pytest
import uvicorn
from faults import Poisoned, Spread, raising
from tiny_gpt import V, dmc_config, make_engine

from megatron_dmc import AsyncLLM
from megatron_dmc.engine import RequestStream, detokenizer
from megatron_dmc.engine.sampler import Sampler
from megatron_dmc.server import text as text_module
from megatron_dmc.server.app import build_app
from megatron_dmc.server.limits import Concurrency
from megatron_dmc.server.metrics import Metrics
from megatron_dmc.server.service import Service

NEIGHBOUR = {"prompt": [5, 6, 7], "max_tokens": 40, "seed": 3, "logprobs": 2, "ignore_eos": True}


class Template:
    """A chat template: "broken" breaks it."""

    exists = True

    def token_ids(self, messages, **_):
        if messages[0]["content"] == "broken":
            raise ZeroDivisionError("template")
        return [4, 5, 6]


@pytest.fixture(scope="module")
def served():
    """A served engine; its model's logits behind token V - 1 are NaN."""
    engine = make_engine(
        dmc_config(), tokenizer=Spread(), model=Poisoned(dmc_config()), enable_prefix_caching=True,
        prefix_block_size=4, num_pages=2000,
    )  # fmt: skip
    metrics = Metrics("tiny")
    llm = AsyncLLM(engine, observer=metrics.observe)
    service = Service(llm, ["tiny"], Concurrency(100), Template())
    app = build_app(service, metrics, max_body_bytes=10**6)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="critical", lifespan="off"))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()), daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield SimpleNamespace(url=f"http://127.0.0.1:{port}", llm=llm, engine=engine, metrics=metrics)
    server.should_exit = True
    thread.join(30)
    llm.shutdown()


def post(served, body, path="/v1/completions"):
    """(status, document), of a stream (status, [documents])."""
    request = urllib.request.Request(
        served.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            if not body.get("stream"):
                return answer.status, json.load(answer)
            lines = [line[5:].strip() for line in answer if line.startswith(b"data:")]
    except urllib.error.HTTPError as e:
        return e.code, json.load(e)
    assert lines.pop() == b"[DONE]"
    return 200, [json.loads(line) for line in lines]


def tokens_of(document):
    choice = document["choices"][0]
    # rounded as in a batch
    return choice["text"], pytest.approx(choice["logprobs"]["token_logprobs"], abs=1e-9)


def with_a_neighbour(served, *asked):
    """Answers while another request runs, which must get the tokens that it gets alone."""
    want = tokens_of(post(served, NEIGHBOUR)[1])
    got = []
    thread = threading.Thread(target=lambda: got.append(post(served, NEIGHBOUR)))
    thread.start()
    answers = [post(served, *one) for one in asked]
    thread.join(60)
    choice = got[0][1]["choices"][0]
    assert got[0][0] == 200
    assert (choice["text"], choice["logprobs"]["token_logprobs"]) == want
    assert served.llm.failure is None
    return answers


@pytest.mark.parametrize(
    "body, message",
    [
        ({"prompt": "x", "max_tokens": 2, "min_tokens": 1, "stop_token_ids": [40000]},
         "stop_token_ids: token id 40000 is not in the model's vocabulary of 40"),
        ({"prompt": "x", "max_tokens": 2, "allowed_token_ids": [39, 40]}, "allowed_token_ids: token id 40"),
        ({"prompt": "x", "logit_bias": {"40000": 1}}, "logit_bias: token id 40000"),
        ({"prompt": [40000]}, "token id 40000"),
        ({"prompt": "a", "temperature": 1e39, "min_tokens": 1}, "temperature"),
        ({"prompt": "a", "temperature": 1e308}, "temperature"),
        ({"prompt": "a", "min_tokens": 17}, "min_tokens"),
        ({"prompt": "a", "top_k": 1e400}, "top_k"),
        ({"prompt": "a", "max_tokens": True}, "max_tokens"),
        ({"prompt": "a", "seed": "7"}, "seed"),
        ({"prompt": "a", "presence_penalty": float("nan")}, "presence_penalty"),
        ({"prompt": "a", "cache_salt": ""}, "cache_salt"),
    ],
)  # fmt: skip
def test_ids_and_numbers_outside_of_their_bounds_are_refused(served, body, message):
    ((status, document),) = with_a_neighbour(served, (body,))
    assert status == 400 and message in document["error"]["message"], document


def test_numbers_at_their_bounds_are_taken(served):
    body = {
        "prompt": "a",
        "max_tokens": 3,
        "seed": 2**63 - 1,
        "n": 3,
        "temperature": 1e-45,
        "min_tokens": 3,
    }
    assert post(served, body)[0] == 200
    body |= {"temperature": 1e6, "top_k": 2**31 - 1, "top_p": 1e-50, "repetition_penalty": 100}
    assert post(served, body)[0] == 200


SAMPLED = {"prompt": [9, 9], "max_tokens": 6, "seed": 1, "logprobs": 4, "ignore_eos": True}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", ["sampling", "detokenizing", "output", "log-probability texts"])
def test_a_failed_request_is_told_and_the_others_go_on(served, monkeypatch, name, stream):
    target, attribute, is_meant = {
        "sampling": (Sampler, "_seed_of", lambda self, request: request.params.seed == 1),
        "detokenizing": (detokenizer, "find_stop", lambda text, old, stops: stops == ["~~"]),
        "output": (RequestStream, "take", lambda self: self.params.seed == 1),
        "log-probability texts": (text_module, "for_completions", lambda *a: 4 in a),
    }[name]
    in_each_step = name in ("sampling", "detokenizing")
    broken = raising(
        getattr(target, attribute), is_meant, KeyError("injected"), after=2 * in_each_step
    )
    monkeypatch.setattr(target, attribute, broken)
    ((status, answer),) = with_a_neighbour(served, (SAMPLED | {"stream": stream, "stop": ["~~"]},))
    if stream:
        assert status == 200
        answer = answer[-1]
    else:
        assert status == 500
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert "injected" in answer["error"]["message"] and answer["error"]["type"] == "server_error"
    monkeypatch.undo()
    assert post(served, SAMPLED)[0] == 200


def test_a_broken_template_and_logits_that_are_not_finite(served):
    chat = {"messages": [{"role": "user", "content": "broken"}]}
    template, nan, chat_nan = with_a_neighbour(
        served,
        (chat, "/v1/chat/completions"),
        ({"prompt": [4, V - 1], "n": 2},),
        ({"prompt": [4, V - 1], "stream": True},),
    )
    assert template[0] == 500 and "template" in template[1]["error"]["message"]
    assert nan[0] == 500 and "not finite" in nan[1]["error"]["message"]
    assert nan[1]["error"]["code"] == chat_nan[1][-1]["error"]["code"] == "request_failed"
    assert '="error"' in urllib.request.urlopen(f"{served.url}/metrics").read().decode()


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_every_token_sends_a_chunk_with_or_without_text(served, path):
    """Halves of a character, special tokens, and text held back for a stop text."""
    body = {"max_tokens": 6, "stream": True, "ignore_eos": True, "temperature": 0}
    body |= {"prompt": "abc"} if path == "/v1/completions" else {
        "messages": [{"role": "user", "content": "x"}]
    }  # fmt: skip
    for extra in ({"allowed_token_ids": [2]}, {"allowed_token_ids": [1]}, {"stop": ["~" * 20]}):
        chunks = [c["choices"][0] for c in post(served, body | extra, path)[1]]
        if path == "/v1/completions":
            texts = [c["text"] for c in chunks]
        else:
            assert chunks.pop(0)["delta"] == {"role": "assistant", "content": ""}
            texts = [c["delta"].get("content") for c in chunks]
        assert len(texts) == 6, "a chunk for each token"  # a slow reader could get fewer
        assert texts[:-1] == [""] * 5
        assert [c["finish_reason"] for c in chunks] == [None] * 5 + ["length"]


def test_cached_prefixes_are_shared_within_a_salt_only(served):
    prompt = list(range(4, 22))

    def cached(path="/v1/completions", **salt):
        body = {"max_tokens": 1, "prompt": prompt}
        if path != "/v1/completions":
            body = {"max_tokens": 6, "messages": [{"role": "user", "content": "x"}]}
        status, document = post(served, body | salt, path)
        assert status == 200, document
        return document["usage"]["prompt_tokens_details"]["cached_tokens"]

    assert [cached(), cached()] == [0, 16]
    assert [cached(cache_salt="a"), cached(cache_salt="b")] == [0, 0]
    assert [cached(cache_salt="a"), cached(cache_salt="b"), cached()] == [16, 16, 16]
    status, document = post(served, {"prompt": "x", "cache_salt": 5})
    assert status == 400 and "cache_salt" in document["error"]["message"]


def mixed(number):
    """Bodies of many kinds, no two alike."""
    prompt = [4 + number % 31, 4 + number // 31 % 31, *range(4, 4 + number % 13)]
    body = {"prompt": prompt, "max_tokens": 1 + number % 4, "stream": number % 2 == 0}
    return body | [
        {}, {"logprobs": 3}, {"n": 2, "seed": number}, {"stop": [f"{number}"], "min_tokens": 1},
        {"presence_penalty": 1, "logit_bias": {"5": 1}}, {"cache_salt": f"tenant {number}"},
        {"temperature": -1}, {"bad_words": [f"w{number}"], "top_p": 0.5}, {"prompt": [4, V - 1]},
    ][number % 9]  # fmt: skip


def test_nothing_is_kept_of_requests_that_ended(served):
    """Count objects; `soak/soak_memory.py` measures memory."""
    engine = served.engine
    logging.disable(logging.CRITICAL)  # pytest would keep the tracebacks

    def objects_after(numbers):
        for number in numbers:
            assert post(served, mixed(number))[0] in (200, 400, 500)
        engine.context.prefixes.clear()  # they are kept on purpose, as long as there are pages
        gc.collect()
        return Counter(type(o).__name__ for o in gc.get_objects())

    try:
        first, second, third = (objects_after(range(k, k + 45)) for k in (0, 45, 90))
    finally:
        logging.disable(logging.NOTSET)
    # there are five requests of each kind; an object made only once does not belong to a request
    growth = min(second - first, third - second, key=Counter.total)
    assert growth.total() < 5, growth.most_common(10)
    assert (
        not engine._requests
        and not engine.output_processor._texts
        and not engine.sampler._rules._states
    )
    assert not served.llm._streams and not served.llm._calls and not served.llm.client._loop._sent
    assert not served.metrics._last_token
