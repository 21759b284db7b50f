"""mbarrier: init, arrive, expect_tx, complete_tx, test_wait, try_wait. The state is kept beside shared memory.

A phase completes when no arrival and no transaction byte is pending. Asynchronous operations that signal an mbarrier
complete when somebody polls it, one at a time, and the poll that completed one still fails: as late as allowed.

Initialising an mbarrier must happen before each use by another thread. To threads of other blocks a barrier of the
cluster tells it, relaxed too if a fence.mbarrier_init is between.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ..faults import LaneFault
from ..ptx_module import Instruction, Sink
from ..registry import FINAL_CHECKS, Plain, plain
from ..shared_memory import PERIOD_BITS
from .elementwise import allow
from .load_store import shared_place

if TYPE_CHECKING:
    from ..program import Scope
    from ..wave import Active, Wave

Array = np.ndarray[Any, np.dtype[Any]]
Delivery = Callable[[], None]

MAXIMUM_COUNT = (1 << 20) - 1
_SCOPES = ("release", "acquire", "relaxed", "cta", "cluster", "shared", "shared::cta", "shared::cluster", "b64")


@dataclass
class Barrier:
    """One mbarrier object."""

    expected: int
    pending: int
    init_thread: int = -1  # of the cluster; clock of its warp, and its number of fence.mbarrier_init after the next one
    init_clock: int = 0
    init_fence: int = 0
    known_to: set[int] = field(default_factory=set)  # warps of the cluster that may use it
    writes: int = 0  # asynchronous operations in flight that write shared memory and signal it
    phase: int = 0
    bytes: int = 0
    arriving: Array | None = None  # what the arrivals of this phase knew
    completed: Array | None = None  # what a waiter learns
    deliveries: list[Delivery] = field(default_factory=list)


class Barriers:
    """The mbarriers of a wave, by block and offset."""

    def __init__(self) -> None:
        self.objects: dict[tuple[int, int], Barrier] = {}

    def init(self, wave: Wave, block: int, offset: int, lane: int, count: int) -> None:
        """A lane makes an mbarrier."""
        cluster, warp = warp_in_cluster(wave, lane)
        known = wave.clocks.known[cluster, warp]
        thread = lane % (wave.threads * wave.cluster_size)
        fence = int(known[wave.clocks.warps + warp]) + 1
        self.objects[block, offset] = Barrier(count, count, thread, int(known[warp]), fence)

    def find(self, wave: Wave, block: int, offset: int, lane: int) -> Barrier:
        """The object, or a fault if none was initialised there, or not in order with this lane."""
        found = self.objects.get((block, offset))
        if found is None:
            raise LaneFault("uninitialised", "no mbarrier is initialised at this address", lane, offset)
        cluster, warp = warp_in_cluster(wave, lane)
        if warp not in found.known_to and lane % (wave.threads * wave.cluster_size) != found.init_thread:
            known, maker = wave.clocks.known[cluster, warp], found.init_thread // 32
            if maker == warp:
                ordered = known[warp] >> PERIOD_BITS > found.init_clock >> PERIOD_BITS
            else:
                fenced = known[wave.clocks.warps + maker] >= found.init_fence
                ordered = known[maker] >= found.init_clock or fenced
            if not ordered:
                raise LaneFault(
                    "race",
                    f"use of an mbarrier that thread {found.init_thread} of the cluster initialises, without a barrier "
                    "between that also orders the initialisation (fence.mbarrier_init before a relaxed arrival)",
                    lane,
                    offset,
                )
            found.known_to.add(warp)
        return found

    def arrive(self, wave: Wave, barrier: Barrier, count: int, knowledge: Array | None, lane: int | None) -> None:
        """Count arrivals."""
        if count > barrier.pending:
            raise LaneFault(
                "invalid operand",
                f"{count} arrivals at an mbarrier that waits for {barrier.pending} more in this phase",
                lane,
            )
        barrier.pending -= count
        if knowledge is not None:
            barrier.arriving = knowledge if barrier.arriving is None else np.maximum(barrier.arriving, knowledge)
        self.settle(wave, barrier)

    def settle(self, wave: Wave, barrier: Barrier) -> None:
        """End the phase if nothing is pending."""
        wave.launch.progress += 1
        if barrier.pending == 0 and barrier.bytes == 0:
            barrier.phase += 1
            barrier.pending = barrier.expected
            if barrier.arriving is not None:
                barrier.completed = (
                    barrier.arriving if barrier.completed is None else np.maximum(barrier.completed, barrier.arriving)
                )
            barrier.arriving = None


def barriers_of(wave: Wave) -> Barriers:
    """The wave's mbarriers."""
    found = wave.state.setdefault("mbarriers", Barriers())
    assert isinstance(found, Barriers)
    return found


