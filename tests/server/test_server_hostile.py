"""Harmful clients, malicious or not, and a server that continues: large bodies, partial requests, and a
shutdown that exceeds its timeout. The last test ends the shared server."""

import contextlib
import http.client
import json
import re
import socket
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import openai
import psutil
import pytest
from server_process import CHAT_TEMPLATE, ServerProcess

CLIENT_TIMEOUT = 3
MAX_CONNECTIONS = 60
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
USER = {"role": "user", "content": "x"}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with ServerProcess(
        tmp_path_factory.mktemp("server"), "--dtype", "float32", "--chat-template", CHAT_TEMPLATE,
        "--num-pages", "16384", "--client-timeout", str(CLIENT_TIMEOUT),
        "--max-connections", str(MAX_CONNECTIONS), "--shutdown-timeout", "1",
    ) as process:  # fmt: skip
        yield process


def post(server, body, path="/v1/completions", kind="application/json"):
    """(status, JSON document)"""
    request = urllib.request.Request(f"{server.url}{path}", body, {"Content-Type": kind})
    try:
        with urllib.request.urlopen(request, timeout=300) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as e:
        return e.code, json.load(e)


def connect(server, data=b""):
    """A socket on which something has been sent."""
    parts = urlsplit(server.url)
    connection = socket.create_connection((parts.hostname, parts.port), timeout=60)
    connection.sendall(data)
    return connection


def rest(connection):
    """All bytes until the server closes."""
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while data := connection.recv(65536):
            received += data
    connection.close()
    return received


class Watch:
    """Queries /health on new connections, and reads the memory, while the context lasts.

    Attributes:
        slowest: seconds of the slowest answer.
        most_memory: bytes.
    """

    def __init__(self, server):
        self.server, self.slowest, self.most_memory = server, 0.0, 0
        self._process = psutil.Process(server.process.pid)
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self):
        while not self._done.wait(0.02):
            began = time.monotonic()
            try:
                urllib.request.urlopen(f"{self.server.url}/health", timeout=30).close()
            except OSError:
                self.slowest = 30.0
                return
            self.slowest = max(self.slowest, time.monotonic() - began)
            self.most_memory = max(self.most_memory, self._process.memory_info().rss)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._done.set()
        self._thread.join()


def large(item, size=16 * 2**20 - 100):
    """A body whose prompt is a list of one item repeated."""
    return b'{"prompt":[' + b",".join([item] * ((size - 20) // (len(item) + 1))) + b"]}"


BODIES = {
    "a million empty prompts": json.dumps({"prompt": [""] * 10**6, "n": 128}).encode(),
    "16 MB of numbers": large(b"1"),
    "16 MB of token ids": large(b"30000"),
    "16 MB of mixed things": large(b'1,"a text"'),
    "16 MB of lists": large(b"[]"),
    "a million keys": b'{"prompt":"x",' + b",".join(b'"%x":1' % i for i in range(10**6)) + b"}",
    "half a million keys": b'{"prompt":"x",'
    + b",".join(b'"%x":1' % i for i in range(500_000))
    + b"}",
    "a text of 16 MB": b'{"prompt":"' + b"x = 1 + y; " * 1_500_000 + b'"}',
    "a million texts to stop at": json.dumps({"prompt": "x", "stop": ["a"] * 10**6}).encode(),
    "ids that are no numbers": json.dumps(
        {"prompt": "x", "allowed_token_ids": ["a"] * 10**6}
    ).encode(),
}


@pytest.mark.alone
def test_large_bodies_hold_up_nobody(server):
    """Each is refused, and /health answers within a second meanwhile."""
    post(server, b'{"prompt": "x", "max_tokens": 1}')
    before = psutil.Process(server.process.pid).memory_info().rss
    messages = json.dumps({"messages": [USER] * 400_000}).encode()
    with Watch(server) as watch, ThreadPoolExecutor(3) as pool:
        answers = [pool.submit(post, server, body) for body in BODIES.values()]
        answers.append(pool.submit(post, server, messages, "/v1/chat/completions"))
        for name, answer in zip([*BODIES, "messages"], answers, strict=True):
            status, document = answer.result()
            assert status == 400, (name, document)
            assert len(document["error"]["message"]) < 500, name
    assert watch.slowest < 1, watch.slowest
    grown = watch.most_memory - before
    assert grown < 600 * 2**20, f"{grown:,} bytes"


def test_a_text_that_cannot_fit_is_not_tokenised(server):
    """The message starts with the words that clients look for."""
    for path, body in (
        ("/v1/completions", {"prompt": ["x", "word " * 200_000]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "word " * 200_000}]}),
    ):
        began = time.monotonic()
        status, document = post(server, json.dumps(body).encode(), path)
        error = document["error"]
        assert status == 400 and error["code"] == "context_length_exceeded"
        assert error["message"].startswith("This model's maximum context length is 512 tokens.")
        assert "at least" in error["message"] and time.monotonic() - began < 5
    chat = {"messages": [USER], "max_completion_tokens": 600}
    status, document = post(server, json.dumps(chat).encode(), "/v1/chat/completions")
    assert (status, document["error"]["code"]) == (400, "context_length_exceeded")
    assert "maximum context length is 512 tokens. However, you requested" in str(document)


