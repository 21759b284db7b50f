"""padded_squared_relu: out = max(x, 0)^2 for the rows that hold a token."""

from __future__ import annotations

import triton
import triton.language as tl

from aot.declare import TritonKernel


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
    COLUMN_BLOCK: tl.constexpr,
):
    """Blocks on axis 1 split a row; blocks on axis 0 stride over the rows.

    So any grid gives the same result, and a captured grid follows n_used, which only the device knows.
    """
    last = tl.minimum(tl.load(n_used), rows)
    column = tl.program_id(1) * COLUMN_BLOCK + tl.arange(0, COLUMN_BLOCK)
    in_row = column < columns
    for row in tl.range(tl.program_id(0), last, tl.num_programs(0)):
        if tl.load(permutation_map + row) >= 0:
            value = tl.load(x + row.to(tl.int64) * x_stride + column, mask=in_row).to(tl.float32)
            # `value < 0` and not max(): NaN stays NaN.
            value = tl.where(value < 0, 0.0, value)
            tl.store(out + row.to(tl.int64) * out_stride + column, (value * value).to(tl.bfloat16), mask=in_row)


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
COLUMN_BLOCK = 1024  # 128 threads of 8 elements: one 16-byte access a thread

KERNELS = [
    TritonKernel(
        padded_squared_relu_kernel,
        name="padded_squared_relu_aligned",
        arguments=ARGUMENTS,
        constants={"COLUMN_BLOCK": COLUMN_BLOCK},
        aligned=("x", "out", "x_stride", "out_stride", "columns"),
    ),
    TritonKernel(
        padded_squared_relu_kernel,
        name="padded_squared_relu_any",
        arguments=ARGUMENTS,
        constants={"COLUMN_BLOCK": COLUMN_BLOCK},
    ),
]
