"""A short run of the state machine of `engine_machine.py`; its head says what must hold."""

from engine_machine import EngineMachine, machine_settings, totals
from hypothesis.stateful import run_state_machine_as_test


def test_random_use_conserves_pages_and_tokens():
    run_state_machine_as_test(EngineMachine, settings=machine_settings(20, 40))
    assert totals["steps"] > 500 and totals["finished"] > 20
    assert totals["preempted"] > 0 and totals["hits"] > 0
