"""`EngineConfig` is the one source of keyword arguments, flags and their help."""

import argparse
import subprocess
import sys
from dataclasses import FrozenInstanceError, fields

import pytest

from megatron_dmc.engine.config import EngineConfig, settings
from megatron_dmc.engine.flags import add_engine_arguments, add_settings, engine_settings
from megatron_dmc.errors import UnsupportedConfig


def parse(*words):
    parser = argparse.ArgumentParser()
    add_engine_arguments(parser)
    return engine_settings(parser.parse_args(["model", *words]))


def test_every_field_is_described_and_has_a_flag_with_its_default():
    assert [s.name for s in settings()] == [f.name for f in fields(EngineConfig)]
    assert all(s.description.endswith(".") for s in settings())
    assert [s.name for s in settings() if not s.has_flag] == ["poison"]
    assert EngineConfig.from_settings(parse()) == EngineConfig()


def test_flags_become_settings():
    words = (
        "--no-enable-dmc -tp 2 --cache-budget 0.25 --cudagraph-capture-sizes 1 8 --dtype float32"
    )
    given = {k: v for k, v in parse(*words.split()).items() if v != getattr(EngineConfig, k)}
    assert given == {
        "enable_dmc": False, "tensor_parallel_size": 2, "cache_budget": 0.25,
        "cudagraph_capture_sizes": [1, 8], "dtype": "float32",
    }  # fmt: skip
    assert type(parse("--cache-budget", "4")["cache_budget"]) is int


def test_some_flags_and_other_defaults():
    parser = argparse.ArgumentParser()
    add_settings(parser, ["allow_pickle"])
    assert vars(parser.parse_args([])) == {"allow_pickle": False}
    parser = argparse.ArgumentParser()
    add_engine_arguments(parser, max_num_seqs=1)
    assert parser.parse_args(["model"]).max_num_seqs == 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_num_seq": 4}, "max_num_seq=4: no such engine setting; did you mean max_num_seqs"),
        ({"qqq": 4}, "qqq=4: no such engine setting; see docs/settings.md"),
        ({"max_num_seqs": True}, "max_num_seqs=True: use a positive whole number"),
        ({"block_size": None}, "block_size=None: use a positive whole number"),
        ({"num_pages": 2.0}, r"num_pages=2\.0: use a positive whole number"),
        ({"scheduling_policy": "lifo"}, "scheduling_policy='lifo': use one of fcfs, priority"),
        ({"enforce_eager": 1}, "enforce_eager=1: use True or False"),
        ({"seed": 1.5}, r"seed=1\.5: use a whole number"),
        ({"gpu_memory_utilization": float("nan")}, "gpu_memory_utilization=nan"),
        ({"cache_policy": "lru", "cache_budget": 4}, "cache_policy='lru': use one of h2o"),
        ({"cache_policy": "h2o", "cache_budget": 0}, "cache_budget=0"),
        ({"cache_policy": "h2o"}, "give both or neither"),
        ({"cache_policy": "h2o", "cache_budget": 4, "tensor_parallel_size": 2}, "use one process"),
    ],
)
def test_bad_settings_are_refused_by_name(values, message):
    with pytest.raises(UnsupportedConfig, match=message):
        EngineConfig.from_settings(values)


def test_settings_do_not_change():
    with pytest.raises(FrozenInstanceError):
        EngineConfig().seed = 1


def test_help_needs_no_torch():
    script = (
        "import sys; from megatron_dmc.cli.main import main\n"
        "try: main(['serve', '--help'])\n"
        "except SystemExit: pass\n"
        "assert 'torch' not in sys.modules and 'megatron.core' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--no-enable-dmc" in done.stdout and "--priority-reach" in done.stdout
