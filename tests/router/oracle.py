"""The router from its mathematics, one number at a time, in Python floats. Shares no code with the package."""

from __future__ import annotations

import math
from collections.abc import Sequence

NO_EXPERT = -1


def score(logit: float) -> float:
    """sqrt(log(1 + e^x)), without overflow and without losing digits where e^x is small; NaN stays NaN."""
    if math.isnan(logit):
        return math.nan
    return math.sqrt(math.log1p(math.exp(logit)) if logit < 0 else logit + math.log1p(math.exp(-logit)))


def weights_of(scores: Sequence[float], renormalize: bool, scale: float, epsilon: float) -> list[float]:
    """Scores of the chosen experts to weights; a NaN score weighs nothing."""
    finite = [0.0 if math.isnan(s) else s for s in scores]
    divisor = (math.fsum(finite) + epsilon) if renormalize else 1.0
    return [scale * s / (divisor or 1.0) for s in finite]


def table_row(token: int, table: Sequence[Sequence[int]], padding: bool) -> list[int]:
    k = len(table[0])
    return [NO_EXPERT] * k if padding or not 0 <= token < len(table) else list(table[token])


def hash_router(token: int, table: Sequence[Sequence[int]], padding: bool = False) -> tuple[list[float], list[int]]:
    row = table_row(token, table, padding)
    ids = [e if 0 <= e < 2**31 else NO_EXPERT for e in row]
    return [0.0 if e == NO_EXPERT else 1.0 / len(row) for e in ids], ids


def hash_router_scored(
    token: int,
    table: Sequence[Sequence[int]],
    logits: Sequence[float],
    padding: bool = False,
    renormalize: bool = True,
    scale: float = 1.0,
    epsilon: float = 0.0,
) -> tuple[list[float], list[int]]:
    ids = [e if 0 <= e < len(logits) else NO_EXPERT for e in table_row(token, table, padding)]
    scores = [0.0 if e == NO_EXPERT else score(logits[e]) for e in ids]
    return weights_of(scores, renormalize, scale, epsilon), ids


def largest(values: Sequence[float], k: int) -> list[int]:
    """The indices of the k largest: descending, ties to the lower index, NaN lowest."""

    def place(index: int) -> tuple[bool, float, int]:
        value = values[index]
        return (True, 0.0, index) if math.isnan(value) else (False, -value, index)

    return sorted(range(len(values)), key=place)[:k]


def dense(
    hidden: Sequence[float],
    weight: Sequence[Sequence[float]],
    bias: Sequence[float] | None,
    k: int,
    renormalize: bool = True,
    scale: float = 1.0,
    epsilon: float = 0.0,
) -> tuple[list[float], list[int]]:
    """One token. Descending by score + bias, ties to the lower expert, NaN lowest."""
    # Plain addition where a term is not finite: fsum refuses to add infinities of both signs.
    products = [[h * w for h, w in zip(hidden, row, strict=True)] for row in weight]
    logits = [math.fsum(p) if all(map(math.isfinite, p)) else sum(p) for p in products]
    scores = [score(logit) for logit in logits]
    selection = [s + (bias[e] if bias is not None else 0.0) for e, s in enumerate(scores)]
    ids = largest(selection, k)
    return weights_of([scores[e] for e in ids], renormalize, scale, epsilon), ids


def softmax(logits: Sequence[float]) -> list[float]:
    """Over the logits that are numbers; the others stay NaN. All of -infinity: all equal."""
    highest = max((x for x in logits if not math.isnan(x)), default=0.0)
    powers = [x if math.isnan(x) else 1.0 if x == highest else math.exp(x - highest) for x in logits]
    total = math.fsum(p for p in powers if not math.isnan(p))
    return [p / (total or 1.0) for p in powers]


def gate(
    logits: Sequence[float],
    bias: Sequence[float] | None,
    k: int,
    score_function: str = "sqrt_softplus",
    renormalize: bool = True,
    scale: float = 1.0,
    epsilon: float = 0.0,
) -> tuple[list[float], list[int]]:
    """One token. Descending by score + bias, ties to the lower expert, NaN lowest."""
    if score_function == "softmax":
        scores = softmax(logits)
    elif score_function == "sigmoid":
        scores = [x if math.isnan(x) else 1 / (1 + math.exp(-x)) if x > -700 else 0.0 for x in logits]
    else:
        scores = [0.0 if x == -math.inf else score(x) for x in logits]
    ids = largest([s + (bias[e] if bias is not None else 0.0) for e, s in enumerate(scores)], k)
    return weights_of([scores[e] for e in ids], renormalize, scale, epsilon), ids