def locate(active: Active, addresses: Array, deferred: bool = False) -> list[tuple[int, int, int, int]]:
    """(row, lane, block, offset) of each active lane's mbarrier. deferred: see `shared_place`."""
    window = addresses & np.uint64(0xFFFFFFFF)
    blocks, offsets = shared_place(active, window, deferred)
    active.wave.shared.check_range(blocks, offsets, 8, 8, active.index, "mbarrier access")
    return list(zip(range(active.count), active.index.tolist(), blocks.tolist(), offsets.tolist(), strict=False))


def warp_in_cluster(wave: Wave, lane: int) -> tuple[int, int]:
    """Cluster of the wave and warp inside it."""
    block = lane // wave.threads
    return block // wave.cluster_size, (block % wave.cluster_size * wave.threads + lane % wave.threads) // 32


@plain("mbarrier")
def mbarrier(instruction: Instruction, scope: Scope) -> Plain:
    """mbarrier.*"""
    forms = {
        "init": _init, "inval": _inval, "arrive": _arrive, "arrive_drop": _arrive, "expect_tx": _expect,
        "complete_tx": _expect, "test_wait": _wait, "try_wait": _wait,
    }  # fmt: skip
    builder = forms.get(instruction.qualifiers[0])
    if builder is None:
        raise instruction.unknown()
    return builder(instruction, scope)


def _init(instruction: Instruction, scope: Scope) -> Plain:
    allow(instruction, "init", *_SCOPES)
    address, count = scope.address(instruction.operands[0]), scope.source(instruction.operands[1], "u32")

    def run(active: Active) -> None:
        wave = active.wave
        counts = active.rows(count(active))
        for row, lane, block, offset in locate(active, active.rows(address(active))):
            if not 1 <= counts[row] <= MAXIMUM_COUNT:
                raise LaneFault("invalid operand", f"mbarrier count {counts[row]}", lane, offset)
            barriers_of(wave).init(wave, block, offset, lane, int(counts[row]))
        wave.launch.progress += 1

    return run


def _inval(instruction: Instruction, scope: Scope) -> Plain:
    address = scope.address(instruction.operands[0])

    def run(active: Active) -> None:
        for _, lane, block, offset in locate(active, active.rows(address(active))):
            barrier = barriers_of(active.wave).find(active.wave, block, offset, lane)
            if barrier.deliveries:
                raise LaneFault(
                    "missing wait", "mbarrier invalidated while asynchronous operations signal it", lane, offset
                )
            del barriers_of(active.wave).objects[block, offset]

    return run


def _arrive(instruction: Instruction, scope: Scope) -> Plain:
    allow(instruction, "arrive", "arrive_drop", "expect_tx", "noComplete", *_SCOPES)
    operands = list(instruction.operands)
    has_state = not hasattr(operands[0], "base")
    target = operands.pop(0) if has_state else Sink()
    put = scope.destination(target, "b64")
    address = scope.address(operands.pop(0))
    count = scope.source(operands[0], "u32") if operands else None
    expects, drops = instruction.has("expect_tx"), instruction.has("arrive_drop")
    relaxed = instruction.has("relaxed")

    def run(active: Active) -> None:
        wave = active.wave
        state = barriers_of(wave)
        counts = active.rows(count(active)) if count is not None else np.ones(active.count, np.uint32)
        tokens = np.zeros(active.count, np.uint64)
        for row, lane, block, offset in locate(active, active.rows(address(active))):
            barrier = state.find(wave, block, offset, lane)
            tokens[row] = barrier.phase
            if expects:
                barrier.bytes += int(counts[row])
            if drops:
                barrier.expected -= 1
            where = warp_in_cluster(wave, lane)
            knowledge = wave.clocks.relaxed(*np.array(where)[:, None])[0] if relaxed else wave.clocks.release(*where)
            state.arrive(wave, barrier, 1 if expects else int(counts[row]), knowledge, lane)
        put(active, active.layout(tokens))

    return run


