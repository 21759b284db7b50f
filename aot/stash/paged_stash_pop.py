"""paged_stash_pop: rows out of their pages, which go back to the list of free ones, byte by byte.

Right for every alignment. csrc/stash/paged_stash_pop.cu takes what 16-byte accesses can move.
"""

from __future__ import annotations

import triton
import triton.language as tl

from aot.declare import TritonKernel
from aot.grid_dependency import await_previous_grid
from aot.stash.device.pages import arrives_last, move_bytes, tokens_of


@triton.jit
def zero_bytes(target, size, BLOCK: tl.constexpr):
    """target[:size] = 0, shared by the programs of axis 1."""
    column = tl.arange(0, BLOCK)
    for offset in tl.range(tl.program_id(1) * BLOCK, size, tl.num_programs(1) * BLOCK):
        tl.store(target + offset + column, tl.zeros((BLOCK,), tl.uint8), mask=column < size - offset)


@triton.jit
def paged_stash_pop_kernel(
    cuda_pool,  # [cuda_pages, page_size, row_bytes]
    host_pool,  # [host_pages, page_size, row_bytes]; not read if host_pages is 0
    destination,  # [rows, row_bytes]
    num_tokens,  # [1]
    page_record,  # [at least the pages of `rows`]
    spilled_to_host,  # [1], as the next
    overflow,
    free_list_cuda,  # [cuda_pages]
    free_list_host,  # [host_pages]
    free_list_tail,  # [2], as the next two: CUDA, host
    free_list_capacity,
    new_free_list_tail,  # may be free_list_tail
    arrivals,  # [1], 0 before and after
    rows,
    row_bytes,
    cuda_pages,
    host_pages,
    page_size,
    zero_rest,
    BLOCK: tl.constexpr,
):
    """Programs share the pages as those of paged_stash_copy_kernel do; the last to arrive writes the tails."""
    await_previous_grid()
    tokens = tokens_of(num_tokens, rows)
    needed = tl.cdiv(tokens, page_size)
    overflowed = tl.load(overflow) != 0
    from_host = tl.load(spilled_to_host) != 0
    cuda_tail = tl.load(free_list_tail)
    host_tail = tl.load(free_list_tail + 1)
    tail = tl.where(from_host, host_tail, cuda_tail)
    capacity = tl.where(from_host, tl.load(free_list_capacity + 1), tl.load(free_list_capacity))
    pool_pages = tl.where(from_host, host_pages, cuda_pages)
    # Without tokens the list is not looked at, so it need not be sound.
    sound = (needed == 0) | ((capacity >= needed) & (capacity <= pool_pages) & (tail >= 0))
    moves = (overflowed == 0) & sound

    if arrives_last(arrivals):
        tl.store(new_free_list_tail, tl.where(moves & (from_host == 0), cuda_tail + needed, cuda_tail))
        tl.store(new_free_list_tail + 1, tl.where(moves & from_host, host_tail + needed, host_tail))

    if moves:
        pool = tl.where(from_host, host_pool, cuda_pool)
        free_list = tl.where(from_host, free_list_host, free_list_cuda)
        page_bytes = page_size * row_bytes
        if needed > 0:
            first = tail % capacity
            for page in tl.range(tl.program_id(0), needed.to(tl.int32), tl.num_programs(0)):
                identity = tl.load(page_record + page)
                if tl.program_id(1) == 0:
                    slot = first + page
                    tl.store(free_list + tl.where(slot < capacity, slot, slot - capacity), identity)
                if (identity >= 0) & (identity < pool_pages):
                    start = page.to(tl.int64) * page_bytes
                    size = tl.minimum(page_bytes, tokens * row_bytes - start)
                    move_bytes(pool + identity * page_bytes, destination + start, size, BLOCK)
        if zero_rest != 0:
            # Page by page too, for the order of the programs' work means nothing.
            for page in tl.range(tl.program_id(0), tl.cdiv(rows, page_size).to(tl.int32), tl.num_programs(0)):
                start = tl.maximum(page.to(tl.int64) * page_bytes, tokens * row_bytes)
                end = tl.minimum((page.to(tl.int64) + 1) * page_bytes, rows * row_bytes)
                zero_bytes(destination + start, end - start, BLOCK)


KERNELS = [
    TritonKernel(
        paged_stash_pop_kernel,
        name="paged_stash_pop_bytes",
        arguments={
            "cuda_pool": "const uint8*",
            "host_pool": "const uint8*",
            "destination": "uint8*",
            "num_tokens": "const int64*",
            "page_record": "const int64*",
            "spilled_to_host": "const int64*",
            "overflow": "const int64*",
            "free_list_cuda": "int64*",
            "free_list_host": "int64*",
            "free_list_tail": "const int64*",
            "free_list_capacity": "const int64*",
            "new_free_list_tail": "int64*",
            "arrivals": "int32*",
            "rows": "int64",
            "row_bytes": "int64",
            "cuda_pages": "int64",
            "host_pages": "int64",
            "page_size": "int64",
            "zero_rest": "int32",
        },
        constants={"BLOCK": 1024},
    ),
]
