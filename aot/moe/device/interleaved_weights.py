"""moe_grouped_gemm for bfloat16 rows and weights that dsv4_kernels.moe.interleave_weights has rearranged.

A 32-bit word holds 8 codes of one weight row: 4 pairs of neighbouring inner positions, the pairs 8 positions apart. So
the tensor cores' register operand spreads a row over threads: a thread loads whole words and dequantises them in
registers.
Pair by pair, two codes land where bfloat16 has its sign, the low two bits of its exponent and the top bit of its
mantissa. As bfloat16 that is the value times 2^-126, denormals included, and one multiplication by the scale as
bfloat16, times 2^118, gives the weight times 2^-8 exactly.
"""

from __future__ import annotations

import triton
import triton.language as tl

from aot.declare import TritonKernel
from aot.grid_dependency import await_previous_grid
from aot.moe.device.grouped_product import PRODUCT_SCALARS
from aot.moe.device.swiglu import swiglu

# Undoes what is left of the factors' bias.
LEFT_OVER = tl.constexpr(256.0)

# $0-$7: the codes of word $8, pair after pair, times factor $9 (the first two pairs) and $10 (the others).
# Pair 0 lies in place, pairs 1 and 2 a rotation by 3 and 6 away. What bits are left hold pair 3: a multiplication moves
# them by 3 (exponent's low bit and mantissa), 8 (exponent's high bit) and 14 (sign); none of the sums collide.
WIDEN = tl.constexpr("""{
.reg .b32 a, b, c, d, first, second;
mov.b32 first, {$9, $9};
mov.b32 second, {$10, $10};
and.b32 a, $8, 0x81C081C0;
shf.r.wrap.b32 b, $8, $8, 3;
and.b32 b, b, 0x81C081C0;
shf.r.wrap.b32 c, $8, $8, 6;
and.b32 c, c, 0x81C081C0;
and.b32 d, $8, 0x001B001B;
mul.lo.u32 d, d, 0x4108;
and.b32 d, d, 0x81C081C0;
mul.rn.bf16x2 a, a, first;
mul.rn.bf16x2 b, b, first;
mul.rn.bf16x2 c, c, second;
mul.rn.bf16x2 d, d, second;
mov.b32 {$0, $1}, a;
mov.b32 {$2, $3}, b;
mov.b32 {$4, $5}, c;
mov.b32 {$6, $7}, d;
}""")
WIDEN_REGISTERS = tl.constexpr("=h,=h,=h,=h,=h,=h,=h,=h,r,h,h")


@triton.jit
def dequantize(words, factors, COLUMNS: tl.constexpr, GROUPS: tl.constexpr):
    """[COLUMNS, 64] bfloat16 of [COLUMNS, 4, 2] words and [COLUMNS, GROUPS] factors, bfloat16 in int16.

    Nothing but broadcasts, element-wise operations and changes of shape: so the compiler loads words in the operand's
    own layout, and no value passes through shared memory.
    """
    if GROUPS == 2:
        first = tl.broadcast_to(factors[:, None, :], (COLUMNS, 4, 2))
        second = first
    else:
        first, second = tl.split(tl.reshape(factors, (COLUMNS, 2, 2)))
        first = tl.broadcast_to(first[:, None, :], (COLUMNS, 4, 2))
        second = tl.broadcast_to(second[:, None, :], (COLUMNS, 4, 2))
    a, b, c, d, e, f, g, h = tl.inline_asm_elementwise(
        WIDEN,
        WIDEN_REGISTERS,
        [words, first, second],
        dtype=(
            tl.bfloat16,
            tl.bfloat16,
            tl.bfloat16,
            tl.bfloat16,
            tl.bfloat16,
            tl.bfloat16,
            tl.bfloat16,
            tl.bfloat16,
        ),
        is_pure=True,
        pack=1,
    )
    pairs = tl.join(tl.join(tl.join(a, b), tl.join(c, d)), tl.join(tl.join(e, f), tl.join(g, h)))
    # [columns, place of a pair in 8, half, position in the pair, pair's low bit, its high bit] to the order of K
    return tl.reshape(tl.permute(pairs, (0, 2, 5, 4, 1, 3)), (COLUMNS, 64))