@pytest.mark.parametrize("times", [1.1, 2.5])
@pytest.mark.parametrize("chunked", [False, True])
def test_too_large_a_body_is_answered(server, times, chunked):
    """Clients that send the whole body before they read get the 413 too."""
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=60)
    size = int(times * 16 * 2**20)
    body = (b" " * 2**20 for _ in range(size // 2**20 + 1)) if chunked else b" " * size
    connection.request(
        "POST",
        "/v1/completions",
        body,
        {"Content-Type": "application/json"},
        encode_chunked=chunked,
    )
    answer = connection.getresponse()
    assert answer.status == 413 and answer.headers["Connection"] == "close"
    assert json.load(answer)["error"]["code"] == "request_too_large"
    connection.close()


def test_other_refusals_of_large_bodies_are_answered(server):
    body = b" " * (8 * 2**20)
    assert post(server, body, "/v1/nothing")[0] == 404
    assert post(server, body, "/health")[0] == 405
    assert post(server, body, kind="text/plain")[0] == 400
    assert post(server, body)[0] == 400


@pytest.mark.alone
def test_half_requests_end_and_keep_nobody_out(server):
    """70 of them, more than there are connections."""
    began = time.monotonic()
    kinds = [b"", HEAD[:40], HEAD + b"Content-Length: 100\r\n\r\n{", HEAD + b"X-Long: a"]
    with Watch(server) as watch:
        connections = [connect(server, kinds[i % 4]) for i in range(70)]
        # a client that sends a byte now and then has the same time as one that sends nothing
        slow = connect(server, HEAD + b"Content-Length: 100\r\n\r\n")
        with contextlib.suppress(OSError):
            while time.monotonic() - began < 3 * CLIENT_TIMEOUT:
                slow.sendall(b" ")
                time.sleep(0.2)
        assert CLIENT_TIMEOUT <= time.monotonic() - began < 3 * CLIENT_TIMEOUT
        slow.close()
        answers = [rest(connection) for connection in connections]
    assert watch.slowest < 1
    assert all(b" 408 " in answer.split(b"\r\n")[0] for answer in answers), set(answers)
    assert any(b"the request was not complete after 3 s" in answer for answer in answers)
    assert any(b"others need its place" in answer for answer in answers)
    assert "Traceback" not in server.log.read_text()


def test_endless_headers_are_cut_off(server):
    connection = connect(server, HEAD)
    with contextlib.suppress(OSError):
        for _ in range(100):
            connection.sendall(b"X-Long: " + b"a" * 1000 + b"\r\n")
            time.sleep(0.001)
    assert b" 431 " in rest(connection).split(b"\r\n")[0]


def test_a_second_request_has_a_deadline_too(server):
    whole = b"GET /version HTTP/1.1\r\nHost: x\r\n\r\n"
    connection = connect(server, whole + whole[:20])
    answer = rest(connection)
    assert answer.count(b"HTTP/1.1 200") == 1 and b"HTTP/1.1 408" in answer


def test_connections_that_are_being_answered_stay(server):
    """If no connection can be closed, a new one gets 503 at once."""
    body = json.dumps(
        {"prompt": "x", "max_tokens": 500, "ignore_eos": True, "stream": True}
    ).encode()
    data = HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body
    busy = [connect(server, data) for _ in range(MAX_CONNECTIONS)]
    for connection in busy:
        assert connection.recv(15) == b"HTTP/1.1 200 OK"
    answer = rest(connect(server))
    assert answer.startswith(b"HTTP/1.1 503 ") and b"--max-connections" in answer
    assert json.loads(answer.split(b"\r\n\r\n")[1])["error"]["type"] == "server_error"
    for connection in busy:
        connection.close()
    server.wait_until_idle()


def test_fields_that_change_nothing_are_ignored(server):
    """Requests as common clients send them."""
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        ask = dict(model="tiny", max_completion_tokens=4, temperature=0)
        messages = [
            {"role": "user", "content": [{"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}}]},
            {"role": "assistant", "content": None, "reasoning_content": "because"},
            {**USER, "cache_control": {"type": "ephemeral"}},
        ]  # fmt: skip
        plain = client.chat.completions.create(
            messages=[USER, {"role": "assistant", "content": ""}, USER], **ask
        )
        for _ in range(2):
            more = client.chat.completions.create(
                messages=messages, reasoning_effort="low", metadata={"a": "b"}, store=True, user="u",
                prompt_cache_key="k", verbosity="low", service_tier="flex", safety_identifier="s",
                tools=[], functions=None, extra_body={"a_field_of_tomorrow": 1, "echo": False, "ignore_eos": None}, **ask,
            )  # fmt: skip
            assert more.choices[0].message.content == plain.choices[0].message.content
        log = server.log.read_text()
        assert log.count("'a_field_of_tomorrow' is ignored") == 1
        chunks = list(
            client.completions.create(
                model="tiny", prompt="x", max_tokens=5, n=2, stream=True, extra_body={"ignore_eos": True},
                stream_options={"include_usage": True, "continuous_usage_stats": True},
            )
        )  # fmt: skip
    for index in range(2):
        counts = [
            c.usage.completion_tokens for c in chunks if c.choices and c.choices[0].index == index
        ]
        assert counts == sorted(counts) and counts[0] < counts[-1] == 5
    assert chunks[-1].usage.completion_tokens == 10 and not chunks[-1].choices
    assert all(c.usage.prompt_tokens == chunks[-1].usage.prompt_tokens for c in chunks)


REFUSED = {
    "messages[1].content[1].type": {
        "messages": [USER, {"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "image_url"}]}]
    },
    "messages[1].tool_calls": {"messages": [USER, {"role": "assistant", "tool_calls": [{"id": "1"}]}]},
    "messages[0]": {"messages": [{"role": "user", "content": None}]},
    "response_format": {"messages": [USER], "response_format": {"type": "json_object"}},
    "audio": {"messages": [USER], "audio": {"voice": "x"}},
    "structured_outputs": {"messages": [USER], "structured_outputs": {"regex": "a"}},
    "stream_options.include_usag": {
        "messages": [USER], "stream": True, "stream_options": {"include_usag": True}
    },
    "max_token": {"messages": [USER], "max_token": 5},
}  # fmt: skip


@pytest.mark.parametrize("path", REFUSED)
def test_fields_that_would_change_the_answer_are_refused_by_their_path(server, path):
    status, document = post(server, json.dumps(REFUSED[path]).encode(), "/v1/chat/completions")
    assert (status, document["error"]["param"]) == (400, path), document
    assert document["error"]["message"].startswith(path)


def test_a_client_that_does_not_read_is_dropped():
    """In a server of its own, whose answer is larger than all buffers."""
    import uvicorn

    from megatron_dmc.server.connections import bounded

    ended = threading.Event()

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(64):
            await send({"type": "http.response.body", "body": b"x" * 2**20, "more_body": True})
        ended.set()

    protocol = bounded(client_timeout_s=1, max_connections=10)
    server = uvicorn.Server(
        uvicorn.Config(app, port=0, http=protocol, lifespan="off", log_level="error")
    )
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        address = server.servers[0].sockets[0].getsockname()
        with socket.create_connection(address) as connection:
            connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            assert not ended.wait(0.5), "the answer fits into buffers"
            assert ended.wait(20)
    finally:
        server.should_exit = True
        thread.join(30)


def test_the_limit_of_open_files(monkeypatch):
    import resource

    from megatron_dmc.server.connections import connections_within_file_limit

    limits = [(1024, 1 << 20)]
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda _, new: limits.append(new))
    assert connections_within_file_limit(4096) == 4096 and limits[-1] == (8448, 1 << 20)
    limits.append((256, 1024))
    assert connections_within_file_limit(4096) == 384 and limits[-1] == (1024, 1024)
    limits.append((64, 64))
    assert connections_within_file_limit(4096) == 1


def test_a_shutdown_whose_time_is_over(server):
    """Whole answers get 503, streams an error event and their end, partial requests 503."""
    body = {"prompt": ["x"] * 40, "max_tokens": 500, "ignore_eos": True}
    with (
        ThreadPoolExecutor(1) as pool,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client,
    ):
        whole = pool.submit(post, server, json.dumps({**body, "logprobs": 1}).encode())
        stream = client.completions.create(model="tiny", stream=True, extra_body=body, prompt="x")
        data = json.dumps({**body, "stream": True}).encode()
        raw = connect(server, HEAD + b"Content-Length: %d\r\n\r\n" % len(data) + data)
        assert raw.recv(15) == b"HTTP/1.1 200 OK"
        time.sleep(CLIENT_TIMEOUT / 2)
        half = connect(server, HEAD + b"Content-Length: 100\r\n\r\n{")
        began = time.monotonic()
        time.sleep(0.2)
        server.terminate()
        status, document = whole.result()
        assert status == 503 and document["error"]["code"] == "shutting_down", document
        with pytest.raises(openai.APIError, match="shutting down") as error:
            list(stream)
        assert error.value.body["code"] == "shutting_down"
        events = re.findall(rb"data: (.*)\n", rest(raw))
        assert events[-1] == b"[DONE]"
        assert json.loads(events[-2])["error"]["code"] == "shutting_down"
        assert rest(half).startswith(b"HTTP/1.1 503 ")
    assert server.process.wait(60) == 0, server.log.read_text()
    assert time.monotonic() - began < 30
    assert "Traceback" not in server.log.read_text()
