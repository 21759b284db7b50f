"""Padded activations in plain torch: the CPU implementation. Each function writes to its last arguments."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4_kernels import number_formats
from dsv4_kernels.cpu.moe.scale_layouts import blackwell_swizzle_32_4_4
from dsv4_kernels.cpu.moe.swiglu import clamped_swiglu


def used_rows(permutation_map: Tensor, n_used: Tensor) -> Tensor:
    """Indices of the rows that hold a token."""
    limit = n_used.reshape(()).clamp(0, permutation_map.shape[0])
    row = torch.arange(permutation_map.shape[0], device=permutation_map.device)
    return ((row < limit) & (permutation_map >= 0)).nonzero()[:, 0]


def squared_relu(x: Tensor) -> Tensor:
    """max(x, 0)^2; NaN stays NaN."""
    # The square of a bfloat16 is exact in float32, so what rounds it rounds once.
    value = x.to(torch.float32)
    return torch.where(value < 0, 0.0, value).square()


def swiglu(x: Tensor, limit: float) -> Tensor:
    """silu(min(gate, limit)) * clamp(up, -limit, limit) in float64; NaN stays NaN."""
    gate, up = x.to(torch.float64).chunk(2, dim=-1)
    return clamped_swiglu(gate, up, limit)


def mxfp8(value: Tensor) -> tuple[Tensor, Tensor]:
    """E4M3 codes and the E8M0 scales of each 32 columns, as uint8; the scale is the least that nothing saturates under.

    Args:
        value: float32. A group with a NaN or an infinity becomes NaN, as does its scale.
    """
    groups = value.unflatten(-1, (-1, 32))
    largest = number_formats.largest_magnitude(groups)
    scale = number_formats.ceil_e8m0_of_amax(largest, 0.0, number_formats.LARGEST_E4M3)
    codes = number_formats.encode_e4m3(groups * number_formats.reciprocal_e8m0(scale)[..., None])
    return codes.flatten(-2), scale


def padded_squared_relu(x: Tensor, permutation_map: Tensor, n_used: Tensor, out: Tensor) -> None:
    rows = used_rows(permutation_map, n_used)
    out[rows] = squared_relu(x[rows]).to(out.dtype)


def padded_swiglu(x: Tensor, permutation_map: Tensor, n_used: Tensor, limit: float, out: Tensor) -> None:
    rows = used_rows(permutation_map, n_used)
    out[rows] = swiglu(x[rows], limit).to(out.dtype)


def squared_relu_and_quantize_mxfp8(
    x: Tensor, permutation_map: Tensor, n_used: Tensor, out_data: Tensor, out_scale: Tensor
) -> None:
    rows = used_rows(permutation_map, n_used)
    _store_mxfp8(squared_relu(x[rows]), rows, out_data, out_scale)


def swiglu_and_quantize_mxfp8(
    x: Tensor, permutation_map: Tensor, n_used: Tensor, limit: float, out_data: Tensor, out_scale: Tensor
) -> None:
    rows = used_rows(permutation_map, n_used)
    _store_mxfp8(swiglu(x[rows], limit), rows, out_data, out_scale)


def _store_mxfp8(value: Tensor, rows: Tensor, out_data: Tensor, out_scale: Tensor) -> None:
    codes, scale = mxfp8(value.to(torch.bfloat16).to(torch.float32))
    out_data.view(torch.uint8)[rows] = codes
    scales = scale.new_zeros(out_data.shape[0], out_data.shape[1] // 32)
    scales[rows] = scale
    blackwell_swizzle_32_4_4(scales, out_scale)