@triton.jit
def multiply_rows(
    x,
    weight,
    factors,
    row_to_slot,
    alpha,
    slot_weights,
    out,
    x_stride,
    out_stride,
    weight_rows,
    inner,
    expert,
    x_rows,
    top_k,
    alphas,
    weighted,
    limit,
    first,  # row
    block,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUPS: tl.constexpr,
    SWIGLU: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """ROWS rows from `first` on, all of `expert`, times a block of its weight rows. Arguments are the kernel's."""
    row = first + tl.arange(0, ROWS)
    slot = tl.load(row_to_slot + row)
    source = tl.where(top_k > 0, slot // tl.maximum(top_k, 1), row)
    valid = (slot >= 0) & (source < x_rows)
    # Padding loads nothing: all blocks would read the same row at the same time.
    source = tl.where(valid, source, 0).to(tl.int64)
    loaded = valid[:, None]

    blocks = tl.cdiv(inner, 128)
    weight_row = block * COLUMNS + tl.arange(0, COLUMNS)
    weight_row = expert * blocks * weight_rows + tl.where(weight_row < weight_rows, weight_row, 0)
    w_at = weight + weight_row[:, None] * 16 + tl.arange(0, 16)[None, :]
    f_at = factors + weight_row[:, None] * GROUPS + tl.arange(0, GROUPS)[None, :]
    place = tl.arange(0, 128 if WHOLE else 64)
    x_at = x + source[:, None] * x_stride + place[None, :]

    sums = tl.zeros((COLUMNS, ROWS), dtype=tl.float32)
    for done in range(0, blocks * 128, 128):
        # What x lacks of the last block counts as 0, whatever the weights hold there.
        in_x = loaded & (place < inner - done)[None, :]
        low, high = tl.split(tl.reshape(tl.load(w_at), (COLUMNS, 4, 2, 2)))
        scales = tl.load(f_at)
        low = dequantize(low, scales.to(tl.int16), COLUMNS, GROUPS)
        if WHOLE:
            high = dequantize(high, (scales >> 16).to(tl.int16), COLUMNS, GROUPS)
            both = tl.reshape(tl.permute(tl.join(low, high), (0, 2, 1)), (COLUMNS, 128))
            sums = tl.dot(both, tl.load(x_at, mask=in_x, other=0.0).T, sums)
        else:
            sums = tl.dot(low, tl.load(x_at, mask=in_x, other=0.0).T, sums)
            high = dequantize(high, (scales >> 16).to(tl.int16), COLUMNS, GROUPS)
            in_x = loaded & (place < inner - done - 64)[None, :]
            sums = tl.dot(high, tl.load(x_at + 64, mask=in_x, other=0.0).T, sums)
        x_at += 128
        w_at += weight_rows * 16
        f_at += weight_rows * GROUPS

    factor = LEFT_OVER
    up_factor = LEFT_OVER
    if alphas > 0:
        factor *= tl.load(alpha + expert * alphas)
        up_factor *= tl.load(alpha + expert * alphas + alphas - 1)
    if SWIGLU:
        pairs = tl.permute(tl.reshape(sums, (COLUMNS // 16, 2, 8, ROWS)), (0, 2, 3, 1))
        gate, up = tl.split(pairs)
        gate = tl.reshape(gate, (COLUMNS // 2, ROWS)) * factor
        up = tl.reshape(up, (COLUMNS // 2, ROWS)) * up_factor
        value = swiglu(gate, up, limit)
        column = block * (COLUMNS // 2) + tl.arange(0, COLUMNS // 2)
        in_columns = column < weight_rows // 2
    else:
        value = sums * factor
        column = block * COLUMNS + tl.arange(0, COLUMNS)
        in_columns = column < weight_rows
    value = value.T
    # What is not pure is not computed twice: else the compiler stores from the operand's layout, two bytes at a time,
    # and keeps addresses for each of them.
    row = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [row], dtype=tl.int32, is_pure=False, pack=1)
    slot = tl.load(row_to_slot + row)
    valid = (slot >= 0) & (tl.where(top_k > 0, slot // tl.maximum(top_k, 1), row) < x_rows)
    if weighted != 0:
        value *= tl.load(slot_weights + tl.where(valid, slot, 0))[:, None]
    at = out + row.to(tl.int64)[:, None] * out_stride + column[None, :]
    tl.store(at, value.to(tl.bfloat16), mask=valid[:, None] & in_columns[None, :])


@triton.jit
def moe_grouped_gemm_interleaved_kernel(
    x,  # [x_rows, inner]
    weight,  # [experts, blocks, weight_rows, 16], blocks of 128 inner positions
    factors,  # [experts, blocks, weight_rows, GROUPS]
    tile_to_expert,  # [tiles]
    row_to_slot,  # [tiles * ROWS]
    alpha,  # [experts, alphas]
    slot_weights,  # [x_rows * top_k]
    out,  # [tiles * ROWS, weight_rows, or half of it with SWIGLU]
    x_stride,
    out_stride,
    weight_rows,
    inner,
    experts,
    x_rows,
    top_k,  # this and the rest as in moe_grouped_gemm
    alphas,
    weighted,
    column_blocks,
    limit,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,  # weight rows of a block; with SWIGLU 8 of the gate, 8 of up, and so on
    GROUPS: tl.constexpr,  # words of factors for 128 inner positions: 2 of MXFP4, 4 of NVFP4
    SWIGLU: tl.constexpr,
    WHOLE: tl.constexpr,  # 128 inner positions in one product; else two of 64, in fewer registers
    PASSES: tl.constexpr,  # parts in which a block takes its weight rows, one after the other: fewer registers
    SIZES: tl.constexpr,  # 2: a tile whose second half is padding is multiplied as half a tile; 3: and as a quarter
):
    """A block a tile and COLUMNS weight rows; the blocks of a tile run side by side, so that they share its rows."""
    await_previous_grid()
    tile = tl.program_id(0) // column_blocks
    block = tl.program_id(0) % column_blocks
    expert = tl.load(tile_to_expert + tile)
    if (expert < 0) | (expert >= experts):
        return
    expert = expert.to(tl.int64)
    first = tile * ROWS
    place = tl.arange(0, ROWS)
    used = tl.max(tl.where(tl.load(row_to_slot + first + place) >= 0, place + 1, 0), axis=0)
    for part in range(PASSES):
        for size in tl.static_range(SIZES):
            # That many rows suffice, and half of them do not.
            if (used <= (ROWS >> (SIZES - 1 - size))) & ((used > (ROWS >> (SIZES - size))) | (size == 0)):
                multiply_rows(
                    x,
                    weight,
                    factors,
                    row_to_slot,
                    alpha,
                    slot_weights,
                    out,
                    x_stride,
                    out_stride,
                    weight_rows,
                    inner,
                    expert,
                    x_rows,
                    top_k,
                    alphas,
                    weighted,
                    limit,
                    first,
                    block * PASSES + part,
                    ROWS >> (SIZES - 1 - size),
                    COLUMNS // PASSES,
                    GROUPS,
                    SWIGLU,
                    WHOLE,
                )


def interleaved_kernel(
    weights: str,
    swiglu: bool,
    rows: int,
    columns: int,
    warps: int,
    stages: int,
    sizes: int,
    registers_on: dict[str, int] | None = None,
    stages_on: dict[str, int] | None = None,
    constants_on: dict[str, dict[str, object]] | None = None,
) -> TritonKernel:
    """One specialisation: moe_gemm_interleaved_<weights>_<swiglu or plain>_<rows>."""
    return TritonKernel(
        moe_grouped_gemm_interleaved_kernel,
        name=f"moe_gemm_interleaved_{weights}_{'swiglu' if swiglu else 'plain'}_{rows}",
        arguments={
            "x": "const bf16*",
            "weight": "const int32*",
            "factors": "const int32*",
            "tile_to_expert": "const int32*",
            "row_to_slot": "const int32*",
            "alpha": "const float32*",
            "slot_weights": "const float32*",
            "out": "bf16*",
            "x_stride": "int64",
            "out_stride": "int64",
            "weight_rows": "int32",
            **PRODUCT_SCALARS,
        },
        constants={
            "ROWS": rows,
            "COLUMNS": columns,
            "GROUPS": {"mxfp4": 2, "nvfp4": 4}[weights],
            "SWIGLU": swiglu,
            "WHOLE": rows * columns <= 128 * 128,
            "PASSES": 1,
            "SIZES": sizes,
        },
        aligned=("x", "weight", "factors", "out", "x_stride", "out_stride", "weight_rows", "inner"),
        num_warps=warps,
        num_stages=stages,
        stages_on=stages_on or {},
        constants_on=constants_on or {},
        registers_on=registers_on or {},
    )
