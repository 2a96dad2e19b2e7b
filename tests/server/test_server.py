"""A real server process, driven by the official `openai` client and by plain HTTP."""

import concurrent.futures
import http.client
import json
import re
import socket
import threading
import time
import urllib.error
import urllib.request
from urllib.parse import urlsplit

import openai
import pytest
from server_process import CHAT_TEMPLATE, MODEL, ServerProcess

from megatron_dmc import LLM, SamplingParams

PROMPT = "def main():\n"
LONG = {"prompt": PROMPT, "max_tokens": 480, "ignore_eos": True}
PATIENCE = 300
"""Seconds; only a busy machine needs as long."""
FLAGS = ("--dtype", "float32", "--chat-template", CHAT_TEMPLATE, "--num-pages", "16384")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    flags = (*FLAGS, "--max-request-bytes", "100000", "--max-concurrent-requests", "40")
    with ServerProcess(tmp_path_factory.mktemp("server"), *flags) as process:
        yield process


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def llm():
    return LLM(MODEL, dtype="float32", device="cpu", num_pages=4096)


def post(server, body, path="/v1/completions", **headers):
    """(status, JSON document) of a body, bytes or JSON."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Content-Type": "application/json", **headers}
    request = urllib.request.Request(f"{server.url}{path}", data, headers)
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as e:
        return e.code, json.load(e)


def connect(server, body):
    """A socket on which a request has been sent and nothing has been read."""
    data = json.dumps(body).encode()
    parts = urlsplit(server.url)
    connection = socket.create_connection((parts.hostname, parts.port))
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(data)}\r\n\r\n"
    )
    connection.sendall(head.encode() + data)
    return connection


def wait_until(condition, seconds=PATIENCE):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def test_completions_are_the_engines(client, llm):
    prompts = [PROMPT, "import os\n"]
    params = SamplingParams(temperature=0, max_tokens=12, logprobs=2)
    want = [output.outputs[0] for output in llm.generate(prompts, params, use_tqdm=False)]
    got = client.completions.create(
        model="tiny", prompt=prompts, temperature=0, max_tokens=12, logprobs=2
    )
    assert [c.text for c in got.choices] == [w.text for w in want]
    assert [c.finish_reason for c in got.choices] == ["length", "length"]
    ids = [llm.get_tokenizer().encode(p) for p in prompts]
    num_prompt = sum(map(len, ids))
    assert (got.usage.prompt_tokens, got.usage.completion_tokens) == (num_prompt, 24)
    assert got.usage.measured_cr == 1.0  # the example model does not merge
    for choice, w in zip(got.choices, want, strict=True):
        assert "".join(choice.logprobs.tokens) == w.text
        probabilities = [row[i].logprob for i, row in zip(w.token_ids, w.logprobs, strict=True)]
        assert choice.logprobs.token_logprobs == pytest.approx(probabilities, abs=1e-4)
        assert all(2 <= len(top) <= 3 for top in choice.logprobs.top_logprobs)
    # token ids in place of texts: one prompt, or several
    again = client.completions.create(model="tiny", prompt=ids, temperature=0, max_tokens=12)
    assert [c.text for c in again.choices] == [w.text for w in want]
    one = client.completions.create(model="tiny", prompt=ids[0], temperature=0, max_tokens=12)
    assert [c.text for c in one.choices] == [want[0].text]


def test_streams_add_up(client):
    whole = client.completions.create(
        model="tiny", prompt=PROMPT, n=2, seed=5, max_tokens=20, logprobs=0, stop=["zzz"]
    )
    texts, tokens, reasons, usage = ["", ""], [[], []], [None, None], None
    for chunk in client.completions.create(
        model="tiny", prompt=PROMPT, n=2, seed=5, max_tokens=20, logprobs=0, stop=["zzz"],
        stream=True, stream_options={"include_usage": True},
    ):  # fmt: skip
        assert usage is None, "the usage comes last"
        usage = chunk.usage
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            tokens[choice.index] += choice.logprobs.tokens
            reasons[choice.index] = choice.finish_reason
    assert texts == [c.text for c in whole.choices] and texts[0] != texts[1]
    assert tokens == [c.logprobs.tokens for c in whole.choices]
    assert reasons == ["length", "length"]
    assert usage == whole.usage and usage.completion_tokens == 40


def test_seed_stop_and_echo(client, llm):
    ask = dict(model="tiny", prompt=PROMPT, max_tokens=24)
    a, b = (client.completions.create(**ask, seed=7).choices[0].text for _ in range(2))
    assert a == b != client.completions.create(**ask, seed=8).choices[0].text
    greedy = client.completions.create(**ask, temperature=0).choices[0].text
    stop = greedy[9:13]
    stopped = client.completions.create(**ask, temperature=0, stop=stop).choices[0]
    assert stopped.text == greedy[: greedy.index(stop)] and stopped.finish_reason == "stop"
    assert stopped.stop_reason == stop
    streamed = client.completions.create(**ask, temperature=0, stop=[stop, "never"], stream=True)
    assert "".join(c.choices[0].text for c in streamed) == stopped.text
    # as evaluation harnesses ask for the likelihood of a text
    scored = client.completions.create(
        model="tiny", prompt=PROMPT, max_tokens=0, echo=True, logprobs=1
    )
    assert scored.choices[0].text == PROMPT and scored.usage.completion_tokens == 0
    params = SamplingParams(max_tokens=1, prompt_logprobs=1)
    output = llm.generate(PROMPT, params, use_tqdm=False)[0]
    rows = zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True)
    want = [row[token_id].logprob for token_id, row in rows]
    logprobs = scored.choices[0].logprobs
    assert logprobs.token_logprobs[0] is None and logprobs.text_offset[:2] == [0, 3]
    assert logprobs.token_logprobs[1:] == pytest.approx(want, abs=1e-4)
    both = client.completions.create(**ask, temperature=0, echo=True, stream=True)
    assert "".join(c.choices[0].text for c in both) == PROMPT + greedy


def test_chat(client, llm):
    messages = [
        {"role": "system", "content": "Say less."},
        {"role": "user", "content": [{"type": "text", "text": "import"}]},
    ]
    prompt = "# system: Say less.\n# user: import\n# assistant: "
    params = SamplingParams(temperature=0, max_tokens=10)
    want = llm.generate(prompt, params, use_tqdm=False)[0]
    ask = dict(model="tiny", messages=messages, temperature=0, max_completion_tokens=10)
    got = client.chat.completions.create(**ask, logprobs=True, top_logprobs=3)
    assert got.choices[0].message.role == "assistant"
    assert got.choices[0].message.content == want.outputs[0].text
    assert got.usage.prompt_tokens == len(want.prompt_token_ids)
    content = got.choices[0].logprobs.content
    assert "".join(token.token for token in content) == want.outputs[0].text
    assert all(len(t.top_logprobs) == 3 and t.logprob <= 0 for t in content)
    assert all(t.top_logprobs[0].logprob == t.logprob for t in content)  # greedy
    chunks = list(client.chat.completions.create(**ask, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == want.outputs[0].text
    assert chunks[-1].choices[0].finish_reason == "length"
    # without a limit: up to the context's end
    rest = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "x = 1\n" * 70}], temperature=0,
        extra_body={"ignore_eos": True},
    )  # fmt: skip
    assert 300 < rest.usage.prompt_tokens
    assert rest.usage.total_tokens == 512
    with pytest.raises(openai.BadRequestError, match="no such role: judge"):
        client.chat.completions.create(model="tiny", messages=[{"role": "judge", "content": "x"}])


def test_what_the_client_sends_and_expects(client):
    """Turns made of answers, n with a stream and usage, and parameters refused by name."""
    ask = dict(
        model="tiny", messages=[{"role": "user", "content": "import"}], max_completion_tokens=5
    )
    turn = client.chat.completions.create(**ask, n=2, seed=1).choices[1].message
    for form in (turn, turn.model_dump()):  # both ways to continue a conversation
        messages = [*ask["messages"], form, {"role": "user", "content": "os"}]
        again = client.chat.completions.create(**ask | {"messages": messages})
        assert again.choices[0].message.content
    whole = client.chat.completions.create(**ask, n=3, seed=1, logprobs=True, top_logprobs=1)
    texts, tokens, last = [""] * 3, [0] * 3, None
    for chunk in client.chat.completions.create(
        **ask, n=3, seed=1, logprobs=True, top_logprobs=1, stream=True,
        stream_options={"include_usage": True},
    ):  # fmt: skip
        assert last is None or last.usage is None
        last = chunk
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            tokens[choice.index] += len(choice.logprobs.content) if choice.logprobs else 0
    assert texts == [c.message.content for c in whole.choices] and tokens == [5, 5, 5]
    assert last.choices == [] and last.usage == whole.usage and last.usage.completion_tokens == 15
    both = client.chat.completions.create(**ask, max_tokens=1)
    assert both.usage.completion_tokens == 5, "max_completion_tokens goes first"
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    for name, value in (
        ("tools", [tool]), ("response_format", {"type": "json_object"}), ("tool_choice", "required"),
    ):  # fmt: skip
        with pytest.raises(openai.BadRequestError, match=f"{name} is not supported") as refused:
            client.chat.completions.create(**ask, **{name: value})
        assert refused.value.param == name
    client.chat.completions.create(
        **ask, tools=[], tool_choice="none", response_format={"type": "text"}
    )


def test_penalties_and_biases(client, llm):
    ask = dict(model="tiny", prompt=PROMPT, max_tokens=24, temperature=0)
    options = dict(presence_penalty=1.5, frequency_penalty=0.5, logit_bias={"40": -100, "41": 7})
    more = dict(repetition_penalty=1.2, min_tokens=3, bad_words=["self"])
    got = client.completions.create(**ask, **options, extra_body=more).choices[0].text
    bias = {int(i): value for i, value in options["logit_bias"].items()}
    params = SamplingParams(temperature=0, max_tokens=24, **options | {"logit_bias": bias}, **more)
    assert got == llm.generate(PROMPT, params, use_tqdm=False)[0].outputs[0].text
    assert got != client.completions.create(**ask).choices[0].text
    only = client.completions.create(**ask, logprobs=0, extra_body={"allowed_token_ids": [40, 41]})
    assert len(set(only.choices[0].logprobs.tokens)) <= 2


def test_models_version_health_and_metrics(server, client):
    assert [m.id for m in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").max_model_len == 512
    with pytest.raises(openai.NotFoundError, match="other"):
        client.models.retrieve("other")
    assert re.fullmatch(r"[\d.]+", server.get("/version")["version"])
    with urllib.request.urlopen(f"{server.url}/health") as answer:
        assert answer.status == 200

    def scrape():
        with urllib.request.urlopen(f"{server.url}/metrics") as answer:
            text = answer.read().decode()
        return {
            m[1]: float(m[2])
            for m in re.finditer(
                r'^megatron_dmc:(\w+)\{model_name="tiny"\} (\S+)$', text, re.MULTILINE
            )
        }

    before = scrape()
    client.completions.create(model="tiny", prompt=PROMPT, max_tokens=9, n=2)
    server.wait_until_idle()
    after = scrape()
    grown = {name: after[name] - before.get(name, 0) for name in after}
    assert grown["generation_tokens_total"] == 18 and grown["prompt_tokens_total"] == 14
    assert grown["time_to_first_token_seconds_count"] == 2
    assert grown["inter_token_latency_seconds_count"] == 16
    assert grown["request_time_per_output_token_seconds_count"] == 2
    assert grown["e2e_request_latency_seconds_sum"] >= grown["time_to_first_token_seconds_sum"] > 0
    assert (after["num_requests_running"], after["num_requests_waiting"]) == (0, 0)
    assert after["kv_cache_usage_perc"] == 0 and after["measured_cr"] == 1


WRONG = {
    "not JSON": (b'{"prompt": ', 400, "not JSON"),
    "not an object": (b"[1, 2]", 400, "JSON object"),
    "not UTF-8": (b'{"prompt": "\xff\xfe"}', 400, ""),
    "deeply nested": (b'{"prompt": ' + b"[" * 40000 + b"]" * 40000 + b"}", 400, ""),
    "lone surrogate": (b'{"prompt": "\\ud800"}', 400, "not JSON"),
    "huge number": (b'{"prompt": "x", "max_tokens": ' + b"9" * 6000 + b"}", 400, ""),
    "no prompt": ({"model": "tiny"}, 400, "prompt"),
    "mixed prompt": ({"prompt": [1, "a"]}, 400, "prompt"),
    "empty list": ({"prompt": []}, 400, "prompt"),
    "token id out of range": ({"prompt": [512]}, 400, "vocabulary of 512"),
    "other model": ({"prompt": "x", "model": "gpt-4"}, 404, "gpt-4"),
    "misspelled parameter": ({"prompt": "x", "temprature": 1}, 400, "did you mean temperature"),
    "too many fields": ({"prompt": "x", **{f"f{i}": 1 for i in range(999)}}, 400, "1000 fields"),
    "unsupported parameter": ({"prompt": "x", "suffix": "y"}, 400, "suffix"),
    "penalty": ({"prompt": "x", "frequency_penalty": 2.5}, 400, "frequency_penalty"),
    "repetition penalty": ({"prompt": "x", "repetition_penalty": 0}, 400, "repetition_penalty"),
    "bias of no token": ({"prompt": "x", "logit_bias": {"a": 1}}, 400, "logit_bias"),
    "bias too large": ({"prompt": "x", "logit_bias": {"3": 101}}, 400, "logit_bias"),
    "bias out of range": ({"prompt": "x", "logit_bias": {"512": 1}}, 400, "vocabulary of 512"),
    "nothing allowed": ({"prompt": "x", "allowed_token_ids": []}, 400, "allowed_token_ids"),
    "blank bad word": ({"prompt": "x", "bad_words": [" "]}, 400, "bad_words"),
    "min over max": ({"prompt": "x", "min_tokens": 5, "max_tokens": 4}, 400, "min_tokens"),
    "priority": ({"prompt": "x", "priority": 1}, 400, "scheduling_policy='priority'"),
    "temperature": ({"prompt": "x", "temperature": -1}, 400, "temperature"),
    "NaN": (b'{"prompt": "x", "temperature": NaN}', 400, "temperature"),
    "top_p": ({"prompt": "x", "top_p": 0}, 400, "top_p"),
    "n": ({"prompt": "x", "n": 0}, 400, "n:"),
    "text as a number": ({"prompt": "x", "max_tokens": "5"}, 400, "max_tokens"),
    "logprobs": ({"prompt": "x", "logprobs": 21}, 400, "logprobs"),
    "empty stop": ({"prompt": "x", "stop": [""]}, 400, "stop"),
    "stream_options": ({"prompt": "x", "stream_options": {}}, 400, "stream=true"),
    "context": ({"prompt": "x", "max_tokens": 512}, 400, "maximum context length is 512 tokens"),
    "prompt too long": ({"prompt": [5] * 512}, 400, "maximum context length is 512 tokens"),
    "too many": ({"prompt": ["x"] * 41}, 400, "--max-concurrent-requests"),
    "too large": (b'{"prompt": "' + b"x" * 100_000 + b'"}', 413, "--max-request-bytes"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_requests(server, case):
    body, status, message = WRONG[case]
    got, document = post(server, body)
    assert got == status, document
    assert set(document["error"]) == {"message", "type", "param", "code"}
    assert message in document["error"]["message"]


def test_wrong_paths_and_chunked_bodies(server):
    assert post(server, {}, "/v1/nothing")[0] == 404
    assert post(server, {}, "/health")[0] == 405
    assert post(server, {"messages": []}, "/v1/chat/completions")[0] == 400
    for field in ("messages", "chat_template"):
        kwargs = {
            "messages": [{"role": "user", "content": "x"}],
            "chat_template_kwargs": {field: 1},
        }
        assert post(server, kwargs, "/v1/chat/completions")[0] == 400
    # a body of undeclared length is cut off while it is read
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=PATIENCE)
    chunks = (b" " * 30_000 for _ in range(6))
    connection.request(
        "POST", "/v1/completions", chunks, {"Content-Type": "application/json"}, encode_chunked=True
    )
    assert connection.getresponse().status == 413
    connection.close()


def test_limits_and_slow_readers(server, client):
    """40 places: 39 taken by clients that never read, and all other clients are still served."""
    many = {**LONG, "n": 13, "max_tokens": 100, "stream": True}
    connections = [connect(server, many) for _ in range(3)]
    wait_until(lambda: server.get("/live")["num_in_progress"] == 39)
    status, document = post(server, {**LONG, "n": 2})
    assert status == 429 and document["error"]["code"] == "server_busy"
    answer = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=3, temperature=0)
    assert answer.choices[0].text
    for connection in connections:
        connection.close()
    server.wait_until_idle()


@pytest.mark.parametrize("stream", [True, False])
def test_disconnect_frees_the_pages(server, stream):
    connection = connect(server, {**LONG, "n": 13, "stream": stream})
    wait_until(lambda: server.get("/live")["num_running"] == 13)
    before = server.get("/live")
    connection.close()
    live = server.wait_until_idle()
    made = live["num_generated_tokens"] - before["num_generated_tokens"]
    assert made < 13 * 400, "the completions went on to their end"


def test_api_keys_cached_prefixes_and_failing_flags(tmp_path, capsys):
    from megatron_dmc.cli.main import main

    with ServerProcess(
        tmp_path, "--api-key", "secret", "other", "--max-model-len", "64",
        "--shutdown-timeout", "300", "--enable-prefix-caching", "--prefix-block-size", "16",
        "--chat-template", CHAT_TEMPLATE, MEGATRON_DMC_API_KEY="third",
    ) as server:  # fmt: skip
        assert post(server, {"prompt": "x"})[0] == 401
        assert post(server, {"prompt": "x"}, Authorization="Bearer wrong")[0] == 401
        assert post(server, {"prompt": "x"}, "//v1/completions")[0] == 404
        for key in ("secret", "other", "third"):
            with openai.OpenAI(base_url=f"{server.url}/v1", api_key=key) as client:
                assert client.models.list().data[0].max_model_len == 64
        with (
            openai.OpenAI(base_url=f"{server.url}/v1", api_key="no") as client,
            pytest.raises(openai.AuthenticationError, match="API key"),
        ):
            client.models.list()
        assert server.get("/version") and server.get("/live")

        # a prompt that came before is found again, except for the part past the last block
        body = {"prompt": list(range(40)), "max_tokens": 4, "temperature": 0, "n": 2}
        answers = [post(server, body, Authorization="Bearer secret")[1] for _ in range(2)]
        usages = [answer["usage"] for answer in answers]
        assert [u["prompt_tokens_details"]["cached_tokens"] for u in usages] == [0, 32]
        assert answers[0]["choices"] == answers[1]["choices"]

        # SIGTERM: running requests finish, new connections are refused, exit code 0
        asked = {}

        def ask():
            asked["whole"] = post(
                server, {"prompt": "x", "n": 16, "max_tokens": 60, "ignore_eos": True},
                Authorization="Bearer secret",
            )  # fmt: skip

        asking = threading.Thread(target=ask)
        asking.start()
        wait_until(lambda: server.get("/live")["num_pages_in_use"] > 0)
        port = urlsplit(server.url).port
        server.terminate()
        asking.join(PATIENCE)
        assert asked["whole"][0] == 200, asked
        assert asked["whole"][1]["usage"]["completion_tokens"] == 960
        assert server.process.wait(PATIENCE) == 0, server.log.read_text()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port))

    for flags, message in (
        ((), "give the model once"),
        ((str(MODEL), "--model", str(MODEL)), "give the model once"),
        ((str(MODEL), "--max-concurrent-requests", "0"), "--max-concurrent-requests 0"),
        ((str(MODEL), "--port", "70000"), "--port 70000"),
        ((str(MODEL), "--port", "0", "--chat-template", "none.jinja"), "none.jinja"),
        ((str(MODEL), "--port", "0", "--tokenizer", "nowhere"), "nowhere"),
        ((str(MODEL), "--port", "0", "--enable-dmc"), "not retrofitted"),
    ):
        assert main(["serve", *flags]) == 2
        assert message in capsys.readouterr().err


def test_priorities_go_first(tmp_path):
    """One request runs at a time: of the waiting ones, the lowest priority number is next."""
    flags = ("--max-num-seqs", "1", "--num-pages", "1024", "--scheduling-policy", "priority")
    with ServerProcess(tmp_path, *flags) as server:
        order = []

        def ask(priority):
            body = {"prompt": "x = 1\n", "max_tokens": 2, "priority": priority}
            assert post(server, body)[0] == 200
            order.append(priority)

        first = connect(server, {**LONG, "priority": -5, "stream": True})
        wait_until(lambda: server.get("/live")["num_running"] == 1)
        threads = []
        for count, priority in enumerate((3, 0, 7, -2), start=1):
            threads.append(threading.Thread(target=ask, args=(priority,)))
            threads[-1].start()
            wait_until(lambda n=count: server.get("/live")["num_waiting"] == n)
        first.close()
        for thread in threads:
            thread.join(PATIENCE)
        assert order == [-2, 0, 3, 7]


def test_many_clients(server):
    """Each request gets the tokens that it gets alone."""

    def ask(i):
        body = {"prompt": f"x = {i}\n", "max_tokens": 8 + i, "seed": i, "ignore_eos": True}
        status, document = post(server, body)
        assert status == 200, document
        return document["choices"][0]["text"]

    alone = [ask(i) for i in range(12)]
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        assert list(pool.map(ask, range(12))) == alone
    server.wait_until_idle()
