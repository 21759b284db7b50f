"""The mixture of experts in plain torch: the CPU implementation. Each function writes to its last arguments."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4_kernels.moe.quantize_reference import (
    dequantize_blocks,
    quantize_fp8_per_token,
    quantize_mx,
    quantize_nvfp4,
    quantize_nvfp4_gpu_fused,
)
from dsv4_kernels.moe.routing_reference import moe_finalize, moe_sort

__all__ = [
    "dequantize_blocks",
    "moe_finalize",
    "moe_sort",
    "padded_squared_relu",
    "quantize_fp8_per_token",
    "quantize_mx",
    "quantize_nvfp4",
    "quantize_nvfp4_gpu_fused",
    "used_rows",
]


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


def blackwell_swizzle_32_4_4(scales: Tensor, out: Tensor) -> None:
    matrices = as_batch(scales)
    _, rows, columns = matrices.shape
    padded = matrices.new_zeros(matrices.shape[0], *out.shape[-2:])
    padded[:, :rows, :columns] = matrices
    out.view(torch.uint8).copy_(_as_tiles(padded).permute(0, 1, 4, 3, 2, 5).reshape(out.shape))


def blackwell_unswizzle_32_4_4(swizzled: Tensor, rows: int, columns: int, out: Tensor) -> None:
    padded = as_batch(swizzled)
    count, padded_rows, padded_columns = padded.shape
    tiles = padded.reshape(count, padded_rows // 128, padded_columns // 4, 32, 4, 4)
    matrices = tiles.permute(0, 1, 4, 3, 2, 5).reshape(padded.shape)
    out.view(torch.uint8).copy_(matrices[:, :rows, :columns].reshape(out.shape))


def as_batch(scales: Tensor) -> Tensor:
    """[matrices, rows, columns] bytes."""
    as_bytes = scales.view(torch.uint8)
    return as_bytes if as_bytes.dim() == 3 else as_bytes[None]


def _as_tiles(padded: Tensor) -> Tensor:
    """[matrices, rows, columns] as [matrices, tile down, quarter, row in quarter, tile across, column in tile]."""
    count, rows, columns = padded.shape
    return padded.reshape(count, rows // 128, 4, 32, columns // 4, 4)


def assemble_scales_2d_side(
    scales: Tensor, expert_offsets: Tensor, padded_offsets: Tensor, padded_rows: int, out: Tensor
) -> None:
    row = torch.arange(padded_rows, device=scales.device)
    starts, ends = padded_offsets[:-1].contiguous(), padded_offsets[1:]
    expert = (torch.searchsorted(starts, row, right=True) - 1).clamp(min=0)
    in_expert = row - padded_offsets[expert]
    source = expert_offsets[expert] + in_expert
    holds = (in_expert >= 0) & (row < ends[expert]) & (source < expert_offsets[expert + 1])
    holds &= (source >= 0) & (source < scales.shape[0])
    padded = scales.new_zeros(padded_rows, scales.shape[1], dtype=torch.uint8)
    padded[holds] = scales.view(torch.uint8)[source[holds]]
    blackwell_swizzle_32_4_4(padded, out)
