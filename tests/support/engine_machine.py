"""Random use of the engine: add, step, abort, preempt, finish, with a pool that is always short.

After every step the pages are counted: free + held = total, every page has the owners that name it, and
the page that a head writes to has one. Every finished request's tokens are those of running it alone;
an aborted one's are their beginning. Some engines run decode steps as if captured. Models merge at once or after
a delay, or evict (`MODELS`).

`python tests/support/engine_machine.py --examples 300 --steps 100` runs it longer than the tests do.
"""

import argparse
import random
from functools import cache

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)
from tiny_gpt import G, L, V, dmc_config, drain, greedy_params, make_engine

from megatron_dmc import SamplingParams
from megatron_dmc.engine.graphs import Captured
from megatron_dmc.engine.request import RequestStatus

_rng = random.Random(0)
_TRUNKS = [[_rng.randrange(V) for _ in range(24)] for _ in range(2)]
KINDS = [
    (trunk[:length] + [_rng.randrange(V)], max_tokens, seed)
    for trunk in _TRUNKS
    for length, max_tokens in ((0, 9), (5, 4), (13, 12), (24, 8))
    for seed in (None, 7)
]
"""(prompt, max_tokens, seed or greedy)."""

MODELS = {
    "w=0": dmc_config(),
    "w=1": dmc_config(merge_delay=1),
    "w=16": dmc_config(merge_delay=16),
    "dms": dmc_config(policy="evict", eviction_delay=3),
}
SHARES_PREFIXES = ("w=0", "w=16", "dms")
"""A ring of whole pages can be cached."""

totals = {"steps": 0, "finished": 0, "preempted": 0, "hits": 0, "replays": 0}


def params_of(kind):
    _, max_tokens, seed = KINDS[kind]
    if seed is None:
        return greedy_params(max_tokens)
    return SamplingParams(max_tokens=max_tokens, seed=seed)


@cache
def alone(model, kind):
    engine = make_engine(MODELS[model], max_num_batched_tokens=64)
    engine.add_request("x", KINDS[kind][0], params_of(kind))
    return drain(engine)["x"].outputs[0].token_ids


def run_again(work):
    """In place of a CUDA graph: on the same tensors, as a replay would."""
    output = work()

    def replay():
        totals["replays"] += 1
        output.copy_(work())

    return Captured(replay, output)


class EngineMachine(RuleBasedStateMachine):
    @initialize(
        num_pages=st.integers(9 * L * G, 16 * L * G),
        budget=st.sampled_from([1, 5, 16, 40]),
        prefixes=st.booleans(),
        policy=st.sampled_from(["fcfs", "priority"]),
        model=st.sampled_from(list(MODELS)),
    )
    def make(self, num_pages, budget, prefixes, policy, model):
        self.model = model
        self.engine = make_engine(
            MODELS[model], num_pages=num_pages, max_num_batched_tokens=budget, max_num_seqs=3,
            enable_prefix_caching=prefixes and model in SHARES_PREFIXES, prefix_block_size=4,
            scheduling_policy=policy, priority_reach=2,
        )  # fmt: skip
        if num_pages % 2:
            self.engine.runner.capture([1, 2], run_again, progress=False)
        self.priorities = policy == "priority"
        self.kinds: dict[str, int] = {}
        self.count = 0

    @rule(kind=st.integers(0, len(KINDS) - 1), level=st.integers(-2, 2))
    def add(self, kind, level):
        if len(self.kinds) < 8:
            request_id = str(self.count)
            self.count += 1
            self.engine.add_request(
                request_id, KINDS[kind][0], params_of(kind),
                priority=level if self.priorities else 0,
            )  # fmt: skip
            self.kinds[request_id] = kind

    @rule(times=st.integers(1, 6))
    def step(self, times):
        for _ in range(times):
            outputs = self.engine.step()
            totals["steps"] += 1
            for output in outputs:
                want = alone(self.model, self.kinds[output.request_id])
                got = output.outputs[0].token_ids
                assert got == want[: len(got)]
                if output.finished:
                    assert got == want
                    del self.kinds[output.request_id]
                    totals["finished"] += 1
            self.engine.check_integrity()

    @rule(data=st.data())
    def abort(self, data):
        if self.kinds:
            request_id = data.draw(st.sampled_from(sorted(self.kinds)))
            output = self.engine.abort_request(request_id)
            got = output.outputs[0].token_ids
            assert got == alone(self.model, self.kinds.pop(request_id))[: len(got)]

    @rule()
    def preempt(self):
        scheduler = self.engine.scheduler
        if len(scheduler.running) > 1:
            request = scheduler._preempt_last()
            assert request.status is RequestStatus.WAITING and request.row is None

    @invariant()
    def conserves_pages(self):
        if hasattr(self, "engine"):
            self.engine.check_integrity()
            pool = self.engine.context.pool
            assert pool.num_free + pool.num_held == pool.num_pages
            orders = [self.engine.scheduler.order(r) for r in self.engine.scheduler.running]
            assert orders == sorted(orders)

    def teardown(self):
        if not hasattr(self, "engine"):
            return
        for _ in range(3000):
            if not self.engine.has_unfinished_requests:
                break
            self.step(1)
        stats = self.engine.stats()
        totals["preempted"] += stats.num_preemptions
        totals["hits"] += stats.num_prefix_hit_tokens
        assert not self.kinds and stats.num_running == stats.num_waiting == 0, "a stuck request"
        assert stats.num_pages_in_use == 0
        if self.engine.context.prefixes is not None:
            self.engine.context.prefixes.clear()
        assert self.engine.context.pool.num_free == self.engine.context.pool.num_pages
        self.engine.check_integrity()


def machine_settings(examples, steps):
    return settings(
        max_examples=examples,
        stateful_step_count=steps,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=300)
    parser.add_argument("--steps", type=int, default=100, help="rules in an example")
    args = parser.parse_args()
    run_state_machine_as_test(EngineMachine, settings=machine_settings(args.examples, args.steps))
    print(", ".join(f"{n} {name}" for name, n in totals.items()))


if __name__ == "__main__":
    main()
