"""A conversion holds a few tensors, not the model; `convert_large.py` shows it at any size."""

import json
import subprocess
import sys

from convert_large import make, same_bits

# Peaks are those of the process's whole life, so each must stay under the bound on its own.
WORKER = """
import json, resource, sys
from megatron_dmc.cli.main import main
peaks = []
for name in ("tiny", "large"):
    for to_format, before, after in (("megatron", "", "-m"), ("hf", "-m", "-back")):
        code = main(["convert", "--to", to_format, f"{sys.argv[1]}/{name}{before}",
                     f"{sys.argv[1]}/{name}{after}"])
        assert code == 0
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
print(json.dumps(peaks))
"""


def test_memory_is_less_than_the_largest_shard(tmp_path):
    shard = 70_000_000
    make(tmp_path / "tiny", 1, 256, shard)
    large = make(tmp_path / "large", 5, 1024, shard)
    sizes = [f.stat().st_size for f in large.glob("*.safetensors")]
    assert sum(sizes) > 2.5 * max(sizes) > 1.9 * shard
    run = subprocess.run(
        [sys.executable, "-c", WORKER, tmp_path],
        capture_output=True, text=True, timeout=240, check=True,
    )  # fmt: skip
    _, base, to_megatron, to_hf = json.loads(run.stdout.splitlines()[-1])
    assert to_megatron - base < max(sizes)
    assert to_hf - base < max(sizes)
    assert same_bits(large, tmp_path / "large-back")
