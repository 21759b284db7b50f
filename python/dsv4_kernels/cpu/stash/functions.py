"""The paged stash in plain torch: the CPU implementation. Each function changes its arguments in place."""

from __future__ import annotations

import torch
from torch import Tensor

CUDA, HOST = 0, 1  # indices of the pools in head, tail and capacity


def used_tokens(num_tokens: Tensor, rows: int) -> int:
    """The number of rows to move: what num_tokens says, but never more than there are."""
    return min(max(int(num_tokens), 0), rows)


def free_pages(head: int, tail: int, capacity: int, pages: int) -> int:
    """Pages that can be taken: none from a list whose numbers contradict each other."""
    sound = 1 <= capacity <= pages and 0 <= head <= tail and tail - head <= capacity
    return tail - head if sound else 0


def slots_from(first: int, count: int, capacity: int) -> Tensor:
    """Where `count` entries of a circular list lie that start at a position which only grows."""
    return (torch.arange(count, device="cpu") + first % capacity) % capacity


def move_pages(rows: Tensor, pool: Tensor, ids: Tensor, tokens: int, into_pool: bool) -> None:
    """Copies rows[:tokens] to or from the pages `ids` of the pool, leaving out pages that are not in it."""
    page_size = pool.shape[1]
    rows, pool = rows.view(torch.uint8), pool.view(torch.uint8)
    whole = tokens // page_size
    paged = rows[: whole * page_size].view(whole, page_size, rows.shape[1])
    full = ids[:whole]
    inside = (full >= 0) & (full < pool.shape[0])
    if not bool(inside.all()):
        full, chosen = full[inside], inside.nonzero()[:, 0]
        if into_pool:
            pool[full] = paged[chosen]
        else:
            paged[chosen] = pool[full]
    elif into_pool:
        pool[full] = paged
    else:
        torch.index_select(pool, 0, full, out=paged)
    rest = tokens - whole * page_size
    last = int(ids[whole]) if rest else -1
    if rest and 0 <= last < pool.shape[0]:
        in_rows, in_pool = rows[whole * page_size : tokens], pool[last, :rest]
        if into_pool:
            in_pool.copy_(in_rows)
        else:
            in_rows.copy_(in_pool)


def paged_stash_copy(
    src: Tensor,
    cuda_dst: Tensor,
    host_dst: Tensor | None,
    num_tokens: Tensor,
    free_list_cuda: Tensor,
    free_list_host: Tensor | None,
    free_list_head: Tensor,
    free_list_tail: Tensor,
    free_list_capacity: Tensor,
    page_record: Tensor,
    overflow: Tensor,
    host_spill_global: Tensor,
    spilled_to_host: Tensor,
    new_free_list_head: Tensor | None,
    high_water: Tensor | None,
) -> None:
    if new_free_list_head is not None:
        new_free_list_head.copy_(free_list_head)
    tokens = used_tokens(num_tokens, src.shape[0])
    needed = -(-tokens // cuda_dst.shape[1])
    if int(overflow) or not needed:
        return
    heads, tails, capacities = (t.tolist() for t in (free_list_head, free_list_tail, free_list_capacity))
    for place, pool, free_list in ((CUDA, cuda_dst, free_list_cuda), (HOST, host_dst, free_list_host)):
        if pool is None or free_list is None:
            continue
        if needed > free_pages(heads[place], tails[place], capacities[place], pool.shape[0]):
            continue
        ids = free_list[slots_from(heads[place], needed, capacities[place])]
        page_record[:needed] = ids
        move_pages(src, pool, ids, tokens, into_pool=True)
        (free_list_head if new_free_list_head is None else new_free_list_head)[place] = heads[place] + needed
        spilled_to_host.fill_(place)
        if place == HOST:
            host_spill_global.fill_(1)
        if high_water is not None:
            used = capacities[place] - (tails[place] - heads[place]) + needed
            high_water[place] = max(int(high_water[place]), used)
        return
    overflow.fill_(1)
    spilled_to_host.fill_(1)


def paged_stash_pop(
    cuda_src: Tensor,
    host_src: Tensor | None,
    dst: Tensor,
    num_tokens: Tensor,
    page_record: Tensor,
    spilled_to_host: Tensor,
    overflow: Tensor,
    free_list_cuda: Tensor,
    free_list_host: Tensor | None,
    free_list_tail: Tensor,
    free_list_capacity: Tensor,
    new_free_list_tail: Tensor | None,
    zero_rest: bool,
) -> None:
    if new_free_list_tail is not None:
        new_free_list_tail.copy_(free_list_tail)
    if int(overflow):
        return
    tokens = used_tokens(num_tokens, dst.shape[0])
    needed = -(-tokens // cuda_src.shape[1])
    if needed:
        place = HOST if int(spilled_to_host) else CUDA
        pool, free_list = ((cuda_src, free_list_cuda), (host_src, free_list_host))[place]
        tail, capacity = int(free_list_tail[place]), int(free_list_capacity[place])
        if pool is None or free_list is None or not needed <= capacity <= pool.shape[0] or tail < 0:
            return
        ids = page_record[:needed]
        move_pages(dst, pool, ids, tokens, into_pool=False)
        free_list[slots_from(tail, needed, capacity)] = ids
        (free_list_tail if new_free_list_tail is None else new_free_list_tail)[place] = tail + needed
    if zero_rest:
        dst.view(torch.uint8)[tokens:] = 0
