"""The tokens of one request in one step, from the scheduler to the kernels' tables (`ops.paged.chunks`)."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from megatron_dmc.engine.request import Request


@dataclass(slots=True)
class Chunk:
    """Tokens [start, start + num_tokens) of a request."""

    request: Request
    num_tokens: int
    start: int
    """Position of the first token in its sequence."""

    @classmethod
    def next_of(cls, request: Request, num_tokens: int) -> "Chunk":
        """The request's first tokens that are not computed yet."""
        return cls(request, num_tokens, request.num_computed_tokens)

    @property
    def end(self) -> int:
        return self.start + self.num_tokens

    @property
    def row(self) -> int:
        assert self.request.row is not None
        return self.request.row

    @property
    def samples(self) -> bool:
        """True where the chunk ends with the request's last known token."""
        return self.end == self.request.num_tokens

    @property
    def logit_offsets(self) -> list[int]:
        """Offsets within the chunk whose logits are needed: those of prompt log-probabilities, and the last
        one where it samples."""
        params = self.request.params
        if params.prompt_logprobs is None:
            return [self.num_tokens - 1] if self.samples else []
        # position p predicts token p + 1
        first = max(self.start, params.prompt_logprobs_start - 1)
        last = min(self.end, self.request.num_prompt_tokens - 1)
        offsets = list(range(first - self.start, last - self.start))
        if self.samples:
            offsets.append(self.num_tokens - 1)
        return offsets

    def cut(self, positions: Iterable[int]) -> Iterator["Chunk"]:
        """The chunk in parts that end at these increasing positions within it, and at its end."""
        start = self.start
        for end in (*positions, self.end):
            if end > start:
                yield Chunk(self.request, end - start, start)
            start = end
