"""What the router's ops compute, as its documentation has it: what results are checked against.

In float64 and integers, token by token where there is a table to look up. Shares no code with the CPU implementation.
"""

from __future__ import annotations

import torch
from torch import Tensor

SQRT_SOFTPLUS, SIGMOID, SOFTMAX = range(3)  # dsv4_score_function of csrc/include/dsv4/router.h


def scores_of(logits: Tensor, score_function: int = SQRT_SOFTPLUS) -> Tensor:
    """sqrt(log(e^x + e^0)), 1 / (1 + e^-x) or e^x / sum e^x in float64, of finite logits."""
    x = logits.to(torch.float64)
    if score_function == SQRT_SOFTPLUS:
        return torch.logaddexp(x, torch.zeros_like(x)).sqrt()
    return 1 / (1 + torch.exp(-x)) if score_function == SIGMOID else torch.exp(x) / torch.exp(x).sum(1, keepdim=True)


def logits_of(hidden: Tensor, weight: Tensor) -> Tensor:
    """The gate's product in float64."""
    return hidden.to(torch.float64) @ weight.to(torch.float64).T


def weights_of(scores: Tensor, renormalize: bool, scale: float, epsilon: float) -> Tensor:
    """From the scores [tokens, k] of chosen experts to their weights."""
    return scale * (scores / (scores.sum(dim=1, keepdim=True) + epsilon) if renormalize else scores)


def looked_up(token_ids: Tensor, hash_lut: Tensor, padding_mask: Tensor | None) -> Tensor:
    """[tokens, k] int32: each token's row of the table; -1 for padding and for ids outside of the table."""
    rows = torch.full((len(token_ids), hash_lut.shape[1]), -1, dtype=torch.int32, device="cpu")
    for i, token in enumerate(token_ids.tolist()):
        if 0 <= token < len(hash_lut) and not (padding_mask is not None and bool(padding_mask[i])):
            rows[i] = hash_lut[token]
    return rows


def looked_up_weights(ids: Tensor, logits: Tensor | None, renormalize: bool, scale: float, epsilon: float) -> Tensor:
    """Weights [tokens, k] in float64 of experts that a table gave: 1 / k without logits, 0 where there is no expert."""
    weights = torch.full(ids.shape, 1 / ids.shape[1], dtype=torch.float64, device="cpu")
    if logits is not None:
        chosen = scores_of(logits).gather(1, ids.clamp(min=0).to(torch.int64))
        weights = weights_of(chosen.masked_fill(ids < 0, 0.0), renormalize, scale, epsilon)
    return weights.masked_fill(ids < 0, 0.0)


def largest(scores: Tensor, k: int, lengths: Tensor | None, by_score: bool) -> Tensor:
    """[rows, k] int32: the columns of the k largest, -1 where a row has no more.

    Every element becomes a number of its own, which orders them: its float32 bits, as signed integers that compare like
    their values (-0 as 0, NaN below all), then, of equal ones, the lower column.
    """
    columns = scores.shape[1]
    values = scores.to(torch.float32) + 0.0
    bits = values.view(torch.int32).to(torch.int64)
    order = torch.where(bits >= 0, bits, -(bits & 0x7FFFFFFF))
    order = torch.where(values.isnan(), -(2**31), order)
    column = torch.arange(columns, device="cpu")
    number = order * 2**21 + (2**21 - 1 - column)
    if lengths is not None:
        number = torch.where(column < lengths.to(torch.int64)[:, None], number, torch.iinfo(torch.int64).min)
    best = number.sort(dim=1, descending=True).values[:, :k]
    found = torch.where(best == torch.iinfo(torch.int64).min, -1, 2**21 - 1 - best % 2**21)
    if not by_score:  # in the order of columns, those that are none behind
        found = torch.where(found < 0, columns, found).sort(dim=1).values
        found = torch.where(found == columns, -1, found)
    return torch.nn.functional.pad(found, (0, k - found.shape[1]), value=-1).to(torch.int32)
