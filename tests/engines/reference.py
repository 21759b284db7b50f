"""What the engines' layers compute, in float64, by the formulas of the models' published code."""

from __future__ import annotations

import torch
from torch import Tensor

E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], dtype=torch.float64)


def mxfp4_values(codes: Tensor, scale: Tensor) -> Tensor:
    """[..., N, K] of packed codes [..., N, K / 2], low nibble first, and UE8M0 bytes [..., N, K / 32]."""
    codes, scale = codes.view(torch.uint8), scale.view(torch.uint8)
    nibbles = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-2).long()
    values = E2M1[nibbles & 7] * torch.where(nibbles >= 8, -1.0, 1.0)
    return values * torch.exp2(scale.double() - 127).repeat_interleave(32, dim=-1)


def experts(
    hidden: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, ids: Tensor, limit: float, dtype: torch.dtype
) -> Tensor:
    """Each token's weighted sum over its experts; in float64, or as plain torch does it in bfloat16."""
    hidden, gate_up, down = hidden.to(dtype), gate_up.to(dtype), down.to(dtype)
    out = torch.zeros(hidden.shape, dtype=dtype)
    for token in range(hidden.shape[0]):
        for weight, expert in zip(weights[token], ids[token].tolist(), strict=True):
            if not 0 <= expert < gate_up.shape[0]:
                continue
            gate, up = (gate_up[expert] @ hidden[token]).chunk(2)
            inner = torch.nn.functional.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit)
            out[token] += weight.to(dtype) * (down[expert] @ inner)
    return out


def route(logits: Tensor, bias: Tensor | None, k: int, scale: float, chosen: Tensor | None) -> tuple[Tensor, Tensor]:
    """Weights in float64 and ids: the k largest of sqrt(softplus(logit)) + bias, ties to the lower id, or `chosen`."""
    scores = torch.nn.functional.softplus(logits.double(), threshold=1e9).sqrt()
    if chosen is None:
        by = scores if bias is None else scores + bias.double()
        chosen = by.sort(dim=1, descending=True, stable=True).indices[:, :k]
    weights = scores.gather(1, chosen.long())
    return scale * weights / weights.sum(dim=1, keepdim=True), chosen


def relative_error(found: Tensor, exact: Tensor) -> float:
    """Of the Frobenius norms."""
    return float((found.double() - exact).norm() / exact.norm())
