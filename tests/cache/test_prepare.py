"""Blocks for the entries to come: right numbers, all or nothing, no leak."""

from __future__ import annotations

import dataclasses
import random
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from dsv4_kernels import InvalidArgumentError, KernelError
from dsv4_kernels.cache import (
    BlockAllocator,
    BlockError,
    CacheHandle,
    CacheState,
    LayerCacheSchema,
    OutOfBlocksError,
    PagedCache,
    Request,
    prepare_forward,
    release,
)

SCHEMA = LayerCacheSchema.csa(4, entries_per_block=2)  # a block for every 8 tokens


def handle(blocks: int = 8, requests: int = 3, columns: int = 4, slots: int = 5) -> CacheHandle:
    state = CacheState.allocate(SCHEMA, slots)
    return CacheHandle.allocate(state, PagedCache.allocate(SCHEMA, blocks), requests, columns)


def tensors(of: CacheHandle) -> dict[str, Any]:
    names = ("request_slots", "positions", "token_offsets", "block_table")
    return {name: getattr(of, name).tolist() for name in names}


def test_blocks_come_with_the_first_entry_that_needs_them() -> None:
    batch, allocator, request = handle(), BlockAllocator(8), Request(slot=2)
    grown = []
    for _ in range(20):
        prepare_forward(batch, SCHEMA, allocator, [request], [1])
        grown.append(len(request.blocks))
    # Entries 1, 2 at 4 and 8 tokens fill the first block, the third at 12 opens the next.
    assert grown == [0] * 3 + [1] * 8 + [2] * 8 + [3]
    assert request.position == 20
    assert tensors(batch) == {
        "request_slots": [2, -1, -1],
        "positions": [19, -1, -1],
        "token_offsets": [0, 1, 1, 1],
        "block_table": [[0, 1, 2, -1], [-1] * 4, [-1] * 4],
    }


def test_a_batch_of_prompts_and_tokens() -> None:
    batch, allocator = handle(), BlockAllocator(8)
    requests = [Request(0, position=7), Request(4, position=16, blocks=allocator.allocate(2)), Request(1)]
    prepare_forward(batch, SCHEMA, allocator, requests, [1, 0, 30])
    assert [request.blocks for request in requests] == [[2], [0, 1], [3, 4, 5, 6]]
    assert tensors(batch) == {
        "request_slots": [0, 4, 1],
        "positions": [7, 16, 0],
        "token_offsets": [0, 1, 1, 31],
        "block_table": [[2, -1, -1, -1], [0, 1, -1, -1], [3, 4, 5, 6]],
    }


def test_short_pool_changes_nothing() -> None:
    batch, allocator = handle(blocks=3), BlockAllocator(3)
    first = Request(0)
    prepare_forward(batch, SCHEMA, allocator, [first], [8])
    before = tensors(batch)
    requests = [first, Request(1)]
    with pytest.raises(OutOfBlocksError, match=r"^prepare_forward: expected 3 free blocks for 2 requests, got 2 of 3;"):
        prepare_forward(batch, SCHEMA, allocator, requests, [8, 12])
    assert allocator.available == 2
    assert [(r.position, r.blocks) for r in requests] == [(8, [0]), (0, [])]
    assert tensors(batch) == before
    assert issubclass(OutOfBlocksError, KernelError)
    prepare_forward(batch, SCHEMA, allocator, requests, [8, 8])
    assert allocator.available == 0


