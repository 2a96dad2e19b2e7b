"""Soak of the server: mixed traffic over HTTP for minutes, then everything must be as at the start.

    python tests/soak/soak_server.py --minutes 10

Text and chat completions, streamed or not, with random parameters; clients that leave in the middle, that
send half a request, or that read slowly; malformed, mutated and wrong bodies; scrapes. The cache is small, so
requests wait and are preempted. It fails on: a status of 500 or more, a broken stream, a request that does
not end, an answer that differs from the same request's answer on an idle server (float64, greedy), a page
held when all is done, memory that grows, or an unclean end. The last line printed is a JSON document.
"""

import argparse
import asyncio
import json
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp
import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
from server_process import CHAT_TEMPLATE, ServerProcess, compressing_model

WORDS = [
    "def",
    "class",
    "import",
    "return",
    "self",
    "os",
    "path",
    "for",
    "in",
    "range",
    "print",
    "x",
    "y",
    "=",
    "(",
    ")",
    ":",
    "\n",
    "é",
    "日",
    "🙂",
]
STUCK_SECONDS = 300
WARM_UP = 0.25
"""Part of the run after which memory must be flat."""
ALLOWED_GROWTH = 0.03


class Soak:
    def __init__(self, server, seed):
        self.server, self.random = server, random.Random(seed)
        self.statuses, self.actions = Counter(), Counter()
        self.failures, self.memory = [], []
        self.tokens = 0
        self.reference = {}

    def prompt(self):
        kind = self.random.random()
        if kind < 0.3:
            return [self.random.randrange(3, 512) for _ in range(self.random.randrange(1, 200))]
        text = " ".join(self.random.choices(WORDS, k=self.random.randrange(1, 60)))
        return [text, text[::-1] or "x"] if kind < 0.4 else text or "x"

    def body(self):
        r = self.random
        body = {"prompt": self.prompt(), "max_tokens": r.randrange(1, 160), "ignore_eos": True}
        optional = {
            "n": lambda: r.randrange(1, 4), "temperature": lambda: r.choice([0, 0.5, 1, 2]),
            "top_p": lambda: r.uniform(0.05, 1), "top_k": lambda: r.randrange(0, 600),
            "min_p": lambda: r.random(), "seed": lambda: r.randrange(-5, 2**40),
            "stop": lambda: r.choice(["\n", ["self", "zzz"], []]),
            "logprobs": lambda: r.randrange(0, 21), "echo": lambda: r.random() < 0.5,
            "stop_token_ids": lambda: [r.randrange(0, 600)],
        }  # fmt: skip
        for name, value in optional.items():
            if r.random() < 0.25:
                body[name] = value()
        return body

    async def completion(self, session):
        body = self.body()
        if self.random.random() < 0.6:
            body["stream"] = True
            await self.stream(session, "/v1/completions", body)
        else:
            await self.whole(session, "/v1/completions", body)

    async def chat(self, session):
        messages = [
            {"role": self.random.choice(["user", "assistant", "judge"]), "content": "import os"}
            for _ in range(self.random.randrange(1, 4))
        ]
        body = {"messages": messages, "max_tokens": self.random.randrange(1, 100)}
        if self.random.random() < 0.5:
            await self.stream(session, "/v1/chat/completions", {**body, "stream": True})
        else:
            await self.whole(session, "/v1/chat/completions", body)

    async def whole(self, session, path, body):
        async with session.post(path, json=body) as answer:
            document = await answer.json()
            self.count(answer.status, document)
            if answer.status == 200:
                self.tokens += document["usage"]["completion_tokens"]
                assert all(choice["finish_reason"] for choice in document["choices"])

    async def stream(self, session, path, body, pause=0.0):
        async with session.post(path, json=body) as answer:
            if answer.status != 200:
                self.count(answer.status, await answer.json())
                return
            last, reasons = b"", 0
            async for line in answer.content:
                if line.startswith(b"data:"):
                    last = line[5:].strip()
                    if last != b"[DONE]":
                        chunk = json.loads(last)
                        assert "error" not in chunk, chunk
                        reasons += sum(bool(c["finish_reason"]) for c in chunk["choices"])
                await asyncio.sleep(pause)
            assert last == b"[DONE]" and reasons >= 1, last
            self.count(200, None)

    async def slow_reader(self, session):
        await self.stream(session, "/v1/completions", {**self.body(), "stream": True}, pause=0.05)

    async def leave(self, session):
        """Send all or half of a request, perhaps read a little, and close the connection."""
        parts = urlsplit(self.server.url)
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
        data = json.dumps({**self.body(), "stream": self.random.random() < 0.7}).encode()
        head = (
            "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(data)}\r\n\r\n"
        )
        sent = head.encode() + data
        if self.random.random() < 0.3:
            sent = sent[: self.random.randrange(len(sent))]
        writer.write(sent)
        await writer.drain()
        await asyncio.sleep(self.random.random())
        if self.random.random() < 0.5:
            try:
                await asyncio.wait_for(reader.read(200), 0.5)
            except TimeoutError:
                pass
        writer.transport.abort()

    async def malformed(self, session):
        data = bytearray(json.dumps(self.body()).encode())
        for _ in range(self.random.randrange(1, 8)):
            at = self.random.randrange(len(data))
            change = self.random.randrange(3)
            if change == 0:
                data[at] = self.random.randrange(256)
            elif change == 1:
                del data[at : at + self.random.randrange(1, 20)]
            else:
                data[at:at] = self.random.choice(
                    [b"NaN", b"null", b"[[", b'"', b"-1e999", b"\\ud800"]
                )
            if not data:
                break
        headers = {"Content-Type": self.random.choice(["application/json", "text/plain"])}
        async with session.post("/v1/completions", data=bytes(data), headers=headers) as answer:
            self.count(answer.status, await answer.json() if answer.status != 200 else None)

    async def wrong_values(self, session):
        values = [None, -1, 0, 1, 1e308, -(2**70), 2**70, "x", "", [], {}, True, [None], 1e-320]
        body = self.body()
        for name in self.random.sample([*body, "temperature", "top_p", "seed", "n", "best_of"], 2):
            body[name] = self.random.choice(values)
        await self.whole(session, "/v1/completions", body)

    async def scrape(self, session):
        for path in ("/metrics", "/live", "/health", "/v1/models", "/"):
            async with session.get(path) as answer:
                await answer.read()
                self.count(answer.status, None)

    async def same_again(self, session):
        """Whatever else is in the batch, a greedy request gets what it got alone."""
        prompt = self.random.choice(list(self.reference))
        text = await self.greedy(session, prompt)
        assert text is None or text == self.reference[prompt], f"other tokens for {prompt!r}"

    async def greedy(self, session, prompt):
        body = {"prompt": prompt, "max_tokens": 60, "temperature": 0, "ignore_eos": True}
        async with session.post("/v1/completions", json=body) as answer:
            document = await answer.json()
            self.count(answer.status, document)
            return document["choices"][0]["text"] if answer.status == 200 else None

    def count(self, status, document):
        self.statuses[status] += 1
        assert status < 500, f"status {status}: {document}"
        if document is not None and status >= 400:
            assert set(document["error"]) == {"message", "type", "param", "code"}, document

    async def worker(self, session, until):
        actions = {
            self.completion: 8, self.chat: 2, self.slow_reader: 1, self.leave: 4,
            self.malformed: 4, self.wrong_values: 4, self.scrape: 1, self.same_again: 3,
        }  # fmt: skip
        while time.monotonic() < until:
            action = self.random.choices(list(actions), list(actions.values()))[0]
            self.actions[action.__name__] += 1
            try:
                await asyncio.wait_for(action(session), STUCK_SECONDS)
            except Exception as e:  # noqa: BLE001 - whatever it is, the soak has failed and continues
                self.failures.append(f"{action.__name__}: {type(e).__name__}: {e}"[:500])

    async def watch(self, began, until):
        process = psutil.Process(self.server.process.pid)
        reported = began
        while time.monotonic() < until:
            now = time.monotonic()
            self.memory.append((now - began, process.memory_info().rss))
            if now - reported >= 30:
                reported = now
                live = await asyncio.to_thread(self.server.get, "/live")
                print(
                    f"{now - began:5.0f} s: {self.memory[-1][1] / 2**20:.0f} MiB, "
                    f"{live['num_running']} running, {live['num_waiting']} waiting, "
                    f"{live['num_pages_in_use']}/{live['num_pages']} pages, "
                    f"{live['num_finished']} finished, {live['num_preemptions']} preemptions, "
                    f"{len(self.failures)} failures",
                    flush=True,
                )
            await asyncio.sleep(1)

    async def run(self, seconds, num_workers):
        timeout = aiohttp.ClientTimeout(total=None)
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(
            self.server.url, timeout=timeout, connector=connector, read_bufsize=2**22
        ) as session:
            for prompt in ("def main():\n", "import os\n", "class A:\n"):
                self.reference[prompt] = await self.greedy(session, prompt)
            began = time.monotonic()
            until = began + seconds
            workers = [self.worker(session, until) for _ in range(num_workers)]
            await asyncio.gather(self.watch(began, until), *workers)


