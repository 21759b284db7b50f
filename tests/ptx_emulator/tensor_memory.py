"""Tensor memory: 128 lanes by 512 columns of 32 bits per block, its allocation, and which operations are in flight.

A product is formed when it is issued, but its cells count as in flight until an mbarrier that tcgen05.commit named is
polled. Stores are in flight until their warp waits for them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .faults import LaneFault
from .registry import FINAL_CHECKS

if TYPE_CHECKING:
    from .wave import Wave

Array = np.ndarray[Any, np.dtype[Any]]

LANES, COLUMNS = 128, 512


@dataclass(eq=False)
class Commit:
    """A tcgen05.commit whose mbarrier has not been told yet: products up to `number` of the blocks."""

    blocks: tuple[int, ...]
    number: int
    barrier: Any
    knowledge: Array
    lane: int


class TensorMemory:
    """Tensor memory of all blocks of a wave."""

    def __init__(self, wave: Wave) -> None:
        shape = (wave.block_count, LANES, COLUMNS)
        self.data = np.zeros(shape, np.uint32)
        self.written = np.zeros(shape, np.bool_)
        self.product = np.zeros(shape, np.int32)  # number of the last product or copy that wrote the cell
        self.storing = np.zeros(shape, np.int32)  # 1 + warp whose store has not been waited for
        self.issued = 0
        self.completed = np.zeros(wave.block_count, np.int64)
        self.operands: list[list[tuple[int, Array, Array, int]]] = [[] for _ in range(wave.block_count)]
        self.allocations: list[dict[int, int]] = [{} for _ in range(wave.block_count)]
        self.may_allocate = np.ones(wave.block_count, np.bool_)
        self.commits: list[Commit] = []
        self.loads: list[tuple[Array, list[int]]] = []

    def allocate(self, block: int, columns: int, lane: int) -> int:
        """First column of a new allocation."""
        if columns not in (32, 64, 128, 256, 512):
            raise LaneFault("invalid operand", f"allocation of {columns} columns of tensor memory", lane)
        if not self.may_allocate[block]:
            raise LaneFault("invalid operand", "allocation of tensor memory after giving up the right to", lane)
        taken = self.allocations[block]
        for start in range(0, COLUMNS, columns):
            if all(start + columns <= other or start >= other + width for other, width in taken.items()):
                taken[start] = columns
                self.written[block, :, start : start + columns] = False
                return start
        raise LaneFault("deadlock", f"no {columns} free columns of tensor memory, and nobody else can free any", lane)

    def free(self, block: int, start: int, columns: int, lane: int) -> None:
        """End of an allocation."""
        if self.allocations[block].get(start) != columns:
            raise LaneFault(
                "invalid operand", f"tensor memory {start} to {start + columns} was not allocated as such", lane
            )
        if (self.product[block, :, start : start + columns] > self.completed[block]).any():
            raise LaneFault("missing wait", "tensor memory is freed while products write it", lane)
        del self.allocations[block][start]

    def check_columns(self, block: int, column: int, count: int, lane: int) -> None:
        """The columns must lie inside one allocation."""
        for start, width in self.allocations[block].items():
            if start <= column and column + count <= start + width:
                return
        raise LaneFault(
            "out of bounds",
            f"tensor memory columns {column} to {column + count}, allocated are {self.allocations[block]}",
            lane,
        )

    def check_read(self, block: int, rows: Array, columns: Array, lane: int, by_product: bool) -> None:
        """Cells that are read must be written and not in flight; products are in order among themselves."""
        where = (block, rows, columns)
        if (self.storing[where] > 0).any():
            raise LaneFault("missing wait", "tensor memory is read before tcgen05.wait::st", lane)
        if not self.written[where].all():
            raise LaneFault("uninitialised", "read of tensor memory that was never written", lane)
        if not by_product and (self.product[where] > self.completed[block]).any():
            raise LaneFault(
                "missing wait", "tensor memory is read before the products that write it are complete", lane
            )

    def begin(self) -> int:
        """The number of a new product or copy."""
        self.issued += 1
        return self.issued

    def complete(self, wave: Wave, block: int, number: int) -> None:
        """Products up to a number are complete: what they read from shared memory must not have changed meanwhile."""
        rest = []
        for one in self.operands[block]:
            issued, flat, seen, line = one
            if issued > number:
                rest.append(one)
            elif not np.array_equal(wave.shared.data[flat], seen):
                raise LaneFault(
                    "missing wait",
                    f"shared memory changed while the tcgen05 instruction of line {line} was reading it",
                    block * wave.threads,
                )
        self.operands[block] = rest
        self.completed[block] = max(int(self.completed[block]), number)


def tensor_memory_of(wave: Wave) -> TensorMemory:
    """The wave's tensor memory."""
    if "tensor memory" not in wave.state:
        wave.state["tensor memory"] = TensorMemory(wave)
    found = wave.state["tensor memory"]
    assert isinstance(found, TensorMemory)
    return found


def _check_freed(wave: Wave) -> None:
    memory = wave.state.get("tensor memory")
    if memory is None:
        return
    for block, left in enumerate(memory.allocations):
        if left:
            raise LaneFault(
                "leak", f"tensor memory was not freed: {left} (first column: columns)", block * wave.threads
            )


FINAL_CHECKS.append(_check_freed)
