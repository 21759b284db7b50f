"""padded_squared_relu: out = max(x, 0)^2 for the rows that hold a token."""

from __future__ import annotations

import triton
import triton.language as tl

from aot.declare import TritonKernel
from aot.grid_dependency import await_previous_grid
from aot.moe.device.padded_rows import columns_of_block, elements, rows_of, squared_relu, tokens_of


@triton.jit
def padded_squared_relu_kernel(
    x,  # [rows, columns]
    permutation_map,  # [rows], negative = padding
    n_used,  # [1]
    out,  # [rows, columns]
    x_stride,  # elements from row to row
    out_stride,
    columns,
    rows,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    await_previous_grid()
    column = columns_of_block(COLUMNS)
    token = tokens_of(permutation_map, rows_of(tl.program_id(1), ROWS), rows)
    last = tl.minimum(tl.load(n_used), rows)
    for group in tl.range(tl.program_id(1), tl.cdiv(last, ROWS), tl.num_programs(1)):
        row = rows_of(group, ROWS)
        next_token = tokens_of(permutation_map, rows_of(group + tl.num_programs(1), ROWS), rows)
        used = (row < last) & (token >= 0)
        mask = used[:, None] & (column < columns)[None, :]
        value = tl.load(elements(x, row, column, x_stride), mask=mask).to(tl.float32)
        tl.store(elements(out, row, column, out_stride), squared_relu(value).to(tl.bfloat16), mask=mask)
        token = next_token


ARGUMENTS = {
    "x": "const bf16*",
    "permutation_map": "const int32*",
    "n_used": "const int32*",
    "out": "bf16*",
    "x_stride": "int64",
    "out_stride": "int64",
    "columns": "int32",
    "rows": "int32",
}
# 256 threads with two 16-byte loads each in flight. 256 columns divide the models' widths; more threads make a grid of
# fewer blocks.
TILE: dict[str, object] = {"ROWS": 16, "COLUMNS": 256}
WARPS = 8

KERNELS = [
    TritonKernel(
        padded_squared_relu_kernel,
        name="padded_squared_relu_aligned",
        arguments=ARGUMENTS,
        constants=TILE,
        num_warps=WARPS,
        aligned=("x", "out", "x_stride", "out_stride", "columns"),
    ),
    TritonKernel(
        padded_squared_relu_kernel, name="padded_squared_relu_any", arguments=ARGUMENTS, constants=TILE, num_warps=WARPS
    ),
]
