"""Decode attention's plan, simulated: when the last of a GPU's workers is done if a head counts as its tiles and a fixed
number more. Nothing here is a measurement; `python tests/support/plan_simulator.py` prints the table of docs/kernels.md.

A worker (a warp) computes one tile after another and has up to two more on their way. Memory answers in order, at its
bandwidth, after a latency. What a change of heads costs comes in cycles from the kernel's chains of loads.

Local letters: X heads, C workers.
"""

import heapq
from dataclasses import dataclass, replace

import numpy as np

TILE = 16
"""Entries."""
AHEAD = 2
"""Tiles on their way while one is computed."""


@dataclass(frozen=True)
class Machine:
    """In cycles; estimates from data sheets and the kernel's machine code. The default is an H100 with pages in half
    precision, 128 channels.

    Attributes:
        bytes_per_cycle: of the memory.
        tile_bytes: keys and values of a tile.
        latency: from a request to its data.
        tile: arithmetic of a tile.
        enter: until the address of a head's first tile is known: row, count and page, loaded one head ahead.
        begin, end: queries; output.
    """

    num_workers: int = 132 * 8
    bytes_per_cycle: float = 3.35e12 / 1.75e9
    tile_bytes: int = 8192
    latency: int = 1400
    tile: int = 1500
    enter: int = 100
    begin: int = 700
    end: int = 300


def stretches(tiles_X: np.ndarray, fixed: int, num_workers: int, least: int = 4) -> list[list[int]]:
    """For each worker the numbers of tiles of its heads; as csrc/include/dmc/schedule.h divides them."""
    ends_X = np.cumsum(tiles_X + fixed * (tiles_X > 0))
    num_units = int(ends_X[-1])
    num_workers = max(1, min(num_workers, -(-num_units // least)))
    own, longer = divmod(num_units, num_workers)
    shares: list[list[int]] = []
    x = 0
    for c in range(num_workers):
        begin = c * own + min(c, longer)
        end = begin + own + (c < longer)
        share = []
        while x < len(ends_X):
            first = ends_X[x] - tiles_X[x]
            count = min(end, int(ends_X[x])) - max(begin, int(first))
            if count > 0:
                share.append(count)
            if ends_X[x] > end:
                break
            x += 1
        shares.append(share)
    return shares


def makespan(shares: list[list[int]], machine: Machine) -> float:
    """Cycles until the last worker has ended."""
    memory_is_free = 0.0  # when it has sent all that was asked for
    last = 0.0
    step = machine.tile_bytes / machine.bytes_per_cycle

    def run(share):
        """A worker: yields when it asks for a tile, is sent when the tile arrives."""
        heads = [h for h, count in enumerate(share) for _ in range(count)]
        arrivals, now = [], 0.0

        def ask(i, now):
            now += machine.enter if i == 0 or heads[i] != heads[i - 1] else 0
            arrivals.append((yield now))
            return now

        for i in range(min(AHEAD, len(heads))):
            now = yield from ask(i, now)
        for i, head in enumerate(heads):
            now += machine.begin if i == 0 or head != heads[i - 1] else 0
            now = max(now, arrivals[i])
            if i + AHEAD < len(heads):
                now = yield from ask(i + AHEAD, now)
            now += machine.tile
            now += machine.end if i + 1 == len(heads) or head != heads[i + 1] else 0
        return now

    events = []
    for c, share in enumerate(shares):
        worker = run(share)
        if share:
            heapq.heappush(events, (next(worker), c, worker))
    while events:
        now, c, worker = events[0]
        memory_is_free = max(memory_is_free, now) + step
        try:
            now = worker.send(max(memory_is_free, now + machine.latency))
            heapq.heapreplace(events, (now, c, worker))
        except StopIteration as stop:
            last = max(last, stop.value)
            heapq.heappop(events)
    return last


def efficiency(tiles_X: np.ndarray, fixed: int, machine: Machine) -> float:
    """Of the memory: the time that the bytes alone take, over the makespan."""
    ideal = int(tiles_X.sum()) * machine.tile_bytes / machine.bytes_per_cycle
    return ideal / makespan(stretches(tiles_X, fixed, machine.num_workers), machine)


def lengths(num_requests: int, mean: float, spread: str, *, heads: int = 32) -> np.ndarray:
    """Tiles of every head. `spread`: all equal; rates of heads distributed as exp(0.6 x), as imposed decisions are; or
    one head of eight that keeps everything among others that keep a sixteenth."""
    rng = np.random.default_rng(0)
    if spread == "equal":
        rates_G = np.ones(heads)
    elif spread == "skewed":
        rates_G = np.exp(0.6 * rng.standard_normal(heads))
    else:
        rates_G = np.where(np.arange(heads) % 8 == 3, 1.0, 1 / 16)
    entries = mean * rates_G / rates_G.mean()
    entries_BG = entries * rng.uniform(0.5, 1.5, (num_requests, 1))
    return np.maximum(1, np.ceil(entries_BG.ravel() / TILE)).astype(np.int64)


H200 = 4.8e12 / 1.75e9
MACHINES = {
    "H100, half precision": Machine(),
    "H200, half precision": Machine(bytes_per_cycle=H200),
    "H100, 8 bits": Machine(tile_bytes=4224, tile=1600),
    "H200, 8 bits": Machine(tile_bytes=4224, tile=1600, bytes_per_cycle=H200),
}
CASES = [
    (1, 1024, "skewed"), (1, 4096, "skewed"), (4, 512, "skewed"), (16, 1024, "skewed"),
    (64, 128, "equal"), (64, 128, "skewed"), (64, 128, "few long"), (64, 512, "few long"),
]  # fmt: skip
"""Requests, mean entries of a head, spread."""
FIXED = (0, 1, 2)


def efficiencies(machine: Machine) -> np.ndarray:
    """Of every case and fixed cost."""
    tiles = [lengths(*case) for case in CASES]
    return np.array([[efficiency(of, fixed, machine) for fixed in FIXED] for of in tiles])


def geometric_mean(x: np.ndarray) -> np.ndarray:
    return np.exp(np.log(x).mean(0))


if __name__ == "__main__":
    for name, machine in MACHINES.items():
        for title, one in (
            (name, machine),
            (f"{name}, no loads ahead", replace(machine, enter=2250)),
        ):
            found = efficiencies(one)
            for case, row in zip(CASES, found, strict=True):
                print(title, *case, *(f"{x:.3f}" for x in row), sep="; ")
            print(title, "mean", *(f"{x:.3f}" for x in geometric_mean(found)), sep="; ", flush=True)
