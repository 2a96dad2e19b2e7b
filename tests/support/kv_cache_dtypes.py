"""Accuracy of 8-bit pages: the demo's base model on held-out text, through the engine.

`python tests/support/kv_cache_dtypes.py` prints the tables of docs/engine.md; the test takes a few windows.
Every window of tokens is prefilled, its last `--decoded` tokens are decoded one at a time, and every
position's logits are compared with those of float32 and float32 pages in the same engine. The model was not
retrofitted, so at CR 2 (decisions imposed, spread over the heads) its perplexity is bad; what counts
there is the distance between the dtypes, over entries that are means of several tokens.

Dimension letters: T tokens, V vocabulary.
"""

import argparse
import copy
import functools
import itertools
import sys
import sysconfig
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_dmc import SamplingParams
from megatron_dmc.checkpoint.load import load_model
from megatron_dmc.config import DMCConfig
from megatron_dmc.engine import EngineConfig, LLMEngine
from megatron_dmc.engine.chunk import Chunk
from megatron_dmc.engine.context import PagedContext
from megatron_dmc.engine.imposed import ImposedDecisions, ImposingContext, even_weights
from megatron_dmc.engine.request import Request
from megatron_dmc.ops.paged import kv_pages

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "examples" / "models" / "stdlib-llama-3m"
DTYPES = [
    ("float32", "auto"), ("float32", "fp8"), ("float32", "int8"),
    ("bfloat16", "auto"), ("bfloat16", "fp8"), ("bfloat16", "int8"),
]  # fmt: skip


def heldout_windows(tokenizer, length, count):
    """`count` windows of `length` + 1 tokens, spread over the sources that the model never saw."""
    sys.path.insert(0, str(ROOT / "tools"))
    import build_corpus

    stdlib = Path(sysconfig.get_path("stdlib"))
    tokens = []
    for file in sorted(stdlib.rglob("*.py")):
        path = file.relative_to(stdlib).as_posix()
        if not build_corpus.is_excluded(path) and build_corpus.side_of(path) == "heldout":
            tokens += tokenizer.encode(file.read_text(encoding="utf-8"))
    stride = (len(tokens) - length - 1) // count
    assert stride > 0, f"{len(tokens)} tokens are too few"
    return [tokens[i * stride :][: length + 1] for i in range(count)]


