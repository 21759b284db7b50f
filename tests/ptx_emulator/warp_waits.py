"""Lanes that wait for the others of their warp: collectives with a member mask, and guards on control instructions."""

from __future__ import annotations

from typing import Any

import numpy as np

from .faults import LaneFault
from .ptx_module import Instruction
from .registry import Control, Members, Plain
from .wave import Active, Stack, Wave

Array = np.ndarray[Any, np.dtype[Any]]


def lane_bits(mask: Array) -> Array:
    """A 32-bit mask for each warp of the wave."""
    return np.packbits(mask, bitorder="little").view(np.uint32)


class _Rendezvous:
    """Lanes that wait at one collective instruction until all members of their warp are there."""

    def __init__(
        self, pc: int, stack: Stack, instruction: Instruction, run: Plain, members: Members | None, span: int
    ) -> None:
        self.pc, self.stack = pc, stack
        self.span = span
        self.instruction = instruction
        self.run, self.members = run, members
        self.mask: Array | None = None

    def ready(self, wave: Wave) -> Array:
        """Which waiting lanes have all their partners. Lanes that have exited are not waited for, unless the
        instruction needs the whole warp."""
        assert self.mask is not None
        here = lane_bits(self.mask)
        alive = lane_bits(wave.alive)
        if self.members is None:
            full = alive.reshape(-1, self.span // 32) == np.uint32(0xFFFFFFFF)
            broken = np.flatnonzero((here.reshape(full.shape) != 0).any(axis=1) & ~full.all(axis=1))
            if len(broken):
                first = int(broken[0]) * self.span
                raise LaneFault(
                    "divergent warp",
                    f"the instruction needs all {self.span} threads together, some have exited or do not exist",
                    int(np.flatnonzero(self.mask[first : first + self.span])[0]) + first,
                )
            whole = (here == alive).reshape(-1, self.span // 32).all(axis=1)
            return np.repeat(whole, self.span) & self.mask
        if np.array_equal(here[here != 0], alive[here != 0]):
            return self.mask
        active = Active(wave, self.mask, compact=False)
        wanted = np.broadcast_to(self.members(active), (wave.lanes,)).astype(np.uint32)
        missing = wanted & np.repeat(alive & ~here, 32)
        return self.mask & (missing == 0)

    def retry(self, wave: Wave) -> bool:
        """Let lanes go on whose missing partners have exited."""
        if self.mask is None:
            return False
        try:
            ready = self.ready(wave)
            if not ready.any():
                return False
            self.leave(ready)
            self.run(Active(wave, ready))
        except LaneFault as fault:
            raise wave.fault(fault, self.pc, None) from fault
        wave.add(self.pc + 1, self.stack, ready)
        return True

    def leave(self, ready: Array) -> None:
        """Take lanes out of the waiting set."""
        assert self.mask is not None
        rest = self.mask & ~ready
        self.mask = rest if rest.any() else None

    def explain(self, wave: Wave) -> tuple[str, str, int] | None:
        """Who waits here."""
        if self.mask is None:
            return None
        lanes = np.flatnonzero(self.mask)
        kind = "divergent warp" if self.members is None else "deadlock"
        return (
            kind,
            f"{len(lanes)} threads wait at line {self.instruction.line} ({self.instruction.text}) for others of "
            "their warp",
            int(lanes[0]),
        )


def rendezvous(instruction: Instruction, run: Plain, members: Members | None, span: int = 32) -> Control:
    """The control form of a collective: lanes wait here for the members of their warp, then execute it together.

    span: lanes that execute it together, 128 for a warpgroup.
    """

    def control(wave: Wave, active: Active, pc: int, stack: Stack) -> int | None:
        key = ("warp", pc, stack)
        waiter = wave.waiters.get(key)
        if waiter is None:
            waiter = wave.waiters[key] = _Rendezvous(pc, stack, instruction, run, members, span)
        assert isinstance(waiter, _Rendezvous)
        alone = waiter.mask is None
        waiter.mask = active.mask if alone else waiter.mask | active.mask
        ready = waiter.ready(wave)
        if alone and (ready is active.mask or np.count_nonzero(ready) == active.count):
            waiter.mask = None
            run(active)
            return pc + 1
        if ready.any():
            waiter.leave(ready)
            run(Active(wave, ready))
            wave.add(pc + 1, stack, ready)
        return None

    return control


def guarded_control(control: Control, slot: int, negated: bool) -> Control:
    """A control instruction under a guard: the other lanes go on behind it."""

    def guarded(wave: Wave, active: Active, pc: int, stack: Stack) -> int | None:
        part = active.where(active.registers[slot], negated)
        if part is active:
            return control(wave, active, pc, stack)
        if part is None:
            return pc + 1
        wave.add(pc + 1, stack, active.mask & ~part.mask)
        target = control(wave, part, pc, stack)
        if target is not None:
            wave.add(target, stack, part.mask)
        return None

    return guarded
