"""--dmc-borrowed-rope-pair: the same model with exchanged pairs trains as the original, with a teacher of its own order."""

from argparse import Namespace

import pytest
import torch
from test_distillation import UNTIED, make_base
from training_runs import Forked, logged

from megatron_dmc.checkpoint.convert import open_checkpoint
from megatron_dmc.checkpoint.load import full_forward, load_model
from megatron_dmc.checkpoint.rope_pairs import ExchangedPair
from megatron_dmc.checkpoint.torch_dist_write import write
from megatron_dmc.errors import UnsupportedConfig
from megatron_dmc.training.arguments import check_borrowed_rope_pair

PAIR = 2


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """A plain model, and the same one with pair 2 of 8 in the last place."""
    folder = tmp_path_factory.mktemp("bases")
    usual, exchanged = make_base(folder / "usual"), folder / "exchanged"
    description, source, _ = open_checkpoint(usual)
    exchanged.mkdir()
    weights = ExchangedPair(source, description, PAIR)
    description.borrowed_rope_pair = PAIR
    write(exchanged, weights, description)
    return usual, exchanged


def test_a_checkpoint_has_its_order_and_the_same_logits(bases):
    tokens = torch.arange(30)[None]
    usual, exchanged = (load_model(base) for base in bases)
    assert exchanged.description.borrowed_rope_pair == PAIR
    ordered = exchanged.model.rotary_pos_emb.inv_freq
    assert ordered[-1] == usual.model.rotary_pos_emb.inv_freq[PAIR] != ordered[PAIR]
    logits, expected = (full_forward(loaded.model, tokens) for loaded in (exchanged, usual))
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)


@pytest.mark.dist
def test_runs_start_at_the_original(bases, tmp_path):
    """Megatron's own model, and one whose teacher has the usual order."""
    usual, exchanged = map(str, bases)
    flags = ["--dmc-stage", "off", "--dmc-borrowed-rope-pair", str(PAIR), "--ckpt-format", "torch_dist",
             "--train-iters", "1", "--pretrained-checkpoint", exchanged]  # fmt: skip
    saved = ["--save", str(tmp_path / "saved"), "--save-interval", "1"]
    plain = Forked(*flags, model=UNTIED).wait()
    taught = Forked(*flags, *saved, "--dmc-teacher", usual, model=UNTIED).wait()
    for run in (plain, taught):
        assert run.returncode == 0, run.stderr[-2000:]
    assert abs(logged(taught.stdout, "distillation loss")[0]) < 1e-6, "the usual order's logits"
    assert logged(plain.stdout, "lm loss") == pytest.approx(logged(taught.stdout, "lm loss"), 1e-5)
    assert load_model(tmp_path / "saved").description.borrowed_rope_pair == PAIR


@pytest.mark.parametrize(
    ("pair", "values", "words"),
    [
        (8, {}, "heads of --kv-channels 16 have the pairs 0 to 7"),
        (-1, {}, "pairs 0 to 7"),
        (2, {"rotary_percent": 0.5}, "--rotary-percent 0.5"),
        (2, {"position_embedding_type": "yarn"}, "needs --position-embedding-type rope"),
    ],
)
def test_wrong_pairs_are_refused(pair, values, words):
    args = Namespace(**{
        "dmc_borrowed_rope_pair": pair, "kv_channels": 16, "position_embedding_type": "rope",
        "multi_latent_attention": False, "rotary_percent": 1.0, "rotary_interleaved": False, **values,
    })  # fmt: skip
    with pytest.raises(UnsupportedConfig, match=words):
        check_borrowed_rope_pair(args)


def test_the_last_pair_is_the_usual_order():
    args = Namespace(
        dmc_borrowed_rope_pair=7, kv_channels=16, position_embedding_type="rope",
        multi_latent_attention=False, rotary_percent=1.0, rotary_interleaved=False,
    )  # fmt: skip
    check_borrowed_rope_pair(args)
    assert args.dmc_borrowed_rope_pair is None
