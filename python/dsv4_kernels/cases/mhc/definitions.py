"""What the ops of hyper-connections compute, as their documentation has it: what results are checked against.

In float64, a token at a time, with sums written out; Sinkhorn on nested lists. Shares no code with the CPU backend.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

STREAMS = 4


class Rounded(NamedTuple):
    """Values in float64 before their rounding to bfloat16, and the sum of the magnitudes that each is the sum of."""

    exact: Tensor
    magnitude: Tensor

    def error_of(self, got: Tensor, roundings: int = 1) -> float:
        """Worst error of bfloat16 values, where 1 is what so many roundings to nearest and float32 sums may cost."""
        allowed = roundings * 2.0**-8 * self.exact.abs() + 2.0**-20 * self.magnitude + 2.0**-130
        error = (got.to(torch.float64) - self.exact).abs() / allowed
        return float(error.max()) if error.numel() else 0.0


class Coefficients(NamedTuple):
    """pre [tokens, 4], post [tokens, 4], comb [tokens, 4, 4] in float64."""

    pre: Tensor
    post: Tensor
    comb: Tensor


def as_double(rows: list[list[float]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64, device="cpu")


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value)) if value > -700 else 0.0


def products_of(streams: Tensor, fn: Tensor, epsilon: float) -> list[list[float]]:
    """m of each token: the products with the rows of fn, divided by the streams' root mean square."""
    rows = []
    for token in streams.to(torch.float64):
        x = torch.cat(list(token))
        root = math.sqrt(float((x * x).sum()) / len(x) + epsilon)
        rows.append([float((x * row).sum()) / root for row in fn.to(torch.float64)])
    return rows


def doubly_scaled(z: list[float], iterations: int, epsilon: float) -> list[list[float]]:
    """C from its 16 values before the softmax."""
    c = []
    for j in range(STREAMS):
        row = z[STREAMS * j : STREAMS * (j + 1)]
        powers = [math.exp(value - max(row)) for value in row]
        c.append([power / sum(powers) + epsilon for power in powers])
    for i in range(iterations):
        if i > 0:
            c = [[value / (sum(row) + epsilon) for value in row] for row in c]
        sums = [sum(row[k] for row in c) for k in range(STREAMS)]
        c = [[value / (of_column + epsilon) for value, of_column in zip(row, sums, strict=True)] for row in c]
    return c


def coefficients_of(
    streams: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    epsilon: float,
    hc_epsilon: float,
    post_factor: float,
    iterations: int,
) -> Coefficients:
    b, s = base.tolist(), scale.tolist()
    pre, post, comb = [], [], []
    for m in products_of(streams, fn, epsilon):
        pre.append([sigmoid(m[i] * s[0] + b[i]) + hc_epsilon for i in range(4)])
        post.append([post_factor * sigmoid(m[i] * s[1] + b[i]) for i in range(4, 8)])
        c = doubly_scaled([m[i] * s[2] + b[i] for i in range(8, 24)], iterations, hc_epsilon)
        comb.append([value for row in c for value in row])
    return Coefficients(
        as_double(pre).reshape(-1, 4), as_double(post).reshape(-1, 4), as_double(comb).reshape(-1, 4, 4)
    )


def head_pre_of(streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, epsilon: float, hc_epsilon: float) -> Tensor:
    """pre [tokens, 4] of the head."""
    factor, b = float(scale), base.tolist()
    rows = [[sigmoid(m[i] * factor + b[i]) + hc_epsilon for i in range(4)] for m in products_of(streams, fn, epsilon)]
    return as_double(rows).reshape(-1, 4)


def updated(x: Tensor, streams: Tensor, post: Tensor, comb: Tensor) -> Rounded:
    """The new streams [tokens, 4, hidden]."""
    x, streams, post, comb = (tensor.to(torch.float64) for tensor in (x, streams, post, comb))
    exact, magnitude = torch.zeros_like(streams), torch.zeros_like(streams)
    for k in range(STREAMS):
        terms = [post[:, k, None] * x, *(comb[:, j, k, None] * streams[:, j] for j in range(STREAMS))]
        for term in terms:
            exact[:, k] += term
            magnitude[:, k] += term.abs()
    return Rounded(exact, magnitude)


def collapsed(streams: Tensor, pre: Tensor) -> Rounded:
    """u [tokens, hidden]."""
    terms = [pre[:, j, None].to(torch.float64) * streams[:, j].to(torch.float64) for j in range(STREAMS)]
    return Rounded(terms[0] + terms[1] + terms[2] + terms[3], sum(term.abs() for term in terms))  # type: ignore[arg-type]


def normed(u: Rounded, norm_weight: Tensor | None, epsilon: float) -> Rounded:
    """n [tokens, hidden] of u as it is before its rounding; u itself without a weight."""
    if norm_weight is None:
        return u
    factor = (
        norm_weight.to(torch.float64) / ((u.exact * u.exact).sum(1, keepdim=True) / u.exact.shape[1] + epsilon).sqrt()
    )
    return Rounded(u.exact * factor, u.magnitude * factor.abs())
