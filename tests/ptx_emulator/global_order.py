"""Races on global memory: who wrote each place last, and who has read it since, in this launch.

Two accesses to one place, of which one writes, must be in order. Inside a cluster the order is that of the warps'
clocks, as for shared memory. Threads of different clusters are in order by what one published and the other saw at a
place in global memory:

- A warp publishes what it knows where it stores, or changes by an atomic, with .release; and where it does so relaxed
  (volatile, or an atomic without qualifier) what it knew at its last fence of gpu scope. Without a fence, nothing.
- A warp learns what was published at a place until then where it loads from it with .acquire, .relaxed or .volatile,
  or gets its value by an atomic. That goes on to the rest of its cluster by barriers, and to others where it is
  published again.

So a read or write of another block's data is found to be too early, a write over what another thread may still have to
read too, whatever schedule ran. A store that repeats the value that is there is no race. Memory of any size is watched.

Not noticed:
- a missing acquiring fence behind a relaxed load or atomic: what was seen counts as acquired;
- a release of cluster scope that other clusters see (of scope cta it publishes nothing, a fence of cluster scope
  neither);
- which value was seen: a load that finds an old value learns all that was published at that place until then;
- races of atomics and of volatile, relaxed, acquire or release accesses, with each other or with other accesses;
- accesses of cp.async.bulk, of tensor copies and of tensor map updates; cp.async reads where it is issued;
- what only some lanes of a warp have done: the unit of order is the warp.
"""

from __future__ import annotations

import bisect
import mmap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .faults import LaneFault
from .spaces import SPACE_SHIFT

if TYPE_CHECKING:
    from .memory import Allocation
    from .wave import Active, Wave

Array = np.ndarray[Any, np.dtype[Any]]

_ATOMIC = 1 << 20  # flag on the writing thread: its access is not checked against others
_BUCKET_BITS = 7  # reads are listed by buckets of 128 bytes, which no access crosses


def _zeros(count: int) -> Array:
    """Zeroed int32; of large arrays only the touched pages take memory."""
    if count < 1 << 18:
        return np.zeros(count, np.int32)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    return np.frombuffer(mmap.mmap(-1, 4 * count, flags=flags), np.int32)


class Knowledge:
    """What warps of other clusters told a warp: how many publications it has seen at each place. Never changed."""

    def __init__(self, seen: dict[Place, int]) -> None:
        self.seen = seen
        self._rows: dict[int, Array | None] = {}

    def joined(self, other: Knowledge) -> Knowledge:
        """All that the two know."""
        if all(self.seen.get(place, 0) >= count for place, count in other.seen.items()):
            return self
        seen = dict(self.seen)
        for place, count in other.seen.items():
            seen[place] = max(count, seen.get(place, 0))
        return Knowledge(seen)

    def of_cluster(self, cluster: int) -> Array | None:
        """Up to which clock the warps of a cluster are known, or None if nothing is known of it."""
        if cluster not in self._rows:
            found = [place.row(cluster, count) for place, count in self.seen.items()]
            rows = [row for row in found if row is not None]
            self._rows[cluster] = np.max(rows, axis=0) if rows else None
        return self._rows[cluster]


NOTHING = Knowledge({})


class Place:
    """A place in global memory at which blocks synchronise: what was published there, in order."""

    def __init__(self) -> None:
        self.count = 0
        self.told = NOTHING  # what the publishing warps knew of other clusters
        self._clusters: dict[int, tuple[list[int], list[Array]]] = {}

    def publish(self, cluster: int, row: Array, knowledge: Knowledge) -> None:
        """A warp of a cluster lets others know what it knows of its cluster's warps, and of other clusters."""
        numbers, rows = self._clusters.setdefault(cluster, ([], []))
        joint = np.maximum(rows[-1], row) if rows else row.copy()
        told = self.told.joined(knowledge)
        if told is self.told and rows and np.array_equal(joint, rows[-1]):
            return
        self.count += 1
        self.told = told
        numbers.append(self.count)
        rows.append(joint)

    def row(self, cluster: int, count: int) -> Array | None:
        """What the first `count` publications tell of a cluster."""
        numbers, rows = self._clusters.get(cluster, ((), ()))
        found = bisect.bisect_right(numbers, count)
        return rows[found - 1] if found else None


