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
        """Compute the chunks' tokens and cache them.

        Args:
            chunks: this step's work, which the scheduler found pages for.
            wanted: for each chunk the offsets within it that need logits.

        Returns:
            logits_XV, rows in the order of `wanted`.
        """
        token_ids: list[int] = []
        positions: list[int] = []
        rows: list[int] = []
        packed: list[PackedChunk] = []
        for chunk, offsets in zip(chunks, wanted, strict=True):
            request = chunk.request
            rows += [len(token_ids) + offset for offset in offsets]
            token_ids += request.tokens_between(chunk.start, chunk.end)
            positions += range(chunk.start, chunk.end)
            packed.append(PackedChunk(request, chunk.start, chunk.num_tokens))
        self.context.begin_step(packed)
        logits = self.model(
            input_ids=torch.tensor([token_ids], device=self.device),
            position_ids=torch.tensor([positions], device=self.device),
            attention_mask=None,
            inference_context=self.context,
            runtime_gather_output=False,
            output_processor=_logits_of_rows,
            output_processor_context=torch.tensor(rows, dtype=torch.int64, device=self.device),
        )
        self.context.end_step()
        # Megatron's output layer gives [X, 1, V]
        logits_XV = logits.flatten(0, -2)
        if self._gather is not None:
            logits_XV = self._gather(logits_XV)
        return logits_XV[:, : self.vocab_size]
