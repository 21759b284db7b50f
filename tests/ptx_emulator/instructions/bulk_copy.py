"""cp.async.bulk: copies of many bytes by one thread, plain and through tensor maps, signalled by an mbarrier or a
bulk group. They complete as late as allowed: loads when their mbarrier is polled, stores when their group is awaited.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..faults import LaneFault
from ..ptx_module import Address, Immediate, Instruction, Vector
from ..registry import FINAL_CHECKS, Plain
from ..tensor_map import TensorMap
from .load_store import shared_place
from .mbarrier import barriers_of, locate

if TYPE_CHECKING:
    from ..program import Scope
    from ..wave import Active, Wave

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass
class Store:
    """A copy out of shared memory that has not happened yet. Reading comes first; `data` holds what was read."""

    lane: int
    group: int
    read: Callable[[], Array]
    write: Callable[[Array], None]
    data: Array | None = None


class BulkGroups:
    """Copies out of shared memory, by committing lane and group."""

    def __init__(self, wave: Wave) -> None:
        self.stores: list[Store] = []
        self.committed = np.zeros(wave.lanes, np.int64)

    def complete(self, active: Active, keep: int, reading_only: bool) -> None:
        """Complete all but the newest `keep` groups of the active lanes, or their reading."""
        rest = []
        for store in self.stores:
            due = bool(active.mask[store.lane]) and store.group < self.committed[store.lane] - keep
            if due and store.data is None:
                store.data = store.read()
            if due and not reading_only:
                assert store.data is not None
                store.write(store.data)
            else:
                rest.append(store)
        self.stores = rest


def groups_of(wave: Wave) -> BulkGroups:
    """The wave's bulk groups."""
    if "bulk groups" not in wave.state:
        wave.state["bulk groups"] = BulkGroups(wave)
    found = wave.state["bulk groups"]
    assert isinstance(found, BulkGroups)
    return found


def finish_stores(wave: Wave) -> None:
    """At the end of the blocks: what was read but not written arrives; what was not even read has lost its source."""
    groups = wave.state.get("bulk groups")
    if groups is None:
        return
    for store in groups.stores:
        if store.data is None:
            block, thread = wave.place(store.lane)
            raise LaneFault(
                "missing wait",
                f"block {block}, thread {thread} ended before its bulk copy had read shared memory",
                store.lane,
            )
        store.write(store.data)
    groups.stores = []


def bulk(instruction: Instruction, scope: Scope) -> Plain:
    """cp.async.bulk{.tensor}, its commit_group and wait_group"""
    if instruction.has("commit_group"):

        def commit(active: Active) -> None:
            groups = groups_of(active.wave)
            groups.committed = groups.committed + active.mask

        return commit
    if instruction.has("wait_group"):
        (count,) = instruction.operands
        assert isinstance(count, Immediate)
        keep, reading = int(count.value), instruction.has("read")
        return lambda active: groups_of(active.wave).complete(active, keep, reading)
    if instruction.has("prefetch"):
        return lambda active: None
    if instruction.has("bulk_group"):
        return _store(instruction, scope)
    return _load(instruction, scope)


def _bytes_at(wave: Wave, address: int, size: int, lane: int) -> Array:
    unit = np.dtype("u1")
    places = np.uint64(address) + np.arange(size, dtype=np.uint64)
    return wave.launch.memory.load(places, unit, 1, np.full(size, lane))[:, 0]


def _one_lane(active: Active, value: Array) -> list[int]:
    return [int(v) for v in active.rows(value)]


def _check_plain(size: int, source: int, target: int, lane: int) -> None:
    if size % 16 or source % 16 or target % 16:
        raise LaneFault(
            "misaligned", f"bulk copy of {size} bytes: size and addresses must be multiples of 16", lane, source
        )