def memory_growth(samples, seconds):
    """(MiB after the warm-up, MiB at the end): medians of a sixth of the run each."""
    window = seconds / 6
    early = [rss for at, rss in samples if WARM_UP * seconds <= at < WARM_UP * seconds + window]
    late = [rss for at, rss in samples if at >= seconds - window]
    return statistics.median(early) / 2**20, statistics.median(late) / 2**20


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--workers", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    seconds = 60 * args.minutes
    with tempfile.TemporaryDirectory() as folder:
        flags = (
            "--dtype", "float64", "--num-pages", "3000", "--max-num-seqs", "16",
            "--max-num-batched-tokens", "128", "--max-concurrent-requests", "48",
            "--chat-template", CHAT_TEMPLATE, "--disable-uvicorn-access-log",
        )  # fmt: skip
        model = compressing_model(Path(folder) / "model")
        with ServerProcess(folder, *flags, model=model) as server:
            soak = Soak(server, args.seed)
            asyncio.run(soak.run(seconds, args.workers))
            live = server.wait_until_idle(STUCK_SECONDS)
            server.terminate()
            exit_code = server.process.wait(90)
            log = server.log.read_text()
    early, late = memory_growth(soak.memory, seconds)
    if late > early * (1 + ALLOWED_GROWTH):
        soak.failures.append(f"memory grew from {early:.0f} to {late:.0f} MiB")
    if exit_code != 0:
        soak.failures.append(f"exit code {exit_code}")
    if "Traceback" in log:
        soak.failures.append(
            "the server's log has a traceback: " + log[log.index("Traceback") :][:2000]
        )
    for failure in soak.failures:
        print(f"FAILED {failure}")
    document = {
        "soak": "server", "minutes": args.minutes, "workers": args.workers, "seed": args.seed,
        "actions": dict(soak.actions), "statuses": {str(k): v for k, v in soak.statuses.items()},
        "generated_tokens": live["num_generated_tokens"], "finished": live["num_finished"],
        "preemptions": live["num_preemptions"], "pages_held_at_the_end": live["num_pages_in_use"],
        "memory_mib": [round(early), round(late)], "exit_code": exit_code,
        "failures": len(soak.failures),
    }  # fmt: skip
    print(json.dumps(document))
    return 1 if soak.failures else 0


if __name__ == "__main__":
    sys.exit(main())
