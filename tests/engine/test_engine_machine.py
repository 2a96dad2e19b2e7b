"""A short run of the state machine of `engine_machine.py`; its head says what must hold."""

import pytest
from engine_machine import KINDS, MODELS, SHARES_PREFIXES, EngineMachine, machine_settings, totals
from hypothesis.stateful import run_state_machine_as_test


def test_random_use_conserves_pages_and_tokens():
    run_state_machine_as_test(EngineMachine, settings=machine_settings(20, 40))
    assert totals["steps"] > 200 and totals["finished"] > 10


@pytest.mark.parametrize("model", list(MODELS))
@pytest.mark.parametrize("num_pages", [40, 41])  # the latter as if captured
def test_fixed_use_meets_preemption_and_cached_prefixes(num_pages, model):
    """A case that random draws may miss."""
    before = dict(totals)
    machine = EngineMachine()
    room = {"w=16": 300, "dms": 40}.get(model, 0)  # for copies of the rings
    machine.make(num_pages=num_pages + room, budget=16, prefixes=True, policy="fcfs", model=model)
    for kind in [*range(len(KINDS)), *range(len(KINDS))]:
        machine.add(kind=kind, level=0)
        machine.step(times=2)
        if kind % 5 == 0:
            machine.preempt()
            machine.conserves_pages()
    machine.teardown()
    change = {name: totals[name] - before[name] for name in totals}
    assert change["preempted"] > 0 and change["finished"] > 10
    assert (change["hits"] > 0) == (model in SHARES_PREFIXES)
    assert (change["replays"] > 0) == (num_pages % 2 == 1)
