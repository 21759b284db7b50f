"""Barriers of a block (bar, barrier), of a cluster (barrier.cluster) and of a warp (bar.warp.sync)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ..faults import LaneFault
from ..ptx_module import Instruction
from ..registry import Control, control
from ..warp_waits import lane_bits
from ..wave import Active as ActiveSet
from .warp import cluster_and_warp, members_of, warps_of

if TYPE_CHECKING:
    from ..program import Scope
    from ..wave import Active, Stack, Wave

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass
class _Arrival:
    """Lanes of one block that arrived together; `waits` unless it was bar.arrive."""

    lanes: Array
    waits: bool
    pc: int
    stack: tuple[int, ...]
    predicate: Array | None = None


@dataclass
class _Barrier:
    """One barrier of one block, between two completions."""

    expected: int
    arrivals: list[_Arrival] = field(default_factory=list)

    @property
    def arrived(self) -> int:
        """Number of threads so far."""
        return sum(len(a.lanes) for a in self.arrivals)


class _Barriers:
    """All block barriers of a wave that some but not all threads have reached."""

    def __init__(self) -> None:
        self.open: dict[tuple[int, int], _Barrier] = {}

    def retry(self, wave: Wave) -> bool:
        """Barriers complete only by arrivals."""
        return False

    def explain(self, wave: Wave) -> tuple[str, str, int] | None:
        """The first barrier that is not complete."""
        for (block, number), barrier in self.open.items():
            waiting = [a for a in barrier.arrivals if a.waits]
            if waiting:
                lanes = slice(block * wave.threads, block * wave.threads + wave.launch.block_size)
                gone = wave.launch.block_size - int(np.count_nonzero(wave.alive[lanes]))
                line = wave.program.steps[waiting[0].pc - 1].instruction.line
                return (
                    "divergent barrier",
                    f"{barrier.arrived} of {barrier.expected} threads reached barrier {number} of "
                    f"their block (line {line}), {gone} threads have exited",
                    int(waiting[0].lanes[0]),
                )
        return None


@control("bar", "barrier")
def barrier(instruction: Instruction, scope: Scope) -> Control:
    """bar.sync, bar.arrive, bar.red, their barrier{.cta} forms, bar.warp.sync, barrier.cluster"""
    if instruction.has("warp"):
        return _warp_barrier(instruction, scope)
    if instruction.has("cluster"):
        return _cluster_barrier(instruction, scope)
    aligned = instruction.opcode == "bar" or instruction.has("aligned")
    reduction = instruction.has("red")
    waits = not instruction.has("arrive")
    operands = list(instruction.operands)
    put, predicate, mode = None, None, ""
    if reduction:
        mode = next(q for q in instruction.qualifiers if q in ("popc", "and", "or"))
        put = scope.destination(operands.pop(0), "u32" if mode == "popc" else "pred")
        predicate = scope.wide(operands.pop(), "pred")
    number = scope.source(operands[0], "u32")
    count = scope.source(operands[1], "u32") if len(operands) > 1 else None

    def finish(wave: Wave, lanes: Array, values: Array | None) -> None:
        """Give all waiting lanes of a block the reduction's result."""
        if put is None or values is None:
            return
        result: Any = {"popc": np.uint32(values.sum()), "and": values.all(), "or": values.any()}[mode]
        mask = np.zeros(wave.lanes, np.bool_)
        mask[lanes] = True
        put(ActiveSet(wave, mask), np.array([result]))

    def run(wave: Wave, active: Active, pc: int, stack: Stack) -> int | None:
        state = wave.waiters.setdefault(("block barriers",), _Barriers())
        assert isinstance(state, _Barriers)
        size = wave.launch.block_size
        ids = number(active)
        wanted = count(active) if count is not None else np.array([size], np.uint32)
        if (
            waits
            and not reduction
            and len(ids) == 1
            and len(wanted) == 1
            and int(wanted[0]) in (size, -(-size // 32) * 32)
        ):
            counts = active.mask.reshape(wave.block_count, wave.threads).sum(axis=1)
            blocks = np.flatnonzero(counts)
            untouched = not state.open or not any((int(b), int(ids[0])) in state.open for b in blocks)
            if untouched and (counts[blocks] == size).all():
                _join_blocks(wave, blocks)
                wave.launch.progress += 1
                return pc + 1
        values = predicate(active) if predicate is not None else None
        ids, wanted = active.rows(ids), active.rows(wanted)
        for block in np.unique(active.blocks):
            here = active.blocks == block
            for one in np.unique(ids[here]):
                part = here & (ids == one)
                lanes = active.index[part]
                expected = int(wanted[part][0])
                if one > 15:
                    raise LaneFault("invalid operand", f"barrier {one}, a block has 0 to 15", int(lanes[0]))
                if count is not None and (expected % 32 or not 0 < expected <= 1024):
                    raise LaneFault(
                        "invalid operand", f"barrier for {expected} threads, not a multiple of 32", int(lanes[0])
                    )
                arrival = _Arrival(lanes, waits, pc + 1, stack, values[lanes] if values is not None else None)
                _arrive(wave, state, int(block), int(one), expected, arrival, aligned, finish)
        if not waits:
            return pc + 1
        return None

    return run


def _arrive(
    wave: Wave, state: _Barriers, block: int, number: int, expected: int, arrival: _Arrival, aligned: bool, finish: Any
) -> None:
    key = (block, number)
    one = state.open.setdefault(key, _Barrier(expected))
    if one.expected != expected:
        raise LaneFault(
            "divergent barrier",
            f"barrier {number} of the block is used for {one.expected} and for {expected} threads",
            int(arrival.lanes[0]),
        )
    one.arrivals.append(arrival)
    whole = -(-wave.launch.block_size // 32) * 32
    needed = wave.launch.block_size if expected == whole else expected
    if one.arrived > needed:
        raise LaneFault(
            "divergent barrier",
            f"{one.arrived} threads arrived at barrier {number}, {needed} were expected",
            int(arrival.lanes[0]),
        )
    if one.arrived < needed:
        return
    del state.open[key]
    if aligned:
        _check_warps(wave, one, number)
    cluster = block // wave.cluster_size
    first = block % wave.cluster_size * (wave.threads // 32)

    def warps(arrivals: list[_Arrival]) -> Array:
        lanes = np.concatenate([a.lanes for a in arrivals]) if arrivals else np.zeros(0, np.int64)
        return first + np.unique(lanes % wave.threads // 32)

    waiting = [a for a in one.arrivals if a.waits]
    wave.clocks.join(cluster, warps(one.arrivals), warps(waiting))
    wave.launch.progress += 1
    if waiting and waiting[0].predicate is not None:
        finish(wave, np.concatenate([a.lanes for a in waiting]), np.concatenate([a.predicate for a in waiting]))
    for a in waiting:
        mask = np.zeros(wave.lanes, np.bool_)
        mask[a.lanes] = True
        wave.add(a.pc, a.stack, mask)


def _check_warps(wave: Wave, one: _Barrier, number: int) -> None:
    """An aligned barrier must be executed by all threads of a warp at the same instruction."""
    places: dict[int, int] = {}
    for arrival in one.arrivals:
        for warp in np.unique(arrival.lanes // 32):
            if places.setdefault(int(warp), arrival.pc) != arrival.pc:
                lines = sorted(wave.program.steps[p - 1].instruction.line for p in (places[int(warp)], arrival.pc))
                raise LaneFault(
                    "divergent barrier",
                    f"threads of one warp reach barrier {number} at lines {lines[0]} and {lines[1]}",
                    int(arrival.lanes[0]),
                )
    together = np.sort(np.concatenate([a.lanes for a in one.arrivals]))
    for warp in places:
        present = np.count_nonzero(together // 32 == warp)
        if present != np.count_nonzero(wave.alive[32 * warp : 32 * warp + 32]):
            raise LaneFault("divergent barrier", f"only {present} threads of a warp reach barrier {number}", 32 * warp)


def _join_blocks(wave: Wave, blocks: Array) -> None:
    """All warps of these blocks synchronise, block by block."""
    warps = wave.threads // 32
    for rank in range(wave.cluster_size):
        mine = blocks[blocks % wave.cluster_size == rank] // wave.cluster_size
        if len(mine):
            wave.clocks.join_all(mine, slice(rank * warps, (rank + 1) * warps))


# ----------------------------------------------------------------------------------------------------------- warps


class _WarpBarriers:
    """bar.warp.sync of every warp: the lanes that wait, which may be at several instructions."""

    def __init__(self, wave: Wave) -> None:
        self.members = np.zeros(wave.lanes, np.uint32)
        self.waiting: list[tuple[Array, int, tuple[int, ...]]] = []

    def release(self, wave: Wave) -> bool:
        """Let those go on whose fellow members are all here or have exited."""
        if not self.waiting:
            return False
        here = np.logical_or.reduce([mask for mask, _, _ in self.waiting])
        missing = self.members & np.repeat(lane_bits(wave.alive) & ~lane_bits(here), 32)
        ready = here & (missing == 0)
        if not ready.any():
            return False
        _tick(wave, np.flatnonzero(lane_bits(ready)))
        rest = []
        for mask, pc, stack in self.waiting:
            if (mask & ready).any():
                wave.add(pc, stack, mask & ready)
            if (mask & ~ready).any():
                rest.append((mask & ~ready, pc, stack))
        self.waiting = rest
        return True

    def retry(self, wave: Wave) -> bool:
        """Lanes that exited are not waited for."""
        return self.release(wave)

    def explain(self, wave: Wave) -> tuple[str, str, int] | None:
        """Who waits."""
        if not self.waiting:
            return None
        mask, pc, _ = self.waiting[0]
        lanes = np.flatnonzero(mask)
        line = wave.program.steps[pc - 1].instruction.line
        return "deadlock", f"{len(lanes)} threads wait for others of their warp (line {line})", int(lanes[0])


def _tick(wave: Wave, warps: Array) -> None:
    """The warps start a new period: what their lanes did before is in order with what follows."""
    per_cluster = wave.threads // 32 * wave.cluster_size
    wave.clocks.tick(warps // per_cluster, warps % per_cluster)


def _warp_barrier(instruction: Instruction, scope: Scope) -> Control:
    members = members_of(scope, instruction.operands[0])

    def run(wave: Wave, active: Active, pc: int, stack: Stack) -> int | None:
        state = wave.waiters.get(("warp barriers",))
        if state is None:
            state = wave.waiters["warp barriers",] = _WarpBarriers(wave)
        assert isinstance(state, _WarpBarriers)
        if not state.waiting:
            here, alive = lane_bits(active.mask), lane_bits(wave.alive)
            if np.array_equal(here[here != 0], alive[here != 0]):
                _tick(wave, warps_of(active))
                return pc + 1
        state.members = np.where(active.mask, members(active), state.members)
        state.waiting.append((active.mask, pc + 1, stack))
        state.release(wave)
        return None

    return run


# -------------------------------------------------------------------------------------------------------- clusters


class _ClusterBarriers:
    """barrier.cluster of every cluster: which lanes have arrived in this phase, which wait for its end.

    What the arriving warps know reaches a warp when it waits, not when the phase ends. A relaxed arrival passes on what
    `Clocks.relaxed` says.
    """

    def __init__(self, wave: Wave) -> None:
        self.arrived = np.zeros(wave.lanes, np.bool_)
        self.waiting: list[tuple[Array, int, tuple[int, ...]]] = []
        self.done = np.zeros(wave.lanes, np.bool_)  # lanes whose phase has completed and who have not waited yet
        clusters, _, columns = wave.clocks.known.shape
        self.arriving = np.zeros((clusters, columns), np.int32)
        self.completed = np.zeros((clusters, columns), np.int32)
        self.begun = np.zeros(clusters, np.int64)  # moment of the phase's first arrival; 0: one of them was relaxed
        self.ended = np.zeros(clusters, np.int64)  # the same of the phase that completed last

    def arrive(self, wave: Wave, active: Active, relaxed: bool) -> None:
        """Lanes arrive; their warps start a new period."""
        clusters, warps = cluster_and_warp(active)
        fresh = np.unique(clusters[~self.arrived.reshape(len(self.begun), -1)[clusters].any(axis=1)])
        self.begun[fresh] = wave.clocks.moment
        if relaxed:
            self.begun[clusters] = 0
        wave.clocks.moment += 1
        known = wave.clocks.relaxed(clusters, warps) if relaxed else wave.clocks.known[clusters, warps]
        np.maximum.at(self.arriving, clusters, known)
        wave.clocks.tick(clusters, warps)
        self.arrived = self.arrived | active.mask

    def clusters_complete(self, wave: Wave) -> bool:
        """Complete the phase of every cluster all of whose threads have arrived or exited."""
        width = wave.threads * wave.cluster_size
        arrived = self.arrived.reshape(-1, width)
        ready = ((arrived | ~wave.alive.reshape(-1, width)).all(axis=1)) & arrived.any(axis=1)
        if not ready.any():
            return False
        self.completed[ready] = self.arriving[ready]
        self.ended[ready] = self.begun[ready]
        self.arriving[ready] = 0
        lanes = np.repeat(ready, width)
        self.done |= self.arrived & lanes
        self.arrived &= ~lanes
        wave.launch.progress += 1
        return True

    def leave(self, wave: Wave, active: Active) -> None:
        """Lanes whose phase is complete go on, and know what the arrivals knew."""
        clusters, warps = cluster_and_warp(active)
        known = wave.clocks.known
        known[clusters, warps] = np.maximum(known[clusters, warps], self.completed[clusters])
        self.done = self.done & ~active.mask
        left: Array = np.any(self.done.reshape(len(self.begun), -1), axis=1)
        finished = np.unique(clusters[~left[clusters]])
        wave.clocks.cluster_joined[finished] = np.maximum(wave.clocks.cluster_joined[finished], self.ended[finished])

    def release(self, wave: Wave) -> bool:
        """Let waiting lanes go on whose phase is complete."""
        rest, moved = [], False
        for mask, pc, stack in self.waiting:
            ready = mask & self.done
            if ready.any():
                self.leave(wave, ActiveSet(wave, ready))
                wave.add(pc, stack, ready)
                moved = True
                mask = mask & ~ready
            if mask.any():
                rest.append((mask, pc, stack))
        self.waiting = rest
        return moved

    def retry(self, wave: Wave) -> bool:
        """Threads that exited count as arrived."""
        self.clusters_complete(wave)
        return self.release(wave)

    def explain(self, wave: Wave) -> tuple[str, str, int] | None:
        """Who waits."""
        if not self.waiting:
            return None
        mask, pc, _ = self.waiting[0]
        lanes = np.flatnonzero(mask)
        line = wave.program.steps[pc - 1].instruction.line
        return "divergent barrier", f"{len(lanes)} threads wait for their cluster (line {line})", int(lanes[0])


def _cluster_barrier(instruction: Instruction, scope: Scope) -> Control:
    arrive, relaxed = instruction.has("arrive"), instruction.has("relaxed")

    def run(wave: Wave, active: Active, pc: int, stack: Stack) -> int | None:
        state = wave.waiters.get(("cluster barrier",))
        if state is None:
            state = wave.waiters["cluster barrier",] = _ClusterBarriers(wave)
        assert isinstance(state, _ClusterBarriers)
        if arrive:
            twice = np.flatnonzero(active.mask & (state.arrived | state.done))
            if len(twice):
                raise LaneFault(
                    "divergent barrier", "a thread arrives twice at the cluster barrier without waiting", int(twice[0])
                )
            state.arrive(wave, active, relaxed)
            if state.clusters_complete(wave):
                state.release(wave)
            return pc + 1
        never = np.flatnonzero(active.mask & ~(state.arrived | state.done))
        if len(never):
            raise LaneFault("deadlock", "a thread waits at the cluster barrier without having arrived", int(never[0]))
        if np.count_nonzero(active.mask & state.done) == active.count:
            state.leave(wave, active)
            return pc + 1
        state.waiting.append((active.mask, pc + 1, stack))
        state.release(wave)
        return None

    return run
