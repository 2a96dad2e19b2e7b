"""The plan of decode attention, simulated: shares hold every tile once, and a head's fixed cost is the best one."""

import re

import numpy as np
import plan_simulator as simulator
import pytest
from host_kernels import INCLUDE

SCHEDULE = (INCLUDE / "dmc" / "schedule.h").read_text()


def constant(name):
    return int(re.search(rf"{name} = (\d+);", SCHEDULE)[1])


@pytest.mark.parametrize("fixed", [0, 1, 3])
def test_shares_hold_every_tile_once(fixed):
    rng = np.random.default_rng(1)
    for num_workers in (1, 7, 64):
        tiles_X = rng.integers(0, 9, 40)
        shares = simulator.stretches(tiles_X, fixed, num_workers)
        assert sum(map(sum, shares)) == tiles_X.sum()
        work = [sum(share) + fixed * len(share) for share in shares]
        # a share that ends within a head's cost has less, one that begins there has more
        assert max(work) - min(work) <= 1 + 2 * fixed


def test_the_cost_of_a_head_is_the_best_one():
    """In the geometric mean over two machines, both kinds of pages and all lengths; and the price where it is not."""
    assert constant("kTile") == simulator.TILE and constant("kMinUnits") == 4
    some = ("H100, half precision", "H200, 8 bits")
    found = np.concatenate([simulator.efficiencies(simulator.MACHINES[name]) for name in some])
    chosen = simulator.FIXED.index(constant("kHeadCost"))
    assert simulator.geometric_mean(found).argmax() == chosen
    assert (found[:, chosen] > 0.96 * found.max(1)).all()


def test_loads_ahead_help_short_heads():
    tiles_X = simulator.lengths(64, 128, "few long")
    late = simulator.Machine(enter=2250)
    assert simulator.efficiency(tiles_X, 1, late) < simulator.efficiency(
        tiles_X, 1, simulator.Machine()
    )
