"""Two replicas behind Ray Serve on this machine, the official client, and one replica killed.

    pip install -e '.[serve,ray]' openai
    python tests/replicas/run_replicas.py

What it shows: both replicas answer; an answer is the engine's own, whichever replica gave it; streams come
through; after one replica is killed with SIGKILL every further request is answered (the client repeats what
was lost with it, as is its default), and a new replica takes its place. The last line is a JSON document.
"""

import argparse
import collections
import concurrent.futures
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import openai

ROOT = Path(__file__).resolve().parent.parent.parent
MODEL = ROOT / "examples/models/stdlib-llama-3m"
PROGRAM = ROOT / "examples/replicas/serve_replicas.py"
PROMPTS = [f"def f{i}(self):\n" for i in range(12)]


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def wait_until(condition, seconds, what):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s in vain for {what}"
        time.sleep(0.5)


class Client:
    """The official client, and who answered it."""

    def __init__(self, url):
        self.openai = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=8)
        self.answered = collections.Counter()

    def complete(self, prompt, **options):
        raw = self.openai.completions.with_raw_response.create(
            model="tiny", prompt=prompt, temperature=0, max_tokens=16, **options
        )
        self.answered[raw.headers["x-replica"]] += 1
        return raw.parse().choices[0].text

    def complete_all(self, prompts):
        with concurrent.futures.ThreadPoolExecutor(6) as pool:
            return list(pool.map(self.complete, prompts))


def expected():
    from megatron_dmc import LLM, SamplingParams

    llm = LLM(MODEL, dtype="float32", device="cpu", num_pages=4096)
    outputs = llm.generate(PROMPTS, SamplingParams(temperature=0), use_tqdm=False)
    return [output.outputs[0].text for output in outputs]


def check(url, started):
    client = Client(url)
    want = expected()
    assert client.complete_all(PROMPTS * 3) == want * 3
    before = dict(client.answered)
    assert len(before) == 2, f"only one replica answered: {before}"
    print(f"{sum(before.values())} requests, by replica: {before}", flush=True)

    chunks = client.openai.completions.create(
        model="tiny", prompt=PROMPTS[0], temperature=0, max_tokens=16, stream=True,
        stream_options={"include_usage": True},
    )  # fmt: skip
    chunks = list(chunks)
    assert "".join(c.choices[0].text for c in chunks if c.choices) == want[0] and len(chunks) > 5
    assert chunks[-1].usage.completion_tokens == 16
    print(f"a stream of {len(chunks)} chunks", flush=True)

    killed = min(before, key=before.get)
    client.answered.clear()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        asking = pool.submit(client.complete_all, PROMPTS * 6)
        wait_until(lambda: client.answered[killed] >= 3, 60, "requests in progress")
        began = time.monotonic()
        os.kill(int(killed.split("/")[1]), signal.SIGKILL)
        assert asking.result() == want * 6
    during = dict(client.answered)
    print(f"{killed} killed while {sum(during.values())} requests ran: {during}", flush=True)
    client.answered.clear()
    assert client.complete_all(PROMPTS * 2) == want * 2
    after = dict(client.answered)
    assert killed not in after, after
    print(f"{sum(after.values())} requests after that: {after}", flush=True)

    def both():
        client.complete_all(PROMPTS[:6])
        return len(client.answered) >= 2

    wait_until(both, 240, "a new replica")
    seconds = time.monotonic() - began
    print(f"a new replica answers {seconds:.0f} s after the kill", flush=True)
    return {
        "seconds_to_start": round(started, 1), "before": before, "killed": killed, "during": during,
        "after": after, "new_replica_after_seconds": round(seconds, 1),
    }  # fmt: skip


def main():
    argparse.ArgumentParser(description=__doc__.split("\n\n")[0]).parse_args()
    port = free_port()
    command = [
        sys.executable, str(PROGRAM), str(MODEL), "--served-model-name", "tiny", "--replicas", "2",
        "--port", str(port), "--dtype", "float32", "--num-pages", "4096", "--cpus-per-replica", "0.5",
    ]  # fmt: skip
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0",
    }  # fmt: skip
    url = f"http://127.0.0.1:{port}"

    def healthy():
        if process.poll() is not None:
            return True
        try:
            return urllib.request.urlopen(f"{url}/v1/models", timeout=10).status == 200
        except OSError:
            return False

    for attempt in range(3):  # Ray gives itself 30 s to start, which a busy machine may not keep
        began = time.monotonic()
        process = subprocess.Popen(command, env=environment)
        try:
            wait_until(healthy, 300, "the endpoint")
            if process.poll() is not None and attempt < 2:
                continue
            assert process.poll() is None, "the server ended"
            result = check(url, time.monotonic() - began)
            process.send_signal(signal.SIGTERM)
            assert process.wait(120) == 0
            break
        finally:
            process.kill()
    print(json.dumps(result))


if __name__ == "__main__":
    main()
