"""The experts' products: rows grouped by expert times quantised weights."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4_kernels import _native
from dsv4_kernels.moe.quantize import block_outputs
from dsv4_kernels.op import op, output

__all__ = ["moe_grouped_gemm", "moe_grouped_gemm_quantized", "run_fused_swiglu_grouped_gemm", "run_nvfp4_grouped_gemm"]


@op(_native.moe_grouped_gemm)
def moe_grouped_gemm(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    tile_to_expert: Tensor,
    row_to_slot: Tensor,
    x_scale: Tensor | None = None,
    alpha: Tensor | None = None,
    slot_weights: Tensor | None = None,
    top_k: int = 0,
    swiglu: bool = False,
    limit: float = 0.0,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """Each tile's rows times its expert's FP4 weights: out[r] = f(x[source] . weight[e]^T * alpha[e]) * slot weight.

    The op behind run_nvfp4_grouped_gemm and run_fused_swiglu_grouped_gemm. Sums are float32. The launch depends on
    shapes and the device alone, so a captured graph follows new routes; a row's result does not depend on the other
    rows. With interleaved weights, up to 12 tiles of 16 rows, no more than experts, have a kernel of their own where an
    expert has 6144 weight rows or more, or all tiles together at most 64 per multiprocessor; its sums have another
    order than the other kernel's.

    Args:
        x: [x_rows, K] bfloat16; or NVFP4, [x_rows, K / 2] packed codes (uint8 or float4_e2m1fn_x2, low nibble first);
            or MXFP8, [x_rows, K] float8_e4m3fn. Rows may be strided, and start on multiples of 16 bytes.
        weight: [experts, N, K / 2] packed E2M1 codes, the checkpoints' layout; with swiglu [experts, 2 N, K / 2], the
            gate's rows before up's. K is a multiple of 32, N one of 16: a shard of an expert need not fill the kernel's
            tiles. Or what interleave_weights makes of them, for bfloat16 x: the fast one; there K is a multiple of the
            scales' group.
        weight_scale: NVFP4: [experts, N or 2 N, K / 16] float8_e4m3fn. MXFP4: [experts, N or 2 N, K / 32] uint8 or
            float8_e8m0fnu. MXFP8 x needs MXFP4 weights, NVFP4 x needs NVFP4 weights. Interleaved with weight.
        tile_to_expert: [tiles] int32, of moe_sort.
        row_to_slot: [tiles * T] int32, of moe_sort, T 16, 64 or 128 (MXFP8 x: 16 or 128).
        x_scale: of quantised x, one row after another: NVFP4 [x_rows, K / 16] float8_e4m3fn, MXFP8 [x_rows, K / 32]
            uint8 or float8_e8m0fnu.
        alpha: [experts] float32 factors, or with swiglu [experts, 2] for gate and up: the product of the per-tensor
            scales of both operands, each counted here and nowhere else.
        slot_weights: [x_rows, top_k] float32 to multiply each row by, last.
        top_k: row r reads x[row_to_slot[r] // top_k]; 0: row r reads x[r].
        swiglu: gate = min(gate, limit), up = clamp(up, -limit, limit), out = silu(gate) * up, as the models have it.
        limit: of swiglu, finite, 0 or more; 0 means none.
        out: [tiles * T, N] bfloat16 to write to; rows may be strided.

    Returns:
        out. Rows without a slot are not written: undefined in an allocated out.
    """
    columns = weight.shape[-2]  # of the checkpoints' layout and of the interleaved one
    return output(out, x, (row_to_slot.shape[0], columns // 2 if swiglu else columns), torch.bfloat16)


@op(_native.moe_grouped_gemm_quantized)
def _moe_grouped_gemm_quantized(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    tile_to_expert: Tensor,
    row_to_slot: Tensor,
    x_scale: Tensor,
    global_scale: Tensor | None = None,
    alpha: Tensor | None = None,
    slot_weights: Tensor | None = None,
    top_k: int = 0,
    limit: float = 0.0,
    swizzle: bool = False,
    *,
    out: Tensor | None = None,
    out_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """moe_grouped_gemm_quantized, its results as bytes."""
    shape = row_to_slot.shape[0], weight.shape[-2] // 2
    group, codes_per_byte = (32, 1) if x.dtype == torch.float8_e4m3fn else (16, 2)
    return block_outputs(x, shape, group, codes_per_byte, swizzle, out, out_scale)


def moe_grouped_gemm_quantized(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    tile_to_expert: Tensor,
    row_to_slot: Tensor,
    x_scale: Tensor,
    global_scale: Tensor | None = None,
    alpha: Tensor | None = None,
    slot_weights: Tensor | None = None,
    top_k: int = 0,
    limit: float = 0.0,
    swizzle: bool = False,
    *,
    out: Tensor | None = None,
    out_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """moe_grouped_gemm with swiglu, its results quantised in the same kernel to the format that x has.

    To the bit what quantize_nvfp4 (of NVFP4 x) or quantize_mxfp8 (of MXFP8 x) make of the bfloat16 result of
    run_fused_swiglu_grouped_gemm, so that the second product can read it: its x and x_scale, with top_k 0.

    Args:
        x: NVFP4 [x_rows, K / 2] or MXFP8 [x_rows, K], as in moe_grouped_gemm.
        weight: [experts, 2 N, K / 2] as in moe_grouped_gemm; not interleaved. N is a multiple of 32, as it is the K of
            the second product.
        weight_scale: as in moe_grouped_gemm.
        tile_to_expert: as in moe_grouped_gemm.
        row_to_slot: as in moe_grouped_gemm.
        x_scale: as in moe_grouped_gemm.
        global_scale: of NVFP4 results: one float32 on the device, amax / (448 * 6), as in quantize_nvfp4. None with
            MXFP8.
        alpha: as in moe_grouped_gemm.
        slot_weights: [x_rows, top_k] float32 to multiply each row by before it is rounded to bfloat16 and quantised.
        top_k: as in moe_grouped_gemm.
        limit: of swiglu, finite, 0 or more; 0 means none.
        swizzle: scales in the order 32_4_4 (see blackwell_swizzle_32_4_4) of the matrix of all rows, for products of
            cuBLAS and CUTLASS. False: one row after another, as the products of this package read them.
        out: NVFP4 [tiles * T, N / 2] uint8 or float4_e2m1fn_x2, MXFP8 [tiles * T, N] uint8 or float8_e4m3fn to write
            to, on a multiple of 16 bytes.
        out_scale: NVFP4 [tiles * T, N / 16] uint8 or float8_e4m3fn, MXFP8 [tiles * T, N / 32] uint8 or float8_e8m0fnu
            to write to, with swizzle rounded up to multiples of 128 and 4; on a multiple of 16 bytes.

    Returns:
        out, out_scale. Rows without a slot: codes are not written, undefined in an allocated out. Their scales neither,
        but for the swizzled order: there they and all padding are 0.
    """
    data, scale = _moe_grouped_gemm_quantized(
        x,
        weight,
        weight_scale,
        tile_to_expert,
        row_to_slot,
        x_scale,
        global_scale,
        alpha,
        slot_weights,
        top_k,
        float(limit),
        swizzle,
        out=out,
        out_scale=out_scale,
    )
    fp8 = x.dtype == torch.float8_e4m3fn
    if out is None:
        data = data.view(torch.float8_e4m3fn if fp8 else torch.float4_e2m1fn_x2)
    if out_scale is None:
        scale = scale.view(torch.float8_e8m0fnu if fp8 else torch.float8_e4m3fn)
    return data, scale


def run_nvfp4_grouped_gemm(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    tile_to_expert: Tensor,
    row_to_slot: Tensor,
    *,
    x_scale: Tensor | None = None,
    alpha: Tensor | None = None,
    slot_weights: Tensor | None = None,
    top_k: int = 0,
    out: Tensor | None = None,
) -> Tensor:
    """x . weight^T for rows grouped by expert, into bfloat16. Arguments and result are moe_grouped_gemm's."""
    return moe_grouped_gemm(
        x, weight, weight_scale, tile_to_expert, row_to_slot, x_scale, alpha, slot_weights, top_k, out=out
    )


def run_fused_swiglu_grouped_gemm(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    tile_to_expert: Tensor,
    row_to_slot: Tensor,
    *,
    x_scale: Tensor | None = None,
    alpha: Tensor | None = None,
    slot_weights: Tensor | None = None,
    top_k: int = 0,
    limit: float = 0.0,
    out: Tensor | None = None,
) -> Tensor:
    """Both products of an expert's first layer, clamp and SwiGLU in one kernel, into bfloat16. See moe_grouped_gemm.

    weight and weight_scale hold gate rows (w1), then up rows (w3). Both are clamped before silu, as the models do.
    moe_grouped_gemm_quantized does the same into NVFP4 or MXFP8.
    """
    return moe_grouped_gemm(
        x, weight, weight_scale, tile_to_expert, row_to_slot, x_scale, alpha, slot_weights, top_k, True, limit, out=out
    )
