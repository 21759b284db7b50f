"""paged_stash_copy: rows into pages that the device takes from a circular list of free ones, byte by byte.

Right for every alignment. csrc/stash/paged_stash_copy.cu takes what 16-byte accesses can move.
"""

from __future__ import annotations

import triton
import triton.language as tl

from aot.declare import TritonKernel
from aot.grid_dependency import await_previous_grid
from aot.stash.device.pages import arrives_last, move_bytes, tokens_of


@triton.jit
def free_pages(head, tail, capacity, pages):
    """Pages that can be taken: none from a list whose numbers contradict each other."""
    sound = (capacity >= 1) & (capacity <= pages) & (head >= 0) & (tail >= head) & (tail - head <= capacity)
    return tl.where(sound, tail - head, 0)


@triton.jit
def paged_stash_copy_kernel(
    source,  # [rows, row_bytes]
    cuda_pool,  # [cuda_pages, page_size, row_bytes]
    host_pool,  # [host_pages, page_size, row_bytes]; not read if host_pages is 0
    num_tokens,  # [1]
    free_list_cuda,  # [cuda_pages]
    free_list_host,  # [host_pages]
    free_list_head,  # [2], as the next two: CUDA, host
    free_list_tail,
    free_list_capacity,
    page_record,  # [at least the pages of `rows`]
    overflow,  # [1], as the next two
    host_spill,
    spilled_to_host,
    new_free_list_head,  # [2]; may be free_list_head
    high_water,  # [2], or null
    arrivals,  # [1], 0 before and after
    rows,
    row_bytes,
    cuda_pages,
    host_pages,
    page_size,
    BLOCK: tl.constexpr,
):
    """Programs on axis 1 split a page; programs on axis 0 stride over the pages.

    So any grid gives the same result, and a captured grid follows num_tokens, which only the device knows. The last
    program to arrive writes heads and flags: by then all have read them, and they may be updated in place.
    """
    await_previous_grid()
    tokens = tokens_of(num_tokens, rows)
    needed = tl.cdiv(tokens, page_size)
    idle = (tl.load(overflow) != 0) | (needed == 0)
    cuda_head = tl.load(free_list_head)
    host_head = tl.load(free_list_head + 1)
    cuda_capacity = tl.load(free_list_capacity)
    host_capacity = tl.load(free_list_capacity + 1)
    cuda_free = free_pages(cuda_head, tl.load(free_list_tail), cuda_capacity, cuda_pages)
    host_free = free_pages(host_head, tl.load(free_list_tail + 1), host_capacity, host_pages)
    to_cuda = needed <= cuda_free
    to_host = (needed > cuda_free) & (needed <= host_free)

    if arrives_last(arrivals):
        tl.store(new_free_list_head, tl.where(to_cuda & (idle == 0), cuda_head + needed, cuda_head))
        tl.store(new_free_list_head + 1, tl.where(to_host & (idle == 0), host_head + needed, host_head))
        if idle == 0:
            tl.store(spilled_to_host, tl.where(to_cuda, 0, 1).to(tl.int64))
            if to_host:
                tl.store(host_spill, tl.full((), 1, tl.int64))
            elif to_cuda == 0:
                tl.store(overflow, tl.full((), 1, tl.int64))
            if (to_cuda | to_host) & (high_water.to(tl.int64) != 0):
                used = tl.where(to_host, host_capacity - host_free, cuda_capacity - cuda_free) + needed
                # Atomic: all threads would load the mark, and one store it, without a barrier between.
                tl.atomic_max(high_water + tl.where(to_host, 1, 0), used, sem="relaxed")

    if (idle == 0) & (to_cuda | to_host):
        pool = tl.where(to_host, host_pool, cuda_pool)
        pool_pages = tl.where(to_host, host_pages, cuda_pages)
        free_list = tl.where(to_host, free_list_host, free_list_cuda)
        capacity = tl.where(to_host, host_capacity, cuda_capacity)
        first = tl.where(to_host, host_head, cuda_head) % capacity
        page_bytes = page_size * row_bytes
        for page in tl.range(tl.program_id(0), needed.to(tl.int32), tl.num_programs(0)):
            slot = first + page
            identity = tl.load(free_list + tl.where(slot < capacity, slot, slot - capacity))
            if tl.program_id(1) == 0:
                tl.store(page_record + page, identity)
            if (identity >= 0) & (identity < pool_pages):
                start = page.to(tl.int64) * page_bytes
                size = tl.minimum(page_bytes, tokens * row_bytes - start)
                move_bytes(source + start, pool + identity * page_bytes, size, BLOCK)


KERNELS = [
    TritonKernel(
        paged_stash_copy_kernel,
        name="paged_stash_copy_bytes",
        arguments={
            "source": "const uint8*",
            "cuda_pool": "uint8*",
            "host_pool": "uint8*",
            "num_tokens": "const int64*",
            "free_list_cuda": "const int64*",
            "free_list_host": "const int64*",
            "free_list_head": "const int64*",
            "free_list_tail": "const int64*",
            "free_list_capacity": "const int64*",
            "page_record": "int64*",
            "overflow": "int64*",
            "host_spill": "int64*",
            "spilled_to_host": "int64*",
            "new_free_list_head": "int64*",
            "high_water": "int64*",
            "arrivals": "int32*",
            "rows": "int64",
            "row_bytes": "int64",
            "cuda_pages": "int64",
            "host_pages": "int64",
            "page_size": "int64",
        },
        constants={"BLOCK": 1024},
    ),
]