def _load(instruction: Instruction, scope: Scope) -> Plain:
    """Global to shared memory of this block, of another one or of several (multicast), signalled by an mbarrier."""
    tensor, pairs = instruction.has("tensor"), instruction.has("cta_group::2")
    known = (
        "async",
        "bulk",
        "tensor",
        "shared",
        "shared::cluster",
        "shared::cta",
        "global",
        "tile",
        "mbarrier::complete_tx::bytes",
        "multicast::cluster",
        "L2::cache_hint",
        "cta_group::1",
        "cta_group::2",
        "1d",
        "2d",
        "3d",
        "4d",
        "5d",
    )
    for qualifier in instruction.qualifiers:
        if qualifier not in known:
            raise instruction.unknown(f"qualifier .{qualifier}")
    operands = list(instruction.operands)
    if instruction.has("L2::cache_hint"):
        operands.pop()
    mask = scope.source(operands.pop(), "u16") if instruction.has("multicast::cluster") else None
    from_shared = instruction.qualifiers[-1] != "global" and "global" not in instruction.qualifiers
    target, source = scope.address(operands[0]), scope.address(operands[1])
    size = None if tensor else scope.source(operands[2], "u32")
    barrier_address = scope.address(operands[2 if tensor else 3])
    place = operands[1]
    assert isinstance(place, Address)
    coordinates = []
    if tensor:
        (listed,) = place.extra
        assert isinstance(listed, Vector)
        coordinates = [scope.source(item, "s32") for item in listed.items]

    def run(active: Active) -> None:
        wave = active.wave
        targets, sources = active.rows(target(active)), _one_lane(active, source(active))
        sizes = [0] * active.count if size is None else _one_lane(active, size(active))
        masks = active.rows(mask(active)) if mask is not None else None
        where = [active.rows(c(active)) for c in coordinates]
        signals = locate(active, active.rows(barrier_address(active)), deferred=True)
        blocks, offsets = shared_place(active, targets, deferred=True)
        for row, lane, barrier_block, barrier_offset in signals:
            fetch: Callable[[], Array]
            if tensor:
                map_ = TensorMap.unpack(wave.launch.memory.read_bytes(sources[row], 128))
                map_, at = map_.in_bytes([int(w[row]) for w in where], lane)
                length = map_.box_bytes
                map_.check(at, lane)
                if int(offsets[row]) % 128:
                    raise LaneFault(
                        "misaligned", "tensor copy to an address that is not a multiple of 128", lane, int(offsets[row])
                    )

                def fetch(
                    map_: TensorMap = map_, at: list[int] = at, lane: int = lane, offset: int = int(offsets[row])
                ) -> Array:
                    return map_.load(wave.launch.memory, at, offset, lane)
            elif from_shared:
                length = sizes[row]
                from_block = int(active.blocks[row])
                from_offset = sources[row] & 0xFFFFFF
                _check_plain(length, from_offset, int(offsets[row]), lane)

                def fetch(block: int = from_block, offset: int = from_offset, length: int = length) -> Array:
                    return _shared_bytes(wave, block, offset, length)
            else:
                length = sizes[row]
                _check_plain(length, sources[row], int(offsets[row]), lane)
                _bytes_at(wave, sources[row], length, lane)  # report a bad source where the copy is issued

                def fetch(address: int = sources[row], length: int = length, lane: int = lane) -> Array:
                    return _bytes_at(wave, address, length, lane)

            ranks = [None] if masks is None else [r for r in range(wave.cluster_size) if int(masks[row]) >> r & 1]
            for rank in ranks:
                first = int(active.blocks[row]) - int(active.blocks[row]) % wave.cluster_size
                block = int(blocks[row]) if rank is None else first + rank
                signal_block = barrier_block if rank is None else first + rank
                if pairs and rank is not None:  # the block of the pair that the barrier's address names
                    signal_block = first + rank - rank % 2 + (barrier_block - first) % 2
                _begin(wave, block, int(offsets[row]), length, fetch, signal_block, barrier_offset, lane)

    return run


