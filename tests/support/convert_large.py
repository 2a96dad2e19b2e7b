"""Memory of `megatron-dmc convert` on a sharded checkpoint much larger than its shards.

`python tests/support/convert_large.py --gigabytes 4` makes a random Llama of that size in bfloat16, converts
it to Megatron's format and back with the real command, each in a process of its own, and prints the
peak of the process's memory (RSS, mapped files included) compared with that of converting a tiny model. Exit
code 1 if a conversion needed as much as its largest shard on top of that, or a bit changed.
The test in `test_convert_memory.py` does the same at 0.2 GB.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path

import torch
from safetensors import safe_open

from megatron_dmc.checkpoint.description import ModelDescription
from megatron_dmc.checkpoint.hf_folder import write_folder

MB = 1_000_000


class RandomSource:
    """Weights that depend on their name alone, made when they are asked for."""

    def fill(self, name, out):
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        bits = torch.randint(0, 1 << 14, out.shape, generator=generator, dtype=torch.int16)
        out.copy_(bits.view(torch.bfloat16) if out.dtype == torch.bfloat16 else bits)


def description(num_layers, hidden=2048):
    return ModelDescription(
        num_layers=num_layers, hidden_size=hidden, ffn_hidden_size=4 * hidden,
        num_attention_heads=hidden // 64, num_query_groups=hidden // 256, kv_channels=64,
        vocab_size=8 * hidden, max_position_embeddings=4096, dtype=torch.bfloat16,
    )  # fmt: skip


def make(folder, num_layers, hidden, shard_bytes):
    folder.mkdir()
    write_folder(folder, RandomSource(), description(num_layers, hidden), shard_bytes=shard_bytes)
    return folder


def same_bits(a, b):
    """Compare two folders tensor by tensor."""
    places = {}
    for folder in (a, b):
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(file, "pt") as f:
                for name in f.keys():  # noqa: SIM118
                    places.setdefault(name, []).append(file)
    for name, files in places.items():
        tensors = []
        for file in files:
            with safe_open(file, "pt") as f:
                tensors.append(f.get_tensor(name).view(torch.int16))
        if len(tensors) != 2 or not torch.equal(*tensors):
            return False
    return True


def run(to_format, source, out):
    """(peak RSS in bytes, seconds) of the command."""
    command = [
        sys.executable,
        "-m",
        "megatron_dmc.cli.main",
        "convert",
        "--to",
        to_format,
        source,
        out,
    ]
    began = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return usage.ru_maxrss * 1024, time.monotonic() - began


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--shard-megabytes", type=int, default=500)
    parser.add_argument("--folder", help="for three copies of the model; default: a temporary one")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as work:
        work = Path(work)
        layer = torch.Size([2048, 2048 * 14 + 2048 // 2]).numel() * 2
        layers = max(1, round(args.gigabytes * 1e9 / layer))
        tiny = make(work / "tiny", 1, 256, 1 << 30)
        large = make(work / "large", layers, 2048, args.shard_megabytes * MB)
        shards = [f.stat().st_size for f in large.glob("*.safetensors")]
        result = {
            "model_mb": round(sum(shards) / MB), "files": len(shards),
            "largest_file_mb": round(max(shards) / MB),
        }  # fmt: skip
        ok = True
        for to_format, before, after in [("megatron", "", "-m"), ("hf", "-m", "-back")]:
            base, _ = run(to_format, f"{tiny}{before}", f"{tiny}{after}")
            peak, seconds = run(to_format, f"{large}{before}", f"{large}{after}")
            result[f"to_{to_format}"] = {
                "tiny_peak_mb": round(base / MB), "peak_mb": round(peak / MB),
                "above_tiny_mb": round((peak - base) / MB), "seconds": round(seconds, 1),
            }  # fmt: skip
            ok = ok and peak - base < max(shards)
        result["same_bits"] = same_bits(large, work / "large-back")
    print(json.dumps(result))
    raise SystemExit(not (ok and result["same_bits"]))


if __name__ == "__main__":
    main()
