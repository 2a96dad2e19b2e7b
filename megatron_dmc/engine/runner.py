"""Runs Megatron's GPTModel on a step's packed tokens.

Dimension letters: T packed tokens, X rows that need logits, V vocabulary.
"""

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_dmc.engine.chunk import Chunk
from megatron_dmc.engine.context import PagedContext
from megatron_dmc.engine.decode_batch import DecodeBatch
from megatron_dmc.engine.graphs import Capture, CudaGraphs, DecodeGraphs
from megatron_dmc.engine.request import Request
from megatron_dmc.errors import UnsupportedConfig
from megatron_dmc.model.inference import use_inference_kernels
from megatron_dmc.ops.tensors import take_rows, to_device

logger = logging.getLogger(__name__)

_SAMPLED = -1
"""In place of a token id: the one in `ModelRunner.sampled_R`."""


def _logits_of_rows(
    *, hidden_states: Tensor, output_layer, output_weight, context: Tensor | None, scale_logits=None,
    **_,
) -> Tensor:  # fmt: skip
    """Megatron's `output_processor` hook: logits of the rows in `context` only (None: of all),
    [X, 1, V]."""
    if context is not None:
        hidden_states = hidden_states[context]
    logits, _ = output_layer(hidden_states, weight=output_weight, runtime_gather_output=False)
    return logits if scale_logits is None else scale_logits(logits)


def _token_at(request: Request, position: int) -> int:
    """The token, or `_SAMPLED` where it is pending."""
    at = position - len(request.prompt_token_ids)
    if at < 0:
        return request.prompt_token_ids[position]
    tokens = request.output_token_ids
    return tokens[at] if at < len(tokens) else _SAMPLED


def device_of_weights(model: torch.nn.Module, device: torch.device | str | None) -> torch.device:
    """The device of the model's weights.

    Args:
        device: what was asked for; None: nothing.

    Raises:
        UnsupportedConfig: that is another device.
    """
    weight = next(model.parameters(), None)
    asked = None if device is None else torch.device(device)
    found = weight.device if weight is not None else asked or torch.device("cpu")
    if asked is None:
        return found
    if asked.type != found.type or asked.index not in (None, found.index):
        raise UnsupportedConfig(
            f"device={str(asked)!r}, and the model's weights are on {str(found)!r}; move the model, or "
            "leave device out"
        )
    return found


