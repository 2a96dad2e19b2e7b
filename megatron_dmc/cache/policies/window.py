"""Recent window with attention sinks: StreamingLLM, Xiao et al., arXiv 2309.17453.

A head keeps the first tokens of the sequence (four, as in the paper; of a budget below five all but one)
and the most recent ones. The paper also renumbers positions within the cache, to go beyond the longest
sequence of training; here keys keep the positions of the text, as for the other methods.

Dimension letters as in `cache.policies.base`.
"""

import torch
from torch import Tensor

NUM_SINKS = 4


class Window:
    """Evicts the oldest entry behind the sinks."""

    name = "window"

    def update(self, score_XGE: Tensor, weights_XGRE: Tensor) -> Tensor:
        return score_XGE

    def rank(
        self, score_XGE: Tensor, position_XGE: Tensor, newest_X: Tensor, budget_X: Tensor
    ) -> Tensor:
        num_sinks_X = torch.clamp(budget_X - 1, max=NUM_SINKS)
        is_sink = position_XGE < num_sinks_X[:, None, None]
        return position_XGE.to(score_XGE.dtype).masked_fill(is_sink, float("inf"))
