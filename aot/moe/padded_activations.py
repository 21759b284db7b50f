"""The padded activations: squared ReLU or SwiGLU of the rows that hold a token, as bfloat16 or as MXFP8."""

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
    squared_relu,
    store_scales,
    tokens_of,
    zero_scales,
)
from aot.moe.device.swiglu import swiglu


@triton.jit
def activation(gate, up, limit, SWIGLU: tl.constexpr):
    if SWIGLU:
        return swiglu(gate, up, limit)
    return squared_relu(gate)


@triton.jit
def padded_activation_kernel(
    x,  # [rows, columns]; of SwiGLU [rows, 2 * columns]: gate, up
    permutation_map,  # [rows], negative = padding
    n_used,  # [1]
    out,  # [rows, columns]
    out_scale,  # MXFP8: [rows to 128, columns / 32 to 4], swizzled
    limit,  # of SwiGLU
    x_stride,  # elements from row to row
    out_stride,  # of MXFP8 not read: its rows lie without gaps
    columns,
    rows,
    SWIGLU: tl.constexpr,
    MXFP8: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WORDS: tl.constexpr,  # of zero scales that a block stores at a time
):
    await_previous_grid()
    column = columns_of_block(COLUMNS)
    token = tokens_of(permutation_map, rows_of(tl.program_id(1), ROWS), rows)
    last = tl.minimum(tl.load(n_used), rows)
    if MXFP8:
        last = tl.maximum(last, 0)
        # Rows up to the next multiple of 128 get their zero scales from the blocks that are there anyway.
        scaled = tl.cdiv(last, 128) * 128
        groups = scaled // ROWS
    else:
        groups = tl.cdiv(last, ROWS)
    other: tl.constexpr = 0 if MXFP8 else None
    for group in tl.range(tl.program_id(1), groups, tl.num_programs(1)):
        row = rows_of(group, ROWS)
        next_token = tokens_of(permutation_map, rows_of(group + tl.num_programs(1), ROWS), rows)
        used = (row < last) & (token >= 0)
        mask = used[:, None] & (column < columns)[None, :]
        gate = tl.load(elements(x, row, column, x_stride), mask=mask, other=other).to(tl.float32)
        up = gate
        if SWIGLU:
            up = tl.load(elements(x + columns, row, column, x_stride), mask=mask, other=other).to(tl.float32)
        if MXFP8:
            value = activation(gate, up, limit, SWIGLU).to(tl.bfloat16).to(tl.float32)
            data, scale = quantize_mxfp8(value, ROWS, COLUMNS)
            tl.store(elements(out, row, column, columns), data, mask=mask)
            store_scales(out_scale, scale, row, columns, COLUMNS)
        else:
            at = elements(out, row, column, out_stride)
            tl.store(at, activation(gate, up, limit, SWIGLU).to(tl.bfloat16), mask=mask)
        token = next_token
    if MXFP8:
        zero_scales(out_scale, scaled, tl.cdiv(rows, 128) * 128, columns, WORDS)


def kernel(op: str, swiglu: bool, mxfp8: bool, aligned: bool, rows: int, warps: int) -> TritonKernel:
    """One specialisation: <op>_aligned reads and writes 16 bytes at a time, <op>_any takes any x (and bfloat16 out).

    MXFP8's results are aligned always. 256 columns divide the models' widths; more threads make a grid of fewer blocks.
    """
    every = (
        ("x", "out", "out_scale", "x_stride", "columns") if mxfp8 else ("x", "out", "x_stride", "out_stride", "columns")
    )
    results = ("out", "out_scale", "columns") if mxfp8 else ()
    return TritonKernel(
        padded_activation_kernel,
        name=f"{op}_{'aligned' if aligned else 'any'}",
        arguments={
            "x": "const bf16*",
            "permutation_map": "const int32*",
            "n_used": "const int32*",
            "out": "fp8e4m3*" if mxfp8 else "bf16*",
            "out_scale": "uint8*",
            "limit": "float32",
            "x_stride": "int64",
            "out_stride": "int64",
            "columns": "int32",
            "rows": "int32",
        },
        constants={"SWIGLU": swiglu, "MXFP8": mxfp8, "ROWS": rows, "COLUMNS": 256, "WORDS": 1024},
        num_warps=warps,
        aligned=every if aligned else results,
        op=op,
    )


# Rows and warps for two 16-byte loads per thread in flight, of gate and up each.
KERNELS = [
    kernel(op, swiglu, mxfp8, aligned, rows, warps)
    for op, swiglu, mxfp8, rows, warps in (
        ("padded_squared_relu", False, False, 16, 8),
        ("padded_swiglu", True, False, 8, 8),
        ("squared_relu_and_quantize_mxfp8", False, True, 8, 4),
        ("swiglu_and_quantize_mxfp8", True, True, 8, 4),
    )
    for aligned in (True, False)
]