def _expect(instruction: Instruction, scope: Scope) -> Plain:
    allow(instruction, "expect_tx", "complete_tx", *_SCOPES)
    address, count = scope.address(instruction.operands[0]), scope.source(instruction.operands[1], "u32")
    sign = 1 if instruction.has("expect_tx") else -1

    def run(active: Active) -> None:
        counts = active.rows(count(active))
        for row, lane, block, offset in locate(active, active.rows(address(active))):
            barrier = barriers_of(active.wave).find(active.wave, block, offset, lane)
            barrier.bytes += sign * int(counts[row])
            if sign < 0:
                barriers_of(active.wave).settle(active.wave, barrier)

    return run


def _wait(instruction: Instruction, scope: Scope) -> Plain:
    allow(instruction, "test_wait", "try_wait", "parity", *_SCOPES)
    put = scope.destination(instruction.operands[0], "pred")
    address = scope.address(instruction.operands[1])
    parity = instruction.has("parity")
    wanted = scope.source(instruction.operands[2], "u32" if parity else "u64")

    def run(active: Active) -> None:
        wave = active.wave
        state = barriers_of(wave)
        values = active.rows(wanted(active))
        result = np.zeros(active.count, np.bool_)
        served: set[int] = set()
        for row, lane, block, offset in locate(active, active.rows(address(active))):
            barrier = state.find(wave, block, offset, lane)
            done = (barrier.phase & 1) != (int(values[row]) & 1) if parity else barrier.phase != int(values[row])
            if done:
                result[row] = True
                if barrier.completed is not None:
                    wave.clocks.acquire(*warp_in_cluster(wave, lane), barrier.completed)
            elif id(barrier) not in served:
                served.add(id(barrier))
                if barrier.deliveries:
                    which = int(wave.launch.random.integers(len(barrier.deliveries)))
                    barrier.deliveries.pop(which)()
        put(active, active.layout(result))
        if not result.all():
            wave.poll()

    return run


def arrive_after_copies(instruction: Instruction, scope: Scope) -> Plain:
    """cp.async.mbarrier.arrive{.noinc}: an arrival when the thread's copies so far are complete"""
    allow(instruction, "async", "mbarrier", "arrive", "noinc", *_SCOPES)
    address = scope.address(instruction.operands[0])
    increments = not instruction.has("noinc")

    def run(active: Active) -> None:
        from .async_copy import state_of
        from .load_store import subset

        wave = active.wave
        copies = state_of(wave)
        for _, lane, block, offset in locate(active, active.rows(address(active))):
            barrier = barriers_of(wave).find(wave, block, offset, lane)
            if increments:
                barrier.pending += 1
            alone = subset(active, np.array([lane]))
            limit = np.full(wave.lanes, copies.committed[lane] + 1)

            def deliver(
                alone: Active = alone, limit: Array = limit, barrier: Barrier = barrier, lane: int = lane
            ) -> None:
                copies.complete(alone, limit)
                barriers_of(wave).arrive(wave, barrier, 1, wave.clocks.release(*warp_in_cluster(wave, lane)), lane)

            barrier.deliveries.append(deliver)

    return run


def check_ends(wave: Wave) -> None:
    """When all blocks have ended: nothing may still be on its way into their shared memory, and nobody in there."""
    for (block, offset), barrier in barriers_of(wave).objects.items():
        if barrier.writes:
            raise LaneFault(
                "missing wait",
                f"a block ended while {barrier.writes} asynchronous operations were to write shared memory and to "
                "signal its mbarrier",
                block * wave.threads,
                offset,
            )
    wave.remote.check_ends(wave)


FINAL_CHECKS.append(check_ends)
