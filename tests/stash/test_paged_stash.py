"""Both ops against their description: where pages come from and go to, what is copied, what is left alone."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from dsv4_kernels import InvalidArgumentError
from dsv4_kernels.cases import is_poison, poison
from dsv4_kernels.cpu.stash import functions as on_cpu
from dsv4_kernels.stash import paged_stash_copy, paged_stash_pop

from tests.emulated import DISTINCT, emulated, ptx_folder
from tests.stash.pools import Pools, as_bytes, number, random_rows

FAR = 1 << 40
MAXIMUM = 70


@pytest.mark.parametrize("page_size", [16, 17, 64])
@pytest.mark.parametrize("hidden", [8, 5])
@pytest.mark.parametrize("which", ["0", "1", "page - 1", "page", "page + 1", "maximum"])
def test_tokens_around_pages(which: str, hidden: int, page_size: int, device: str) -> None:
    tokens = {"0": 0, "1": 1, "page - 1": page_size - 1, "page": page_size, "page + 1": page_size + 1}.get(
        which, MAXIMUM
    )
    pools = Pools(device, 7, page_size=page_size, hidden=hidden)
    rows = pools.rows(MAXIMUM)
    record = pools.copy(rows, tokens)
    pages = -(-tokens // page_size)
    if tokens:
        pools.expect_stashed(rows, record, list(range(pages)))
    else:
        assert int(record.spilled) == -7
        assert is_poison(record.pages).all()
    assert (as_bytes(pools.pool)[pages:] == 0xA5).all()
    assert pools.free() == list(range(pages, 7))
    back = pools.pop(pools.poisoned(MAXIMUM), record)
    assert torch.equal(as_bytes(back[:tokens]), as_bytes(rows[:tokens]))
    assert (as_bytes(back[tokens:]) == 0xA5).all()
    assert pools.free() == [*range(pages, 7), *range(pages)]
    assert int(pools.overflow) == int(pools.host_spill) == 0


@pytest.mark.parametrize("page_size", [16, 100, 1024])
@pytest.mark.parametrize(
    ("dtype", "hidden"),
    [
        (torch.uint8, 1),
        (torch.uint8, 16),
        (torch.uint8, 33),
        (torch.bfloat16, 7),
        (torch.bfloat16, 520),
        (torch.float32, 12),
        (torch.float8_e4m3fn, 48),
        (torch.float8_e5m2, 9),
        (torch.int16, 5),
        (torch.complex64, 3),
    ],
    ids=str,
)
def test_any_dtype_and_width(dtype: torch.dtype, hidden: int, page_size: int, device: str) -> None:
    rows = 2 * page_size + 5
    pools = Pools(device, 3, page_size=page_size, hidden=hidden, dtype=dtype)
    source = pools.rows(rows)
    record = pools.copy(source, rows - 2)
    pools.expect_stashed(source, record, [0, 1, 2])
    back = pools.pop(pools.poisoned(rows), record)
    assert torch.equal(as_bytes(back[:-2]), as_bytes(source[:-2]))
    assert (as_bytes(back[-2:]) == 0xA5).all()


@pytest.mark.parametrize("page_size", [7, 96])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.int64], ids=str)
def test_pools_an_element_off_16_bytes(dtype: torch.dtype, page_size: int, device: str) -> None:
    """Elements of every size, in pages of one unit of a warp and of several, the last of them in part."""
    rows = 2 * page_size + 5
    pools = Pools(device, 3, page_size=page_size, hidden=37, dtype=dtype, off_16=True)
    source = pools.rows(rows)
    record = pools.copy(source, rows - 2)
    pools.expect_stashed(source, record, [0, 1, 2])
    back = pools.pop(pools.poisoned(rows), record, zero_rest=True)
    assert torch.equal(as_bytes(back[:-2]), as_bytes(source[:-2]))
    assert (as_bytes(back[-2:]) == 0).all()


@pytest.mark.parametrize("offset", [1, 4, 16])
@pytest.mark.parametrize("what", ["rows", "pool"])
def test_misaligned_memory(what: str, offset: int, device: str) -> None:
    """The same bytes, however the memory lies; what lies around it stays."""
    pools = Pools(device, 5, hidden=48, dtype=torch.uint8)
    storage = poison(torch.empty(5 * 16 * 48 + 32, dtype=torch.uint8, device=device))
    source = pools.rows(40)
    if what == "rows":
        source = storage[offset : offset + source.numel()].view(source.shape).copy_(source)
    else:
        pools.pool = storage[offset : offset + pools.pool.numel()].view(pools.pool.shape)
    around = storage.clone()
    record = pools.copy(source, 37)
    pools.expect_stashed(source, record, [0, 1, 2])
    target = pools.poisoned(40)
    if what == "rows":
        target = storage[offset : offset + target.numel()].view(target.shape)
        poison(target)
    pools.pop(target, record)
    assert torch.equal(target[:37], source[:37]) or what == "rows"
    assert (target[37:] == 0xA5).all()
    for end in (slice(0, offset), slice(offset + 5 * 16 * 48, None)):
        assert torch.equal(storage[end], around[end])


@pytest.mark.parametrize("head", [0, 5, FAR, FAR + 6])
def test_exact_fit_and_wrap(head: int, device: str) -> None:
    """All pages but one, again and again: the list goes round, heads and tails only grow."""
    pools = Pools(device, 7, head=head, hidden=24, dtype=torch.uint8)
    pools.list.copy_(torch.tensor([3, 0, 6, 1, 5, 2, 4]))
    free = pools.free()
    for turn in range(4):
        rows = pools.rows(16 * 7, seed=turn)
        record = pools.copy(rows, 16 * 7 - turn)
        pools.expect_stashed(rows, record, free)
        assert pools.free() == []
        assert int(pools.copy(rows, 0).spilled) == -7  # nothing fits into nothing
        assert int(pools.overflow) == 0
        back = pools.pop(pools.poisoned(16 * 7), record)
        assert torch.equal(back[: 16 * 7 - turn], rows[: 16 * 7 - turn])
        assert pools.free() == free
        poison(pools.pool)
    assert pools.head.tolist() == [head + 28, head]
    assert pools.tail.tolist() == [head + 35, head]


@pytest.mark.parametrize("host_pages", [None, 0, 2])
@pytest.mark.parametrize("hidden", [16, 3])
def test_overflow_is_sticky(hidden: int, host_pages: int | None, device: str) -> None:
    pools = Pools(device, 3, host_pages, hidden=hidden, off_16=hidden == 3)
    rows = pools.rows(80)
    first = pools.copy(rows, 20)
    before = pools.state()
    lost = pools.copy(rows, 80)  # 5 pages where 1 is free, or 2
    assert int(pools.overflow) == int(lost.spilled) == 1
    assert int(pools.host_spill) == 0
    assert is_poison(lost.pages).all()
    pools.overflow.zero_()
    assert all(torch.equal(a, b) for a, b in zip(pools.state(), before, strict=True))
    pools.overflow.fill_(1)
    before = pools.state()
    refused = pools.copy(rows, 1)  # which would fit
    assert int(refused.spilled) == -7
    assert is_poison(refused.pages).all()
    back = pools.pop(pools.poisoned(80), first, zero_rest=True)
    assert is_poison(back).all()
    assert all(torch.equal(a, b) for a, b in zip(pools.state(), before, strict=True))
    pools.overflow.zero_()
    assert torch.equal(as_bytes(pools.pop(pools.poisoned(80), first)[:20]), as_bytes(rows[:20]))


@pytest.mark.parametrize("hidden", [16, 3])
def test_cuda_then_host_then_overflow(hidden: int, device: str) -> None:
    """A tensor never splits; smaller ones still find room; each goes back to where it came from."""
    pools = Pools(device, 4, 5, hidden=hidden, off_16=hidden == 3, head=FAR)
    host = pools.free(1)
    assert host == [1, 2, 3, 4, 0]
    rows = [pools.rows(64, seed) for seed in range(4)]
    a = pools.copy(rows[0], 48)
    pools.expect_stashed(rows[0], a, [0, 1, 2])
    assert int(pools.host_spill) == 0
    b = pools.copy(rows[1], 33)  # 3 pages, 1 free: to the host
    pools.expect_stashed(rows[1], b, host[:3], place=1)
    assert int(pools.host_spill) == 1
    c = pools.copy(rows[2], 16)
    pools.expect_stashed(rows[2], c, [3])
    d = pools.copy(rows[3], 32)
    pools.expect_stashed(rows[3], d, host[3:], place=1)
    assert pools.head.tolist() == [FAR + 4, FAR + 5]
    assert pools.high_water.tolist() == [4, 5]
    assert (pools.free(), pools.free(1)) == ([], [])
    for record, source, tokens in ((b, rows[1], 33), (a, rows[0], 48), (d, rows[3], 32), (c, rows[2], 16)):
        back = pools.pop(pools.poisoned(64), record)
        assert torch.equal(as_bytes(back[:tokens]), as_bytes(source[:tokens]))
        assert (as_bytes(back[tokens:]) == 0xA5).all()
    assert (pools.free(), pools.free(1)) == ([0, 1, 2, 3], host)
    pools.copy(rows[0], 64)
    pools.copy(rows[0], 64)
    assert int(pools.overflow) == 0
    assert int(pools.copy(rows[0], 64).spilled) == 1
    assert int(pools.overflow) == 1


def test_interleaved_then_refilled(device: str) -> None:
    pools = Pools(device, 9, head=3, hidden=40, dtype=torch.float32)
    rows = {name: pools.rows(60, seed) for seed, name in enumerate("abcd")}
    tokens = {"a": 20, "b": 48, "c": 7, "d": 50}
    records = {name: pools.copy(rows[name], tokens[name]) for name in "ab"}
    back = pools.pop(pools.poisoned(60), records["a"])
    assert torch.equal(as_bytes(back[:20]), as_bytes(rows["a"][:20]))
    assert pools.high_water.tolist() == [5, 0]
    records |= {name: pools.copy(rows[name], tokens[name]) for name in "cd"}
    assert pools.high_water.tolist() == [8, 0]
    taken = [records[name].pages[: -(-tokens[name] // 16)].tolist() for name in "bcd"]
    assert len(set(functools.reduce(operator.iadd, taken, []))) == 8  # no page twice
    for name in "cbd":
        back = pools.pop(pools.poisoned(60), records[name])
        assert torch.equal(as_bytes(back[: tokens[name]]), as_bytes(rows[name][: tokens[name]]))
    assert sorted(pools.free()) == list(range(9))
    full = pools.rows(144, 9)
    record = pools.copy(full, 144)
    assert pools.high_water.tolist() == [9, 0]
    assert torch.equal(as_bytes(pools.pop(pools.poisoned(144), record)), as_bytes(full))
    pools.copy(full, 1)
    assert pools.high_water.tolist() == [9, 0]


@pytest.mark.parametrize("hidden", [16, 3])
@pytest.mark.parametrize("tokens", [0, 13, 32, 50])
def test_rest_zeroed(tokens: int, hidden: int, device: str) -> None:
    pools = Pools(device, 4, hidden=hidden, off_16=hidden == 3, dtype=torch.uint8)
    rows = pools.rows(50)
    record = pools.copy(rows, tokens)
    record.spilled.clamp_(min=0)
    storage = poison(torch.empty(50 * hidden + 64, dtype=torch.uint8, device=device))
    target = storage[16 : 16 + 50 * hidden].view(50, hidden)
    pools.pop(target, record, zero_rest=True)
    assert torch.equal(target[:tokens], rows[:tokens])
    assert not target[tokens:].any()
    assert is_poison(storage[:16]).all()
    assert is_poison(storage[16 + 50 * hidden :]).all()


def test_new_heads_and_tails_to_other_tensors(device: str) -> None:
    """The lists' own stay; an overflow hands the old ones on."""
    pools = Pools(device, 4, 4, head=FAR)
    rows, new = pools.rows(64), number(0, device).repeat(2)
    for tokens, expected in ((40, [FAR + 3, FAR]), (0, [FAR, FAR])):
        record = pools.copy(rows, tokens, new)
        assert new.tolist() == expected
        assert pools.head.tolist() == [FAR, FAR]
    record = pools.copy(rows, 40, new)
    pools.pop(pools.poisoned(64), record, new)
    assert new.tolist() == [FAR + 7, FAR + 4]
    assert pools.tail.tolist() == [FAR + 4, FAR + 4]
    pools.overflow.fill_(1)
    pools.copy(rows, 40, new)
    assert new.tolist() == [FAR, FAR]
    pools.pop(pools.poisoned(64), record, new)
    assert new.tolist() == [FAR + 4, FAR + 4]


