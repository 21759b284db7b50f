"""swiglu_and_quantize_mxfp8: MXFP8 of bfloat16(silu(gate) * up) for the rows that hold a token, gate and up the halves
of a row.
"""

from __future__ import annotations

import triton
import triton.language as tl

from aot.declare import TritonKernel
from aot.grid_dependency import await_previous_grid
from aot.moe.device.padded_rows import (
    columns_of_block,
    elements,
    quantize_mxfp8,
    rows_of,
    store_scales,
    swiglu,
    tokens_of,
    zero_scales,
)


@triton.jit
def swiglu_and_quantize_mxfp8_kernel(
    x,  # [rows, 2 * columns]: gate, up
    permutation_map,  # [rows], negative = padding
    n_used,  # [1]
    out_data,  # [rows, columns]
    out_scale,  # [rows to 128, columns / 32 to 4], swizzled
    limit,
    x_stride,  # elements from row to row
    columns,
    rows,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WORDS: tl.constexpr,
):
    await_previous_grid()
    column = columns_of_block(COLUMNS)
    token = tokens_of(permutation_map, rows_of(tl.program_id(1), ROWS), rows)
    last = tl.maximum(tl.minimum(tl.load(n_used), rows), 0)
    # Rows up to the next multiple of 128 get their zero scales from the blocks that are there anyway.
    looked_at = tl.cdiv(last, 128) * 128
    for group in tl.range(tl.program_id(1), looked_at // ROWS, tl.num_programs(1)):
        row = rows_of(group, ROWS)
        next_token = tokens_of(permutation_map, rows_of(group + tl.num_programs(1), ROWS), rows)
        used = (row < last) & (token >= 0)
        mask = used[:, None] & (column < columns)[None, :]
        gate = tl.load(elements(x, row, column, x_stride), mask=mask, other=0).to(tl.float32)
        up = tl.load(elements(x + columns, row, column, x_stride), mask=mask, other=0).to(tl.float32)
        value = swiglu(gate, up, limit).to(tl.bfloat16).to(tl.float32)
        data, scale = quantize_mxfp8(value, ROWS, COLUMNS)
        tl.store(elements(out_data, row, column, columns), data, mask=mask)
        store_scales(out_scale, scale, row, columns, COLUMNS)
        token = next_token
    zero_scales(out_scale, looked_at, tl.cdiv(rows, 128) * 128, columns, WORDS)


ARGUMENTS = {
    "x": "const bf16*",
    "permutation_map": "const int32*",
    "n_used": "const int32*",
    "out_data": "fp8e4m3*",
    "out_scale": "uint8*",
    "limit": "float32",
    "x_stride": "int64",
    "columns": "int32",
    "rows": "int32",
}
# 128 threads with two 16-byte loads each in flight. 256 columns divide the models' widths.
TILE: dict[str, object] = {"ROWS": 8, "COLUMNS": 256, "WORDS": 1024}

KERNELS = [
    TritonKernel(
        swiglu_and_quantize_mxfp8_kernel,
        name="swiglu_and_quantize_mxfp8_aligned",
        arguments=ARGUMENTS,
        constants=TILE,
        aligned=("x", "out_data", "out_scale", "x_stride", "columns"),
    ),
    TritonKernel(
        swiglu_and_quantize_mxfp8_kernel,
        name="swiglu_and_quantize_mxfp8_any",
        arguments=ARGUMENTS,
        constants=TILE,
        aligned=("out_data", "out_scale", "columns"),
    ),
]