@pytest.mark.parametrize(
    ("requests", "new_tokens", "text"),
    [
        ([Request(0)], [1, 2], "new_tokens: expected one number for each of 1 requests, got 2"),
        ([Request(i) for i in range(4)], [1] * 4, "requests: expected at most 3, got 4"),
        ([Request(0), Request(0)], [1, 1], "requests: expected distinct slots from 0 to 4, got 0 twice"),
        ([Request(5)], [1], "requests: expected distinct slots from 0 to 4, got 5"),
        ([Request(-1)], [1], "requests: expected distinct slots from 0 to 4, got -1"),
        ([Request(0)], [-1], "new_tokens: expected an int from 0 to 2147483647, got -1"),
        (
            [Request(3, position=30)],
            [6],
            "block_table: expected at most 4 blocks per request, got 5 for 36 tokens in slot 3",
        ),
    ],
)
def test_refusals(requests: list[Request], new_tokens: list[int], text: str) -> None:
    batch, allocator = handle(), BlockAllocator(8)
    before, positions = tensors(batch), [request.position for request in requests]
    with pytest.raises(ValueError, match=f"^prepare_forward: {text}$"):
        prepare_forward(batch, SCHEMA, allocator, requests, new_tokens)
    assert allocator.available == 8
    assert tensors(batch) == before
    assert [request.position for request in requests] == positions


@pytest.mark.parametrize(
    ("request_", "new", "name"),
    [
        (Request(0), 1.5, "new_tokens"),
        (Request(0), "1", "new_tokens"),
        (Request(0), None, "new_tokens"),
        (Request(0), torch.tensor(1.5), "new_tokens"),
        (Request(0), 2**31, "new_tokens"),
        (Request(0, position=-1), 1, "position"),
        (Request(0, position=2.0), 1, "position"),  # type: ignore[arg-type]
        (Request(1.0), 1, "distinct slots"),  # type: ignore[arg-type]
        (Request(0, blocks=[8]), 1, "block"),
        (Request(0, blocks=[-1]), 1, "block"),
        (Request(0, blocks=[0.0]), 1, "block"),  # type: ignore[list-item]
        (Request(0, blocks=[0] * 5), 1, "block_table"),
    ],
    ids=str,
)
def test_values_that_are_no_counts_change_nothing(request_: Request, new: Any, name: str) -> None:
    batch, allocator = handle(), BlockAllocator(8)
    good = Request(3)
    prepare_forward(batch, SCHEMA, allocator, [good], [8])
    before, request_before = tensors(batch), dataclasses.replace(request_, blocks=list(request_.blocks))
    with pytest.raises(InvalidArgumentError, match=rf"^prepare_forward: .*{name}.*, got "):
        prepare_forward(batch, SCHEMA, allocator, [good, request_], [8, new])
    assert tensors(batch) == before
    assert (good, request_) == (Request(3, 8, [0]), request_before)
    assert allocator.available == 7


def test_numpy_integers_are_counts() -> None:
    batch, allocator, request = handle(), BlockAllocator(8), Request(0)
    prepare_forward(batch, SCHEMA, allocator, [request], np.array([8], np.int32))  # type: ignore[arg-type]
    assert (request.position, type(request.position)) == (8, int)


def expected(batch: CacheHandle, requests: list[Request], new: list[int]) -> dict[str, Any]:
    """What the tensors must hold after a step, cell by cell."""
    capacity, columns = batch.block_table.shape
    total = sum(new)
    return {
        "request_slots": [requests[i].slot if i < len(requests) else -1 for i in range(capacity)],
        "positions": [requests[i].position - new[i] if i < len(requests) else -1 for i in range(capacity)],
        "token_offsets": [sum(new[:i]) if i < len(requests) else total for i in range(capacity + 1)],
        "block_table": [
            [requests[i].blocks[j] if i < len(requests) and j < len(requests[i].blocks) else -1 for j in range(columns)]
            for i in range(capacity)
        ],
    }