@pytest.mark.parametrize("hidden", [16, 3])
@pytest.mark.parametrize(("tokens", "used"), [(-1, 0), (-(2**63), 0), (41, 40), (2**63 - 1, 40)])
def test_counts_outside_the_rows(tokens: int, used: int, hidden: int, device: str) -> None:
    pools = Pools(device, 6, hidden=hidden, off_16=hidden == 3)
    rows = pools.rows(40)
    record = pools.copy(rows, tokens)
    assert pools.free() == list(range(-(-used // 16), 6))
    if used:
        pools.expect_stashed(rows, record, [0, 1, 2])
    record.spilled.zero_()
    back = pools.pop(pools.poisoned(40), record)
    assert torch.equal(as_bytes(back[:used]), as_bytes(rows[:used]))
    assert is_poison(back[used:]).all()


CONTRADICTIONS: dict[str, Callable[[Pools], object]] = {
    "capacity 0": lambda p: p.capacity.zero_(),
    "capacity negative": lambda p: p.capacity.fill_(-3),
    "capacity above the list": lambda p: p.capacity.add_(1),
    "capacity of 2^62": lambda p: p.capacity.fill_(2**62),
    "head above tail": lambda p: p.head.copy_(p.tail + 1),
    "head negative": lambda p: p.head.fill_(-1),
    "head far below tail": lambda p: p.tail.fill_(2**62),
    "both negative": lambda p: (p.head.fill_(-9), p.tail.fill_(-5)),
}


@pytest.mark.parametrize("hidden", [16, 3])
@pytest.mark.parametrize("contradiction", CONTRADICTIONS)
def test_lists_that_contradict_themselves_have_no_pages(contradiction: str, hidden: int, device: str) -> None:
    pools = Pools(device, 5, hidden=hidden, off_16=hidden == 3)
    CONTRADICTIONS[contradiction](pools)
    before = pools.state()
    record = pools.copy(pools.rows(20), 20)
    assert int(pools.overflow) == int(record.spilled) == 1
    assert is_poison(record.pages).all()
    pools.overflow.zero_()
    assert all(torch.equal(a, b) for a, b in zip(pools.state(), before, strict=True))


@pytest.mark.parametrize("hidden", [16, 3])
@pytest.mark.parametrize(
    "change",
    [
        lambda p, r: p.capacity.zero_(),
        lambda p, r: p.capacity.fill_(-(2**63)),
        lambda p, r: p.capacity.fill_(6),
        lambda p, r: p.capacity.fill_(1),
        lambda p, r: p.tail.fill_(-1),
        lambda p, r: r.spilled.fill_(1),
    ],
    ids=[
        "capacity 0",
        "capacity lowest",
        "capacity above",
        "capacity below the pages",
        "tail negative",
        "no host pool",
    ],
)
def test_a_pop_that_cannot_be_does_nothing(change: Callable[..., object], hidden: int, device: str) -> None:
    pools = Pools(device, 5, hidden=hidden, off_16=hidden == 3)
    record = pools.copy(pools.rows(20), 20)
    change(pools, record)
    before = pools.state()
    assert is_poison(pools.pop(pools.poisoned(20), record, zero_rest=True)).all()
    assert all(torch.equal(a, b) for a, b in zip(pools.state(), before, strict=True))


@pytest.mark.parametrize("hidden", [16, 3])
@pytest.mark.parametrize("identity", [-1, 5, 2**62, -(2**63)])
def test_page_ids_outside_the_pool(identity: int, hidden: int, device: str) -> None:
    """Recorded and given back as they are; their rows are not moved."""
    pools = Pools(device, 5, hidden=hidden, off_16=hidden == 3, dtype=torch.uint8)
    pools.list[1] = identity
    rows = pools.rows(60)
    record = pools.copy(rows, 60)
    assert record.pages[:4].tolist() == [0, identity, 2, 3]
    for page in (0, 2, 3):
        part = rows[16 * page : 16 * page + 16]
        assert torch.equal(pools.pool[page, : len(part)], part)
    assert (as_bytes(pools.pool)[[1, 4]] == 0xA5).all()
    back = pools.pop(pools.poisoned(60), record)
    assert torch.equal(back[:16], rows[:16])
    assert is_poison(back[16:32]).all()
    assert torch.equal(back[32:], rows[32:])
    assert pools.free() == [4, 0, identity, 2, 3]


@pytest.mark.thorough
def test_large_pages_with_odd_ends(device: str) -> None:
    """Enough bytes for bulk copies.

    Pages that are no multiple of a stage, a last row that is no multiple of 16 bytes, a page id outside the pool, and
    the list's end.
    """
    pools = Pools(device, 12, 12, page_size=112, hidden=8321, dtype=torch.uint8, head=FAR)
    pools.list[int(pools.head[0] + 5) % 12] = 77
    rows = pools.rows(1120)
    record = pools.copy(rows, 1003)
    ids = record.pages[:9].tolist()
    assert ids == [77 if i == 5 else (FAR + i) % 12 for i in range(9)]
    for page, identity in enumerate(ids):
        part = rows[112 * page : min(112 * page + 112, 1003)]
        assert identity == 77 or torch.equal(pools.pool[identity, : len(part)], part)
    assert is_poison(pools.pool[ids[8], 107:]).all()
    back = pools.pop(pools.poisoned(1120), record, zero_rest=True)
    keep = torch.ones(1003, dtype=torch.bool, device=rows.device)
    keep[560:672] = False
    assert torch.equal(back[:1003][keep], rows[:1003][keep])
    assert is_poison(back[560:672]).all()
    assert not back[1003:].any()
    assert pools.tail.tolist() == [FAR + 21, FAR + 12]


def test_large_whole_pages(device: str) -> None:
    """Bulk copies of pages of which the last one is as full as the others."""
    pools = Pools(device, 12, 12, page_size=112, hidden=8320, dtype=torch.uint8)
    rows = pools.rows(1120)
    record = pools.copy(rows, 1120)
    pools.expect_stashed(rows, record, list(range(10)))
    assert torch.equal(pools.pop(pools.poisoned(1120), record), rows)
    assert pools.free() == [10, 11, *range(10)]


@pytest.mark.parametrize(("odd", "head"), [(False, 5), (True, 5), (True, FAR + 4)])
def test_pages_from_where_the_list_wraps(odd: bool, head: int, device: str) -> None:
    """Pages of an odd number of bytes, or of 16 rows: the end of the list lies within one tensor."""
    page_size = 5 if odd else 16
    pools = Pools(device, 7, page_size=page_size, hidden=3, dtype=torch.uint8, head=head)
    pools.list.copy_(torch.tensor([3, 0, 6, 1, 5, 2, 4]))
    free = pools.free()
    rows = pools.rows(5 * page_size)
    record = pools.copy(rows, 5 * page_size)
    pools.expect_stashed(rows, record, free[:5])
    assert pools.free() == free[5:]
    assert torch.equal(pools.pop(pools.poisoned(5 * page_size), record), rows)
    assert pools.free() == [*free[5:], *free[:5]]


@pytest.mark.parametrize("architecture", DISTINCT)
@pytest.mark.parametrize(
    ("kernels", "options"),
    [
        ("unitsI5uint4E", {"hidden": 16}),
        ("unitsItE", {"hidden": 3, "off_16": True}),
        ("unitsIjE", {"hidden": 37, "off_16": True, "dtype": torch.float32}),
        ("unitsIyE", {"hidden": 37, "off_16": True, "dtype": torch.int64}),
        ("unitsI5uint4E", {"hidden": 3, "dtype": torch.uint8}),  # 16 rows of 3 bytes are a multiple of 16
        ("unitsIhE", {"hidden": 3, "dtype": torch.uint8, "page_size": 5}),
        ("bulk", {"hidden": 8321, "dtype": torch.uint8, "page_size": 112}),
        ("bulk", {"hidden": 8320, "dtype": torch.uint8, "page_size": 112}),
    ],
    ids=str,
)
def test_which_kernels_the_tests_above_run(kernels: str, options: dict[str, Any], architecture: str) -> None:
    ptx_folder()
    with emulated(architecture) as symbols:
        pools = Pools("cpu", 12, 12, **options)
        rows = pools.page_size * (10 if kernels == "bulk" else 2)
        pools.pop(pools.poisoned(rows), pools.copy(pools.rows(rows), 1))
    assert len(symbols) == 2
    for symbol, op in zip(symbols, ("copy", "pop"), strict=True):
        assert f"paged_stash_{op}_{kernels}" in symbol


@pytest.mark.parametrize("shape", [(0, 8), (0, 3)])
def test_no_rows(shape: tuple[int, int], device: str) -> None:
    pools = Pools(device, 2, hidden=shape[1])
    new = number(-1, device).repeat(2)
    record = pools.copy(pools.rows(0), 4, new)
    assert new.tolist() == [0, 0]
    pools.pop(pools.poisoned(0), record, new)
    assert new.tolist() == [2, 0]


def conserve(pools: Pools, turns: int, look: int, copy: Callable[..., None], pop: Callable[..., None]) -> int:
    """Random copies and pops: no page is ever lost, in two places, or read back with other rows. Returns the spills."""
    device, generator = pools.device, torch.Generator().manual_seed(turns)
    choices = torch.randint(1 << 30, (turns, 3), generator=generator).tolist()
    counts = [number(tokens, device) for tokens in range(41)]
    source = torch.empty(40, pools.hidden, dtype=pools.dtype, device=device)
    target = torch.empty_like(source)
    workspace = torch.zeros(64, dtype=torch.uint8, device=device)
    held: list[tuple[torch.Tensor, torch.Tensor, int, int]] = []
    spare = [(torch.zeros(10, dtype=torch.int64, device=device), number(0, device)) for _ in range(64)]
    spills = 0
    for turn, (coin, which, tokens) in enumerate(choices):
        tokens = 1 + tokens % 40
        if (coin % 100 < 55 or not held) and spare:
            record, spilled = spare.pop()
            source.fill_(turn % 251)
            copy(source, counts[tokens], record, spilled, workspace)
            if int(pools.overflow):
                pools.overflow.zero_()  # the step would run again; here it goes on without this tensor
                spare.append((record, spilled))
            else:
                held.append((record, spilled, tokens, turn % 251))
                spills += int(spilled)
        else:
            record, spilled, tokens, value = held.pop(which % len(held))
            target.fill_(255)
            pop(target, counts[tokens], record, spilled, workspace)
            assert bool((target[:tokens] == value).all()), turn
            assert bool((target[tokens:] == 255).all()), turn
            spare.append((record, spilled))
        if turn % look == 0 or turn == turns - 1:
            for place, pool in enumerate((pools.pool, pools.host_pool)):
                assert pool is not None
                taken = [i for r, s, t, _ in held if int(s) == place for i in r[: -(-t // pools.page_size)].tolist()]
                assert sorted(pools.free(place) + taken) == list(range(pool.shape[0])), turn
    return spills


@pytest.mark.thorough
def test_pages_are_conserved_over_100000_operations() -> None:
    pools = Pools("cpu", 37, 11, page_size=4, hidden=2, dtype=torch.uint8, head=FAR)
    lists = (pools.list, pools.host_list)

    def copy(source, tokens, record, spilled, _):  # type: ignore[no-untyped-def]
        counters = (pools.head, pools.tail, pools.capacity, record, pools.overflow, pools.host_spill, spilled, None)
        on_cpu.paged_stash_copy(source, pools.pool, pools.host_pool, tokens, *lists, *counters, pools.high_water)

    def pop(target, tokens, record, spilled, _):  # type: ignore[no-untyped-def]
        counters = (record, spilled, pools.overflow, *lists, pools.tail, pools.capacity, None, False)
        on_cpu.paged_stash_pop(pools.pool, pools.host_pool, target, tokens, *counters)

    assert conserve(pools, 100_000, 500, copy, pop) > 1000


@pytest.mark.gpu
@pytest.mark.parametrize("hidden", [16, 3])
def test_pages_are_conserved_over_2000_operations_on_a_gpu(hidden: int) -> None:
    pools = Pools("cuda", 37, 11, page_size=4, hidden=hidden, off_16=hidden == 3, dtype=torch.uint8, head=FAR)
    lists = (pools.list, pools.host_list)

    def copy(source, tokens, record, spilled, workspace):  # type: ignore[no-untyped-def]
        counters = (pools.head, pools.tail, pools.capacity, record, pools.overflow, pools.host_spill, spilled, None)
        paged_stash_copy(source, pools.pool, pools.host_pool, tokens, *lists, *counters, workspace=workspace)

    def pop(target, tokens, record, spilled, workspace):  # type: ignore[no-untyped-def]
        counters = (record, spilled, pools.overflow, *lists, pools.tail, pools.capacity, None, False)
        paged_stash_pop(pools.pool, pools.host_pool, target, tokens, *counters, workspace=workspace)

    assert conserve(pools, 2000, 50, copy, pop) > 20


@pytest.mark.gpu
@pytest.mark.parametrize("hidden", [16, 3])
def test_a_captured_graph_follows_the_counts(hidden: int) -> None:
    """One capture, in place, replayed with counts that fit, spill, overflow, and are none."""
    pools = Pools("cuda", 6, 9, hidden=hidden, off_16=hidden == 3, dtype=torch.uint8)
    rows, back = pools.rows(140), pools.poisoned(140)
    graph = torch.cuda.CUDAGraph()
    record = pools.record(140, 0)
    counters = (pools.head, pools.tail, pools.capacity, record.pages, pools.overflow, pools.host_spill, record.spilled)
    with torch.cuda.graph(graph):
        paged_stash_copy(rows, pools.pool, pools.host_pool, record.tokens, pools.list, pools.host_list, *counters)
        pools.pop(back, record)
    for turn, tokens in enumerate((96, 1, 0, 97, 140, 16, 2**40, 33)):
        rows.copy_(pools.rows(140, turn))
        poison(back)
        record.tokens.fill_(tokens)
        graph.replay()
        used = min(tokens, 140)
        assert torch.equal(back[:used], rows[:used])
        assert is_poison(back[used:]).all()
        assert int(record.spilled) == int(used > 96) or not used
        assert int(pools.overflow) == 0
    pools.capacity.fill_(5)
    poison(back)
    graph.replay()
    assert int(pools.overflow) == 1
    assert is_poison(back).all()


@pytest.mark.gpu
@pytest.mark.parametrize("hidden", [1024, 1023])
@pytest.mark.parametrize("tokens", [100, 20000])
def test_pool_beyond_two_to_the_31_elements(tokens: int, hidden: int) -> None:
    pages = 2**31 // (64 * 1023) + 400
    pool = torch.empty(pages, 64, hidden, dtype=torch.uint8, device="cuda")
    pools = Pools("cuda", 1, page_size=64, hidden=hidden, dtype=torch.uint8)
    pools.pool = pool
    pools.list = torch.arange(pages, device="cuda").flip(0)
    pools.head = torch.tensor([FAR * pages, 0], device="cuda")
    pools.tail = torch.tensor([FAR * pages + pages, 0], device="cuda")
    pools.capacity = torch.tensor([pages, 0], device="cuda")
    rows = random_rows((tokens, hidden), torch.uint8, "cuda")
    record = pools.copy(rows, tokens)
    used = -(-tokens // 64)
    assert record.pages[:used].tolist() == list(range(pages - 1, pages - 1 - used, -1))
    last = pool[-1]
    assert last.data_ptr() - pool.data_ptr() > 2**31
    assert torch.equal(last, rows[:64])
    assert torch.equal(pools.pop(pools.poisoned(tokens), record), rows)


@pytest.mark.gpu
def test_host_memory_must_be_pinned() -> None:
    pools = Pools("cuda", 2, 2)
    assert pools.host_pool is not None
    pools.host_pool = pools.host_pool.clone()
    text = "expected CUDA memory or pinned host memory, got pageable host memory; allocate it with pin_memory=True"
    with pytest.raises(InvalidArgumentError) as raised:
        pools.copy(pools.rows(4), 4)
    assert str(raised.value) == f"paged_stash_copy: host_dst: {text}"
    with pytest.raises(InvalidArgumentError) as raised:
        pools.pop(pools.poisoned(4), pools.record(4, 4))
    assert str(raised.value) == f"paged_stash_pop: host_src: {text}"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda p: setattr(p, "pool", p.pool[:, :, :9]), "cuda_dst: expected shape [any, any, 10], got [3, 16, 9]"),
        (lambda p: setattr(p, "pool", p.pool.float()), "cuda_dst: expected dtype bfloat16, got float32"),
        (lambda p: setattr(p, "pool", p.pool[:, :0]), "page_size: expected 1 to 65536, got 0"),
        (lambda p: setattr(p, "list", p.list[1:]), "free_list_cuda: expected shape [3], got [2]"),
        (lambda p: setattr(p, "list", p.list.int()), "free_list_cuda: expected dtype int64, got int32"),
        (lambda p: setattr(p, "host_list", None), "free_list_host: expected a tensor, got none"),
        (
            lambda p: setattr(p, "host_pool", p.host_pool[:, :15]),
            "host_dst: expected shape [any, 16, 10], got [2, 15, 10]",
        ),
        (lambda p: setattr(p, "host_pool", None), "free_list_host: expected shape [0], got [2]"),
        (lambda p: setattr(p, "tail", p.tail[:1]), "free_list_tail: expected shape [2], got [1]"),
        (lambda p: setattr(p, "overflow", p.overflow.repeat(2)), "overflow: expected shape [1], got [2]"),
    ],
    ids=lambda value: value if isinstance(value, str) else "change",
)
def test_refuses_what_does_not_fit_together(change: Callable[[Pools], None], text: str, device: str) -> None:
    pools = Pools(device, 3, 2, hidden=10)
    rows = pools.rows(16)
    change(pools)
    with pytest.raises(InvalidArgumentError) as raised:
        pools.copy(rows, 16)
    assert str(raised.value) == f"paged_stash_copy: {text}"


def test_refuses_a_record_that_is_too_short(device: str) -> None:
    pools = Pools(device, 3)
    record = pools.record(16, 16)
    with pytest.raises(InvalidArgumentError, match=r"paged_stash_pop: page_record entries: expected at least 4, got 3"):
        pools.pop(pools.poisoned(49), record)
