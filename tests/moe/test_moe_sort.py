from __future__ import annotations

import random

import pytest
import torch
from dsv4_kernels import InvalidArgumentError, _native
from dsv4_kernels.cases import is_poison, poison
from dsv4_kernels.moe import SortedRoutes, max_tiles, moe_sort
from hypothesis import given, settings
from hypothesis import strategies as st


def expected(ids: list[list[int]], experts: int, tile_size: int, start: int) -> tuple[list[int], ...]:
    """By hand: lists of slots, one expert after another."""
    slots_of: list[list[int]] = [[] for _ in range(experts)]
    flat = [expert for row in ids for expert in row]
    for slot, expert in enumerate(flat):
        if start <= expert < start + experts:
            slots_of[expert - start].append(slot)
    tile_to_expert, tile_rows, row_to_slot = [], [], []
    for expert, slots in enumerate(slots_of):
        for first in range(0, len(slots), tile_size):
            tile = slots[first : first + tile_size]
            tile_to_expert.append(expert)
            tile_rows.append(len(tile))
            row_to_slot += tile + [-1] * (tile_size - len(tile))
    slot_to_row = [row_to_slot.index(slot) if slot in row_to_slot else -1 for slot in range(len(flat))]
    return tile_to_expert, tile_rows, row_to_slot, slot_to_row, [len(tile_rows), sum(tile_rows)]


def check(routes: SortedRoutes, ids: list[list[int]], experts: int, tile_size: int, start: int = 0) -> None:
    tile_to_expert, tile_rows, row_to_slot, slot_to_row, counts = expected(ids, experts, tile_size, start)
    unused = routes.tile_rows.numel() - len(tile_rows)
    assert unused >= 0, "more tiles than the bound"
    assert routes.tile_to_expert.tolist() == tile_to_expert + [-1] * unused
    assert routes.tile_rows.tolist() == tile_rows + [0] * unused
    assert routes.row_to_slot[: len(row_to_slot)].tolist() == row_to_slot
    assert routes.slot_to_row.flatten().tolist() == slot_to_row
    assert routes.counts.tolist() == counts


