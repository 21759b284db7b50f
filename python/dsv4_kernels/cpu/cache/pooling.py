"""The softmax pooling that compresses a block to an entry."""

from __future__ import annotations

import torch
from torch import Tensor


def pooled(values: Tensor, scores: Tensor) -> Tensor:
    """sum softmax(scores) * values over the rows [requests, rows, width], in float64; 0 where all scores are -inf."""
    scores = scores.to(torch.float64)
    top = scores.amax(dim=1, keepdim=True)
    weights = (scores - top.where(top != -torch.inf, 0.0)).exp()
    total = weights.sum(dim=1)
    weighted = (weights * values.to(torch.float64)).sum(dim=1)
    return torch.where(total == 0, 0.0, weighted / total)
