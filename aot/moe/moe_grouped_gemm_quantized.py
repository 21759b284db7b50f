"""moe_grouped_gemm_quantized: moe_grouped_gemm with SwiGLU, and its bfloat16 results quantised as its rows are.

To the bit what quantize_nvfp4 or quantize_mxfp8 make of those results: csrc/moe/nvfp4_block.cuh has the order of
operations, every one of them rounded to nearest.
"""

from __future__ import annotations

import triton
import triton.language as tl

from aot.declare import TritonKernel
from aot.grid_dependency import await_previous_grid
from aot.moe.device.grouped_product import (
    PRODUCT_SCALARS,
    Shape,
    grouped_product,
    on_each,
    product_constants,
    product_inputs,
)
from aot.moe.device.padded_rows import larger_or_nan, quantize_mxfp8


def encode_e2m1(register: str, value: str) -> str:
    """PTX for the code of one value. The magnitude is the least of three counts and 7, as csrc/device/fp4.cuh explains.

    Additions that say how they round are not fused with the product before them.
    """
    return f"""abs.f32 size, {value};
add.rn.f32 sum, size, 0f4A800000;
mov.b32 {register}, sum;
add.rn.f32 sum, size, 0f4B000000;
mov.b32 other, sum;
sub.s32 other, other, 0x7FFFFE;
min.s32 {register}, {register}, other;
add.rn.f32 sum, size, 0f4B800000;
mov.b32 other, sum;
sub.s32 other, other, 0xFFFFFC;
min.s32 {register}, {register}, other;
min.s32 {register}, {register}, 0x4A800007;
and.b32 {register}, {register}, 7;
mov.b32 sign, {value};
shr.u32 sign, sign, 28;
and.b32 sign, sign, 8;
or.b32 {register}, {register}, sign;
"""


# $0: the byte of the codes of $1 (low nibble) and $2.
ENCODE_E2M1 = tl.constexpr(f"""{{
.reg .f32 size, sum;
.reg .b32 low, high, other, sign;
{encode_e2m1("low", "$1")}{encode_e2m1("high", "$2")}shl.b32 high, high, 4;
or.b32 $0, low, high;
}}""")

# The same in an instruction of sm_100 and later.
CONVERT_E2M1 = tl.constexpr("""{
.reg .b8 codes, zero;
cvt.u8.u32 zero, 0;
cvt.rn.satfinite.e2m1x2.f32 codes, $2, $1;
mov.b32 $0, {codes, zero, zero, zero};
}""")