class Learnt:
    """What the warps of one cluster have learnt from others, with the clocks from which on they knew it."""

    def __init__(self) -> None:
        self._warps: dict[int, tuple[list[int], list[Knowledge]]] = {}

    def by_warp(self, warp: int) -> Knowledge:
        """What a warp itself has seen."""
        return self._warps[warp][1][-1] if warp in self._warps else NOTHING

    def add(self, warp: int, clock: int, knowledge: Knowledge) -> None:
        """A warp has seen more."""
        clocks, all_ = self._warps.setdefault(warp, ([], []))
        clocks.append(clock)
        all_.append(knowledge)

    def known_to(self, row: Array) -> Knowledge:
        """What somebody knows who knows these clocks of the cluster's warps."""
        result = NOTHING
        for warp, (clocks, all_) in self._warps.items():
            found = bisect.bisect_right(clocks, int(row[warp]))
            if found:
                result = all_[found - 1] if result is NOTHING else result.joined(all_[found - 1])
        return result


class _Reads:
    """The reads of one instruction in one allocation. One offset may stand for all threads."""

    def __init__(self, offsets: Array, width: int, who: Sequence[Array], previous: Array) -> None:
        self.offsets = offsets
        self.width = width
        self.who = who
        self.previous = previous  # number of the reads before, in the bucket of each offset
        self._sorted: tuple[Array, Array] | None = None

    def overlapping(self, offsets: Array, width: int) -> tuple[Array, Array, Array]:
        """Pairs (number of the given access, row of `who`) that share a byte; and the reads before, in its bucket."""
        if self._sorted is None:
            order = np.argsort(self.offsets, kind="stable")
            self._sorted = self.offsets[order], order
        starts, order = self._sorted
        first = np.searchsorted(starts, offsets - (self.width - 1))
        counts = np.searchsorted(starts, offsets + width) - first
        pairs = np.repeat(np.arange(len(offsets)), counts)
        within = np.arange(len(pairs)) - np.repeat(np.cumsum(counts) - counts, counts)
        rows = order[first[pairs] + within]
        if len(self.offsets) != len(self.who[0]):
            everybody = len(self.who[0])
            pairs, rows = np.repeat(pairs, everybody), np.tile(np.arange(everybody), len(pairs))
        one = np.searchsorted(starts, offsets >> _BUCKET_BITS << _BUCKET_BITS)
        return pairs, rows, self.previous[order[one]]


class History:
    """What happened to an allocation. Of each granule's last write: cluster (0: none), thread in it, clock, and how
    many instructions had read global memory before. Of each bucket: the instruction that read it last, from 1."""

    def __init__(self, allocation: Allocation, granule: int) -> None:
        self.granule = granule
        self.base = allocation.base
        self.size = allocation.end - allocation.base
        self.heads = _zeros((self.size >> _BUCKET_BITS) + 1)
        self.written = False

    def start_writing(self) -> None:
        """Make the records of writes."""
        granules = self.size // self.granule + 1
        self.cluster, self.thread, self.clock, self.reads = (_zeros(granules) for _ in range(4))
        self.written = True


class GlobalOrder:
    """Of a launch: the histories of its memory, the instructions that read, and the places where blocks synchronise."""

    def __init__(self, granule: int) -> None:
        self.granule = granule
        self.histories: dict[int, History] = {}
        self.reads: list[_Reads] = []
        self.places: dict[int, Place] = {}

    def history(self, allocation: Allocation) -> History:
        """The history of an allocation."""
        found = self.histories.get(allocation.address)
        if found is None:
            found = self.histories[allocation.address] = History(allocation, self.granule)
        return found