ROUTINGS = {
    "all to one expert": lambda token, k, experts: experts - 1,
    "one token each": lambda token, k, experts: (token * 6 + k) % experts,
    "even experts only": lambda token, k, experts: 2 * ((token + k) % (experts // 2)),
    "descending": lambda token, k, experts: (experts - 1 - token - k) % experts,
    "one expert too many rows for a tile": lambda token, k, experts: 0 if token % 3 else 1 + k,
}


@pytest.mark.parametrize("tile_size", [16, 32, 64, 128])
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize(("tokens", "top_k"), [(70, 6), (8, 4), (11, 3)])
def test_adversarial_routings(tokens: int, top_k: int, routing: str, tile_size: int, device: str) -> None:
    """Also of as many slots as one warp takes, and of one more."""
    experts = 40
    ids = [[ROUTINGS[routing](token, k, experts) for k in range(top_k)] for token in range(tokens)]
    routes = moe_sort(torch.tensor(ids, device=device), experts, tile_size)
    check(SortedRoutes(*(tensor.cpu() for tensor in routes)), ids, experts, tile_size)


@pytest.mark.parametrize(("tokens", "experts", "map_size"), [(3, 8, 0), (70, 40, 0), (700, 40, 50), (1, 8, 0)])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_ids_that_lie_apart(tokens: int, experts: int, map_size: int, dtype: torch.dtype, device: str) -> None:
    """The first columns of wider rows, as where shared experts are routed too. What lies between is not read."""
    generator = torch.Generator().manual_seed(tokens)
    ids = torch.randint(-1, experts + 2, (tokens, 6), generator=generator)
    wide = torch.full((tokens, 9), 1, dtype=dtype)
    wide[:, 1:7] = ids
    expert_map = torch.arange(map_size, dtype=torch.int32).flip(0) if map_size else None
    mapped = ids if expert_map is None else torch.where(ids >= 0, map_size - 1 - ids, -1)
    options = {} if expert_map is None else {"expert_map": expert_map.to(device)}
    routes = moe_sort(wide.to(device)[:, 1:7], experts, 16, **options)
    check(SortedRoutes(*(tensor.cpu() for tensor in routes)), mapped.tolist(), experts, 16)
    with pytest.raises(InvalidArgumentError, match="topk_ids: expected contiguous rows that do not overlap"):
        moe_sort(torch.zeros(6, 3, dtype=dtype, device=device).T, experts, 16)


@pytest.mark.parametrize("slots", [1, 2, 39, 40, 41, 55, 56, 57, 700])
@pytest.mark.parametrize("tile_size", [16, 128])
def test_the_bound_is_reached_and_never_passed(slots: int, tile_size: int) -> None:
    """The worst routing: every expert's last tile holds one slot, as far as the slots go."""
    experts, left = 40, slots
    count = [min(1, max(0, slots - expert)) for expert in range(experts)]
    left -= sum(count)
    expert = 0
    while left >= tile_size:
        count[expert] += tile_size
        left -= tile_size
        expert = (expert + 1) % experts
    worst = sum(-(-c // tile_size) for c in count)
    assert max_tiles(slots, experts, tile_size) == worst
    ids = [[e] for e, c in enumerate(count) for _ in range(c)] + [[0]] * left
    check(moe_sort(torch.tensor(ids), experts, tile_size), ids, experts, tile_size)


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_any_routing(data: st.DataObject) -> None:
    experts, k = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 5))
    start = data.draw(st.sampled_from([0, 3, 2**31 - 13]))
    some = st.integers(-2, experts + 1).map(lambda expert: expert + start) | st.integers(-(2**63), 2**63 - 1)
    ids = data.draw(st.lists(st.lists(some, min_size=k, max_size=k), max_size=40))
    topk_ids = torch.tensor(ids, dtype=torch.int64).reshape(len(ids), k)
    tile_size = data.draw(st.sampled_from([16, 32]))
    check(moe_sort(topk_ids, experts, tile_size, start), ids, experts, tile_size, start)


@pytest.mark.parametrize("id_type", [torch.int32, torch.int64])
def test_ids_out_of_range_take_no_row(id_type: torch.dtype, device: str) -> None:
    limits = torch.iinfo(id_type)
    ids = [[-1, 4, 5], [limits.max, limits.min, 7], [8, 3, -5], [6, 6, 6]]
    routes = moe_sort(torch.tensor(ids, dtype=id_type, device=device), 4, 16, 4)
    check(SortedRoutes(*(tensor.cpu() for tensor in routes)), ids, 4, 16, 4)


def test_ids_by_a_map(device: str) -> None:
    """Ids of both types, in the map and outside of it; invalid experts; several ids with one expert."""
    expert_map = torch.tensor([2, -1, 0, 4, 2, -(2**31), 2**31 - 1, 3, 1], dtype=torch.int32, device=device)
    for id_type, tokens in ((torch.int32, 3), (torch.int64, 30)):
        limits = torch.iinfo(id_type)
        ids = torch.arange(tokens * 4, dtype=id_type).reshape(tokens, 4) % 12 - 1
        ids[0] = torch.tensor([limits.max, limits.min, 9, 8], dtype=id_type)
        local = [[int(expert_map[i]) if 0 <= i < 9 else -1 for i in row] for row in ids.tolist()]
        routes = moe_sort(ids.to(device), 4, 16, expert_map=expert_map)
        check(SortedRoutes(*(tensor.cpu() for tensor in routes)), local, 4, 16)
    nowhere = moe_sort(ids.to(device), 4, 16, expert_map=expert_map[:0])
    assert nowhere.counts.tolist() == [0, 0]


@pytest.mark.parametrize("experts", [512, 513, 1024])
def test_many_experts(experts: int, device: str) -> None:
    """Around the largest number that the block of 1024 threads takes; the last expert and the first."""
    ids = [[(token * 37 + k * 401) % experts for k in range(8)] for token in range(60)] + [[experts - 1] * 8, [0] * 8]
    routes = moe_sort(torch.tensor(ids, dtype=torch.int32, device=device), experts, 16)
    check(SortedRoutes(*(tensor.cpu() for tensor in routes)), ids, experts, 16)


def test_several_blocks_give_one_order(device: str) -> None:
    """More slots than a block ranks: 3 blocks, ids skewed, the middle block without local ids."""
    ids = torch.arange(14000, dtype=torch.int32).reshape(-1, 7) ** 2 % 23
    ids.view(-1)[6144 : 2 * 6144] = -1
    routes = SortedRoutes(*(tensor.cpu() for tensor in moe_sort(ids.to(device), 20, 64)))
    slots = torch.arange(14000)[(ids.flatten() >= 0) & (ids.flatten() < 20)]
    order = slots[torch.sort(ids.flatten()[slots], stable=True).indices]
    rows = routes.row_to_slot[: int(routes.counts[0]) * 64]
    assert torch.equal(rows[rows >= 0].long(), order)
    assert torch.equal(rows[routes.slot_to_row.flatten()[order].long()].long(), order)
    assert int(routes.counts[1]) == len(slots)


def test_rows_of_unused_tiles_are_not_written(device: str) -> None:
    room = max_tiles(60, 10, 16)
    row_to_slot = poison(torch.empty(room * 16, dtype=torch.int32, device=device))
    ids = torch.full((10, 6), 3, dtype=torch.int32, device=device)
    routes = moe_sort(ids, 10, 16, out_row_to_slot=row_to_slot)
    assert routes.counts.tolist() == [4, 60]
    assert is_poison(row_to_slot[64:]).all()
    assert not is_poison(row_to_slot[:64]).any()


def test_refusals() -> None:
    ids = torch.zeros(3, 6, dtype=torch.int32)
    with pytest.raises(InvalidArgumentError, match=r"moe_sort: tile_size: expected 16, 32, 64 or 128, got 48"):
        moe_sort(ids, 8, 48)
    with pytest.raises(InvalidArgumentError, match=r"moe_sort: local_experts: expected 1 to 1024, got 1025"):
        moe_sort(ids, 1025, 16)
    with pytest.raises(InvalidArgumentError, match=r"moe_sort: topk_ids: expected dtype int32 or int64, got float32"):
        moe_sort(ids.float(), 8, 16)
    expert_map = torch.zeros(8, dtype=torch.int32)
    with pytest.raises(InvalidArgumentError, match=r"experts_start_idx: expected 0 with expert_map, got 2"):
        moe_sort(ids, 8, 16, 2, expert_map)
    with pytest.raises(InvalidArgumentError, match=r"moe_sort: expert_map: expected dtype int32, got int64"):
        moe_sort(ids, 8, 16, expert_map=expert_map.long())
    with pytest.raises(InvalidArgumentError, match=r"moe_sort: out_counts: expected shape \[2\], got \[3\]"):
        moe_sort(ids, 8, 16, out_counts=torch.empty(3, dtype=torch.int32))


def test_max_tiles_is_what_the_library_counts() -> None:
    """Python's formula has no branch, so that it can be traced; the C function's has."""
    numbers = random.Random(0)
    for _ in range(100_000):
        slots = numbers.choice((0, 1, numbers.randrange(1 << 24), numbers.randrange(4096)))
        experts = numbers.choice((1, 1024, numbers.randrange(1, 1025), max(slots % 1024, 1)))
        tile_size = numbers.choice((16, 32, 64, 128))
        assert max_tiles(slots, experts, tile_size) == _native.moe_sort_max_tiles(slots, experts, tile_size)
    for unusable in ((5, 0, 16), (5, 8, 0), (5, -1, 16)):
        assert max_tiles(*unusable) == _native.moe_sort_max_tiles(*unusable) == 0