@torch.no_grad()
def logits_of(loaded, windows, *, kv_cache_dtype, cr, num_decoded) -> tuple[Tensor, float]:
    """Logits (windows, T, V) in float32, and the measured CR."""
    description = copy.copy(loaded.description)
    model = loaded.model
    length = len(windows[0]) - 1
    make_context: Any = PagedContext
    if cr > 1:
        description.dmc = DMCConfig(stage="finetune", target_cr=cr)
        weights = even_weights(description.num_layers, description.num_query_groups)
        make_context = functools.partial(
            ImposingContext, max_num_batched_tokens=length + 1,
            decisions=ImposedDecisions.of(weights, cr, num_tokens=length),
        )  # fmt: skip
    heads = description.num_layers * description.num_query_groups
    engine = LLMEngine(
        model, description, None,
        EngineConfig(
            max_model_len=length + 1, num_pages=heads * -(-(length + 1) // 16), max_num_seqs=1,
            kv_cache_dtype=kv_cache_dtype, count_flipped_decisions=False, poison=True,
        ),
        dtype=next(model.parameters()).dtype, make_context=make_context,
    )  # fmt: skip
    rows, num_entries = [], 0
    for i, window in enumerate(windows):
        request = Request(str(i), i, None, window, SamplingParams(max_tokens=1), length + 2)
        engine.context.start(request)
        parts = []
        for size in [length - num_decoded] + [1] * num_decoded:
            parts.append(engine.runner.run([Chunk.next_of(request, size)], [list(range(size))]))
            request.num_computed_tokens += size
        num_entries += int(engine.context.tables.num_entries_LRG.sum())
        engine.context.release(request)
        rows.append(torch.cat(parts).float())
    engine.check_integrity()
    return torch.stack(rows), len(windows) * length * heads / num_entries


def compare(windows, loaded_by_dtype, *, cr, num_decoded, dtypes=DTYPES):
    """For each (model's dtype, pages' dtype) a dict of figures; the first one is the reference."""
    targets = torch.tensor([w[1:] for w in windows]).flatten()
    results, reference = {}, None
    for dtype, kv_cache_dtype in dtypes:
        logits, measured_cr = logits_of(
            loaded_by_dtype[dtype], windows, kv_cache_dtype=kv_cache_dtype, cr=cr,
            num_decoded=num_decoded,
        )  # fmt: skip
        logits = logits.flatten(0, 1).log_softmax(-1)
        reference = logits if reference is None else reference
        nll = torch.nn.functional.nll_loss(logits, targets)
        difference = logits - reference
        results[dtype, kv_cache_dtype] = {
            "measured_cr": measured_cr,
            "perplexity": float(nll.exp()),
            "rms": float(difference.square().mean().sqrt()),
            "largest": float(difference.abs().max()),
            "kl": float((reference.exp() * -difference).sum(-1).mean()),
            "same_first": float((logits.argmax(-1) == reference.argmax(-1)).double().mean()),
        }
    return results


@torch.no_grad()
def errors_by_granularity(loaded, window):
    """(dtype, K or V, what shares a scale) to RMS error / RMS of a window's entries, all layers and heads."""
    engine = LLMEngine(
        loaded.model, loaded.description, None,
        EngineConfig(max_model_len=len(window), num_pages=4096, max_num_seqs=1),
        dtype=torch.float32,
    )  # fmt: skip
    request = Request("0", 0, None, window, SamplingParams(max_tokens=1), len(window) + 1)
    engine.context.start(request)
    engine.runner.run([Chunk.next_of(request, len(window))], [[]])
    length = len(window) // 16 * 16
    tables, row = engine.context.tables, request.row
    layers = [tables.layer(i).load(row, torch.float32) for i in range(tables.num_layers)]
    k_XED, v_XED = (torch.cat([layer[i] for layer in layers]) for i in range(2))
    errors = {}
    for dtype, (name, x) in itertools.product(kv_pages.LARGEST, (("K", k_XED), ("V", v_XED))):
        x = x[:, :length]
        for shared, size in (("entry", 1), ("page of 16", 16), ("head", length)):
            groups = x.unflatten(1, (-1, size)).flatten(2)
            back = kv_pages.dequantise(*kv_pages.quantise(groups, dtype), torch.float32)
            errors[dtype, name, shared] = float((back - groups).norm() / groups.norm())
    return errors


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--decoded", type=int, default=32)
    parser.add_argument("--crs", type=float, nargs="*", default=[1.0, 2.0])
    args = parser.parse_args()
    loaded = {
        name: load_model(str(MODEL), dtype=getattr(torch, name)) for name in ("float32", "bfloat16")
    }
    windows = heldout_windows(loaded["float32"].tokenizer, args.length, args.windows)
    print("| pages | of | scale per entry | page of 16 | head |")
    found = [errors_by_granularity(loaded["float32"], window) for window in windows[:8]]
    for dtype, of in itertools.product(kv_pages.LARGEST, "KV"):
        means = [
            sum(errors[dtype, of, shared] for errors in found) / len(found)
            for shared in ("entry", "page of 16", "head")
        ]
        print(f"| {dtype} | {of} | " + " | ".join(f"{100 * m:.2f} %" for m in means) + " |")
    print("| CR | model | pages | perplexity | RMS | largest | KL, nats | same first |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for cr in args.crs:
        for (dtype, pages), r in compare(windows, loaded, cr=cr, num_decoded=args.decoded).items():
            print(
                f"| {r['measured_cr']:.2f} | {dtype} | {pages} | {r['perplexity']:.4f} | "
                f"{r['rms']:.4f} | {r['largest']:.2f} | {r['kl']:.1e} | {100 * r['same_first']:.2f} % |",
                flush=True,
            )


if __name__ == "__main__":
    main()
