"""What the kernels over partly used rows share: which elements a block handles, the activations, MXFP8.

A block has some columns, and takes groups of rows in turn. So any grid gives the same result: a captured grid follows
n_used, which only the device knows. A grid of several times what fits on the device lets the hardware balance it.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def columns_of_block(COLUMNS: tl.constexpr):
    return tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)


@triton.jit
def rows_of(group, ROWS: tl.constexpr):
    return group * ROWS + tl.arange(0, ROWS)


@triton.jit
def tokens_of(permutation_map, row, rows):
    """The map of these rows. Kernels load it before they know n_used, so that neither load waits for the other."""
    return tl.load(permutation_map + row, mask=row < rows, other=-1)


@triton.jit
def elements(base, row, column, row_stride):
    """Pointers to a tile's elements."""
    return base + row[:, None].to(tl.int64) * row_stride + column[None, :]


@triton.jit
def squared_relu(value):
    """max(value, 0)^2. `value < 0` and not max(): NaN stays NaN."""
    value = tl.where(value < 0, 0.0, value)
    return value * value


@triton.jit
def larger_or_nan(a, b):
    """The larger one; NaN if one is. tl.max() passes NaN over."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def quantize_mxfp8(value, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """E4M3 codes [ROWS, COLUMNS] and E8M0 scales [ROWS, COLUMNS / 32] of float32 values; as csrc/device/e8m0.cuh.

    A group with a NaN has a scale of NaN, as one with an infinity has. For every bfloat16 magnitude, a product with
    1 / 448 has the scale of the quotient.
    """
    groups = tl.reshape(value, ROWS, COLUMNS // 32, 32)
    largest = tl.reduce(tl.abs(groups), 2, larger_or_nan)
    # Unsigned: the sum of a NaN's bits is above 2^31.
    scale = tl.minimum(((largest * (1 / 448)).to(tl.uint32, bitcast=True) + 0x7FFFFF) >> 23, 255)
    reciprocal = tl.where(scale == 255, 0x7FFFFFFF, (254 - scale) << 23).to(tl.float32, bitcast=True)
    codes = (groups * reciprocal[:, :, None]).to(tl.float8e4nv)
    return tl.reshape(codes, ROWS, COLUMNS), scale


@triton.jit
def store_scales(out_scale, scale, row, columns, COLUMNS: tl.constexpr):
    """A tile's scales [rows, COLUMNS / 32] to the 32_4_4 layout (csrc/device/swizzle.cuh), with its padding columns."""
    tiles_across = tl.cdiv(columns, 128)
    group = columns_of_block(COLUMNS // 32)
    tile = (row // 128).to(tl.int64)[:, None] * tiles_across + (group // 4)[None, :]
    in_tile = (row % 32 * 16 + row % 128 // 32 * 4)[:, None] + (group % 4)[None, :]
    in_row = (group < tiles_across * 4)[None, :]
    tl.store(out_scale + tile * 512 + in_tile, scale.to(tl.uint8), mask=in_row)


@triton.jit
def zero_scales(out_scale, from_row, to_row, columns, WORDS: tl.constexpr):
    """Zeros for the tiles of these rows (multiples of 128), which are one piece of memory."""
    words = out_scale.to(tl.pointer_type(tl.int32))
    words_per_tile_row = tl.cdiv(columns, 128) * 128
    start = from_row // 128 * words_per_tile_row
    end = to_row // 128 * words_per_tile_row
    block = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    step = tl.num_programs(0) * tl.num_programs(1) * WORDS
    for first in tl.range(start + block * WORDS, end, step):
        word = first + tl.arange(0, WORDS)
        tl.store(words + word, tl.zeros([WORDS], tl.int32), mask=word < end)
