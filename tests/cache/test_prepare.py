"""Blocks for the entries to come: right numbers, all or nothing, no leak."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from dsv4_kernels import KernelError
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
        ([Request(0)], [-1], "new_tokens: expected 0 or more, got -1"),
        (
            [Request(3, position=30)],
            [6],
            "block_table: expected at most 4 blocks a request, got 5 for 36 tokens in slot 3",
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
        choice, allocator, held, log = random.Random(3), BlockAllocator(37), [], []
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
