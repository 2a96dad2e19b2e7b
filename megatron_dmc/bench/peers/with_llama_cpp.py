"""llama.cpp through the C functions of llama-cpp-python: prompts one after the other, then a token of every
sequence in one batch."""

import ctypes
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import llama_cpp as ll
import numpy as np

from . import cases, llama_gguf

PROMPT_BATCH = 512


class Sequences:
    """A context for one case."""

    def __init__(self, model: Any, case: dict[str, Any], threads: int):
        params = ll.llama_context_default_params()
        params.n_ctx = case["batch"] * (case["context"] + case["new_tokens"] + 8)
        params.n_seq_max = case["batch"]
        params.n_batch = params.n_ubatch = max(PROMPT_BATCH, case["batch"])
        params.n_threads = params.n_threads_batch = threads
        self._context = ll.llama_init_from_model(model, params)
        if not self._context:
            raise MemoryError(f"llama.cpp cannot hold {params.n_ctx} tokens")
        self._batch = ll.llama_batch_init(int(params.n_batch), 0, 1)
        self._vocab_size = ll.llama_vocab_n_tokens(ll.llama_model_get_vocab(model))

    def decode(self, rows: list[tuple[int, int, int, bool]]) -> list[int]:
        """Compute (token, position, sequence, is wanted); the greedy next tokens of those wanted."""
        self._batch.n_tokens = len(rows)
        for i, (token, position, sequence, wanted) in enumerate(rows):
            self._batch.token[i], self._batch.pos[i] = token, position
            self._batch.n_seq_id[i], self._batch.seq_id[i][0] = 1, sequence
            self._batch.logits[i] = wanted
        if status := ll.llama_decode(self._context, self._batch):
            raise RuntimeError(f"llama_decode returned {status}")
        return [self._greedy(i) for i, row in enumerate(rows) if row[3]]

    def _greedy(self, i: int) -> int:
        logits = ll.llama_get_logits_ith(self._context, i)
        address = ctypes.cast(logits, ctypes.POINTER(ctypes.c_float))
        return int(np.ctypeslib.as_array(address, (self._vocab_size,)).argmax())

    def close(self) -> None:
        ll.llama_batch_free(self._batch)
        ll.llama_free(self._context)


def measure(asked: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the row of each case of a request that `cases` describes; raises what the engine raises."""
    ll.llama_backend_init()
    with tempfile.TemporaryDirectory() as folder:
        if (file := asked["gguf"]) is None:
            llama_gguf.write(Path(asked["model"]), Path(file := f"{folder}/model.gguf"))
        model = ll.llama_model_load_from_file(file.encode(), ll.llama_model_default_params())
    if not model:
        raise ValueError(f"llama.cpp cannot load {file}")
    run(model, asked["cases"][0] | {"context": 8, "new_tokens": 2}, asked)  # warm-up
    for case in asked["cases"]:
        yield case | run(model, case, asked) | {"version": ll.__version__}


def run(model: Any, case: dict[str, Any], asked: dict[str, Any]) -> dict[str, Any]:
    """Figures of one case."""
    sequences = Sequences(model, case, asked["threads"])
    requests, progress = cases.prompts(case), cases.Progress(case, asked["clock"])
    tokens = []
    for sequence, ids in enumerate(requests):
        for first in range(0, len(ids), PROMPT_BATCH):
            part = ids[first : first + PROMPT_BATCH]
            last = first + len(part) == len(ids)
            found = sequences.decode(
                [(x, first + i, sequence, last and i == len(part) - 1) for i, x in enumerate(part)]
            )
        tokens += found
        progress.step([sequence])
    for step in range(case["new_tokens"] - 1):
        at = case["context"] + step
        tokens = sequences.decode([(token, at, s, True) for s, token in enumerate(tokens)])
        progress.step(range(len(tokens)))
    sequences.close()
    return progress.row()


if __name__ == "__main__":
    cases.answer(measure)
