"""moe_grouped_gemm_quantized in plain torch: the CPU implementation."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4_kernels.moe import quantize_reference
from dsv4_kernels.moe.grouped_gemm_reference import moe_grouped_gemm, rows_of_experts


def moe_grouped_gemm_quantized(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    tile_to_expert: Tensor,
    row_to_slot: Tensor,
    x_scale: Tensor,
    global_scale: Tensor | None,
    alpha: Tensor | None,
    slot_weights: Tensor | None,
    top_k: int,
    limit: float,
    swizzle: bool,
    out: Tensor,
    out_scale: Tensor,
) -> None:
    """Two steps: bfloat16, then codes of it."""
    maps = tile_to_expert, row_to_slot
    in_bfloat16 = torch.zeros(row_to_slot.shape[0], weight.shape[-2] // 2, dtype=torch.bfloat16, device="cpu")
    moe_grouped_gemm(x, weight, weight_scale, *maps, x_scale, alpha, slot_weights, top_k, True, limit, in_bfloat16)
    rows, _, _ = rows_of_experts(*maps, top_k, x.shape[0], weight.shape[0])
    data, scale = quantized(in_bfloat16[rows], global_scale)
    out.view(torch.uint8)[rows] = data
    as_bytes = out_scale.view(torch.uint8)
    if not swizzle:
        as_bytes[rows] = scale
        return
    padded = torch.zeros_like(as_bytes)
    padded[rows, : scale.shape[1]] = scale
    as_bytes.copy_(quantize_reference.swizzle_32_4_4(padded))


def quantized(values: Tensor, global_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """Bytes of codes and of scales, one row after another: NVFP4 under a global scale, without one MXFP8."""
    rows, columns = values.shape
    group, codes_per_byte = (32, 1) if global_scale is None else (16, 2)
    data = torch.empty(rows, columns // codes_per_byte, dtype=torch.uint8, device="cpu")
    scale = torch.empty(rows, columns // group, dtype=torch.uint8, device="cpu")
    plain = quantize_reference.PLAIN, 0, 0.0, True
    if global_scale is None:
        quantize_reference.quantize_mx(
            values, quantize_reference.E4M3, *plain, True, 0.0, True, False, None, data, scale
        )
    else:
        quantize_reference.quantize_nvfp4(
            values, global_scale, None, False, *plain, True, 0.0, False, None, data, scale
        )
    return data, scale
