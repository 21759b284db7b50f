"""The 32_4_4 order of block scales in plain torch: the CPU implementation."""

from __future__ import annotations

import torch
from torch import Tensor

TILE_ROWS = 128  # of the 32_4_4 layout


def swizzle_32_4_4(padded: Tensor) -> Tensor:
    """Bytes [rows, columns], multiples of 128 and 4, in the order of csrc/device/swizzle.cuh."""
    rows, columns = padded.shape
    tiles = padded.reshape(rows // TILE_ROWS, 4, 32, columns // 4, 4)
    return tiles.permute(0, 3, 2, 1, 4).reshape(rows, columns)


def unswizzle_32_4_4(swizzled: Tensor) -> Tensor:
    """The inverse of swizzle_32_4_4."""
    rows, columns = swizzled.shape
    tiles = swizzled.reshape(rows // TILE_ROWS, columns // 4, 32, 4, 4)
    return tiles.permute(0, 3, 2, 1, 4).reshape(rows, columns)


def blackwell_swizzle_32_4_4(scales: Tensor, out: Tensor) -> None:
    matrices = as_batch(scales)
    _, rows, columns = matrices.shape
    padded = matrices.new_zeros(matrices.shape[0], *out.shape[-2:])
    padded[:, :rows, :columns] = matrices
    out.view(torch.uint8).copy_(swizzle_32_4_4(padded.flatten(0, 1)).reshape(out.shape))


def blackwell_unswizzle_32_4_4(swizzled: Tensor, rows: int, columns: int, out: Tensor) -> None:
    padded = as_batch(swizzled)
    matrices = unswizzle_32_4_4(padded.flatten(0, 1)).reshape(padded.shape)
    out.view(torch.uint8).copy_(matrices[:, :rows, :columns].reshape(out.shape))


def as_batch(scales: Tensor) -> Tensor:
    """[matrices, rows, columns] bytes."""
    as_bytes = scales.view(torch.uint8)
    return as_bytes if as_bytes.dim() == 3 else as_bytes[None]


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