@triton.jit
def quantize_nvfp4(value, decode, LANES: tl.constexpr, COLUMNS: tl.constexpr, CONVERTS: tl.constexpr):
    """Packed E2M1 codes [LANES, COLUMNS / 2] and E4M3 scales [LANES, COLUMNS / 16], both uint8, of float32 values.

    decode: what products of codes and scales are multiplied by.
    """
    blocks = tl.reshape(value, LANES, COLUMNS // 16, 16)
    largest = tl.reduce(tl.abs(blocks), 2, larger_or_nan)
    wanted = larger_or_nan(tl.div_rn(1.0, decode) * (largest * (1 / 6)), 0.0)
    scale = wanted.to(tl.float8e4nv)
    decoded = scale.to(tl.float32)
    factor = tl.where(decoded == 0, 0.0, tl.div_rn(1.0, decoded * decode))
    low, high = tl.split(tl.reshape(blocks * factor[:, :, None], LANES, COLUMNS // 2, 2))
    codes = tl.inline_asm_elementwise(
        CONVERT_E2M1 if CONVERTS else ENCODE_E2M1, "=r,f,f", [low, high], dtype=tl.int32, is_pure=True, pack=1
    )
    return codes.to(tl.uint8), scale.to(tl.uint8, bitcast=True)


@triton.jit
def scale_offsets(row, group, groups, swizzled):
    """Where the scales of these rows and groups lie: row after row, or in the 32_4_4 layout (csrc/device/swizzle.cuh).

    Groups up to the next multiple of 4 have a place in the latter.
    """
    tile = (row // 128).to(tl.int64)[:, None] * tl.cdiv(groups, 4) + (group // 4)[None, :]
    in_tile = (row % 32 * 16 + row % 128 // 32 * 4)[:, None] + (group % 4)[None, :]
    in_rows = row.to(tl.int64)[:, None] * groups + group[None, :]
    return tl.where(swizzled != 0, tile * 512 + in_tile, in_rows)


@triton.jit
def moe_grouped_gemm_quantized_kernel(
    x,
    x_scale,
    weight,
    weight_scale,
    tile_to_expert,  # [tiles]
    row_to_slot,
    alpha,
    slot_weights,
    global_scale,  # [1], of NVFP4
    out,  # [tiles * ROWS, columns], or half of it of packed FP4
    out_scale,  # [tiles * ROWS, columns / GROUP], swizzled: to multiples of 128 and 4
    x_stride,
    columns,  # this and the rest as in grouped_product
    inner,
    experts,
    x_rows,
    top_k,
    alphas,
    weighted,
    column_blocks,
    limit,
    swizzled,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    GROUP: tl.constexpr,
    X_FORMAT: tl.constexpr,
    SWIGLU: tl.constexpr,
    X_PACK: tl.constexpr,
    WEIGHTS_FIRST: tl.constexpr,
    DEQUANTIZES: tl.constexpr,
    CONVERTS: tl.constexpr,  # whether an instruction makes E2M1
):
    """A block a tile and COLUMNS columns; of swizzled scales, the blocks also cover the padding."""
    await_previous_grid()
    tile = tl.program_id(0) // column_blocks
    block = tl.program_id(0) % column_blocks
    expert = tl.load(tile_to_expert + tile)
    used = (expert >= 0) & (expert < experts)
    groups = columns // GROUP
    group = block * (COLUMNS // GROUP) + tl.arange(0, COLUMNS // GROUP)
    if swizzled != 0:
        # Zeros for a tile of which no row is written, and behind the last one: at most 128 rows, as ROWS divides that.
        tiles = tl.num_programs(0) // column_blocks
        end = tl.where(tile == tiles - 1, tl.cdiv(tiles * ROWS, 128) * 128, (tile + 1) * ROWS)
        padding = tl.where(used, tile + 1, tile) * ROWS + tl.arange(0, 128)
        in_padding = (padding < end)[:, None] & (group < tl.cdiv(groups, 4) * 4)[None, :]
        zeros = tl.zeros([128, COLUMNS // GROUP], tl.uint8)
        tl.store(out_scale + scale_offsets(padding, group, groups, 1), zeros, mask=in_padding)
    if not used:
        return
    value, _, _, _ = grouped_product(
        x,
        x_scale,
        weight,
        weight_scale,
        row_to_slot,
        alpha,
        slot_weights,
        x_stride,
        columns,
        inner,
        x_rows,
        top_k,
        alphas,
        weighted,
        limit,
        tile,
        block,
        expert,
        ROWS,
        LANES,
        COLUMNS,
        INNER,
        GROUP,
        X_FORMAT,
        SWIGLU,
        X_PACK,
        WEIGHTS_FIRST,
        DEQUANTIZES,
    )
    # What is not pure is computed here and not before the loop, where it would hold registers: on sm_90a a block fewer
    # would fit.
    row = tl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r", [tile * ROWS + tl.arange(0, LANES)], dtype=tl.int32, is_pure=False, pack=1
    )
    in_tile = row < (tile + 1) * ROWS
    slot = tl.load(row_to_slot + row, mask=in_tile, other=-1)
    valid = (slot >= 0) & (tl.where(top_k > 0, slot // tl.maximum(top_k, 1), row) < x_rows)
    value = value.to(tl.bfloat16).to(tl.float32)
    if X_FORMAT == "e2m1":
        codes, scale = quantize_nvfp4(value, tl.load(global_scale), LANES, COLUMNS, CONVERTS)
    else:
        codes, scale = quantize_mxfp8(value, LANES, COLUMNS)
        scale = scale.to(tl.uint8)
    width = columns // X_PACK
    place = block * (COLUMNS // X_PACK) + tl.arange(0, COLUMNS // X_PACK)
    at = out + row.to(tl.int64)[:, None] * width + place[None, :]
    tl.store(at, codes, mask=valid[:, None] & (place < width)[None, :])
    # Of swizzled scales, rows without a slot and groups beyond the last one have 0.
    written = valid[:, None] & (group < groups)[None, :]
    scale = tl.where(written, scale, 0)
    if swizzled != 0:
        written = in_tile[:, None] & (group < tl.cdiv(groups, 4) * 4)[None, :]
    tl.store(out_scale + scale_offsets(row, group, groups, swizzled), scale, mask=written)


def kernel(
    x_format: str,
    weights: str,
    rows: int,
    columns: int,
    inner: int,
    warps: int,
    stages: int,
    dequantized: Shape,
) -> TritonKernel:
    """One specialisation: moe_gemm_quantized_<x>_<weights>_<rows>."""
    on = on_each(None, dequantized, rows)
    on["constants_on"]["sm_90a"]["CONVERTS"] = False
    return TritonKernel(
        moe_grouped_gemm_quantized_kernel,
        name=f"moe_gemm_quantized_{x_format}_{weights}_{rows}",
        arguments={
            **product_inputs(x_format, weights),
            "global_scale": "const float32*",
            "out": "uint8*" if x_format == "e2m1" else "fp8e4m3*",
            "out_scale": "uint8*",
            "x_stride": "int64",
            "columns": "int32",
            **PRODUCT_SCALARS,
            "swizzled": "int32",
        },
        constants={**product_constants(x_format, weights, True, rows, columns, inner), "CONVERTS": True},
        aligned=("x", "x_scale", "weight", "weight_scale", "out", "out_scale", "x_stride", "columns", "inner"),
        num_warps=warps,
        num_stages=stages,
        **on,
    )


# The shapes of moe_grouped_gemm with SwiGLU.
KERNELS = [
    kernel("e2m1", "nvfp4", 16, 128, 128, 4, 3, Shape(64, 128, 4, 4)),
    kernel("e2m1", "nvfp4", 64, 128, 64, 8, 3, Shape(64, 64, 4, 3)),
    kernel("e2m1", "nvfp4", 128, 64, 128, 8, 3, Shape(64, 64, 4, 3)),
    kernel("e4m3", "mxfp4", 16, 128, 128, 4, 3, Shape(64, 128, 4, 3)),
    kernel("e4m3", "mxfp4", 128, 64, 128, 8, 3, Shape(64, 32, 4, 4)),
]