@pytest.mark.parametrize("inference", [False, True])
def test_what_is_not_written_again_is_right(inference: bool, real_device: str) -> None:
    """Batches that grow, shrink and change their order; blocks that the engine replaces; a second handle of the same
    tensors; strangers that write to them."""
    choice = random.Random(7)
    with torch.inference_mode(inference):
        state = CacheState.allocate(SCHEMA, 6, device=real_device)
        paged = PagedCache.allocate(SCHEMA, 64, device=real_device)
        batch = CacheHandle.allocate(state, paged, 5, 8)
        names = ("request_slots", "positions", "token_offsets", "block_table")
        other = CacheHandle(state, paged, *(getattr(batch, name)[:] for name in names))
        by_hand = CacheHandle(state, paged, *(getattr(batch, name).clone() for name in names))
        allocator = BlockAllocator(64)
        running: list[Request] = []
        for step in range(300):
            free = [slot for slot in range(6) if slot not in {request.slot for request in running}]
            if running and choice.random() < 0.2:
                release(running.pop(choice.randrange(len(running))), allocator, batch)
            if len(running) < 5 and free and choice.random() < 0.3:
                running.append(Request(choice.choice(free)))
            if choice.random() < 0.1:
                choice.shuffle(running)
            if running and running[0].blocks and choice.random() < 0.1:  # copy on write
                allocator.free([running[0].blocks[0]])
                running[0].blocks[0] = allocator.allocate(2)[1]
                allocator.free(
                    [
                        next(
                            b
                            for b in range(64)
                            if not allocator._is_free[b] and all(b not in request.blocks for request in running)
                        )
                    ]
                )
            if choice.random() < 0.1:
                getattr(batch, choice.choice(names)).fill_(77)
            new = [0 if request.position > 50 else choice.choice((0, 1, 1, 9)) for request in running]
            used = choice.choice((batch, batch, batch, other, by_hand))
            prepare_forward(used, SCHEMA, allocator, running, new)
            assert tensors(used) == expected(used, running, new), step
            assert sum(len(request.blocks) for request in running) == 64 - allocator.available


def test_a_step_writes_what_changes() -> None:
    """Decoding: positions each step, a row of the table when a block is added to it."""
    batch, allocator = handle(), BlockAllocator(8)
    requests = [Request(0, position=5), Request(2)]
    prepare_forward(batch, SCHEMA, allocator, requests, [1, 1])
    writes = dict.fromkeys(("request_slots", "positions", "token_offsets", "block_table"), 0)
    for _ in range(8):
        before = {name: getattr(batch, name)._version for name in writes}
        prepare_forward(batch, SCHEMA, allocator, requests, [1, 1])
        for name in writes:
            writes[name] += getattr(batch, name)._version - before[name]
    # The blocks that come are the second of the first request, at 12 tokens, and the first of the other, at 4.
    assert writes == {"request_slots": 0, "positions": 8, "token_offsets": 0, "block_table": 2}


@pytest.mark.gpu
def test_nothing_is_synchronised() -> None:
    """torch raises where a call waits for the device; staging memory is not reused while a copy is under way."""
    schema = LayerCacheSchema.csa(4, entries_per_block=64)
    state = CacheState.allocate(SCHEMA, 256, device="cuda")
    batch = CacheHandle.allocate(state, PagedCache.allocate(schema, 1, device="cuda"), 256, 64)
    allocator = BlockAllocator(256 * 64)
    requests = [Request(slot, position=slot) for slot in range(256)]
    results = []
    torch.cuda.synchronize()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the mode is a prototype
            torch.cuda.set_sync_debug_mode("error")
        torch.cuda._sleep(200_000_000)  # so that the copies of all steps are under way at once
        for _ in range(50):
            prepare_forward(batch, schema, allocator, requests, [17] * 256)
            results.append((batch.positions.clone(), batch.block_table.clone(), [list(r.blocks) for r in requests]))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for step, (positions, table, blocks) in enumerate(results):
        assert positions.tolist() == [slot + 17 * step for slot in range(256)]
        assert table.tolist() == [row + [-1] * (64 - len(row)) for row in blocks]


def test_layers_without_entries_need_no_blocks() -> None:
    batch, allocator, request = handle(), BlockAllocator(0), Request(0)
    prepare_forward(batch, LayerCacheSchema.swa(), allocator, [request], [100])
    assert request.blocks == []
    assert batch.positions.tolist() == [0, -1, -1]


