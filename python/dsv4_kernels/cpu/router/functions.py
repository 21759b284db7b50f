"""The router in plain torch and float64: the CPU implementation. Each function writes to its last two arguments."""

from __future__ import annotations

import torch
from torch import Tensor

NO_EXPERT = -1


def sqrt_softplus(logits: Tensor) -> Tensor:
    """sqrt(log(1 + e^x)) in float64."""
    x = logits.to(torch.float64)
    return torch.sqrt(x.clamp(min=0) + torch.log1p(torch.exp(-x.abs())))


def lookup(token_ids: Tensor, hash_lut: Tensor, padding_mask: Tensor | None) -> Tensor:
    """[tokens, k] int64 table rows; -1 for padding and token ids outside the table."""
    vocab = hash_lut.shape[0]
    found = (token_ids >= 0) & (token_ids < vocab)
    if padding_mask is not None:
        found &= ~padding_mask
    rows = torch.full((token_ids.shape[0], hash_lut.shape[1]), NO_EXPERT, dtype=torch.int64, device=token_ids.device)
    rows[found] = hash_lut[token_ids[found].to(torch.int64)].to(torch.int64)
    return rows


def weigh(scores: Tensor, renormalize: bool, scale: float, epsilon: float) -> Tensor:
    """From scores [tokens, k] to weights."""
    if renormalize:
        denominator = scores.sum(dim=1, keepdim=True) + epsilon
        scores = scores / torch.where(denominator == 0, 1.0, denominator)
    return scores * scale


# As in csrc/router/weigh_slot.cuh: below LEAST_SUM a sum has lost scores that float32 does not hold; far below 0 a
# score falls as e^(slope * logit).
LEAST_SUM = 2.0**-64
LEAST_SCORE = torch.finfo(torch.float32).tiny
SQRT_SOFTPLUS_SLOPE, LINEAR_SLOPE = 0.5, 1.0


def as_kernels_hold(scores: Tensor) -> Tensor:
    """Scores below the normal range of float32 are 0, as the kernels compute them; the rest keeps its digits."""
    return torch.where(scores < LEAST_SCORE, 0.0, scores)


def limit_shares(logits: Tensor, slope: float) -> Tensor:
    """Shares of the chosen experts [tokens, k] where scores do not tell them: infinite ones share the whole, tiny ones
    are as e^(slope * logit) to each other. NaN and -inf have none.
    """
    x = logits.to(torch.float64)
    highest = x.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf).amax(dim=1, keepdim=True)
    powers = torch.where(x == highest, 1.0, torch.exp(slope * (x - highest)))
    powers = torch.where(x > -torch.inf, powers, 0.0)
    return powers / powers.sum(dim=1, keepdim=True).clamp(min=1.0)  # the highest is 1, if there is one


def weigh_chosen(
    scores: Tensor, logits: Tensor, slope: float, renormalize: bool, scale: float, epsilon: float
) -> Tensor:
    """From the scores [tokens, k] of the chosen experts to weights, by the rule of docs/families/router.md.

    logits: theirs, NaN where a slot has no expert. Never gives NaN.
    """
    if scale == 0.0:
        return torch.zeros_like(scores)
    scores = torch.where(scores.isnan(), 0.0, scores)
    weights = weigh(scores, renormalize, scale, epsilon)
    if not renormalize:
        return weights
    total = scores.sum(dim=1, keepdim=True)
    by_limit = total.isinf() | ((total < LEAST_SUM) & (epsilon == 0.0))
    return torch.where(by_limit, limit_shares(logits, slope) * scale, weights)


def hash_router(
    token_ids: Tensor, hash_lut: Tensor, padding_mask: Tensor | None, out_weights: Tensor, out_ids: Tensor
) -> None:
    rows = lookup(token_ids, hash_lut, padding_mask)
    valid = (rows >= 0) & (rows <= torch.iinfo(torch.int32).max)
    out_ids.copy_(torch.where(valid, rows, NO_EXPERT))
    out_weights.copy_(valid.to(torch.float64) / hash_lut.shape[1])


def hash_router_scored(
    token_ids: Tensor,
    hash_lut: Tensor,
    logits: Tensor,
    padding_mask: Tensor | None,
    renormalize: bool,
    scale: float,
    epsilon: float,
    bias_alt: Tensor | None,
    bias_alt_mask: Tensor | None,
    out_weights: Tensor,
    out_ids: Tensor,
) -> None:
    rows = lookup(token_ids, hash_lut, padding_mask)
    if bias_alt is not None and bias_alt_mask is not None:
        images = bias_alt_mask if padding_mask is None else bias_alt_mask & ~padding_mask
        selection = as_kernels_hold(sqrt_softplus(logits)) + bias_alt.to(torch.float64)
        rows = torch.where(images[:, None], descending(selection)[:, : rows.shape[1]], rows)
    valid = (rows >= 0) & (rows < logits.shape[1])
    chosen = torch.full(rows.shape, torch.nan, dtype=torch.float64, device=logits.device)
    if logits.shape[1]:
        chosen = torch.where(valid, logits.gather(1, torch.where(valid, rows, 0)).to(torch.float64), torch.nan)
    scores = as_kernels_hold(sqrt_softplus(chosen))
    out_ids.copy_(torch.where(valid, rows, NO_EXPERT))
    out_weights.copy_(weigh_chosen(scores, chosen, SQRT_SOFTPLUS_SLOPE, renormalize, scale, epsilon))


