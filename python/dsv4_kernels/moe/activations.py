"""Activations over expert rows of which some are padding."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4_kernels import _native
from dsv4_kernels.moe.mxfp8_tensor import MXFP8Tensor
from dsv4_kernels.moe.scale_layouts import swizzled_shape
from dsv4_kernels.op import op, output

__all__ = ["padded_squared_relu", "padded_swiglu", "squared_relu_and_quantize_mxfp8", "swiglu_and_quantize_mxfp8"]


def _mxfp8(x: Tensor, columns: int, out_data: Tensor | None, out_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """Codes of so many columns for the rows of x, and their swizzled scales, as bytes: torch's tools for ops know no
    FP8.
    """
    rows = x.shape[0]
    return (
        output(out_data, x, (rows, columns), torch.uint8),
        output(out_scale, x, swizzled_shape(rows, columns // 32), torch.uint8),
    )


@op(_native.padded_squared_relu)
def padded_squared_relu(x: Tensor, permutation_map: Tensor, n_used: Tensor, *, out: Tensor | None = None) -> Tensor:
    """max(x, 0)^2 in float32, stored as bfloat16, for the rows that hold a token.

    A row r is processed if r < n_used and permutation_map[r] >= 0; other rows of out are not written. The launch does
    not depend on n_used, so a captured CUDA graph follows its value.

    Args:
        x: [rows, columns] bfloat16, the output of the experts' first product; rows may be strided.
        permutation_map: [rows] int32, the token of each row, negative for padding.
        n_used: one int32 on the device, of rank 0 or 1; values outside [0, rows] act as the nearest end.
        out: [rows, columns] bfloat16 to write to; x itself is allowed.

    Returns:
        out. Rows that were not processed keep what they held; in an allocated out that is undefined. NaN stays NaN.
    """
    return output(out, x, x.shape, torch.bfloat16)


@op(_native.padded_swiglu)
def _padded_swiglu(
    x: Tensor, permutation_map: Tensor, n_used: Tensor, limit: float = 0.0, *, out: Tensor | None = None
) -> Tensor:
    """padded_swiglu, with 0 for no limit."""
    return output(out, x, (x.shape[0], x.shape[1] // 2), torch.bfloat16)


def padded_swiglu(
    x: Tensor, permutation_map: Tensor, n_used: Tensor, limit: float | None = None, *, out: Tensor | None = None
) -> Tensor:
    """silu(min(gate, limit)) * clamp(up, -limit, limit) in float32, stored as bfloat16, for the rows that hold a token.

    The experts of DeepSeek-V4 clamp both before silu, with limit 10. Which rows are processed: see padded_squared_relu.

    Args:
        x: [rows, 2 * columns] bfloat16, the gate in the first half of a row, up in the second; rows may be strided.
        permutation_map: [rows] int32, the token of each row, negative for padding.
        n_used: one int32 on the device, of rank 0 or 1; values outside [0, rows] act as the nearest end.
        limit: of the clamps, finite, 0 or more; None or 0 for none.
        out: [rows, columns] bfloat16 to write to, no part of x.

    Returns:
        out. Rows that were not processed keep what they held; in an allocated out that is undefined. NaN stays NaN; a
        gate of -inf gives NaN, as it does in torch.
    """
    return _padded_swiglu(x, permutation_map, n_used, float(limit or 0.0), out=out)


@op(_native.squared_relu_and_quantize_mxfp8)
def _squared_relu_and_quantize_mxfp8(
    x: Tensor,
    permutation_map: Tensor,
    n_used: Tensor,
    *,
    out_data: Tensor | None = None,
    out_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """squared_relu_and_quantize_mxfp8, its results as bytes."""
    return _mxfp8(x, x.shape[1], out_data, out_scale)


def squared_relu_and_quantize_mxfp8(
    x: Tensor,
    permutation_map: Tensor,
    n_used: Tensor,
    *,
    out_data: Tensor | None = None,
    out_scale: Tensor | None = None,
) -> MXFP8Tensor:
    """padded_squared_relu, its rounding to bfloat16 included, then MXFP8, in one launch.

    Of each 32 columns the scale is the least power of two that is at least amax / 448, so that no code saturates, and
    codes are rounded to nearest, ties to even (quantize_mxfp8 with its defaults, to the bit). Which rows are processed:
    see padded_squared_relu.

    Args:
        x: [rows, columns] bfloat16, columns a multiple of 32; rows may be strided.
        permutation_map: [rows] int32, the token of each row, negative for padding.
        n_used: one int32 on the device, of rank 0 or 1; values outside [0, rows] act as the nearest end.
        out_data: [rows, columns] float8_e4m3fn or uint8 to write to, contiguous, on a multiple of 16 bytes.
        out_scale: [rows to a multiple of 128, columns / 32 to one of 4] float8_e8m0fnu or uint8 to write to, likewise.

    Returns:
        data and swizzled scales. Rows of data that were not processed keep what they held; in an allocated result that
        is undefined. Scales are written whole: those of rows that were not processed, and the padding, are 0. A group
        of zeros has scale 0. A group that holds a NaN or an infinity has scale and codes NaN.
    """
    return _as_mxfp8(
        *_squared_relu_and_quantize_mxfp8(x, permutation_map, n_used, out_data=out_data, out_scale=out_scale)
    )


@op(_native.swiglu_and_quantize_mxfp8)
def _swiglu_and_quantize_mxfp8(
    x: Tensor,
    permutation_map: Tensor,
    n_used: Tensor,
    limit: float = 0.0,
    *,
    out_data: Tensor | None = None,
    out_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """swiglu_and_quantize_mxfp8, its results as bytes and with 0 for no limit."""
    return _mxfp8(x, x.shape[1] // 2, out_data, out_scale)


def swiglu_and_quantize_mxfp8(
    x: Tensor,
    permutation_map: Tensor,
    n_used: Tensor,
    limit: float | None = None,
    *,
    out_data: Tensor | None = None,
    out_scale: Tensor | None = None,
) -> MXFP8Tensor:
    """padded_swiglu, its rounding to bfloat16 included, then MXFP8, in one launch.

    Args:
        x: [rows, 2 * columns] bfloat16, columns a multiple of 32, the gate in the first half of a row, up in the
            second; rows may be strided.
        permutation_map: [rows] int32, the token of each row, negative for padding.
        n_used: one int32 on the device, of rank 0 or 1; values outside [0, rows] act as the nearest end.
        limit: of the clamps, as in padded_swiglu; None or 0 for none.
        out_data: [rows, columns] float8_e4m3fn or uint8 to write to, contiguous, on a multiple of 16 bytes.
        out_scale: [rows to a multiple of 128, columns / 32 to one of 4] float8_e8m0fnu or uint8 to write to, likewise.

    Returns:
        data and swizzled scales, as of squared_relu_and_quantize_mxfp8.
    """
    return _as_mxfp8(
        *_swiglu_and_quantize_mxfp8(
            x, permutation_map, n_used, float(limit or 0.0), out_data=out_data, out_scale=out_scale
        )
    )


def _as_mxfp8(data: Tensor, scale: Tensor) -> MXFP8Tensor:
    return MXFP8Tensor(data.view(torch.float8_e4m3fn), scale.view(torch.float8_e8m0fnu))
