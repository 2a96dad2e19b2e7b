"""--dmc-borrowed-lr-mult: the optimizer's update of the borrowed rows, and of them alone, is multiplied."""

from types import SimpleNamespace

import pytest
import torch
from torch.optim import optimizer as torch_optimizer
from training_runs import DIM, HEADS, KV_HEADS, Forked

from megatron_dmc.checkpoint.load import load_model
from megatron_dmc.ops.gates import borrowed_rows
from megatron_dmc.training.borrowed import scale_updates

GROUP = HEADS // KV_HEADS
ROWS = [
    group * (GROUP + 2) * DIM + head * DIM + DIM - 1
    for group in range(KV_HEADS)
    for head in range(GROUP + 1)  # the query heads and the key; not the value
]


def test_borrowed_rows():
    sizes = {"num_kv_heads": KV_HEADS, "queries_per_group": GROUP, "head_dim": DIM}
    assert borrowed_rows(**sizes).tolist() == ROWS


@pytest.fixture
def hooks():
    """No hook of a test outlives it."""
    tables = (
        torch_optimizer._global_optimizer_pre_hooks,
        torch_optimizer._global_optimizer_post_hooks,
    )
    kept = [dict(table) for table in tables]
    yield
    for table, before in zip(tables, kept, strict=True):
        table.clear()
        table.update(before)


@pytest.mark.parametrize("has_main_params", [False, True])
def test_an_update_of_borrowed_rows_is_multiplied(hooks, has_main_params):
    def stepped(factor):
        torch.manual_seed(0)
        linear = torch.nn.Linear(6, KV_HEADS * (GROUP + 2) * DIM)
        other = torch.nn.Linear(6, 6)
        attention = SimpleNamespace(
            linear_qkv=linear, num_query_groups_per_partition=KV_HEADS,
            num_attention_heads_per_partition=HEADS, hidden_size_per_attention_head=DIM,
        )  # fmt: skip
        if factor is not None:
            decoder = SimpleNamespace(layers=[SimpleNamespace(self_attention=attention)])
            scale_updates(SimpleNamespace(decoder=decoder), factor)
        parameters = [*linear.parameters(), *other.parameters()]
        held = parameters
        if has_main_params:  # as Megatron's mixed-precision optimizer keeps them
            held = [torch.nn.Parameter(p.detach().clone()) for p in parameters]
            for parameter, main in zip(parameters, held, strict=True):
                parameter.main_param = main
        before = [p.detach().clone() for p in held]
        optimizer = torch.optim.AdamW(held, lr=0.1, weight_decay=0.1)
        for step in range(2):
            for p in held:
                p.grad = torch.full_like(p, 0.5 + step)
            optimizer.step()
            if step == 0:
                first = [p.detach() - b for p, b in zip(held, before, strict=True)]
        return first

    plain, scaled = stepped(None), stepped(5.0)
    rest = [row for row in range(len(plain[0])) if row not in ROWS]
    for i in (0, 1):  # weight and bias
        torch.testing.assert_close(scaled[i][ROWS], 5 * plain[i][ROWS])
        assert torch.equal(scaled[i][rest], plain[i][rest])
    assert all(torch.equal(a, b) for a, b in zip(scaled[2:], plain[2:], strict=True))


def test_a_run_with_it(tmp_path):
    common = ["--dmc-stage", "retrofit", "--dmc-target-cr", "4", "--dmc-no-stage-check", "--train-iters", "1",
              "--clip-grad", "0", "--seed", "3", "--save-interval", "1"]  # fmt: skip
    start, weights = tmp_path / "start", {}
    first = Forked(*common, "--save", str(start)).wait()
    assert first.returncode == 0, first.stderr[-2000:]
    begin = ["--pretrained-checkpoint", str(start)]
    runs = {
        factor: Forked(
            *common, *begin, "--save", str(tmp_path / factor), "--dmc-borrowed-lr-mult", factor
        )
        for factor in ("1", "3")
    }
    name = "decoder.layers.1.self_attention.linear_qkv.weight"
    for run in runs.values():
        done = run.wait()
        assert done.returncode == 0, done.stderr[-2000:]
    for folder in ("start", *runs):
        state = load_model(tmp_path / folder).model.state_dict()
        weights[folder] = state[name].double()
    update = {factor: weights[factor] - weights["start"] for factor in runs}
    rest = [row for row in range(len(update["1"])) if row not in ROWS]
    assert update["1"][ROWS].abs().max() > 1e-3
    torch.testing.assert_close(update["3"][ROWS], 3 * update["1"][ROWS], rtol=1e-3, atol=1e-6)
    assert torch.equal(update["3"][rest], update["1"][rest])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--dmc-borrowed-lr-mult", "0"], "use a positive number"),
        (
            ["--dmc-borrowed-lr-mult", "4", "--use-distributed-optimizer"],
            "leave out one of the two",
        ),
        (["--dmc-borrowed-lr-mult", "4", "--dmc-stage", "off"], "nothing is borrowed"),
    ],
)
def test_wrong_flags_are_refused(flags, words):
    done = Forked("--dmc-stage", "retrofit", "--train-iters", "1", *flags).wait()
    assert done.returncode and words in done.stderr, done.stderr[-2000:]
