"""Cases of the paged stash: sizes of real activations, and every way that an allocation can go."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dsv4_kernels.cases import Baseline, Case, Verdict, fresh, named, to_cpu
from dsv4_kernels.ops import OPS

MIB = 1 << 20


def indexable(tensor: Tensor) -> Tensor:
    """Torch indexes no float8."""
    return tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor


def baseline_paged_stash_copy(*arguments: Any) -> tuple[Tensor, ...]:
    """As an engine would write it: shapes known to the host, so every row, into the CUDA pool, fits or not."""
    given = named("paged_stash_copy", arguments)
    page_size = given.cuda_dst.shape[1]
    rows, hidden = given.src.shape
    pages = -(-rows // page_size)
    slot = (given.free_list_head[0] + torch.arange(pages, device=given.src.device)) % max(given.cuda_dst.shape[0], 1)
    ids = given.free_list_cuda[slot]
    row = torch.arange(rows, device=given.src.device)
    index = ids[row // page_size] * page_size + row % page_size
    indexable(given.cuda_dst).view(-1, hidden).index_copy_(0, index, indexable(given.src))
    given.page_record[:pages] = ids
    return OPS["paged_stash_copy"].mutated_of(given)


def baseline_paged_stash_pop(*arguments: Any) -> tuple[Tensor, ...]:
    """As an engine would write it: every row, from the CUDA pool."""
    given = named("paged_stash_pop", arguments)
    page_size = given.cuda_src.shape[1]
    rows, hidden = given.dst.shape
    pages, pool_pages = -(-rows // page_size), max(given.cuda_src.shape[0], 1)
    ids = given.page_record[:pages] % pool_pages
    row = torch.arange(rows, device=given.dst.device)
    index = ids[row // page_size] * page_size + row % page_size
    torch.index_select(indexable(given.cuda_src).view(-1, hidden), 0, index, out=indexable(given.dst))
    slot = (given.free_list_tail[0] + torch.arange(pages, device=given.dst.device)) % pool_pages
    given.free_list_cuda[slot] = ids
    return OPS["paged_stash_pop"].mutated_of(given)


def expected_paged_stash_copy(
    src: Tensor,
    cuda_dst: Tensor,
    host_dst: Tensor | None,
    num_tokens: Tensor,
    free_list_cuda: Tensor,
    free_list_host: Tensor | None,
    head: Tensor,
    tail: Tensor,
    capacity: Tensor,
    page_record: Tensor,
    overflow: Tensor,
    host_spill: Tensor,
    spilled: Tensor,
    new_head: Tensor | None,
    high_water: Tensor | None,
) -> None:
    """The description, page by page, for lists and counts that are sound."""
    page_size, tokens = cuda_dst.shape[1], int(num_tokens)
    if new_head is not None:
        new_head.copy_(head)
    if int(overflow) or tokens == 0:
        return
    pages = (tokens + page_size - 1) // page_size
    for place, pool, free_list in ((0, cuda_dst, free_list_cuda), (1, host_dst, free_list_host)):
        if pool is None or free_list is None or int(tail[place] - head[place]) < pages:
            continue
        for page in range(pages):
            identity = int(free_list[(int(head[place]) + page) % int(capacity[place])])
            rows = src[page * page_size : min((page + 1) * page_size, tokens)]
            pool[identity, : len(rows)] = rows
            page_record[page] = identity
        (head if new_head is None else new_head)[place] += pages
        if high_water is not None:
            in_use = capacity[place] - tail[place] + (head if new_head is None else new_head)[place]
            high_water[place] = torch.maximum(high_water[place], in_use)
        spilled.fill_(place)
        host_spill.fill_(max(place, int(host_spill)))
        return
    overflow.fill_(1)
    spilled.fill_(1)


def expected_paged_stash_pop(
    cuda_src: Tensor,
    host_src: Tensor | None,
    dst: Tensor,
    num_tokens: Tensor,
    page_record: Tensor,
    spilled: Tensor,
    overflow: Tensor,
    free_list_cuda: Tensor,
    free_list_host: Tensor | None,
    tail: Tensor,
    capacity: Tensor,
    new_tail: Tensor | None,
    zero_rest: bool,
) -> None:
    """The description, page by page, for lists and counts that are sound."""
    page_size, tokens = cuda_src.shape[1], int(num_tokens)
    if new_tail is not None:
        new_tail.copy_(tail)
    if int(overflow):
        return
    place = int(spilled)
    pool, free_list = ((cuda_src, free_list_cuda), (host_src, free_list_host))[place]
    pages = (tokens + page_size - 1) // page_size
    for page in range(pages):
        assert pool is not None
        assert free_list is not None
        identity = page_record[page]
        rows = dst[page * page_size : min((page + 1) * page_size, tokens)]
        rows.copy_(pool[identity, : len(rows)])
        free_list[(int(tail[place]) + page) % int(capacity[place])] = identity
    (tail if new_tail is None else new_tail)[place] += pages
    if zero_rest:
        dst[tokens:] = 0


def _check_of(op: str, expected: Any) -> Any:
    def check(arguments: tuple[Any, ...], results: tuple[Tensor, ...], baseline: tuple[Tensor, ...]) -> Verdict:
        """To the byte, in everything that the op may write."""
        wanted = fresh(to_cpu(arguments))
        expected(*wanted)
        wrong = 0
        for got, want in zip(results, OPS[op].mutated_of(wanted), strict=True):
            a, b = got.reshape(-1).view(torch.uint8), want.reshape(-1).view(torch.uint8)
            wrong += 0 if torch.equal(a, b) else int((a != b).sum())
        return Verdict(float(wrong), 0.0, "wrong or touched bytes")

    return check


def paged_stash_copy_bytes(*arguments: Any) -> int:
    given = named("paged_stash_copy", arguments)
    return 2 * int(given.num_tokens) * int(given.src.shape[1]) * int(given.src.element_size())


def paged_stash_pop_bytes(*arguments: Any) -> int:
    given = named("paged_stash_pop", arguments)
    return 2 * int(given.num_tokens) * int(given.dst.shape[1]) * int(given.dst.element_size())


COPY = Baseline(
    baseline_paged_stash_copy, _check_of("paged_stash_copy", expected_paged_stash_copy), paged_stash_copy_bytes
)
POP = Baseline(baseline_paged_stash_pop, _check_of("paged_stash_pop", expected_paged_stash_pop), paged_stash_pop_bytes)


def random_rows(generator: torch.Generator, dtype: torch.dtype, *shape: int) -> Tensor:
    """Random bytes, seen as that dtype."""
    size = torch.empty(0, dtype=dtype, device="cpu").element_size()
    return torch.randint(
        256, (*shape[:-1], shape[-1] * size), generator=generator, dtype=torch.uint8, device="cpu"
    ).view(dtype)


def cases_of(
    rows: int,
    hidden: int,
    dtype: torch.dtype,
    tokens: int,
    page_size: int = 64,
    free: int | None = None,
    host_free: int | None = None,
    in_place: bool = True,
    overflow: int = 0,
    zero_rest: bool = False,
    benched: bool = False,
    large: bool = False,
    what: str = "",
) -> tuple[Case, Case]:
    """The copy and the pop of one problem.

    free, host_free: pages that are free before the copy; None: as many as all rows take, and no host pool. As many
    again are taken, by others. Benchmarks write new heads to another tensor, so that every call finds the same list.
    """
    needed = -(-tokens // page_size)
    cuda_free = -(-rows // page_size) if free is None else free

    def state(generator: torch.Generator, pages: int, head: int, in_order: bool) -> tuple[Tensor, int, int]:
        """A list of twice as many pages with `pages` of them free, its head and its tail."""
        capacity = max(2 * pages, 1)
        ids = (
            torch.arange(capacity, device="cpu")
            if in_order
            else torch.randperm(capacity, generator=generator, device="cpu")
        )
        return ids, head, head + pages

    def pools(generator: torch.Generator) -> Any:
        cuda = state(generator, cuda_free, (1 << 40) + 5, benched)
        host = None if host_free is None else state(generator, host_free, 3, False)
        cuda_pool = random_rows(generator, dtype, len(cuda[0]), page_size, hidden)
        host_pool = None if host is None else random_rows(generator, dtype, len(host[0]), page_size, hidden)
        capacity = torch.tensor([len(cuda[0]), 0 if host is None else len(host[0])], dtype=torch.int64, device="cpu")
        head, tail = (
            torch.tensor([cuda[i], 0 if host is None else host[i]], dtype=torch.int64, device="cpu") for i in (1, 2)
        )
        return cuda_pool, host_pool, cuda[0], None if host is None else host[0], head, tail, capacity

    def make_copy(generator: torch.Generator) -> tuple[Any, ...]:
        cuda_pool, host_pool, cuda_list, host_list, head, tail, capacity = pools(generator)
        record = torch.randint(1 << 40, (-(-rows // page_size) + 3,), generator=generator, device="cpu")
        flags = [torch.tensor([flag], dtype=torch.int64, device="cpu") for flag in (overflow, 0, 1)]
        new_head = None if in_place else torch.tensor([-1, -1], dtype=torch.int64, device="cpu")
        src = random_rows(generator, dtype, rows, hidden)
        fixed = (
            src,
            cuda_pool,
            host_pool,
            torch.tensor([tokens], dtype=torch.int64, device="cpu"),
            cuda_list,
            host_list,
            head,
            tail,
            capacity,
        )
        high_water = torch.tensor([needed, 1], dtype=torch.int64, device="cpu") if in_place else None
        return (*fixed, record, *flags, new_head, high_water)

    def make_pop(generator: torch.Generator) -> tuple[Any, ...]:
        cuda_pool, host_pool, cuda_list, host_list, _, tail, capacity = pools(generator)
        spilled = int(needed > cuda_free)
        pool_list = cuda_list if not spilled or host_list is None else host_list
        # The pages that are taken are those ahead of the tail.
        taken = pool_list[(tail[spilled] + torch.arange(needed, device="cpu")) % len(pool_list)]
        record = torch.randint(1 << 40, (-(-rows // page_size) + 3,), generator=generator, device="cpu")
        record[:needed] = taken
        new_tail = None if in_place else torch.tensor([-1, -1], dtype=torch.int64, device="cpu")
        dst = random_rows(generator, dtype, rows, hidden)
        fixed = (
            cuda_pool,
            host_pool,
            dst,
            torch.tensor([tokens], dtype=torch.int64, device="cpu"),
            record,
            torch.tensor([spilled], dtype=torch.int64, device="cpu"),
        )
        lists = (torch.tensor([overflow], dtype=torch.int64, device="cpu"), cuda_list, host_list, tail, capacity)
        return (*fixed, *lists, new_tail, zero_rest)

    size = rows * hidden * torch.empty(0, dtype=dtype, device="cpu").element_size()
    amount = f"{size // MIB} MiB" if size >= MIB else f"{tokens} of {rows} x {hidden}"
    name = f"{amount} {str(dtype).removeprefix('torch.')}, pages of {page_size}{what}"
    labels = {"rows": rows, "hidden": hidden, "tokens": tokens, "page_size": page_size}
    return (
        Case("paged_stash_copy", name, make_copy, COPY, benched=benched, large=large, labels=labels),
        Case("paged_stash_pop", name, make_pop, POP, benched=benched, large=large, labels=labels),
    )


_ALL = (
    cases_of(128, 4096, torch.bfloat16, 128, in_place=False, benched=True),
    cases_of(32768, 4096, torch.uint8, 32768, in_place=False, benched=True, large=True),
    cases_of(65536, 4096, torch.bfloat16, 65536, in_place=False, benched=True, large=True),
    cases_of(1030, 4096, torch.bfloat16, 1001, zero_rest=True, what=", rest zeroed"),
    cases_of(48, 32, torch.float32, 48, page_size=16),
    cases_of(300, 96, torch.float32, 201),
    cases_of(300, 96, torch.bfloat16, 0, what=", no tokens"),
    cases_of(50, 7, torch.uint8, 33, page_size=16, zero_rest=True, what=", rest zeroed"),
    cases_of(40, 3, torch.uint8, 40, page_size=5, zero_rest=True, what=", rest zeroed"),
    cases_of(40, 3, torch.uint8, 27, page_size=5, free=2, host_free=9, zero_rest=True, what=", to host, rest zeroed"),
    cases_of(130, 40, torch.float8_e4m3fn, 130, free=2, host_free=3, in_place=False, what=", to host"),
    cases_of(2100, 16, torch.uint8, 1100, page_size=1024, zero_rest=True, what=", rest zeroed"),
    cases_of(100, 8, torch.float64, 100, page_size=16, overflow=1, what=", overflow set"),
)
CASES = (
    *(case for pair in zip(*_ALL, strict=True) for case in pair),
    # Only a copy can overflow.
    cases_of(90, 24, torch.bfloat16, 80, page_size=16, free=4, host_free=4, what=", overflows")[0],
    cases_of(90, 24, torch.bfloat16, 80, page_size=16, free=4, what=", overflows without host pool")[0],
    cases_of(90, 3, torch.uint8, 80, page_size=15, free=4, what=", overflows")[0],
)
