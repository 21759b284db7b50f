"""The mixture of experts in plain torch: the CPU implementation. Each function writes to its last arguments."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4_kernels.moe.routing_reference import moe_finalize, moe_sort

__all__ = ["moe_finalize", "moe_sort", "padded_squared_relu", "used_rows"]


def used_rows(permutation_map: Tensor, n_used: Tensor) -> Tensor:
    """Indices of the rows that hold a token."""
    limit = n_used.reshape(()).clamp(0, permutation_map.shape[0])
    row = torch.arange(permutation_map.shape[0], device=permutation_map.device)
    return ((row < limit) & (permutation_map >= 0)).nonzero()[:, 0]


def padded_squared_relu(x: Tensor, permutation_map: Tensor, n_used: Tensor, out: Tensor) -> None:
    rows = used_rows(permutation_map, n_used)
    # The square of a bfloat16 is exact in float32, so this rounds once.
    value = x[rows].to(torch.float32)
    out[rows] = torch.where(value < 0, 0.0, value).square().to(out.dtype)
