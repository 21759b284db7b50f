"""Block scales in the layout that Blackwell's block-scaled tensor core instructions read.

A matrix of one-byte scales [rows, columns], a column for each group along K, is cut into tiles of 128 x 4 that are
stored one after another along the columns. Inside its 512 bytes, a tile is 32 x 4 x 4: the row modulo 32, which of the
four 32-row quarters, the column. With C4 = ceil(columns / 4), the scale of row r and column c is byte

    ((r // 128) * C4 + c // 4) * 512 + (r % 32) * 16 + (r % 128) // 32 * 4 + c % 4

(NVIDIA's "128x4" scale factor layout of cuBLAS and CUTLASS). Scales are uint8, float8_e8m0fnu or float8_e4m3fn, and
come out in the dtype in which they went in.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dsv4_kernels import _native
from dsv4_kernels.errors import InvalidArgumentError
from dsv4_kernels.op import op, output

__all__ = [
    "assemble_raw_scales_2d3d_2d_side",
    "assemble_raw_scales_2d3d_3d_side",
    "assemble_scales_2d_side",
    "assemble_scales_3d_side",
    "blackwell_swizzle_32_4_4",
    "blackwell_unswizzle_32_4_4",
    "pad_and_swizzle_single",
]

ROWS = 128  # what rows are padded to
COLUMNS = 4


def swizzled_shape(rows: int, columns: int) -> tuple[int, int]:
    """The extents of a matrix in the 32_4_4 layout."""
    return -(-rows // ROWS) * ROWS, -(-columns // COLUMNS) * COLUMNS


@op(_native.blackwell_swizzle_32_4_4)
def blackwell_swizzle_32_4_4(scales: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Scales in row-major order to the 32_4_4 layout; the padding is written with zeros.

    Args:
        scales: [rows, columns] or [matrices, rows, columns]; rows may be strided.
        out: as returned, contiguous, on a multiple of 16 bytes.

    Returns:
        out, [rows to a multiple of 128, columns to one of 4], or [matrices, ...] of them: the bytes in their order in
        memory, of which rows and columns mean nothing.
    """
    shape = (*scales.shape[:-2], *swizzled_shape(*scales.shape[-2:]))
    return output(out, scales, shape, scales.dtype)


@op(_native.blackwell_unswizzle_32_4_4)
def blackwell_unswizzle_32_4_4(swizzled: Tensor, rows: int, columns: int, *, out: Tensor | None = None) -> Tensor:
    """The inverse of blackwell_swizzle_32_4_4.

    Args:
        swizzled: [rows to a multiple of 128, columns to one of 4], or [matrices, ...] of them; contiguous, on a
            multiple of 16 bytes.
        rows: of the matrix without padding.
        columns: of the matrix without padding.
        out: [rows, columns] or [matrices, rows, columns]; rows may be strided.

    Returns:
        out.
    """
    return output(out, swizzled, (*swizzled.shape[:-2], rows, columns), swizzled.dtype)


def pad_and_swizzle_single(scale: Tensor) -> Tensor:
    """One matrix of scales [rows, columns], padded and swizzled, as one dimension of bytes.

    Raises:
        InvalidArgumentError: scale is no matrix.
    """
    if scale.dim() != 2:
        raise InvalidArgumentError(
            f"pad_and_swizzle_single: scale: expected rank 2, got rank {scale.dim()}; "
            "blackwell_swizzle_32_4_4 takes several matrices at once"
        )
    return blackwell_swizzle_32_4_4(_rows_contiguous(scale)).flatten()


def assemble_raw_scales_2d3d_3d_side(scales: Sequence[Tensor] | Tensor) -> Tensor:
    """The weights' scales of a grouped product, from checkpoint order.

    Args:
        scales: of each expert [N, K / group], all of one shape; or the stack of them [experts, N, K / group].

    Returns:
        [experts, bytes of an expert], each row one expert's swizzled scales.
    """
    stacked = scales if isinstance(scales, Tensor) else _stack("assemble_raw_scales_2d3d_3d_side", scales)
    if stacked.dim() != 3:
        raise InvalidArgumentError(
            "assemble_raw_scales_2d3d_3d_side: scales: expected a matrix for each expert, "
            f"got shape {list(stacked.shape)}"
        )
    return blackwell_swizzle_32_4_4(_rows_contiguous(stacked)).flatten(1)


def assemble_scales_3d_side(scales: Sequence[Tensor] | Tensor) -> Tensor:
    """The weights' scales of a grouped product, from the order that quantize_weight_to_nvfp4 returns.

    Args:
        scales: of each expert [K / group, N], all of one shape; or the stack of them [experts, K / group, N].

    Returns:
        [experts, bytes of an expert], each row one expert's swizzled scales [N, K / group].
    """
    stacked = scales if isinstance(scales, Tensor) else _stack("assemble_scales_3d_side", scales)
    return assemble_raw_scales_2d3d_3d_side(stacked.transpose(-1, -2))


def assemble_raw_scales_2d3d_2d_side(scales: Sequence[Tensor]) -> Tensor:
    """The activations' scales of a grouped product, from a matrix [tokens of the expert, K / group] for each expert.

    The host knows the row counts here. assemble_scales_2d_side is for offsets that only the device knows.

    Returns:
        [sum of rows to a multiple of 128 each, columns to one of 4], the experts' swizzled scales one after another.
    """
    parts = [blackwell_swizzle_32_4_4(_rows_contiguous(scale)).view(torch.uint8) for scale in scales]
    if not parts:
        raise InvalidArgumentError(
            "assemble_raw_scales_2d3d_2d_side: scales: expected a matrix for each expert, got none"
        )
    return torch.cat(parts).view(scales[0].dtype)


@op(_native.assemble_scales_2d_side)
def assemble_scales_2d_side(
    scales: Tensor, expert_offsets: Tensor, padded_offsets: Tensor, padded_rows: int, *, out: Tensor | None = None
) -> Tensor:
    """The activations' scales of a grouped product, from rows sorted by expert to a padded section for each expert.

    Row padded_offsets[e] + i of the swizzled matrix is row expert_offsets[e] + i of scales, for i below
    expert_offsets[e + 1] - expert_offsets[e]; every other scale is zero. One launch that does not depend on the
    offsets, so a captured CUDA graph follows them.

    Args:
        scales: [rows, columns], sorted by expert; rows may be strided.
        expert_offsets: [experts + 1] int32, ascending: where each expert's rows start in scales, and the end.
        padded_offsets: [experts + 1] int32, ascending: where each expert's section starts, and the end. Multiples of
            128 where a grouped product reads the result. Offsets out of range leave zeros, never a bad access.
        padded_rows: rows of the result, a multiple of 128.
        out: [padded_rows, columns to a multiple of 4], contiguous, on a multiple of 16 bytes.

    Returns:
        out.
    """
    return output(out, scales, swizzled_shape(padded_rows, scales.shape[-1]), scales.dtype)


def _stack(function: str, scales: Sequence[Tensor]) -> Tensor:
    shapes = {tuple(scale.shape) for scale in scales}
    if len(shapes) != 1:
        raise InvalidArgumentError(
            f"{function}: scales: expected one matrix per expert, all of one shape, got {sorted(shapes) or 'none'}"
        )
    # As bytes: torch does not stack every one-byte dtype.
    return torch.stack([scale.view(torch.uint8) for scale in scales]).view(scales[0].dtype)


def _rows_contiguous(scales: Tensor) -> Tensor:
    """scales itself, or a copy where rows are not contiguous."""
    return scales.view(torch.uint8).contiguous().view(scales.dtype) if scales.stride(-1) != 1 else scales
