"""A wave: the threads of many blocks executed together, one lane of numpy arrays each.

Lanes that are at the same instruction form a group and execute it together. The group with the lowest program counter
runs first, until it meets the next group, so that diverged lanes come together again behind branches and loops. A group
that loops for long while others could run steps aside for a round; that makes spinning on a flag fair. Registers are
arrays that are never changed in place: a value that all lanes share is an array of one element.

Lanes are numbered block by block, each block padded to whole warps; blocks of a cluster are neighbours.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from .cluster_life import RemoteAccesses
from .faults import EmulatorFault, LaneFault
from .global_order import Learnt
from .shared_memory import Clocks, SharedMemory
from .spaces import RANK_SHIFT

if TYPE_CHECKING:
    from .launch import Launch

Array = np.ndarray[Any, np.dtype[Any]]
Stack = tuple[int, ...]
Key = tuple[int, Stack]

SPIN_STREAK = 512  # backward jumps after which a group lets others run
SPIN_ROUNDS = 12  # rounds in which all groups only poll and nothing changes, until that is a deadlock
LOOP_ROUNDS = 40_000  # the same for loops that do not poll

POISON = {1: np.zeros(1, np.bool_), 8: np.full(1, 0xA5, np.uint8), 16: np.full(1, 0xA5A5, np.uint16),
          32: np.full(1, 0xA5A5A5A5, np.uint32), 64: np.full(1, 0xA5A5A5A5A5A5A5A5, np.uint64),
          128: np.full((1, 2), 0xA5A5A5A5A5A5A5A5, np.uint64)}  # fmt: skip


class Waiter(Protocol):
    """Something that lanes wait at. `retry` is called when nothing can run; it returns whether lanes were released."""

    def retry(self, wave: Wave) -> bool:
        """Look again whether lanes can go on, for example because others have exited."""

    def explain(self, wave: Wave) -> tuple[str, str, int] | None:
        """(kind of fault, text, a lane) if lanes wait here."""


class InFlight:
    """A register that an asynchronous instruction writes: the lanes in `mask` may not touch it before the wait."""

    def __init__(self, value: Array, mask: Array, what: str) -> None:
        self.value = value
        self.mask = mask
        self.what = what

    def resolve(self, mask: Array) -> Array:
        """The value for lanes that the instruction does not concern; a fault for the others."""
        early = np.flatnonzero(self.mask & mask)
        if len(early):
            raise LaneFault(
                "missing wait", f"use of a register that {self.what} has not been waited for", int(early[0])
            )
        return self.value


class Active:
    """The lanes that execute an instruction.

    Values have one row (the same for all lanes) or one per lane; 'compact' layout has rows for active lanes only, the
    other layout ('wide') for all lanes of the wave.
    """

    __slots__ = ("_blocks", "_index", "_threads", "_who", "compact", "count", "mask", "registers", "wave", "whole")

    def __init__(self, wave: Wave, mask: Array, compact: bool | None = None) -> None:
        self.wave = wave
        self.registers = wave.registers
        self.mask = mask
        self.count = int(np.count_nonzero(mask))
        self.compact = self.count * 4 < wave.lanes if compact is None else compact
        self.whole = not self.compact and self.count == wave.live_count
        self._index: Array | None = None
        self._blocks: Array | None = None
        self._threads: Array | None = None
        self._who: tuple[int, tuple[Array, Array, Array]] = (-1, ())  # type: ignore[assignment]

    @property
    def index(self) -> Array:
        """Numbers of the active lanes."""
        if self._index is None:
            self._index = np.flatnonzero(self.mask)
        return self._index

    @property
    def blocks(self) -> Array:
        """The wave's block number of each active lane."""
        if self._blocks is None:
            self._blocks = self.index // self.wave.threads
        return self._blocks

    @property
    def threads(self) -> Array:
        """The thread number inside the cluster of each active lane."""
        if self._threads is None:
            self._threads = self.index % (self.wave.threads * self.wave.cluster_size)
        return self._threads

    def who(self) -> tuple[Array, Array, Array]:
        """Of each active lane: cluster, numbered over all waves from 1, thread inside it, and clock of its warp."""
        wave = self.wave
        if self._who[0] != wave.clocks.version:
            clusters = self.blocks // wave.cluster_size
            warps = self.threads >> 5
            clocks = wave.clocks.known[clusters, warps, warps]
            mine = (clusters + wave.cluster_base).astype(np.int32)
            self._who = wave.clocks.version, (mine, self.threads.astype(np.int32), clocks)
        return self._who[1]

    def rows(self, value: Array) -> Array:
        """The value's rows for the active lanes, whatever its layout."""
        if value.shape[0] == 1:
            return np.broadcast_to(value, (self.count, *value.shape[1:]))
        return value if self.compact else value[self.index]

    def layout(self, rows: Array) -> Array:
        """Rows of active lanes in the layout of this set."""
        if self.compact or rows.shape[0] == 1:
            return rows
        if self.count == self.wave.lanes:
            return rows
        wide = np.zeros((self.wave.lanes, *rows.shape[1:]), rows.dtype)
        wide[self.index] = rows
        return wide

    def from_wide(self, wide: Array) -> Array:
        """A value with a row for every lane of the wave, in the layout of this set."""
        return wide[self.index] if self.compact and wide.shape[0] != 1 else wide

    def read(self, slot: int) -> Array:
        """A register in this set's layout."""
        value = self.registers[slot]
        if value.__class__ is InFlight:
            value = value.resolve(self.mask)
        return value[self.index] if self.compact and value.shape[0] != 1 else value

    def write(self, slot: int, value: Array) -> None:
        """Set a register for the active lanes; the value is in this set's layout."""
        if self.whole:
            if self.registers[slot].__class__ is InFlight:
                self.registers[slot].resolve(self.mask)
            self.registers[slot] = value
            return
        old = self.registers[slot]
        if old.__class__ is InFlight:
            flying = old
            self.registers[slot] = old.resolve(self.mask)
            self.write(slot, value)
            flying.value = self.registers[slot]
            self.registers[slot] = flying
        elif self.compact:
            new = np.empty((self.wave.lanes, *old.shape[1:]), old.dtype)
            new[:] = old
            new[self.index] = value
            self.registers[slot] = new
        else:
            mask = self.mask if value.ndim == 1 else self.mask[:, None]
            self.registers[slot] = np.where(mask, value, old)

    def where(self, predicate: Array, negated: bool) -> Active | None:
        """The part of this set for which a predicate register (as stored) holds; None if there is no lane."""
        if predicate.shape[0] == 1:
            return self if bool(predicate[0]) != negated else None
        mask = self.mask & ~predicate if negated else self.mask & predicate
        part = Active(self.wave, mask)
        if part.count == 0:
            return None
        return self if part.count == self.count else part


