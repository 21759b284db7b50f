"""SwiGLU in plain torch, in the dtype of its arguments."""

from __future__ import annotations

import torch
from torch import Tensor


def clamped_swiglu(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    """silu(min(gate, limit)) * clamp(up, -limit, limit); NaN stays NaN."""
    if limit > 0:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate * torch.sigmoid(gate) * up
