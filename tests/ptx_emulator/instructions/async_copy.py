"""cp.async: copies of 4, 8 or 16 bytes per thread. They complete as late as allowed, when their thread waits for them.

Until then the destination counts as in flight: who touches it has missed a wait. The source is read at completion.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..ptx_module import Immediate, Instruction, Register
from ..registry import Plain, plain
from .bulk_copy import bulk
from .elementwise import allow
from .load_store import load_rows, shared_place, subset

if TYPE_CHECKING:
    from ..program import Scope
    from ..wave import Active, Wave

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass
class Copies:
    """Copies in flight, one row each. `group`: which of its thread's commit groups a copy belongs to."""

    lanes: Array
    flat: Array
    sources: Array
    lengths: Array
    group: Array
    width: int

    def part(self, rows: Array) -> Copies:
        """Some of the rows."""
        return Copies(
            self.lanes[rows], self.flat[rows], self.sources[rows], self.lengths[rows], self.group[rows], self.width
        )


class AsyncCopies:
    """All cp.async of a wave: the copies in flight, and for each lane how many groups it has committed."""

    def __init__(self, wave: Wave) -> None:
        self.pending: list[Copies] = []
        self.committed = np.zeros(wave.lanes, np.int64)

    def complete(self, active: Active, limit: Array) -> None:
        """Complete the active lanes' copies of groups before `limit` (a row for each lane of the wave)."""
        rest = []
        for copies in self.pending:
            due = active.mask[copies.lanes] & (copies.group < limit[copies.lanes])
            if due.any():
                finish(active.wave, copies.part(np.flatnonzero(due)))
            if not due.all():
                rest.append(copies.part(np.flatnonzero(~due)))
        self.pending = rest


def finish(wave: Wave, copies: Copies) -> None:
    """Move the bytes."""
    data = np.zeros((len(copies.lanes), copies.width), np.uint8)
    for length in np.unique(copies.lengths):
        if length:
            rows = np.flatnonzero(copies.lengths == length)
            unit = np.dtype(f"u{min(8, int(length) & -int(length))}")
            count = int(length) // unit.itemsize
            flat = copies.sources[rows][:, None] + np.arange(count, dtype=np.uint64) * np.uint64(unit.itemsize)
            loaded = wave.launch.memory.load(flat.reshape(-1), unit, 1, np.repeat(copies.lanes[rows], count))
            data[rows, :length] = loaded.reshape(len(rows), count).view(np.uint8)
    blocks = copies.lanes // wave.threads
    threads = copies.lanes % (wave.threads * wave.cluster_size)
    wave.shared.end_copy(copies.flat, data, blocks, threads)
    wave.launch.progress += 1


def state_of(wave: Wave) -> AsyncCopies:
    """The wave's record of cp.async."""
    if "async copies" not in wave.state:
        wave.state["async copies"] = AsyncCopies(wave)
    found = wave.state["async copies"]
    assert isinstance(found, AsyncCopies)
    return found


@plain("cp")
def cp(instruction: Instruction, scope: Scope) -> Plain:
    """cp.async and its waits; the bulk forms are in bulk_copy"""
    if instruction.has("bulk"):
        return bulk(instruction, scope)
    if instruction.qualifiers[0] != "async":
        raise instruction.unknown()
    if instruction.has("commit_group"):
        return _commit
    if instruction.has("wait_all"):
        return lambda active: state_of(active.wave).complete(active, np.full(active.wave.lanes, 1 << 60))
    if instruction.has("wait_group"):
        (count,) = instruction.operands
        assert isinstance(count, Immediate)
        keep = int(count.value)

        def wait(active: Active) -> None:
            copies = state_of(active.wave)
            copies.complete(active, copies.committed - keep)

        return wait
    if instruction.has("mbarrier"):
        from .mbarrier import arrive_after_copies

        return arrive_after_copies(instruction, scope)
    return _copy(instruction, scope)


def _commit(active: Active) -> None:
    copies = state_of(active.wave)
    copies.committed = copies.committed + active.mask


def _copy(instruction: Instruction, scope: Scope) -> Plain:
    allow(
        instruction,
        "async",
        "ca",
        "cg",
        "shared",
        "shared::cta",
        "global",
        "L2::64B",
        "L2::128B",
        "L2::256B",
        "L2::cache_hint",
    )
    operands = list(instruction.operands)
    if instruction.has("L2::cache_hint"):
        operands.pop()
    to, source = scope.address(operands[0]), scope.address(operands[1])
    size = operands[2]
    assert isinstance(size, Immediate)
    width = int(size.value)
    length, ignore = None, None
    if len(operands) > 3:
        last = operands[3]
        if isinstance(last, Register) and last.bits == 1:
            ignore = scope.predicate(last)
        else:
            length = scope.source(last, "u32")
    allowed = (16,) if instruction.has("cg") else (4, 8, 16)
    if width not in allowed:
        raise instruction.unknown(f"{width} bytes")

    def run(active: Active) -> None:
        wave = active.wave
        blocks, offsets = shared_place(active, active.rows(to(active)))
        flat = wave.shared.check_range(blocks, offsets, width, width, active.index, "asynchronous copy")
        sources = active.rows(source(active))
        lengths = np.full(active.count, width, np.int64)
        if length is not None:
            lengths = active.rows(length(active)).astype(np.int64)
        if ignore is not None:
            lengths = np.where(active.rows(ignore(active)), 0, lengths)
        whole = np.flatnonzero(lengths == width)
        if len(whole):  # report a bad source where the copy is issued
            unit = np.dtype(f"u{min(width, 8)}")
            load_rows(subset(active, active.index[whole]), "global", sources[whole], unit, width // unit.itemsize)
        wave.shared.begin_copy(flat, width, blocks, active.index, active.threads)
        copies = state_of(wave)
        copies.pending.append(Copies(active.index, flat, sources, lengths, copies.committed[active.index], width))

    return run
