"""What happens between two forward passes: blocks for the entries to come, and the batch's tensors.

All of it is host arithmetic on positions that the engine knows; a captured graph allocates nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from operator import add

from dsv4_kernels.cache.schema import LayerCacheSchema
from dsv4_kernels.cache.state import CacheHandle
from dsv4_kernels.errors import InvalidArgumentError, KernelError
from dsv4_kernels.host_values import integer, integers

_INT32_MAX = 2**31 - 1


class OutOfBlocksError(KernelError):
    """The pool has fewer free blocks than a forward pass needs."""


class BlockError(InvalidArgumentError):
    """A block that cannot be freed: not of the pool, or free already."""


class BlockAllocator:
    """Hands out the blocks of a pool. The block that was freed last is handed out first: what it does follows from the
    calls alone.
    """

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks = integer("BlockAllocator", "blocks", blocks, 0, _INT32_MAX)
        self._free = list(range(blocks - 1, -1, -1))
        self._is_free = [True] * blocks

    @property
    def available(self) -> int:
        """How many blocks are free."""
        return len(self._free)

    def allocate(self, count: int) -> list[int]:
        """That many blocks.

        Raises:
            OutOfBlocksError: fewer are free; nothing has changed.
            InvalidArgumentError: a negative count, or no integer.
        """
        count = integer("BlockAllocator.allocate", "count", count, 0)
        if count > self.available:
            raise OutOfBlocksError(
                f"BlockAllocator: expected {count} free blocks, got {self.available} of {self.blocks}; free the blocks "
                "of requests that have ended, or allocate a larger pool"
            )
        taken = [self._free.pop() for _ in range(count)]
        for block in taken:
            self._is_free[block] = False
        return taken

    def free(self, blocks: Iterable[int]) -> None:
        """Takes blocks back.

        Raises:
            BlockError: one of them is not of the pool, is free already, or is given twice; nothing has changed.
        """
        given = list(blocks)
        seen: set[int] = set()
        for block in given:
            if type(block) is not int or not 0 <= block < self.blocks:
                raise BlockError(f"BlockAllocator: block: expected 0 to {self.blocks - 1}, got {block!r}")
            if self._is_free[block] or block in seen:
                raise BlockError(f"BlockAllocator: block: expected one that is in use, got {block}, which is free")
            seen.add(block)
        for block in reversed(given):
            self._is_free[block] = True
            self._free.append(block)


@dataclass
class Request:
    """A request as the engine keeps it: its slot in the state, its tokens so far, and the blocks of its entries.

    An engine may change the blocks between passes, where a request shares a prefix with others, say.
    """

    slot: int
    position: int = 0
    blocks: list[int] = field(default_factory=list)


def prepare_forward(
    handle: CacheHandle,
    schema: LayerCacheSchema,
    allocator: BlockAllocator,
    requests: Sequence[Request],
    new_tokens: Sequence[int],
) -> None:
    """Makes a layer ready for a forward pass in which each request brings some tokens.

    The entries that this will complete follow from the positions: entries(position + new) - entries(position). Blocks
    for them are allocated now, up to the next block boundary, and the handle's tensors are written, so that the graph
    that reads them runs as captured. Requests then stand at their new positions. All or nothing: if anything is
    refused, allocator, requests and handle are as before. Run it once for all layers that share a schema: their
    handles may share these tensors.

    What a tensor holds already is not written again, so that a step costs what changes in it. Nothing is synchronised:
    values go from page-locked memory to the device, ordered by the current stream, which should be the graph's.

    Args:
        handle: whose request_slots, positions, token_offsets and block_table are written; requests beyond those given
            are padding.
        schema: of the layer.
        allocator: of the pool's blocks.
        requests: the batch, in order. Their positions and blocks change.
        new_tokens: how many tokens each of them brings, 0 or more, in the order of the batch's token rows.

    Raises:
        OutOfBlocksError: the pool is short.
        InvalidArgumentError: more requests than the handle holds, more blocks than a row of its table, a slot that is
            not of the state or is used twice, a block that is not of the pool, or a number of tokens or a position that
            is negative or no integer.
    """
    capacity, columns = handle.block_table.shape
    requests = list(requests)
    if len(requests) != len(new_tokens):
        raise InvalidArgumentError(
            f"prepare_forward: new_tokens: expected one number for each of {len(requests)} requests, "
            f"got {len(new_tokens)}"
        )
    if len(requests) > capacity:
        raise InvalidArgumentError(f"prepare_forward: requests: expected at most {capacity}, got {len(requests)}")
    slots = _distinct_slots([request.slot for request in requests], handle.state.tail_len.shape[0])
    positions = integers("prepare_forward", "requests (position)", [request.position for request in requests], 0, 2**62)
    new = integers("prepare_forward", "new_tokens", new_tokens, 0, _INT32_MAX)
    ends = list(map(add, positions, new))
    offsets = list(accumulate(new, initial=0))
    if offsets[-1] > _INT32_MAX:
        raise InvalidArgumentError(
            f"prepare_forward: new_tokens: expected at most {_INT32_MAX} tokens of all requests, got {offsets[-1]}"
        )
    held = [request.blocks for request in requests]
    batch = handle.batch
    changed = batch.changed_rows(handle.block_table, held)
    m, per_block = schema.m, schema.entries_per_block
    short = [row for row, end in enumerate(ends) if end // m > per_block * len(held[row])] if m else []
    wanted = [schema.blocks(ends[row]) - len(held[row]) for row in short]
    changed = sorted({*changed, *short})
    for row in changed:
        size = max(schema.blocks(ends[row]), len(held[row]))
        if size > columns:
            raise InvalidArgumentError(
                f"prepare_forward: block_table: expected at most {columns} blocks per request, got {size} for "
                f"{ends[row]} tokens in slot {slots[row]}"
            )
        integers("prepare_forward", "requests (block)", held[row], 0, allocator.blocks - 1)
    total = sum(wanted)
    if total > allocator.available:
        raise OutOfBlocksError(
            f"prepare_forward: expected {total} free blocks for {len(requests)} requests, got "
            f"{allocator.available} of {allocator.blocks}; nothing was changed; free the blocks of requests that have "
            "ended, send fewer requests, or allocate a larger pool"
        )

    for row, count in zip(short, wanted, strict=True):
        held[row] += allocator.allocate(count)
    for request, end in zip(requests, ends, strict=True):
        request.position = end
    padding = [-1] * (capacity - len(requests))
    batch.write_vector("request_slots", handle.request_slots, slots + padding)
    batch.write_vector("positions", handle.positions, positions + padding)
    batch.write_vector("token_offsets", handle.token_offsets, offsets + offsets[-1:] * len(padding))
    batch.write_rows(handle.block_table, held, changed)


def _distinct_slots(given: list[int], count: int) -> list[int]:
    """The slots of a batch, each of the state's `count` and no two the same."""
    seen: set[int] = set()
    for slot in given if not _are_distinct_slots(given, count) else ():
        if type(slot) is not int or not 0 <= slot < count or slot in seen:
            raise InvalidArgumentError(
                f"prepare_forward: requests: expected distinct slots from 0 to {count - 1}, got {slot!r}"
                f"{' twice' if slot in seen else ''}"
            )
        seen.add(slot)
    return given


def _are_distinct_slots(given: list[int], count: int) -> bool:
    ints = set(map(type, given)) <= {int}
    return ints and len(set(given)) == len(given) and (not given or (min(given) >= 0 and max(given) < count))


def release(request: Request, allocator: BlockAllocator, handle: CacheHandle) -> None:
    """Ends a request: its blocks go back to the pool, its slot is ready for another one.

    Raises:
        InvalidArgumentError: a slot that the state does not have, -1 (padding) among them.
        BlockError: a block that is not in use. Nothing has changed in either case.
    """
    slot = handle.state.check_slot("release", "request.slot", request.slot)
    allocator.free(request.blocks)
    request.blocks = []
    handle.state.reset_slot(slot)