def test_release() -> None:
    batch, allocator, request = handle(), BlockAllocator(8), Request(3)
    prepare_forward(batch, SCHEMA, allocator, [request], [24])
    batch.state.tail_len[3] = 2
    release(request, allocator, batch)
    assert allocator.available == 8
    assert request.blocks == []
    assert batch.state.tail_len[3] == 0
    assert (batch.state.tail_zb[3] == -torch.inf).all()


def test_release_of_padding_changes_nothing() -> None:
    """Slot -1 is padding, not the last slot."""
    batch, allocator = handle(), BlockAllocator(8)
    state, blocks = batch.state, allocator.allocate(2)
    state.tail_ka[4], state.tail_len[4], state.positions[4] = 7.0, 3, 11
    for slot in (-1, 5, 1.0, None):
        with pytest.raises(InvalidArgumentError, match=r"^release: request.slot: expected an int from 0 to 4, got "):
            release(Request(slot, 8, blocks), allocator, batch)  # type: ignore[arg-type]
        with pytest.raises(InvalidArgumentError, match=r"^CacheState.reset_slot: slot: expected an int from 0 to 4"):
            state.reset_slot(slot)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgumentError, match=r"^CacheState.reset_slot: position: expected an int, 0 or more, g"):
        state.reset_slot(4, -1)
    with pytest.raises(BlockError):
        release(Request(4, 8, [7]), allocator, batch)
    assert (float(state.tail_ka[4].min()), int(state.tail_len[4]), int(state.positions[4])) == (7.0, 3, 11)
    assert allocator.available == 6


@pytest.mark.parametrize("count", [-1, 1.5, "2", None])
def test_counts_of_blocks(count: Any) -> None:
    allocator = BlockAllocator(4)
    with pytest.raises(InvalidArgumentError, match=r"^BlockAllocator.allocate: count: expected an int, 0 or more, got"):
        allocator.allocate(count)
    with pytest.raises(InvalidArgumentError, match=r"^BlockAllocator: blocks: expected an int from 0 to"):
        BlockAllocator(count)
    with pytest.raises(BlockError, match=r"^BlockAllocator: block: expected 0 to 3, got"):
        allocator.free([count])
    assert allocator.available == 4


def test_blocks_that_cannot_be_freed() -> None:
    allocator = BlockAllocator(4)
    taken = allocator.allocate(3)
    for given, text in (
        ([0, 4], "expected 0 to 3, got 4"),
        ([-1], "expected 0 to 3, got -1"),
        ([0, 3], "expected one that is in use, got 3, which is free"),
        ([1, 0, 1], "expected one that is in use, got 1, which is free"),
    ):
        with pytest.raises(BlockError, match=f"^BlockAllocator: block: {text}$"):
            allocator.free(given)
        assert allocator.available == 1
    with pytest.raises(OutOfBlocksError, match=r"^BlockAllocator: expected 2 free blocks, got 1 of 4;"):
        allocator.allocate(2)
    allocator.free(taken)
    with pytest.raises(BlockError):
        allocator.free(taken)
    assert allocator.available == 4


def test_allocator_is_deterministic_and_never_gives_a_block_twice() -> None:
    runs = []
    for _ in range(2):
        choice, allocator = random.Random(3), BlockAllocator(37)
        held: list[Any] = []
        log: list[Any] = []
        for _ in range(3000):
            if held and choice.random() < 0.5:
                allocator.free(held.pop(choice.randrange(len(held))))
            elif (count := choice.randrange(4)) <= allocator.available:
                held.append(allocator.allocate(count))
                log.append(held[-1])
            in_use = [block for blocks in held for block in blocks]
            assert len(set(in_use)) == len(in_use) == 37 - allocator.available
        runs.append(log)
    assert runs[0] == runs[1]
