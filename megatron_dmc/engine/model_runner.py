"""Runs Megatron's GPTModel on a step's packed tokens.

Dimension letters: T packed tokens, X rows that need logits, V vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_dmc.engine.context import PackedChunk, PagedContext
from megatron_dmc.engine.scheduler import ScheduledChunk


def _logits_of_rows(
    *, hidden_states: Tensor, output_layer, output_weight, context: Tensor, scale_logits=None, **_
) -> Tensor:
    """Megatron's `output_processor` hook: logits of the rows in `context` only, [X, 1, V]."""
    logits, _ = output_layer(
        hidden_states[context], weight=output_weight, runtime_gather_output=False
    )
    return logits if scale_logits is None else scale_logits(logits)


class ModelRunner:
    """The model and its cache.

    Args:
        model: Megatron's GPTModel, or whatever is called like it.
        context: its cache.
        vocab_size: token ids that exist; the model's own vocabulary may be padded.
        gather: tensor parallelism: from this rank's part of the logits to all of them.
    """

    def __init__(
        self,
        model: Any,
        context: PagedContext,
        *,
        vocab_size: int,
        device: torch.device | str,
        gather: Callable[[Tensor], Tensor] | None = None,
    ):
        self.model, self.context = model.eval(), context
        self.vocab_size, self.device = vocab_size, device
        self._gather = gather

    @torch.no_grad()
    def run(self, chunks: Sequence[ScheduledChunk], wanted: Sequence[Sequence[int]]) -> Tensor:
        """Compute the chunks' tokens and cache them. Waits for nothing; `PagedContext.settle` does.

        Args:
            chunks: this step's work, which the scheduler found pages for.
            wanted: for each chunk the offsets within it that need logits.

        Returns:
            logits_XV, rows in the order of `wanted`.
        """
        packed = [PackedChunk(c.request, c.start, c.num_tokens) for c in chunks]
        packed.sort(key=lambda chunk: chunk.num_tokens > 1)  # single tokens come first
        token_ids: list[int] = []
        positions: list[int] = []
        first: dict[int, int] = {}
        for chunk in packed:
            first[chunk.request.number] = len(token_ids)
            token_ids += chunk.request.tokens_between(chunk.start, chunk.end)
            positions += range(chunk.start, chunk.end)
        decode_rows = [c.row for c in packed if c.num_tokens == 1]
        logit_rows = [
            first[chunk.request.number] + offset
            for chunk, offsets in zip(chunks, wanted, strict=True)
            for offset in offsets
        ]
        self.context.begin_step(packed)
        parts = (token_ids, positions, decode_rows, logit_rows)
        logits = self._compute(*self._on_device(parts))
        self.context.end_step()
        return logits

    def _compute(
        self, token_ids_T: Tensor, positions_T: Tensor, rows_B: Tensor, logit_rows_X: Tensor
    ) -> Tensor:
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
        logits_XV = logits.flatten(0, -2)
        if self._gather is not None:
            logits_XV = self._gather(logits_XV)
        return logits_XV[:, : self.vocab_size]

    def _on_device(self, parts: Sequence[Sequence[int]]) -> list[Tensor]:
        """Lists of whole numbers to the device, in one copy that nobody waits for."""
        on_gpu = torch.device(self.device).type == "cuda"
        flat = torch.tensor([x for part in parts for x in part], dtype=torch.int64)
        if on_gpu:
            flat = flat.pin_memory()
        return list(flat.to(self.device, non_blocking=True).split([len(part) for part in parts]))