def _begin(
    wave: Wave,
    block: int,
    offset: int,
    length: int,
    fetch: Callable[[], Array],
    barrier_block: int,
    barrier_offset: int,
    lane: int,
) -> None:
    """Mark the destination as in flight and leave the delivery with the mbarrier."""
    shared = wave.shared
    unit = 16
    starts = offset + np.arange(0, length, unit)
    lanes = np.full(len(starts), lane)
    where = np.full(len(starts), block)
    flat = shared.check_range(where, starts, unit, unit, lanes, "bulk copy")
    threads = np.full(len(starts), lane % (wave.threads * wave.cluster_size))
    shared.begin_copy(flat, unit, where, lanes, threads)
    state = barriers_of(wave)
    wave.remote.check(wave, where, lanes, starts, deferred=True)  # of a multicast, each block
    barrier = state.find(wave, barrier_block, barrier_offset, lane)
    barrier.writes += 1

    def deliver() -> None:
        shared.end_copy(flat, fetch().reshape(-1, unit), where, None)
        barrier.bytes -= length
        barrier.writes -= 1
        state.settle(wave, barrier)

    barrier.deliveries.append(deliver)


def _shared_bytes(wave: Wave, block: int, offset: int, length: int) -> Array:
    flat = block * wave.shared.stride + offset
    return wave.shared.data[flat : flat + length].copy()


def _store(instruction: Instruction, scope: Scope) -> Plain:
    """Shared to global memory, as part of a bulk group; cp.reduce is not implemented."""
    tensor = instruction.has("tensor")
    known = (
        "async",
        "bulk",
        "tensor",
        "shared::cta",
        "global",
        "tile",
        "bulk_group",
        "L2::cache_hint",
        "1d",
        "2d",
        "3d",
        "4d",
        "5d",
    )
    for qualifier in instruction.qualifiers:
        if qualifier not in known:
            raise instruction.unknown(f"qualifier .{qualifier}")
    operands = list(instruction.operands)
    if instruction.has("L2::cache_hint"):
        operands.pop()
    target, source = scope.address(operands[0]), scope.address(operands[1])
    size = None if tensor else scope.source(operands[2], "u32")
    place = operands[0]
    assert isinstance(place, Address)
    coordinates = []
    if tensor:
        (listed,) = place.extra
        assert isinstance(listed, Vector)
        coordinates = [scope.source(item, "s32") for item in listed.items]

    def run(active: Active) -> None:
        wave = active.wave
        groups = groups_of(wave)
        targets = _one_lane(active, target(active))
        blocks, offsets = shared_place(active, active.rows(source(active)))
        sizes = [0] * active.count if size is None else _one_lane(active, size(active))
        where = [active.rows(c(active)) for c in coordinates]
        for row, lane in enumerate(active.index.tolist()):
            block, offset = int(blocks[row]), int(offsets[row])
            write: Callable[[Array], None]
            if tensor:
                map_ = TensorMap.unpack(wave.launch.memory.read_bytes(targets[row], 128))
                map_, at = map_.in_bytes([int(w[row]) for w in where], lane)
                length = map_.box_bytes
                map_.check(at, lane)

                def write(
                    data: Array, map_: TensorMap = map_, at: list[int] = at, offset: int = offset, lane: int = lane
                ) -> None:
                    map_.store(wave.launch.memory, at, offset, data, lane)
            else:
                length = sizes[row]
                _check_plain(length, targets[row], offset, lane)

                def write(data: Array, address: int = targets[row], lane: int = lane) -> None:
                    places = np.uint64(address) + np.arange(len(data), dtype=np.uint64)
                    wave.launch.memory.store(places, data[:, None], np.full(len(data), lane))

            _check_readable(wave, block, offset, length, lane)

            def read(block: int = block, offset: int = offset, length: int = length) -> Array:
                return _shared_bytes(wave, block, offset, length)

            groups.stores.append(Store(lane, int(groups.committed[lane]), read, write))
        wave.launch.progress += 1

    return run


def _check_readable(wave: Wave, block: int, offset: int, length: int, lane: int) -> None:
    """The issuing thread must see all that the copy reads."""
    starts = offset + np.arange(0, length, 16)
    where, lanes = np.full(len(starts), block), np.full(len(starts), lane)
    flat = wave.shared.check_range(where, starts, 16, 16, lanes, "bulk copy")
    wave.shared.note_read(flat, 16, where, lanes, np.full(len(starts), lane % (wave.threads * wave.cluster_size)))


FINAL_CHECKS.append(finish_stores)
