"""What happens between two forward passes: blocks for the entries to come, and the batch's tensors.

All of it is host arithmetic on positions that the engine knows; a captured graph allocates nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dsv4_kernels.cache.schema import LayerCacheSchema
from dsv4_kernels.cache.state import CacheHandle
from dsv4_kernels.errors import KernelError


class OutOfBlocksError(KernelError):
    """The pool has fewer free blocks than a forward pass needs."""


class BlockError(KernelError, ValueError):
    """A block that cannot be freed: not of the pool, or free already."""


class BlockAllocator:
    """Hands out the blocks of a pool. The block that was freed last is handed out first: what it does follows from the
    calls alone.
    """

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks
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
        """
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
            if not 0 <= block < self.blocks:
                raise BlockError(f"BlockAllocator: block: expected 0 to {self.blocks - 1}, got {block}")
            if self._is_free[block] or block in seen:
                raise BlockError(f"BlockAllocator: block: expected one that is in use, got {block}, which is free")
            seen.add(block)
        for block in reversed(given):
            self._is_free[block] = True
            self._free.append(block)


@dataclass
class Request:
    """A request as the engine keeps it: its slot in the state, its tokens so far, and the blocks of its entries."""

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

    Args:
        handle: whose request_slots, positions, token_offsets and block_table are written; requests beyond those given
            are padding.
        schema: of the layer.
        allocator: of the pool's blocks.
        requests: the batch, in order. Their positions and blocks change.
        new_tokens: how many tokens each of them brings, 0 or more, in the order of the batch's token rows.

    Raises:
        OutOfBlocksError: the pool is short.
        ValueError: more requests than the handle holds, more blocks than a row of its table, a slot that is not of the
            state or is used twice, or a negative number of tokens.
    """
    capacity, columns = handle.block_table.shape
    slots = handle.state.tail_len.shape[0]
    if len(requests) != len(new_tokens):
        raise ValueError(
            f"prepare_forward: new_tokens: expected one number for each of {len(requests)} requests, "
            f"got {len(new_tokens)}"
        )
    if len(requests) > capacity:
        raise ValueError(f"prepare_forward: requests: expected at most {capacity}, got {len(requests)}")
    seen: set[int] = set()
    wanted = []
    for request, new in zip(requests, new_tokens, strict=True):
        if not 0 <= request.slot < slots or request.slot in seen:
            raise ValueError(
                f"prepare_forward: requests: expected distinct slots from 0 to {slots - 1}, got {request.slot}"
                f"{' twice' if request.slot in seen else ''}"
            )
        seen.add(request.slot)
        if new < 0:
            raise ValueError(f"prepare_forward: new_tokens: expected 0 or more, got {new}")
        needed = schema.blocks(request.position + new)
        if needed > columns:
            raise ValueError(
                f"prepare_forward: block_table: expected at most {columns} blocks a request, got {needed} for "
                f"{request.position + new} tokens in slot {request.slot}"
            )
        wanted.append(max(0, needed - len(request.blocks)))
    if sum(wanted) > allocator.available:
        raise OutOfBlocksError(
            f"prepare_forward: expected {sum(wanted)} free blocks for {len(requests)} requests, got "
            f"{allocator.available} of {allocator.blocks}; nothing was changed; free the blocks of requests that have "
            "ended, send fewer requests, or allocate a larger pool"
        )

    positions = [request.position for request in requests]
    for request, new, count in zip(requests, new_tokens, wanted, strict=True):
        request.blocks += allocator.allocate(count)
        request.position += new
    offsets = [0]
    for new in new_tokens:
        offsets.append(offsets[-1] + new)
    padding = capacity - len(requests)
    _write(handle.request_slots, [request.slot for request in requests] + [-1] * padding)
    _write(handle.positions, positions + [-1] * padding)
    _write(handle.token_offsets, offsets + [offsets[-1]] * padding)
    rows = [request.blocks + [-1] * (columns - len(request.blocks)) for request in requests]
    _write(handle.block_table, rows + [[-1] * columns] * padding)


def release(request: Request, allocator: BlockAllocator, handle: CacheHandle) -> None:
    """Ends a request: its blocks go back to the pool, its slot is ready for another one."""
    allocator.free(request.blocks)
    request.blocks = []
    handle.state.reset_slot(request.slot)


def _write(tensor: Tensor, values: Sequence[object]) -> None:
    """New values for a tensor that captured graphs read."""
    tensor.copy_(torch.tensor(values, dtype=tensor.dtype).reshape(tensor.shape))
