"""The compressed cache in plain torch: the CPU implementation. Each function writes to its last arguments, or to the
state that it changes.
"""

from __future__ import annotations

import torch
from torch import Tensor


def full_requests(tail_len: Tensor, request_slots: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """[requests] bool, whose tail is full; and the slots of those."""
    inside = (request_slots >= 0) & (request_slots < tail_len.shape[0])
    slots = request_slots.to(torch.int64).clamp(0, max(tail_len.shape[0] - 1, 0))
    if not tail_len.shape[0]:
        return torch.zeros_like(inside), slots[:0]
    full = inside & (tail_len[slots] >= m)
    return full, slots[full]


def pooled(values: Tensor, scores: Tensor) -> Tensor:
    """sum softmax(scores) * values over the rows [requests, rows, width], in float64; 0 where all scores are -inf."""
    scores = scores.to(torch.float64)
    top = scores.amax(dim=1, keepdim=True)
    weights = (scores - top.where(top != -torch.inf, 0.0)).exp()
    total = weights.sum(dim=1)
    weighted = (weights * values.to(torch.float64)).sum(dim=1)
    return torch.where(total == 0, 0.0, weighted / total)


def csa_compress_tail(
    tail_ka: Tensor,
    tail_za: Tensor,
    tail_kb: Tensor,
    tail_zb: Tensor,
    tail_len: Tensor,
    request_slots: Tensor,
    m: int,
    indexer_head_dim: int,
    out_entry: Tensor,
    out_indexer_key: Tensor,
    out_valid_mask: Tensor,
) -> None:
    full, slots = full_requests(tail_len, request_slots, m)
    values = torch.cat((tail_kb[slots, :m], tail_ka[slots, :m]), dim=1)
    scores = torch.cat((tail_zb[slots, :m], tail_za[slots, :m]), dim=1)
    rows = pooled(values, scores)
    head_dim = out_entry.shape[1]
    out_entry[full] = rows[:, :head_dim].to(out_entry.dtype)
    out_indexer_key[full] = rows[:, head_dim:].to(out_indexer_key.dtype)
    out_valid_mask.copy_(full)
