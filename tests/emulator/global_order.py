"""Races on global memory: who wrote each place last, in this launch.

Inside a cluster the order is that of the warps' clocks, as for shared memory. Threads of different clusters are in
order only if the later one's block has synchronised with others before: by an atomic on global memory or by a load that
is volatile, relaxed or acquire. What such a block does afterwards is not checked against other clusters, and neither
are atomics and loads of those kinds. A store that repeats the value that is there is no race. Reads are not remembered,
so a write that comes too early after another thread's read is not found here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .faults import LaneFault

if TYPE_CHECKING:
    from .memory import Allocation
    from .wave import Active, Wave

Array = np.ndarray[Any, np.dtype[Any]]

LARGEST = 1 << 26  # bytes; writers of larger allocations are not recorded
_ATOMIC = 1 << 20


class Writers:
    """For each granule of an allocation: cluster (0: none), thread inside it and clock of the last write."""

    def __init__(self, granules: int) -> None:
        self.cluster = np.zeros(granules, np.int32)
        self.thread = np.zeros(granules, np.int32)
        self.clock = np.zeros(granules, np.int32)


class Observer:
    """Checks and records the global accesses of one instruction's active lanes."""

    def __init__(self, active: Active, exempt: bool) -> None:
        self.active = active
        self.wave: Wave = active.wave
        self.exempt = exempt
        self.threads = active.threads
        self.blocks = active.blocks

    def part(self, rows: Array) -> Observer:
        """The observer of some of the rows."""
        one = Observer.__new__(Observer)
        one.active, one.wave, one.exempt = self.active, self.wave, self.exempt
        one.threads, one.blocks = self.threads[rows], self.blocks[rows]
        return one

    def _places(self, allocation: Allocation, addresses: Array, width: int) -> list[Array]:
        granule = self.wave.program.global_granule
        start = (addresses - np.uint64(allocation.address)).view(np.int64) // granule
        return [start + step for step in range(-(-width // granule))]

    def _unordered(self, writers: Writers, place: Array) -> Array:
        """Whether the last write at each place is not in order with these threads."""
        wave = self.wave
        cluster = wave.cluster_base + self.blocks // wave.cluster_size
        last, thread = writers.cluster[place], writers.thread[place]
        suspicious = (last != 0) & ((last != cluster) | (thread != self.threads)) & (thread < _ATOMIC)
        if not suspicious.any():
            return suspicious
        other = np.where(suspicious & (last == cluster), thread, self.threads)
        warps, other_warps = self.threads >> 5, other >> 5
        known = wave.clocks.known[self.blocks // wave.cluster_size, warps, other_warps]
        clock = writers.clock[place]
        ordered = np.where(warps == other_warps, known > clock, known >= clock) | (other == self.threads)
        return suspicious & np.where(last == cluster, ~ordered, ~wave.synchronised[self.blocks])

    def read(self, allocation: Allocation, addresses: Array, width: int, lanes: Array) -> None:
        """Check reads."""
        writers = self.wave.launch.writers.get(allocation.address)
        if writers is None or self.exempt:
            return
        for place in self._places(allocation, addresses, width):
            bad = self._unordered(writers, place)
            if bad.any():
                self._raise("read of global memory", writers, place, bad, allocation, addresses, lanes)

    def write(self, allocation: Allocation, addresses: Array, width: int, lanes: Array, same: Array) -> None:
        """Check and record writes."""
        writers = self.wave.launch.writers.get(allocation.address)
        if writers is None:
            if allocation.size > LARGEST:
                return
            granules = allocation.size // self.wave.program.global_granule + 1
            writers = self.wave.launch.writers[allocation.address] = Writers(granules)
        wave = self.wave
        cluster = wave.cluster_base + self.blocks // wave.cluster_size
        warps = self.threads >> 5
        clock = wave.clocks.known[self.blocks // wave.cluster_size, warps, warps]
        for place in self._places(allocation, addresses, width):
            if not self.exempt:
                bad = self._unordered(writers, place) & ~same
                if bad.any():
                    self._raise("write to global memory", writers, place, bad, allocation, addresses, lanes)
            writers.cluster[place] = cluster
            writers.thread[place] = self.threads + (_ATOMIC if self.exempt else 0)
            writers.clock[place] = clock

    def _raise(
        self,
        what: str,
        writers: Writers,
        place: Array,
        bad: Array,
        allocation: Allocation,
        addresses: Array,
        lanes: Array,
    ) -> None:
        one = int(np.flatnonzero(bad)[0])
        inside = writers.cluster[place[one]] == self.wave.cluster_base + self.blocks[one] // self.wave.cluster_size
        other = f"thread {int(writers.thread[place[one]])}" if inside else "another block"
        missing = "a barrier" if inside else "synchronisation"
        raise LaneFault(
            "race",
            f"{what} that {other} wrote, without {missing} between, {allocation}",
            int(lanes[one]),
            int(addresses[one]),
        )


def synchronises(active: Active) -> None:
    """The blocks of the active lanes have looked at what other blocks did."""
    active.wave.synchronised[active.blocks] = True
