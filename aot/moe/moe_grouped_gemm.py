"""moe_grouped_gemm: each tile's rows times the FP4 weights of its expert, with SwiGLU at the end or without."""

from __future__ import annotations

from typing import Any

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
from aot.moe.device.interleaved_weights import interleaved_kernel


@triton.jit
def moe_grouped_gemm_kernel(
    x,
    x_scale,
    weight,
    weight_scale,
    tile_to_expert,  # [tiles]
    row_to_slot,
    alpha,
    slot_weights,
    out,  # [tiles * ROWS, columns]
    x_stride,
    out_stride,
    columns,  # this and the rest as in grouped_product
    inner,
    experts,
    x_rows,
    top_k,
    alphas,
    weighted,
    column_blocks,
    limit,
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
):
    """A block a tile and COLUMNS columns; the columns of a tile run side by side, so that they share its rows."""
    await_previous_grid()
    tile = tl.program_id(0) // column_blocks
    expert = tl.load(tile_to_expert + tile)
    if (expert < 0) | (expert >= experts):
        return
    value, row, valid, column = grouped_product(
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
        tl.program_id(0) % column_blocks,
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
    at = out + row.to(tl.int64)[:, None] * out_stride + column[None, :]
    tl.store(at, value.to(tl.bfloat16), mask=valid[:, None] & (column < columns)[None, :])


def kernel(
    x_format: str,
    weights: str,
    swiglu: bool,
    rows: int,
    columns: int,
    inner: int,
    warps: int,
    stages: int,
    warps_on: dict[str, int] | None = None,
    dequantized: Shape | None = None,
) -> TritonKernel:
    """One specialisation: moe_gemm_<x>_<weights>_<swiglu or plain>_<rows>. dequantized: where quantised x is."""
    return TritonKernel(
        moe_grouped_gemm_kernel,
        name=f"moe_gemm_{x_format}_{weights}_{'swiglu' if swiglu else 'plain'}_{rows}",
        arguments={
            **product_inputs(x_format, weights),
            "out": "bf16*",
            "x_stride": "int64",
            "out_stride": "int64",
            "columns": "int32",
            **PRODUCT_SCALARS,
        },
        constants=product_constants(x_format, weights, swiglu, rows, columns, inner),
        aligned=("x", "x_scale", "weight", "weight_scale", "out", "x_stride", "out_stride", "columns", "inner"),
        num_warps=warps,
        num_stages=stages,
        **on_each(warps_on, dequantized, rows),
    )


SM_120 = ("sm_120a", "sm_121a")

# For registers that hold sums of 64 weight rows only.
FOUR_PASSES: dict[str, object] = {"PASSES": 4, "WHOLE": True, "SIZES": 2}

# Of interleaved weights: rows of a tile, weight rows, warps, stages, sizes. Fastest of a sweep (docs/decisions/0017).
INTERLEAVED: list[tuple[Any, ...]] = [
    (16, 64, 4, 6, 1, {"sm_90a": 80}),
    (64, 128, 8, 3, 2, {"sm_90a": 128}),
    (128, 256, 8, 3, 3, None, dict.fromkeys(SM_120, 2), dict.fromkeys(SM_120, FOUR_PASSES)),
]

# Columns, inner, warps, stages by rows of a tile: the fastest of a sweep on an H100 (docs/decisions/0017).
KERNELS = [
    kernel("bf16", "mxfp4", True, 16, 64, 128, 4, 4),
    kernel("bf16", "mxfp4", True, 64, 64, 64, 4, 3),
    kernel("bf16", "mxfp4", True, 128, 64, 64, 4, 3, dict.fromkeys(SM_120, 8)),
    kernel("bf16", "mxfp4", False, 16, 128, 128, 4, 4),
    kernel("bf16", "mxfp4", False, 64, 64, 128, 4, 3),
    kernel("bf16", "mxfp4", False, 128, 128, 64, 8, 3),
    kernel("bf16", "nvfp4", True, 16, 64, 128, 4, 4),
    kernel("bf16", "nvfp4", True, 64, 64, 64, 4, 3),
    kernel("bf16", "nvfp4", True, 128, 64, 64, 4, 3),
    kernel("bf16", "nvfp4", False, 16, 64, 128, 4, 4),
    kernel("bf16", "nvfp4", False, 64, 64, 128, 4, 3),
    kernel("bf16", "nvfp4", False, 128, 128, 64, 8, 3),
    # 128 columns first: what a block-scaled tensor-core instruction of sm_100a needs.
    kernel("e2m1", "nvfp4", True, 16, 128, 128, 4, 3, None, Shape(64, 128, 4, 4)),
    kernel("e2m1", "nvfp4", True, 64, 128, 64, 8, 3, None, Shape(64, 128, 4, 3)),
    kernel("e2m1", "nvfp4", True, 128, 64, 128, 8, 3, None, Shape(64, 64, 4, 3)),
    kernel("e2m1", "nvfp4", False, 16, 128, 128, 4, 3, None, Shape(64, 128, 4, 3)),
    kernel("e2m1", "nvfp4", False, 64, 128, 128, 8, 3, None, Shape(128, 64, 4, 3)),
    kernel("e2m1", "nvfp4", False, 128, 64, 128, 8, 3, None, Shape(64, 64, 4, 3)),
    # None of 64 rows: with SwiGLU it would spill on sm_120a.
    kernel("e4m3", "mxfp4", True, 16, 128, 128, 4, 3, None, Shape(64, 128, 4, 3)),
    kernel("e4m3", "mxfp4", True, 128, 64, 128, 8, 3, None, Shape(64, 32, 4, 4)),
    kernel("e4m3", "mxfp4", False, 16, 128, 128, 4, 3, None, Shape(128, 128, 4, 3)),
    kernel("e4m3", "mxfp4", False, 128, 64, 128, 8, 3, None, Shape(128, 64, 8, 3)),
    *(
        interleaved_kernel(weights, swiglu, *shape)
        for weights in ("mxfp4", "nvfp4")
        for swiglu in (True, False)
        for shape in INTERLEAVED
    ),
]
