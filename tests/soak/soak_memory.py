"""Memory of the server under steady load: it must be flat once every page has been used.

    python tests/soak/soak_memory.py --requests 10000

Short requests over HTTP, every prompt a new one: text and chat, streamed or not, log-probabilities, stop texts,
penalties, cached prefixes with and without a salt, refusals, clients that leave. Resident memory is read every
`--every` requests. It fails if the second half of the run grew by more than `--allowed-mib`, on a status
of 500 or more, or on a page held when all is done. The last line printed is a JSON document.
"""

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import aiohttp
import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
from server_process import CHAT_TEMPLATE, ServerProcess, compressing_model


def body_of(number, rng):
    """(path, JSON body) of a request; no two are alike."""
    prompt = f"def f{number}(x):\n    return " + "x + " * rng.randrange(1, 24)
    body = {"max_tokens": rng.randrange(1, 9), "stream": rng.random() < 0.5}
    optional = {
        "temperature": lambda: rng.choice([0, 0.7]), "top_p": lambda: rng.uniform(0.1, 1),
        "stop": lambda: [f"stop{number}", "\n\n"], "seed": lambda: number,
        "presence_penalty": lambda: 1.0, "logit_bias": lambda: {str(rng.randrange(500)): 5.0},
        "min_tokens": lambda: 1, "n": lambda: 2, "priority": lambda: 0,
        "bad_words": lambda: [f"w{number}"], "cache_salt": lambda: f"tenant {number % 50}",
    }  # fmt: skip
    for name, value in optional.items():
        if rng.random() < 0.2:
            body[name] = value()
    if rng.random() < 0.05:
        body["temperature"] = -1  # refused
    if rng.random() < 0.3:
        if rng.random() < 0.3:
            body |= {"logprobs": True, "top_logprobs": 3}
        return "/v1/chat/completions", body | {"messages": [{"role": "user", "content": prompt}]}
    if rng.random() < 0.3:
        body |= {"logprobs": 3, "echo": rng.random() < 0.5}
    return "/v1/completions", body | {"prompt": prompt}


async def load(server, num_requests, num_workers, every, seed):
    """Returns (statuses, MiB after each `every` requests, first before any)."""
    process = psutil.Process(server.process.pid)
    statuses, rss = Counter(), []
    rng, numbers = random.Random(seed), iter(range(num_requests))
    began = time.monotonic()

    def measure(done):
        rss.append(process.memory_info().rss / 2**20)
        seconds = time.monotonic() - began
        print(f"{done:6} requests, {seconds:5.0f} s: {rss[-1]:.1f} MiB", flush=True)

    async def worker(session):
        for number in numbers:
            path, body = body_of(number, rng)
            async with session.post(path, json=body) as answer:
                statuses[answer.status] += 1
                if rng.random() < 0.05:
                    answer.close()  # leaves before the end
                else:
                    await answer.read()
            if (number + 1) % every == 0:
                measure(number + 1)

    measure(0)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(server.url, connector=connector) as session:
        await asyncio.gather(*(worker(session) for _ in range(num_workers)))
    return statuses, rss


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--every", type=int, default=1_000)
    parser.add_argument("--workers", type=int, default=16)
    parser.add_argument("--allowed-mib", type=float, default=8)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        flags = (
            "--dtype", "float32", "--max-num-seqs", "16", "--num-pages", "8000",
            "--enable-prefix-caching", "--prefix-block-size", "16", "--chat-template", CHAT_TEMPLATE,
            "--disable-uvicorn-access-log",
        )  # fmt: skip
        model = compressing_model(Path(folder) / "model")
        with ServerProcess(folder, *flags, model=model) as server:
            statuses, rss = asyncio.run(
                load(server, args.requests, args.workers, args.every, args.seed)
            )
            live = server.wait_until_idle()
    growth = max(rss[len(rss) // 2 :]) - rss[len(rss) // 2]
    failures = [f"status {status}" for status in statuses if status >= 500]
    if growth > args.allowed_mib:
        failures.append(f"memory grew by {growth:.1f} MiB in the second half")
    for failure in failures:
        print(f"FAILED {failure}")
    document = {
        "soak": "memory", "requests": args.requests, "statuses": dict(sorted(statuses.items())),
        "finished": live["num_finished"], "generated_tokens": live["num_generated_tokens"],
        "rss_mib": [round(value, 1) for value in rss],
        "second_half_growth_mib": round(growth, 1), "failures": len(failures),
    }  # fmt: skip
    print(json.dumps(document))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
