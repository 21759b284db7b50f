"""What the grouped products of weights in the checkpoints' layout share: a tile's rows times its expert's weights.

The weights of an expert are [columns, inner], K-contiguous as in the checkpoints: the product is x . w^T.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from aot.moe.device.swiglu import swiglu

# What dequantised E2M1 rows are to be multiplied by yet.
LEFT_OVER = tl.constexpr(256.0)


@triton.jit
def dequantize_rows(x, x_scale, LANES: tl.constexpr, INNER: tl.constexpr, GROUP: tl.constexpr, X_FORMAT: tl.constexpr):
    """Quantised rows as bfloat16 [LANES, INNER], which holds each code times its scale; E2M1 over LEFT_OVER."""
    if X_FORMAT == "e2m1":
        # A code's bits, as those of a bfloat16, are its value times 2^-126.
        codes = x.to(tl.int16)
        low = ((codes & 7) << 6) | ((codes & 8) << 12)
        high = ((codes & 0x70) << 2) | ((codes & 0x80) << 8)
        value = tl.reshape(tl.join(low, high), (LANES, INNER)).to(tl.bfloat16, bitcast=True)
        factor = (x_scale.to(tl.float32) * 2.0**118).to(tl.bfloat16)
    else:
        value = x.to(tl.bfloat16)
        exponent = x_scale.to(tl.int16)
        # 0 is the denormal 2^-127, and 255 NaN.
        bits = tl.where(exponent == 0, 0x0040, tl.where(exponent == 255, 0x7FC0, exponent << 7))
        factor = bits.to(tl.int16).to(tl.bfloat16, bitcast=True)
    groups = tl.reshape(value, (LANES, INNER // GROUP, GROUP)) * factor[:, :, None]
    return tl.reshape(groups, (LANES, INNER))


@triton.jit
def load_and_multiply(
    accumulator,  # [LANES, COLUMNS], or [COLUMNS, LANES] with WEIGHTS_FIRST
    x,  # [LANES, INNER], or half of it where it is packed FP4
    x_scale,
    w,  # [COLUMNS, INNER / 2]
    w_scale,  # [COLUMNS, INNER / GROUP]
    X_FORMAT: tl.constexpr,
    WEIGHTS_FIRST: tl.constexpr,
):
    if X_FORMAT == "bf16":
        result = tl.dot_scaled(x, None, X_FORMAT, w.T, w_scale, "e2m1", accumulator)
    elif WEIGHTS_FIRST:
        result = tl.dot_scaled(w, w_scale, "e2m1", x.T, x_scale, X_FORMAT, accumulator)
    else:
        result = tl.dot_scaled(x, x_scale, X_FORMAT, w.T, w_scale, "e2m1", accumulator)
    return result


@triton.jit
def grouped_product(
    x,  # [x_rows, inner]
    x_scale,  # [x_rows, inner / GROUP], of quantised x
    weight,  # [experts, columns or 2 columns (gate, up), inner / 2]
    weight_scale,  # [experts, columns or 2 columns, inner / GROUP]
    row_to_slot,  # [tiles * ROWS]
    alpha,  # [experts, alphas]
    slot_weights,  # [x_rows * top_k]
    x_stride,  # elements from row to row; bytes where x is packed FP4
    columns,
    inner,
    x_rows,
    top_k,  # slot s reads row s // top_k of x; 0: row r of a tile reads row r of x
    alphas,  # of an expert: 0, 1, or 2: one for the gate, one for up
    weighted,  # whether rows are multiplied by their slots' weights
    limit,
    tile,
    block,  # of columns
    expert,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,  # rows of the product, ROWS or more
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    GROUP: tl.constexpr,
    X_FORMAT: tl.constexpr,
    SWIGLU: tl.constexpr,
    X_PACK: tl.constexpr,  # values in an element of x
    WEIGHTS_FIRST: tl.constexpr,
    DEQUANTIZES: tl.constexpr,  # whether quantised rows become bfloat16 ones as soon as they are loaded
):
    """A tile's results for a block of columns, float32 [LANES, COLUMNS]; rows; which of them there are; columns."""
    place = tl.arange(0, LANES)
    row = tile * ROWS + place
    slot = tl.load(row_to_slot + row, mask=place < ROWS, other=-1)
    source = tl.where(top_k > 0, slot // tl.maximum(top_k, 1), row)
    valid = (slot >= 0) & (source < x_rows)
    source = tl.where(valid, source, 0).to(tl.int64)  # padding multiplies row 0 and stores nothing

    column = block * COLUMNS + tl.arange(0, COLUMNS)
    in_columns = column < columns
    x_inner = tl.arange(0, INNER // X_PACK)
    w_inner = tl.arange(0, INNER // 2)
    group = tl.arange(0, INNER // GROUP)
    groups = inner // GROUP
    weight_row = expert.to(tl.int64) * (columns * (2 if SWIGLU else 1)) + tl.where(in_columns, column, 0)
    x_at = x + source[:, None] * x_stride + x_inner[None, :]
    x_scale_at = x_scale + source[:, None] * groups + group[None, :]
    w_at = weight + weight_row[:, None] * (inner // 2) + w_inner[None, :]
    w_scale_at = weight_scale + weight_row[:, None] * groups + group[None, :]
    up_w = columns.to(tl.int64) * (inner // 2)
    up_scale = columns.to(tl.int64) * groups

    multiplied: tl.constexpr = "bf16" if DEQUANTIZES else X_FORMAT
    if WEIGHTS_FIRST:
        sums = tl.zeros((COLUMNS, LANES), dtype=tl.float32)
        up_sums = tl.zeros((COLUMNS, LANES), dtype=tl.float32)
    else:
        sums = tl.zeros((LANES, COLUMNS), dtype=tl.float32)
        up_sums = tl.zeros((LANES, COLUMNS), dtype=tl.float32)
    for first in range(0, inner, INNER):
        in_x = x_inner[None, :] < (inner - first) // X_PACK
        in_w = w_inner[None, :] < (inner - first) // 2
        in_group = group[None, :] < (inner - first) // GROUP
        x_group = in_group
        if DEQUANTIZES:  # padding loads nothing: all blocks would read the same row at the same time
            in_x &= valid[:, None]
            x_group = in_group & valid[:, None]
        xs = tl.load(x_at, mask=in_x, other=0.0)
        ws = tl.load(w_at, mask=in_w, other=0)
        ws_scale = tl.load(w_scale_at, mask=in_group, other=0.0)
        xs_scale = ws_scale
        if X_FORMAT != "bf16":
            xs_scale = tl.load(x_scale_at, mask=x_group, other=0.0)
        if DEQUANTIZES:
            xs = dequantize_rows(xs, xs_scale, LANES, INNER, GROUP, X_FORMAT)
        sums = load_and_multiply(sums, xs, xs_scale, ws, ws_scale, multiplied, WEIGHTS_FIRST)
        if SWIGLU:
            ws = tl.load(w_at + up_w, mask=in_w, other=0)
            ws_scale = tl.load(w_scale_at + up_scale, mask=in_group, other=0.0)
            up_sums = load_and_multiply(up_sums, xs, xs_scale, ws, ws_scale, multiplied, WEIGHTS_FIRST)
        x_at += INNER // X_PACK
        x_scale_at += INNER // GROUP
        w_at += INNER // 2
        w_scale_at += INNER // GROUP

    factor = LEFT_OVER if DEQUANTIZES and X_FORMAT == "e2m1" else 1.0
    up_factor = factor
    if alphas > 0:
        factor *= tl.load(alpha + expert * alphas)
        up_factor *= tl.load(alpha + expert * alphas + alphas - 1)
    value = sums * factor
    if SWIGLU:
        value = swiglu(value, up_sums * up_factor, limit)
    if WEIGHTS_FIRST:
        value = value.T
    if weighted != 0:
        value *= tl.load(slot_weights + tl.where(valid, slot, 0))[:, None]
    return value, row, valid, column


# As declared, by the format of x and the group of a scale.
X_TYPES = {"bf16": "bf16", "e4m3": "fp8e4m3", "e2m1": "uint8"}
SCALE_TYPES = {32: "uint8", 16: "fp8e4m3"}
GROUPS = {"mxfp4": 32, "nvfp4": 16}


def product_inputs(x_format: str, weights: str) -> dict[str, str]:
    """The arguments that are read, in the order in which kernels take them."""
    scale = SCALE_TYPES[GROUPS[weights]]
    return {
        "x": f"const {X_TYPES[x_format]}*",
        "x_scale": f"const {scale}*",
        "weight": "const uint8*",
        "weight_scale": f"const {scale}*",
        "tile_to_expert": "const int32*",
        "row_to_slot": "const int32*",
        "alpha": "const float32*",
        "slot_weights": "const float32*",
    }


# What follows the strides and the number of columns or weight rows.
PRODUCT_SCALARS = {
    "inner": "int32",
    "experts": "int32",
    "x_rows": "int32",
    "top_k": "int32",
    "alphas": "int32",
    "weighted": "int32",
    "column_blocks": "int32",
    "limit": "float32",
}


def product_constants(
    x_format: str, weights: str, swiglu: bool, rows: int, columns: int, inner: int
) -> dict[str, object]:
    """grouped_product's constants for tiles of so many rows, and blocks of columns and inner positions."""
    return {
        "ROWS": rows,
        # On sm_100a, scales of fewer than 32 rows leave part of what the instruction reads unwritten.
        "LANES": rows if x_format == "bf16" else max(rows, 32),
        "COLUMNS": columns,
        "INNER": inner,
        "GROUP": GROUPS[weights],
        "X_FORMAT": x_format,
        "SWIGLU": swiglu,
        "X_PACK": 2 if x_format == "e2m1" else 1,
        # Few rows would leave most of a matrix instruction's 64 or 128 idle. Of bfloat16 rows the compiler itself
        # puts the weights first on sm_90a, and then also overlaps the rows' loads.
        "WEIGHTS_FIRST": x_format != "bf16" and rows < 128,
        "DEQUANTIZES": False,
    }


class Shape(NamedTuple):
    """Of a kernel that dequantises rows."""

    columns: int
    inner: int
    warps: int
    stages: int


def on_each(warps_on: dict[str, int] | None, dequantized: Shape | None, rows: int) -> dict[str, Any]:
    """TritonKernel's arguments for single architectures.

    dequantized: on sm_90a, whose tensor cores know no scales. tl.dot_scaled would dequantise rows by itself, but takes
    up to four times as long (docs/decisions/0020).
    """
    if dequantized is None:
        return {"warps_on": warps_on or {}}
    constants = {"LANES": rows, "COLUMNS": dequantized.columns, "INNER": dequantized.inner, "WEIGHTS_FIRST": False}
    return {
        "warps_on": (warps_on or {}) | {"sm_90a": dequantized.warps},
        "stages_on": {"sm_90a": dequantized.stages},
        "constants_on": {"sm_90a": {**constants, "DEQUANTIZES": True}},
    }
