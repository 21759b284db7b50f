"""Shared memory of the blocks of a wave, with the order of accesses tracked so that races are found.

Every warp has a clock, and knows of every warp of its cluster up to which clock it is synchronised with it (a vector
clock for each warp; barriers and mbarriers join them, see `Clocks`). Each granule (the smallest access size that the
kernel has) remembers its last writer with the clock of that moment, and for each warp the clock of its last read. Two
accesses of which one writes are in order if the later thread's warp knows the earlier one's clock; inside a warp, if
the warp has synchronised since. The unit is the warp: after a bar.warp.sync with a partial mask its other lanes count
as synchronised too, so a race that only such a lane has is not seen.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .faults import LaneFault

Array = np.ndarray[Any, np.dtype[Any]]

NEVER = -1  # writer of a granule that no thread has written
IN_FLIGHT = -2  # an asynchronous copy writes it and nobody has waited for that copy
ASYNCHRONOUS = 1 << 20  # writer: a completed copy that was ordered by an mbarrier
ATOMIC = 1 << 21  # flag on the writer: written by an atomic
_MANY = 255
PERIOD_BITS = 8
PERIOD = 1 << PERIOD_BITS  # clocks of a period: fences count inside it


class Clocks:
    """Vector clocks of the warps of every cluster of a wave.

    A row of `known` is what a warp knows. Column v, of the first `warps` columns: all that warp v did up to this clock
    happened before. A clock counts periods in units of PERIOD: a warp starts a new period where its lanes synchronise
    with each other or with others. A fence does not, so that it orders no lanes of its own warp; it adds 1, so that
    what comes before it and what comes after it can be told apart.

    Column warps + v counts what a barrier that does not order memory (barrier.cluster.arrive.relaxed) passes on all the
    same: 1 when the warp is known to have started, and 1 more for each fence.mbarrier_init of warp v.
    """

    def __init__(self, clusters: int, blocks: int, warps: int) -> None:
        self.warps = warps
        self.version = 0  # counts changes of the warps' own clocks
        self.known = np.zeros((clusters, warps, 2 * warps), np.int32)
        self._diagonal = np.arange(warps)
        self.known[:, self._diagonal, self._diagonal] = PERIOD
        self.known[:, self._diagonal, warps + self._diagonal] = 1
        # What each warp knew at its last fence of at least cluster and at least gpu scope; None before the first one.
        self.fenced: dict[str, Array | None] = {"cluster": None, "gpu": None}
        # Moments, for a quick answer: when all warps of a block and of a cluster last synchronised.
        self.moment = 1
        self.block_joined = np.zeros((clusters, blocks), np.int64)
        self.cluster_joined = np.zeros(clusters, np.int64)

    def join_all(self, clusters: Array, warps: slice) -> None:
        """All warps of a range synchronise, in each of these clusters."""
        part = self.known[clusters, warps]
        part[:] = part.max(axis=1, keepdims=True)
        self.known[clusters, warps] = part
        own = self._diagonal[warps]
        self._new_period((clusters[:, None], own, own))
        self.moment += 1
        blocks = self.block_joined.shape[1]
        of_block = len(self._diagonal) // blocks
        self.block_joined[clusters, own[0] // of_block : own[-1] // of_block + 1] = self.moment
        if len(own) == len(self._diagonal):
            self.cluster_joined[clusters] = self.moment

    def join(self, cluster: int, sources: Array, targets: Array) -> None:
        """Targets learn what the sources know; everyone involved starts a new period."""
        joint = self.known[cluster, sources].max(axis=0)
        self.known[cluster, targets] = np.maximum(self.known[cluster, targets], joint)
        involved = np.union1d(sources, targets)
        self._new_period((cluster, involved, involved))

    def _new_period(self, own: Any) -> None:
        self.version += 1
        self.known[own] = (self.known[own] | (PERIOD - 1)) + 1

    def after_fence(self, clusters: Array, warps: Array) -> None:
        """What these warps do now comes after something that others may learn of, without a new period."""
        self.version += 1
        own = self.known[clusters, warps, warps]
        self.known[clusters, warps, warps] = own + (own & (PERIOD - 1) != PERIOD - 1)

    def fence(self, clusters: Array, warps: Array, scope: str) -> None:
        """Warps execute a fence of scope cluster or gpu: a relaxed operation may now publish what they know."""
        for one in ("cluster", "gpu") if scope == "gpu" else ("cluster",):
            kept = self.fenced[one]
            if kept is None:
                kept = self.fenced[one] = np.zeros_like(self.known)
            kept[clusters, warps] = self.known[clusters, warps]
        self.after_fence(clusters, warps)

    def fence_mbarrier_init(self, clusters: Array, warps: Array) -> None:
        """Warps execute fence.mbarrier_init."""
        self.known[clusters, warps, self.warps + warps] += 1

    def relaxed(self, clusters: Array, warps: Array) -> Array:
        """What warps pass on by arriving relaxed: that they have started, inits and memory that they have fenced."""
        rows: Array = self.known[clusters, warps]
        kept = self.fenced["cluster"]
        rows[:, : self.warps] = 0 if kept is None else kept[clusters, warps, : self.warps]
        return rows

    def started(self, clusters: Array, warps: Array, ranks: Array) -> Array:
        """Whether these warps know that the blocks of these ranks have started."""
        of_block = self.warps // self.block_joined.shape[1]
        columns = self.warps + ranks[:, None] * of_block + np.arange(of_block)
        return np.any(self.known[clusters[:, None], warps[:, None], columns], axis=1)

    def release(self, cluster: int, warp: int) -> Array:
        """What a warp knows now; it starts a new period. For mbarrier arrivals."""
        snapshot: Array = self.known[cluster, warp].copy()
        self._new_period((cluster, warp, warp))
        return snapshot

    def acquire(self, cluster: int, warp: int, snapshot: Array) -> None:
        """A warp learns a snapshot."""
        np.maximum(self.known[cluster, warp], snapshot, out=self.known[cluster, warp])

    def tick(self, clusters: Array, warps: Array) -> None:
        """These warps start a new period (bar.warp.sync)."""
        self._new_period((clusters, warps, warps))

    def ordered(self, clusters: Array, threads: Array, others: Array, clocks: Array) -> Array:
        """Whether what `others` did at `clocks` happened before what threads of the same clusters do now."""
        warps, other_warps = threads >> 5, others >> 5
        known = self.known[clusters, warps, other_warps]
        inside = known >> PERIOD_BITS > clocks >> PERIOD_BITS
        return (others == threads) | np.where(warps == other_warps, inside, known >= clocks)


class SharedMemory:
    """Shared memory of all blocks of a wave: bytes, and for each granule who wrote and read it last."""

    def __init__(self, blocks: int, size: int, warps: int, granule: int, clocks: Clocks, cluster_size: int) -> None:
        self.size = size
        self.stride = max(-(-size // 1024) * 1024, 1024)  # the widest swizzle atom is 1024 bytes
        self.granule = granule
        self.clocks = clocks
        self.cluster_size = cluster_size
        self.data = np.zeros(blocks * self.stride, np.uint8)
        granules = blocks * self.stride // granule
        self.writer = np.full(granules, NEVER, np.int32)
        self.writer_clock = np.zeros(granules, np.int32)
        self.reader_clock = np.zeros((granules, warps), np.int32)
        self.reader_lane = np.zeros((granules, warps), np.uint8)
        self.read_moment = np.zeros(granules, np.int64)  # of the last read by the block itself
        self.foreign_moment = np.zeros(granules, np.int64)  # and by other blocks of the cluster
        self.block_threads = warps // cluster_size * 32

    def check_range(self, blocks: Array, offsets: Array, width: int, alignment: int, lanes: Array, verb: str) -> Array:
        """Flat byte positions of accesses; faults for those out of bounds or not aligned."""
        crooked = np.flatnonzero(offsets & (alignment - 1))
        if len(crooked):
            first = int(crooked[0])
            raise LaneFault(
                "misaligned", f"{verb} of {width} bytes of shared memory", int(lanes[first]), int(offsets[first])
            )
        wrong = np.flatnonzero((offsets < 0) | (offsets > self.size - width))
        if len(wrong):
            first = int(wrong[0])
            raise LaneFault(
                "out of bounds",
                f"{verb} of {width} bytes, the block has {self.size} bytes of shared memory",
                int(lanes[first]),
                int(offsets[first]),
            )
        return blocks * self.stride + offsets

    def load(
        self,
        blocks: Array,
        offsets: Array,
        dtype: np.dtype[Any],
        count: int,
        lanes: Array,
        threads: Array,
        alignment: int = 0,
    ) -> Array:
        """Rows of `count` elements. `threads` are numbers inside the cluster."""
        width = dtype.itemsize * count
        flat = self.check_range(blocks, offsets, width, alignment or width, lanes, "read")
        self.note_read(flat, width, blocks, lanes, threads)
        if not alignment or alignment >= width:
            return self.data.view(dtype).reshape(-1, count)[flat // width]
        return self.data.view(dtype)[(flat // dtype.itemsize)[:, None] + np.arange(count)]

    def store(
        self,
        blocks: Array,
        offsets: Array,
        values: Array,
        lanes: Array,
        threads: Array,
        flag: int = 0,
        alignment: int = 0,
    ) -> None:
        """Store rows of elements."""
        count = values.shape[1]
        width = values.dtype.itemsize * count
        flat = self.check_range(blocks, offsets, width, alignment or width, lanes, "write")
        if not alignment or alignment >= width:
            view: Array = self.data.view(values.dtype).reshape(-1, count)
            rows = flat // width
        else:
            view = self.data.view(values.dtype)
            rows = (flat // values.dtype.itemsize)[:, None] + np.arange(count)
        same = (view[rows] == values).all(axis=1)
        self.note_write(flat, width, blocks, lanes, threads, flag, same)
        view[rows] = values
        if len(rows) > 1:
            lost = np.flatnonzero((view[rows] != values).any(axis=1))
            if len(lost):
                first = int(lost[0])
                raise LaneFault(
                    "race",
                    "two threads store different values to shared memory in one instruction",
                    int(lanes[first]),
                    int(offsets[first]),
                )

    # ------------------------------------------------------------------------------------------- order of accesses

    def _ordered(self, writers: Array, clocks: Array, clusters: Array, threads: Array) -> Array:
        """Whether accesses by these threads come after earlier ones by `writers` at `clocks`."""
        other = np.where(writers < 0, threads, writers & (ASYNCHRONOUS - 1))
        return self.clocks.ordered(clusters, threads, other, clocks)

    def note_read(self, flat: Array, width: int, blocks: Array, lanes: Array, threads: Array) -> None:
        """Check and record reads of `width` bytes at flat positions."""
        clusters = blocks // self.cluster_size
        first = flat // self.granule
        warps = threads >> 5
        now = self.clocks.known[clusters, warps, warps]
        lane = (threads & 31).astype(np.uint8)
        self.clocks.moment += 1
        foreign = None
        if self.cluster_size > 1:
            foreign = threads // self.block_threads != blocks % self.cluster_size
            foreign = foreign if foreign.any() else None
        for step in range(max(width // self.granule, 1)):
            place = first + step
            if foreign is None:
                self.read_moment[place] = self.clocks.moment
            else:
                self.read_moment[place[~foreign]] = self.clocks.moment
                self.foreign_moment[place[foreign]] = self.clocks.moment
            writers = self.writer[place]
            if (writers != threads).any():
                self._check_read(writers, place, clusters, flat, lanes, threads)
            again = self.reader_clock[place, warps] >> PERIOD_BITS == now >> PERIOD_BITS
            merged = np.where(again & (self.reader_lane[place, warps] != lane), _MANY, lane).astype(np.uint8)
            self.reader_clock[place, warps] = now
            self.reader_lane[place, warps] = merged
            shared = self.reader_lane[place, warps] != merged
            if shared.any():
                self.reader_lane[place[shared], warps[shared]] = _MANY

    def _check_read(
        self, writers: Array, place: Array, clusters: Array, flat: Array, lanes: Array, threads: Array
    ) -> None:
        for kind, value, text in (
            ("uninitialised", NEVER, "read of shared memory that was never written"),
            ("missing wait", IN_FLIGHT, "read of shared memory that an asynchronous copy is still writing"),
        ):
            found = np.flatnonzero(writers == value)
            if len(found):
                one = int(found[0])
                raise LaneFault(kind, text, int(lanes[one]), int(flat[one] % self.stride))
        ordered = self._ordered(writers, self.writer_clock[place], clusters, threads) | (writers & ASYNCHRONOUS > 0)
        if not ordered.all():
            one = int(np.flatnonzero(~ordered)[0])
            other = int(writers[one] & (ASYNCHRONOUS - 1))
            raise LaneFault(
                "race",
                f"read of shared memory that thread {other} wrote, without a barrier between",
                int(lanes[one]),
                int(flat[one] % self.stride),
            )

    def note_write(
        self, flat: Array, width: int, blocks: Array, lanes: Array, threads: Array, flag: int, same: Array
    ) -> None:
        """Check and record writes. `same`: lanes that store what is there already, which may repeat another's store."""
        clusters = blocks // self.cluster_size
        first = flat // self.granule
        warps = threads >> 5
        now = self.clocks.known[clusters, warps, warps]
        lane = (threads & 31).astype(np.uint8)
        for step in range(max(width // self.granule, 1)):
            place = first + step
            writers = self.writer[place]
            changed = (writers != threads) & (writers != NEVER)
            if changed.any():
                found = np.flatnonzero(writers == IN_FLIGHT)
                if len(found):
                    one = int(found[0])
                    raise LaneFault(
                        "missing wait",
                        "write to shared memory that an asynchronous copy is still writing",
                        int(lanes[one]),
                        int(flat[one] % self.stride),
                    )
                bad = changed & ~self._ordered(writers, self.writer_clock[place], clusters, threads) & ~same
                bad &= (writers & ASYNCHRONOUS) == 0
                if flag & ATOMIC:
                    bad &= (writers & ATOMIC) == 0
                if bad.any():
                    one = int(np.flatnonzero(bad)[0])
                    raise LaneFault(
                        "race",
                        f"write to shared memory that thread {int(writers[one]) & (ASYNCHRONOUS - 1)} wrote, "
                        "without a barrier between",
                        int(lanes[one]),
                        int(flat[one] % self.stride),
                    )
            rows = np.flatnonzero(self._recently_read(place, blocks, clusters, threads) & ~same)
            if len(rows):
                self._check_readers(place[rows], clusters[rows], warps[rows], lane[rows], lanes[rows], flat[rows])
            self.writer[place] = threads | flag
            self.writer_clock[place] = now

    def _recently_read(self, place: Array, blocks: Array, clusters: Array, threads: Array) -> Array:
        """Whether a place was read since all who could have read it last synchronised with these threads."""
        cluster_joined = self.clocks.cluster_joined[clusters]
        if self.cluster_size == 1:
            return self.read_moment[place] > cluster_joined
        rank = blocks % self.cluster_size
        own = threads // self.block_threads == rank
        joined = np.where(own, self.clocks.block_joined[clusters, rank], cluster_joined)
        return (self.read_moment[place] > joined) | (self.foreign_moment[place] > cluster_joined)

    def _check_readers(
        self, place: Array, clusters: Array, warps: Array, lane: Array, lanes: Array, flat: Array
    ) -> None:
        reads = self.reader_clock[place]
        known = self.clocks.known[clusters, warps, : self.clocks.warps]
        late = reads > known
        rows = np.arange(len(place))
        own_clock = known[rows, warps]
        late[rows, warps] = (reads[rows, warps] >> PERIOD_BITS == own_clock >> PERIOD_BITS) & (
            self.reader_lane[place, warps] != lane
        )
        if late.any():
            one, warp = (int(v[0]) for v in np.nonzero(late))
            raise LaneFault(
                "race",
                f"write to shared memory that warp {warp} read, without a barrier between",
                int(lanes[one]),
                int(flat[one] % self.stride),
            )

    # --------------------------------------------------------------------------------------- asynchronous copies

    def begin_copy(self, flat: Array, width: int, blocks: Array, lanes: Array, threads: Array) -> None:
        """An asynchronous copy starts: until it is complete nobody may touch its destination."""
        nobody = np.zeros(len(flat), np.bool_)
        self.note_write(flat, width, blocks, lanes, threads, 0, nobody)
        for step in range(max(width // self.granule, 1)):
            self.writer[flat // self.granule + step] = IN_FLIGHT

    def end_copy(self, flat: Array, data: Array, blocks: Array, threads: Array | None) -> None:
        """Rows of bytes arrive. They belong to the threads, or (None) to whoever waited on the mbarrier."""
        width = data.shape[1]
        self.data[flat[:, None] + np.arange(width)] = data
        place = flat[:, None] // self.granule + np.arange(max(width // self.granule, 1))
        if threads is None:
            self.writer[place] = ASYNCHRONOUS
            self.writer_clock[place] = 0
        else:
            clusters = blocks // self.cluster_size
            warps = threads >> 5
            self.writer[place] = threads[:, None]
            self.writer_clock[place] = self.clocks.known[clusters, warps, warps][:, None]