def hash_router_fused(
    token_ids: Tensor,
    hash_lut: Tensor,
    hidden: Tensor,
    weight: Tensor,
    padding_mask: Tensor | None,
    renormalize: bool,
    scale: float,
    epsilon: float,
    out_weights: Tensor,
    out_ids: Tensor,
) -> None:
    logits = hidden.to(torch.float64) @ weight.to(torch.float64).T
    weighing = renormalize, scale, epsilon
    hash_router_scored(token_ids, hash_lut, logits, padding_mask, *weighing, None, None, out_weights, out_ids)


def descending(scores: Tensor) -> Tensor:
    """Column indices of each row in descending order of score: ties by index, NaN last."""
    nan = scores.isnan()
    order = torch.sort(torch.where(nan, -torch.inf, scores), dim=1, descending=True, stable=True).indices
    nan_last = torch.sort(nan.gather(1, order).to(torch.int8), dim=1, stable=True).indices
    return order.gather(1, nan_last)


def dense_router_decode(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    k: int,
    renormalize: bool,
    scale: float,
    epsilon: float,
    bias_alt: Tensor | None,
    bias_alt_mask: Tensor | None,
    out_weights: Tensor,
    out_ids: Tensor,
) -> None:
    logits = hidden.to(torch.float64) @ weight.to(torch.float64).T
    scores = as_kernels_hold(sqrt_softplus(logits))
    ids = descending(selection_scores(scores, bias, bias_alt, bias_alt_mask))[:, :k]
    chosen, chosen_logits = scores.gather(1, ids), logits.gather(1, ids)
    out_ids.copy_(ids)
    out_weights.copy_(weigh_chosen(chosen, chosen_logits, SQRT_SOFTPLUS_SLOPE, renormalize, scale, epsilon))


SQRT_SOFTPLUS, SIGMOID, SOFTMAX = range(3)  # dsv4_score_function of csrc/include/dsv4/router.h


def softmax(logits: Tensor) -> Tensor:
    """Over the logits that are not NaN, which keep their NaN; infinite ones count as the limit."""
    x = logits.to(torch.float64)
    highest = x.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf).amax(dim=1, keepdim=True)
    powers = torch.where(x == highest, 1.0, torch.exp(x - highest))
    return powers / powers.nansum(dim=1, keepdim=True)


def activate(logits: Tensor, score_function: int) -> Tensor:
    """Scores in float64."""
    if score_function == SOFTMAX:
        return softmax(logits)
    return torch.sigmoid(logits.to(torch.float64)) if score_function == SIGMOID else sqrt_softplus(logits)


def selection_scores(scores: Tensor, bias: Tensor | None, bias_alt: Tensor | None, mask: Tensor | None) -> Tensor:
    """What the experts are chosen by: scores plus the bias that holds for the token."""
    biases = torch.zeros_like(scores) if bias is None else bias.to(torch.float64).expand_as(scores)
    if bias_alt is not None and mask is not None:
        biases = torch.where(mask[:, None], bias_alt.to(torch.float64), biases)
    return scores + biases


def activation_topk(
    logits: Tensor,
    bias: Tensor | None,
    k: int,
    score_function: int,
    renormalize: bool,
    scale: float,
    epsilon: float,
    padding_mask: Tensor | None,
    bias_alt: Tensor | None,
    bias_alt_mask: Tensor | None,
    int64_ids: bool,
    out_weights: Tensor,
    out_ids: Tensor,
) -> None:
    scores = as_kernels_hold(activate(logits, score_function))
    ids = descending(selection_scores(scores, bias, bias_alt, bias_alt_mask))[:, :k]
    slope = SQRT_SOFTPLUS_SLOPE if score_function == SQRT_SOFTPLUS else LINEAR_SLOPE
    weights = weigh_chosen(scores.gather(1, ids), logits.gather(1, ids), slope, renormalize, scale, epsilon)
    if padding_mask is not None:
        ids = torch.where(padding_mask[:, None], NO_EXPERT, ids)
        weights = torch.where(padding_mask[:, None], 0.0, weights)
    out_ids.copy_(ids)
    out_weights.copy_(weights)


def topk_select(
    scores: Tensor,
    k: int,
    lengths: Tensor | None,
    sorted: bool,
    with_values: bool,
    out_values: Tensor,
    out_ids: Tensor,
) -> None:
    columns = scores.shape[1]
    beyond = torch.zeros_like(scores, dtype=torch.bool)
    if lengths is not None:
        beyond = torch.arange(columns, device="cpu") >= lengths.to(torch.int64).clamp(0, columns)[:, None]
    # What is beyond a row's length goes behind everything in it, NaN too.
    order = descending(scores.to(torch.float32))
    order = order.gather(1, torch.sort(beyond.gather(1, order).to(torch.int8), dim=1, stable=True).indices)[:, :k]
    if not sorted:
        order = order.gather(1, torch.where(beyond.gather(1, order), columns, order).argsort(dim=1))
    none = beyond.gather(1, order)
    found = order.shape[1]
    out_ids.fill_(NO_EXPERT)
    out_ids[:, :found] = torch.where(none, NO_EXPERT, order)
    if with_values:
        out_values.fill_(-torch.inf)
        out_values[:, :found] = torch.where(none, -torch.inf, scores.gather(1, order).to(torch.float32))