class ModelRunner:
    """The model and its cache.

    Args:
        model: Megatron's GPTModel, or whatever is called like it.
        context: its cache.
        vocab_size: token ids that exist; the model's own vocabulary may be padded.
        gather: tensor parallelism: from this rank's part of the logits to all of them.
        reads_sampled: single tokens may be `sampled_R`'s.

    Attributes:
        sampled_R: the token sampled last for each row of the cache, int64: a step's input where the host does
            not know it yet.
    """

    def __init__(
        self,
        model: Any,
        context: PagedContext,
        *,
        vocab_size: int,
        device: torch.device | str,
        gather: Callable[[Tensor], Tensor] | None = None,
        reads_sampled: bool = False,
    ):
        self.model, self.context = model.eval(), context
        use_inference_kernels(self.model)
        self.vocab_size, self.device = vocab_size, torch.device(device)
        self._gather, self._reads_sampled = gather, reads_sampled
        self._graphs: DecodeGraphs | None = None
        num_rows = context.tables.num_entries_LRG.shape[1]
        self.sampled_R = torch.zeros(num_rows, dtype=torch.int64, device=self.device)

    @torch.no_grad()
    def capture(self, sizes: Sequence[int], capture: Capture, *, progress: bool = True) -> None:
        """From now on, steps in which every request has one token replay what is captured here, up to the
        largest of these batch sizes. Call it before the first request."""
        self._graphs = DecodeGraphs(
            self._forward_decode, sizes, capture, device=self.device, progress=progress,
        )  # fmt: skip

    def capture_on_gpu(self, sizes: Sequence[int], *, progress: bool) -> None:
        """`capture` into CUDA graphs, with one line in the log; no kernels, no graphs."""
        if not self.context.is_capturable:
            logger.info("no CUDA graphs: the cache ops run in PyTorch")
            return
        began, (free, _) = time.perf_counter(), torch.cuda.mem_get_info(self.device)
        self.capture(sizes, CudaGraphs(self.device), progress=progress)
        taken = free - torch.cuda.mem_get_info(self.device)[0]
        logger.info(
            "CUDA graphs of decode steps: %d batch sizes up to %d, %.2f GiB, captured in %.1f s",
            len(sizes), max(sizes), taken / 2**30, time.perf_counter() - began,
        )  # fmt: skip

    @torch.no_grad()
    def run(self, chunks: Sequence[Chunk], wanted: Sequence[Sequence[int]]) -> Tensor:
        """Compute the chunks' tokens and cache them. Waits for nothing; `PagedContext.land` does.

        Args:
            chunks: this step's work, which the scheduler found pages for.
            wanted: for each chunk the offsets within it that need logits.

        Returns:
            logits_XV, rows in the order of `wanted`; valid until the next call.
        """
        packed, token_ids, positions, firsts = self._pack(chunks)
        num_single = sum(chunk.num_tokens == 1 for chunk in packed)
        decode_rows = [chunk.row for chunk in packed[:num_single]]
        logit_rows = [
            first + offset for first, of in zip(firsts, wanted, strict=True) for offset in of
        ]
        self.context.begin_step(packed)
        graphs = self._graphs
        if graphs is not None and len(packed) == num_single <= graphs.largest:
            inputs_3B = np.array([token_ids, positions, decode_rows], dtype=np.int64)
            logits_XV = take_rows(graphs.run(inputs_3B), logit_rows)
        else:
            parts = (token_ids, positions, decode_rows, logit_rows)
            ids_T, positions_T, rows_B, rows_X = self._on_device(parts)
            self._put_sampled(ids_T, rows_B)
            logits_XV = self._forward(ids_T, positions_T, rows_B, rows_X)
        self.context.end_step()
        if self._gather is not None:
            logits_XV = self._gather(logits_XV)
        return logits_XV[:, : self.vocab_size]

    @torch.no_grad()
    def decode(self, batch: DecodeBatch) -> Tensor:
        """`run` of a step of one token of each request: their logits_BV."""
        are_pending = self._reads_sampled and batch.num_steps > 0
        if not batch.num_steps:
            starts = batch.starts_B.tolist()
            token_ids = [_token_at(r, at) for r, at in zip(batch.requests, starts, strict=True)]
        elif are_pending:
            token_ids = [_SAMPLED] * len(batch.requests)
        else:
            token_ids = [request.output_token_ids[-1] for request in batch.requests]
        self.context.begin_decode(batch)
        if self._graphs is not None and len(token_ids) <= self._graphs.largest:
            logits_XV = self._graphs.run(np.array([token_ids, batch.starts_B, batch.rows_B]))
        else:
            rows_B = batch.rows_on(self.device)
            if are_pending:
                positions_B = to_device(batch.starts_B, self.device)
                ids_B = self.sampled_R[rows_B]
            else:
                ids_B, positions_B = to_device(np.array([token_ids, batch.starts_B]), self.device)
                self._put_sampled(ids_B, rows_B)
            logits_XV = self._forward(ids_B, positions_B, rows_B, None)
        self.context.end_step()
        if self._gather is not None:
            logits_XV = self._gather(logits_XV)
        return logits_XV[:, : self.vocab_size]

    def _pack(self, chunks: Sequence[Chunk]) -> tuple[list[Chunk], list[int], list[int], list[int]]:
        """The chunks with single tokens first, all token ids and positions in this order, and the place of
        each given chunk's first token among them."""
        singles = [c for c, chunk in enumerate(chunks) if chunk.num_tokens == 1]
        positions = [chunks[c].start for c in singles]
        token_ids = [_token_at(chunks[c].request, chunks[c].start) for c in singles]
        if len(singles) == len(chunks):
            return list(chunks), token_ids, positions, singles
        longer = [c for c, chunk in enumerate(chunks) if chunk.num_tokens > 1]
        firsts = [0] * len(chunks)
        for place, c in enumerate(singles):
            firsts[c] = place
        for c in longer:
            chunk, firsts[c] = chunks[c], len(token_ids)
            token_ids += chunk.request.tokens_between(chunk.start, chunk.end)
            positions += range(chunk.start, chunk.end)
        return [chunks[c] for c in (*singles, *longer)], token_ids, positions, firsts

    def keep_sampled(self, token_ids_B: Tensor, rows_B: Tensor) -> None:
        """Make these tokens, int64 on the device, the ones that the next step computes in these rows."""
        self.sampled_R.index_copy_(0, rows_B, token_ids_B)

    def _put_sampled(self, token_ids_T: Tensor, rows_B: Tensor) -> None:
        """Put pending tokens in the places of `_SAMPLED`, which the first B may be."""
        if self._reads_sampled:
            ids_B = token_ids_T[: rows_B.shape[0]]
            ids_B.copy_(torch.where(ids_B == _SAMPLED, self.sampled_R[rows_B], ids_B))

    def _forward_decode(self, token_ids_B: Tensor, positions_B: Tensor, rows_B: Tensor) -> Tensor:
        """The part that graphs capture."""
        self._put_sampled(token_ids_B, rows_B)
        return self._forward(token_ids_B, positions_B, rows_B, None)

    def _forward(
        self, token_ids_T: Tensor, positions_T: Tensor, rows_B: Tensor, logit_rows_X: Tensor | None
    ) -> Tensor:
        """This rank's logits_XV. Nothing here waits for the device, and where T is B no shape depends on
        a length."""
        self.context.set_decode(rows_B, positions_T[: rows_B.shape[0]])
        logits = self.model(
            input_ids=token_ids_T[None],
            position_ids=positions_T[None],
            attention_mask=None,
            inference_context=self.context,
            runtime_gather_output=False,
            output_processor=_logits_of_rows,
            output_processor_context=logit_rows_X,
        )
        # Megatron's output layer gives [X, 1, V]
        logits_XV: Tensor = logits.flatten(0, -2)
        return logits_XV

    def _on_device(self, parts: Sequence[Sequence[int]]) -> list[Tensor]:
        """Lists of whole numbers to the device, in one non-blocking copy."""
        flat = to_device([x for part in parts for x in part], self.device)
        return list(flat.split([len(part) for part in parts]))