class Wave:
    """State and scheduler of the threads of some blocks."""

    def __init__(self, launch: Launch, blocks: Array) -> None:
        program = launch.program
        self.launch = launch
        self.program = program
        self.block_numbers = blocks
        self.block_count = len(blocks)
        self.threads = -(-launch.block_size // program.lane_unit) * program.lane_unit
        self.cluster_size = launch.cluster_size
        self.lanes = self.block_count * self.threads
        self.warps = self.lanes // 32
        thread = np.arange(self.lanes) % self.threads
        self.thread_of_lane = thread
        self.block_of_lane = np.arange(self.lanes) // self.threads
        self.rank_bits = (self.block_of_lane % self.cluster_size).astype(np.uint64) << np.uint64(RANK_SHIFT)
        self.alive = thread < launch.block_size
        self.live_count = int(np.count_nonzero(self.alive))
        self.registers: list[Any] = [POISON[bits] for bits in program.register_bits]
        self.parameters: dict[tuple[str, str], Array] = {}
        self.local = np.zeros((self.lanes, program.local_size), np.uint8) if program.local_size else None
        warps = self.threads // 32 * self.cluster_size
        self.clocks = Clocks(self.block_count // self.cluster_size, self.cluster_size, warps)
        self.shared = SharedMemory(
            self.block_count, launch.shared_size, warps, program.granule, self.clocks, self.cluster_size
        )
        self.cluster_base = launch.next_cluster  # numbers clusters over all waves, from 1
        launch.next_cluster += self.block_count // self.cluster_size
        self.remote = RemoteAccesses(self.block_count // self.cluster_size, self.cluster_size, warps)
        self.learnt: dict[int, Learnt] = {}  # by cluster of the wave
        self.state: dict[str, Any] = {}  # of instruction groups: mbarriers, copies in flight, tensor memory
        self.waiters: dict[Any, Waiter] = {}
        self.groups: dict[Key, Array] = {(program.entry, ()): self.alive.copy()}
        self.tired: dict[Key, Array] = {}
        self.streak = 0
        self.polls = 0
        self.worked = False  # in this round a group looped without polling
        self.quiet_rounds = 0  # rounds in which all groups only polled, and nothing changed
        self.idle_rounds = 0  # rounds in which nothing changed
        self.seen_progress = -1
        self.coordinates: dict[str, Array] = {}
        self.executed = 0
        self.pc = 0  # of the instruction that is executed

    # ------------------------------------------------------------------------------------------------- scheduling

    def add(self, pc: int, stack: Stack, mask: Array) -> None:
        """Let lanes go on at pc."""
        key = (pc, stack)
        if key in self.groups:
            self.groups[key] = self.groups[key] | mask
        else:
            self.groups[key] = mask

    def poll(self) -> None:
        """An instruction looked at something that another thread may change."""
        self.polls += 1
        self.streak += 8

    def step_aside(self, pc: int, stack: Stack, mask: Array) -> None:
        """Lanes go on at pc after all others had their turn."""
        key = (pc, stack)
        self.tired[key] = self.tired[key] | mask if key in self.tired else mask

    def exit(self, mask: Array) -> None:
        """Lanes end."""
        self.alive = self.alive & ~mask
        self.live_count = int(np.count_nonzero(self.alive))
        self.launch.progress += 1

    def run(self) -> bool:
        """Run until all lanes have ended (True) or all are waiting for something outside (False)."""
        while True:
            if not self.groups and not self._refill():
                return True
            if self.quiet_rounds and not self.streak:
                if self.quiet_rounds > SPIN_ROUNDS and not self.launch.others_wait(self):
                    self._no_progress()
                if self.launch.others_wait(self):
                    self.quiet_rounds = 0
                    return False
            key = min(self.groups, key=lambda k: (-len(k[1]), k[0]))
            self._run_group(key[0], key[1], self.groups.pop(key))

    def _refill(self) -> bool:
        """Find lanes to run when no group is ready. False: all have ended."""
        if self.tired:
            self.groups, self.tired = self.tired, {}
            if self.seen_progress != self.launch.progress:
                self.quiet_rounds = self.idle_rounds = 0
            else:
                self.idle_rounds += 1
                self.quiet_rounds = 0 if self.worked else self.quiet_rounds + 1
                if self.idle_rounds > LOOP_ROUNDS:
                    self._no_progress()
            self.worked = False
            self.seen_progress = self.launch.progress
            self.streak = 0
            return True
        if self.live_count == 0:
            return False
        released = [waiter.retry(self) for waiter in list(self.waiters.values())]
        if any(released):
            return bool(self.groups or self._refill())
        self._deadlock()
        return False

    def _run_group(self, pc: int, stack: Stack, mask: Array) -> None:
        steps = self.program.steps
        active = Active(self, mask)
        stop = min((k[0] for k in self.groups if k[1] == stack and k[0] > pc), default=-1)
        crowd = bool(self.groups)
        polls = self.polls
        try:
            while True:
                step = steps[pc]
                self.pc = pc
                self.executed += 1
                if step.control is None:
                    step.run(active)
                    pc += 1
                    if pc == stop:
                        self.add(pc, stack, mask)
                        return
                    continue
                target = step.control(self, active, pc, stack)
                if target is None:
                    return
                if target <= pc:
                    self.streak += 1
                    if self.streak > SPIN_STREAK:
                        self.streak = 0
                        self.worked |= self.polls == polls
                        self.step_aside(target, stack, mask)
                        return
                elif crowd and stop != -1 and target >= stop:
                    self.add(target, stack, mask)
                    return
                pc = target
        except LaneFault as fault:
            raise self.fault(fault, pc, active) from fault
        except KeyError as missing:
            raise steps[pc].instruction.unknown(f"no form for {missing}") from missing

    # ----------------------------------------------------------------------------------------------------- faults

    def place(self, lane: int) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
        """Block and thread coordinates of a lane."""
        return (
            self.launch.block_coordinates(int(self.block_numbers[lane // self.threads])),
            self.launch.thread_coordinates(lane % self.threads),
        )

    def fault(self, fault: LaneFault, pc: int, active: Active | None) -> EmulatorFault:
        """The full report of what an instruction found."""
        lane = fault.lane
        if lane is None and active is not None and active.count:
            lane = int(active.index[0])
        block, thread = self.place(lane) if lane is not None else (None, None)
        instruction = self.program.steps[pc].instruction
        return EmulatorFault(
            fault.kind,
            fault.detail,
            kernel=self.program.name,
            line=instruction.line,
            text=instruction.text,
            block=block,
            thread=thread,
            address=fault.address,
        )

    def _deadlock(self) -> None:
        reasons = [r for r in (waiter.explain(self) for waiter in self.waiters.values()) if r is not None]
        reasons.sort(key=lambda reason: reason[0] != "divergent barrier")
        kind, text, lane = reasons[0] if reasons else ("deadlock", "no thread can run", 0)
        others = "".join(f"; {r[1]}" for r in reasons[1:4])
        block, thread = self.place(lane)
        raise EmulatorFault(kind, text + others, kernel=self.program.name, block=block, thread=thread)

    def _no_progress(self) -> None:
        (pc, _), mask = next(iter(self.groups.items()))
        lane = int(np.flatnonzero(mask)[0])
        block, thread = self.place(lane)
        waiting = [r[1] for r in (w.explain(self) for w in self.waiters.values()) if r is not None]
        instruction = self.program.steps[pc].instruction
        raise EmulatorFault(
            "deadlock",
            "; ".join(["threads loop for ever and nothing changes", *waiting]),
            kernel=self.program.name,
            line=instruction.line,
            text=instruction.text,
            block=block,
            thread=thread,
        )