class Observer:
    """Checks and records the global accesses of one instruction's active lanes."""

    def __init__(self, active: Active, exempt: bool) -> None:
        self.wave: Wave = active.wave
        self.exempt = exempt
        self.who = active.who()

    def part(self, rows: Array) -> Observer:
        """The observer of some of the rows."""
        one = Observer.__new__(Observer)
        one.wave, one.exempt = self.wave, self.exempt
        clusters, threads, clocks = self.who
        one.who = clusters[rows], threads[rows], clocks[rows]
        return one

    def read(self, allocation: Allocation, addresses: Array, width: int, lanes: Array) -> None:
        """Check and record reads; one address may stand for all lanes."""
        if self.exempt or allocation.read_only:
            return
        order = self.wave.launch.order
        history = order.history(allocation)
        offsets = (addresses - np.uint64(history.base)).view(np.int64)
        if history.written:
            each = offsets if len(offsets) == len(self.who[0]) else np.repeat(offsets, len(self.who[0]))
            for step in range(-(-width // history.granule)):
                place = each // history.granule + step
                bad = self._unordered(history, place)
                if bad.any():
                    one = int(np.flatnonzero(bad)[0])
                    self._raise("read of global memory", history, place[one], one, allocation, addresses, lanes)
        buckets = offsets >> _BUCKET_BITS
        order.reads.append(_Reads(offsets, width, self.who, history.heads[buckets]))
        history.heads[buckets] = len(order.reads)

    def write(self, allocation: Allocation, addresses: Array, width: int, lanes: Array, same: Array) -> None:
        """Check and record writes."""
        order = self.wave.launch.order
        history = order.history(allocation)
        if not history.written:
            history.start_writing()
        offsets = (addresses - np.uint64(history.base)).view(np.int64)
        first = offsets // history.granule
        clusters, threads, clocks = self.who
        if not self.exempt:
            self._check_readers(history, offsets, first, width, np.flatnonzero(~same), allocation, addresses, lanes)
        for step in range(-(-width // history.granule)):
            place = first + step
            if not self.exempt:
                bad = self._unordered(history, place) & ~same
                if bad.any():
                    one = int(np.flatnonzero(bad)[0])
                    self._raise("write to global memory", history, place[one], one, allocation, addresses, lanes)
                history.reads[place[~same]] = len(order.reads)
            history.cluster[place] = clusters
            history.thread[place] = threads + (_ATOMIC if self.exempt else 0)
            history.clock[place] = clocks

    # ------------------------------------------------------------------------------------------------------- order

    def _unordered(self, history: History, place: Array) -> Array:
        """Whether the last write at each place is not in order with these threads."""
        clusters, threads, _ = self.who
        last, thread = history.cluster[place], history.thread[place]
        suspicious = (last != 0) & ((last != clusters) | (thread != threads)) & (thread < _ATOMIC)
        rows = np.flatnonzero(suspicious)
        if len(rows):
            suspicious[rows] = ~self._after(rows, last[rows], thread[rows], history.clock[place[rows]])
        return suspicious

    def _check_readers(
        self,
        history: History,
        offsets: Array,
        first: Array,
        width: int,
        rows: Array,
        allocation: Allocation,
        addresses: Array,
        lanes: Array,
    ) -> None:
        """Some rows' writes come after all reads since the last write of the place, which came after those before."""
        number = history.heads[offsets[rows] >> _BUCKET_BITS]
        if not number.any():
            return
        checked = history.reads[first[rows]]
        for step in range(1, -(-width // history.granule)):
            checked = np.minimum(checked, history.reads[first[rows] + step])
        while True:
            due = np.flatnonzero(number > checked)
            if not len(due):
                return
            rows, number, checked = rows[due], number[due], checked[due]
            newest = number.max()
            here = np.flatnonzero(number == newest)
            reads = self.wave.launch.order.reads[newest - 1]
            pairs, readers, number[here] = reads.overlapping(offsets[rows[here]], width)
            writers = rows[here][pairs]
            cluster, thread, clock = (of[readers] for of in reads.who)
            bad = np.flatnonzero(~self._after(writers, cluster, thread, clock))
            if len(bad):
                one = int(writers[bad[0]])
                inside = cluster[bad[0]] == self.who[0][one]
                other = f"thread {int(thread[bad[0]])}" if inside else "another block"
                self._report("write to global memory", other, "read", inside, one, allocation, addresses, lanes)

    def _after(self, rows: Array, clusters: Array, threads: Array, clocks: Array) -> Array:
        """Whether rows of these lanes come after what threads of some clusters did at these clocks."""
        wave = self.wave
        mine, own_threads = self.who[0][rows], self.who[1][rows]
        result = np.zeros(len(rows), np.bool_)
        inside = clusters == mine
        one = np.flatnonzero(inside)
        if len(one):
            local = mine[one] - wave.cluster_base
            result[one] = wave.clocks.ordered(local, own_threads[one], threads[one], clocks[one])
        one = np.flatnonzero(~inside)
        if len(one) and wave.learnt:
            result[one] = self._published(
                mine[one], own_threads[one] >> 5, clusters[one], threads[one] >> 5, clocks[one]
            )
        return result

    def _published(self, mine: Array, warps: Array, clusters: Array, other_warps: Array, clocks: Array) -> Array:
        """Whether warps know what warps of other clusters did at these clocks."""
        wave = self.wave
        count = wave.clocks.warps
        observers, which = np.unique((mine - wave.cluster_base) * np.int64(count) + warps, return_inverse=True)
        others, inverse = np.unique(which.astype(np.int64) * (1 << 32) + clusters, return_inverse=True)
        knowledge = [known_by(wave, int(o) // count, int(o) % count) for o in observers]
        table = np.zeros((len(others), count), np.int32)
        for number, other in enumerate(others.tolist()):
            row = knowledge[other >> 32].of_cluster(other & 0xFFFFFFFF)
            if row is not None:
                table[number] = row
        known: Array = table[inverse, other_warps] >= clocks
        return known

    # ------------------------------------------------------------------------------------------------------ faults

    def _raise(
        self, what: str, history: History, place: Any, one: int, allocation: Allocation, addresses: Array, lanes: Array
    ) -> None:
        inside = history.cluster[place] == self.who[0][one]
        other = f"thread {int(history.thread[place])}" if inside else "another block"
        self._report(what, other, "wrote", inside, one, allocation, addresses, lanes)

    def _report(
        self,
        what: str,
        other: str,
        did: str,
        inside: Any,
        one: int,
        allocation: Allocation,
        addresses: Array,
        lanes: Array,
    ) -> None:
        missing = "a barrier" if inside else "synchronisation"
        at = one if len(addresses) > one else 0  # one address may stand for all
        raise LaneFault(
            "race",
            f"{what} that {other} {did}, without {missing} between, {allocation}",
            int(lanes[at]),
            int(addresses[at]),
        )


# ------------------------------------------------------------------------------------------------- synchronisation


def known_by(wave: Wave, cluster: int, warp: int) -> Knowledge:
    """What a warp knows of other clusters."""
    learnt = wave.learnt.get(cluster)
    return NOTHING if learnt is None else learnt.known_to(wave.clocks.known[cluster, warp])


def synchronise(active: Active, rows: Array, addresses: Array, loads: bool, publishes: str) -> None:
    """Lanes `rows`, in this order, access global memory in a way that others may synchronise with.

    loads: the lanes see the value. publishes: '' (nothing), 'release' or 'relaxed' (what the last fence covers).
    """
    wave = active.wave
    clocks, places = wave.clocks, wave.launch.order.places
    fenced = clocks.fenced["gpu"]
    publishes = "" if publishes == "relaxed" and fenced is None else publishes
    if not publishes and not places:
        return
    clusters = (active.blocks[rows] // wave.cluster_size).tolist()
    warps = (active.threads[rows] >> 5).tolist()
    done: set[tuple[int, int, int]] = set()
    for one in zip(addresses[rows].tolist(), clusters, warps, strict=True):
        if one in done:
            continue
        done.add(one)
        address, cluster, warp = one
        if loads and address in places:
            _acquire(wave, places[address], cluster, warp)
        if publishes:
            source = clocks.known if publishes == "release" else fenced
            assert source is not None
            row = source[cluster, warp, : clocks.warps]
            if row.any():
                learnt = wave.learnt.get(cluster)
                knowledge = NOTHING if learnt is None else learnt.known_to(row)
                places.setdefault(address, Place()).publish(wave.cluster_base + cluster, row, knowledge)
                if publishes == "release":
                    clocks.after_fence(np.array([cluster]), np.array([warp]))


def _acquire(wave: Wave, place: Place, cluster: int, warp: int) -> None:
    """A warp learns what was published at a place."""
    learnt = wave.learnt.setdefault(cluster, Learnt())
    before = learnt.by_warp(warp)
    if before.seen.get(place, 0) >= place.count:
        return
    wave.clocks.after_fence(np.array([cluster]), np.array([warp]))
    known = wave.clocks.known[cluster, warp, : wave.clocks.warps]
    own = place.row(wave.cluster_base + cluster, place.count)  # of warps of the same cluster
    if own is not None:
        np.maximum(known, own, out=known)
    clock = int(known[warp])
    learnt.add(warp, clock, before.joined(place.told).joined(Knowledge({place: place.count})))


def global_lanes(addresses: Array, space: str) -> Array:
    """Rows of the addresses that lie in global memory."""
    if space == "global":
        return np.arange(len(addresses))
    if space != "generic":
        return np.zeros(0, np.int64)
    return np.flatnonzero(addresses >> np.uint64(SPACE_SHIFT) == 0)
