"""Input and output of the scripts of this folder, which run in the peers' own environments: nothing here may
import the package.

A script reads one JSON object from its standard input,

    model, gguf, dtype, threads, clock, filled_caches, cache_bytes, cases: [{batch, context, new_tokens, cr}, ...]

and prints a JSON object for each case as the last thing on its line. All of a case's requests are given at once:
`context` random tokens each, `new_tokens` greedy ones asked for, the end-of-text token ignored. A batch that is
None is the largest that `cache_bytes` of cache hold; its row has the number.
"""

import json
import random
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

MARK = "peer-row "
VOCAB = 40_000
"""Random tokens are below it, and above those with a special meaning."""


def prompts(case: dict[str, Any], vocab_size: int = VOCAB) -> list[list[int]]:
    """Token ids of the case's requests, the same for every engine."""
    draw = random.Random(case["context"])
    return [
        [draw.randrange(200, vocab_size) for _ in range(case["context"])]
        for _ in range(case["batch"])
    ]


CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
"""Seconds: of the wall clock, or of all the process's threads."""


class Progress:
    """Times of a case: prefill until the last request's first token, and the rate of the tokens after that.

    An engine that decodes while it prefills finishes its first requests before the last: steps count for the rate
    only while every request gets a token.
    """

    def __init__(self, case: dict[str, Any], clock: str = "wall"):
        self._case = case
        self._now = CLOCKS[clock]
        self._started: set[Any] = set()
        self._prefill: float | None = None
        self._full_steps = 0
        self._end = 0.0
        _forget_peak_memory()
        self._began = self._now()

    def step(self, requests: Iterable[Any]) -> None:
        """One more token for each of these requests."""
        now, requests = self._now(), set(requests)
        batch = self._case["batch"]
        if self._prefill is not None and len(requests) == batch:
            self._full_steps += 1
            self._end = now
        self._started |= requests
        if self._prefill is None and len(self._started) == batch:
            self._prefill = now - self._began

    def row(self) -> dict[str, Any]:
        """Figures of the case, once it has ended."""
        assert self._prefill is not None, "a request got no token"
        steps = self._full_steps
        return {
            "prefill_s": self._prefill,
            "decode_tokens_per_s": steps * self._case["batch"] / (self._end - self._began - self._prefill)
            if steps else None,
            "peak_memory_bytes": peak_memory_bytes(),
        }  # fmt: skip


def _forget_peak_memory() -> None:
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        pass  # the peak of the process so far


def peak_memory_bytes() -> int | None:
    """Resident memory of this process at most, since the case began; None where the system does not say."""
    try:
        with open("/proc/self/status") as file:
            found = re.search(r"VmHWM:\s+(\d+) kB", file.read())
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


def answer(measure: Callable[[dict[str, Any]], Iterator[dict[str, Any]]]) -> None:
    """Read the request, and print each row as soon as it exists."""
    for row in measure(json.load(sys.stdin)):
        print(MARK + json.dumps(row), flush=True)
