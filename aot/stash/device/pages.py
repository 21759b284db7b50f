"""What the byte-by-byte kernels of the stash share; csrc/stash/pages.cuh has it for those of 16 bytes."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tokens_of(num_tokens, rows):
    """The number of rows to move: what the device says, but never more than there are."""
    return tl.minimum(tl.maximum(tl.load(num_tokens), 0), rows)


@triton.jit
def arrives_last(arrivals):
    """Whether every other program of the grid has been here before. Leaves the counter at 0 for the next launch.

    What a program has read before, the last one may overwrite.
    """
    tl.debug_barrier()
    programs = tl.num_programs(0) * tl.num_programs(1)
    last = tl.atomic_add(arrivals, 1, sem="acq_rel") == programs - 1
    if last:
        tl.store(arrivals, 0)
    return last


@triton.jit
def move_bytes(source, target, size, BLOCK: tl.constexpr):
    """target[:size] = source[:size], shared by the programs of axis 1."""
    column = tl.arange(0, BLOCK)
    for offset in tl.range(tl.program_id(1) * BLOCK, size, tl.num_programs(1) * BLOCK):
        inside = column < size - offset
        tl.store(target + offset + column, tl.load(source + offset + column, mask=inside), mask=inside)
