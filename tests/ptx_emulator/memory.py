"""Global memory: registered host allocations. Every access is checked for bounds, alignment and initialised bytes."""

from __future__ import annotations

import bisect
import ctypes
from typing import TYPE_CHECKING, Any

import numpy as np

from .faults import LaneFault

if TYPE_CHECKING:
    from .global_order import Observer

_WINDOW_ALIGNMENT = 128

Array = np.ndarray[Any, np.dtype[Any]]


class Allocation:
    """One registered range of host memory and, if it was registered as poison, a flag for each byte written so far."""

    def __init__(self, address: int, size: int, name: str, initialised: bool, read_only: bool) -> None:
        self.address = address
        self.size = size
        self.name = name
        self.read_only = read_only
        self.written: Array | None = None if initialised else np.zeros(size, np.bool_)
        # The window is wider than the allocation, so that typed views start at an aligned address. Only the bytes of
        # the allocation are ever touched.
        self.base = address & ~(_WINDOW_ALIGNMENT - 1)
        end = -(-(address + size) // _WINDOW_ALIGNMENT) * _WINDOW_ALIGNMENT
        window: Any = (ctypes.c_uint8 * (end - self.base)).from_address(self.base)
        self._window = np.frombuffer(window, np.uint8)
        self._views: dict[tuple[str, int], Array] = {}

    @property
    def end(self) -> int:
        """One past the last address."""
        return self.address + self.size

    def view(self, dtype: np.dtype[Any], count: int) -> Array:
        """The window as rows of `count` elements."""
        key = (dtype.char, count)
        if key not in self._views:
            self._views[key] = self._window.view(dtype).reshape(-1, count)
        return self._views[key]

    def __repr__(self) -> str:
        return f"'{self.name}' [{self.address:#x}, {self.end:#x}), {self.size} bytes"


class Memory:
    """The set of allocations that a kernel may touch."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._allocations: list[Allocation] = []
        self._owned: list[Array] = []
        self._recent: Allocation | None = None

    def register(
        self, address: int, size: int, name: str, initialised: bool = True, read_only: bool = False
    ) -> Allocation | None:
        """Make host memory accessible. With initialised=False a byte must be stored by a kernel before it is read."""
        if size == 0:
            return None
        allocation = Allocation(address, size, name, initialised, read_only)
        place = bisect.bisect_right(self._starts, address)
        before = self._allocations[place - 1] if place else None
        after = self._allocations[place] if place < len(self._allocations) else None
        for other in (before, after):
            if other is not None and address < other.end and other.address < allocation.end:
                raise ValueError(f"{allocation} overlaps {other}")
        self._starts.insert(place, address)
        self._allocations.insert(place, allocation)
        return allocation

    def register_array(self, array: Array, name: str, initialised: bool = True, read_only: bool = False) -> int:
        """Register a contiguous numpy array and keep it alive. Returns its address."""
        if not array.flags.c_contiguous:
            raise ValueError(f"{name}: array is not contiguous")
        self._owned.append(array)
        self.register(array.ctypes.data, array.nbytes, name, initialised, read_only)
        return int(array.ctypes.data)

    def allocate(
        self, size: int, name: str, initial: bytes = b"", alignment: int = 256, read_only: bool = False
    ) -> int:
        """Allocate zeroed memory that belongs to this object, register it and return its address."""
        buffer = np.zeros(size + alignment, np.uint8)
        skip = -buffer.ctypes.data % alignment
        buffer[skip : skip + len(initial)] = np.frombuffer(initial, np.uint8)
        self._owned.append(buffer)
        address = int(buffer.ctypes.data) + skip
        self.register(address, size, name, read_only=read_only)
        return address

    def unregister(self, address: int) -> None:
        """Take an allocation out again, by its first address."""
        place = bisect.bisect_left(self._starts, address)
        if place == len(self._starts) or self._starts[place] != address:
            raise KeyError(f"no allocation starts at {address:#x}")
        del self._starts[place], self._allocations[place]
        self._recent = None

    def poison(self, address: int) -> None:
        """Mark every byte of an allocation as not initialised."""
        allocation = self.find(address)
        if allocation is None:
            raise KeyError(f"no allocation holds {address:#x}")
        allocation.written = np.zeros(allocation.size, np.bool_)

    def find(self, address: int) -> Allocation | None:
        """The allocation that holds the address."""
        place = bisect.bisect_right(self._starts, address) - 1
        if place >= 0 and address < self._allocations[place].end:
            return self._allocations[place]
        return None

    def nearest(self, address: int) -> str:
        """Text for a fault: the closest allocation and how far away it is."""
        if not self._allocations:
            return "no memory is registered"
        best = min(self._allocations, key=lambda a: max(a.address - address, address - a.end + 1, 0))
        if address >= best.end:
            return f"{address - best.end} bytes past the end of {best}"
        if address < best.address:
            return f"{best.address - address} bytes before {best}"
        return f"at offset {address - best.address} of {best}"

    def load(
        self, addresses: Array, dtype: np.dtype[Any], count: int, lanes: Array, observer: Observer | None = None
    ) -> Array:
        """Rows of `count` elements at the addresses, one row per lane."""
        width = dtype.itemsize * count
        allocation = self._covering(addresses, width)
        if allocation is not None:
            self._check_written(allocation, addresses, width, lanes)
            if observer is not None:
                observer.read(allocation, addresses, width, lanes)
            offsets = addresses - np.uint64(allocation.base)
            return allocation.view(dtype, count)[(offsets // np.uint64(width)).view(np.int64)]
        result = np.empty((len(addresses), count), dtype)
        for _, rows in self._by_allocation(addresses, width, lanes, "read"):
            part = observer.part(rows) if observer is not None else None
            result[rows] = self.load(addresses[rows], dtype, count, lanes[rows], part)
        return result

    def store(self, addresses: Array, values: Array, lanes: Array, observer: Observer | None = None) -> None:
        """Store rows of elements, one row per lane. Two lanes with different data at one address race."""
        count = values.shape[1]
        width = values.dtype.itemsize * count
        allocation = self._covering(addresses, width)
        if allocation is None:
            for _, rows in self._by_allocation(addresses, width, lanes, "write"):
                part = observer.part(rows) if observer is not None else None
                self.store(addresses[rows], values[rows], lanes[rows], part)
            return
        if allocation.read_only:
            raise LaneFault("out of bounds", f"write to read-only {allocation}", int(lanes[0]), int(addresses[0]))
        offsets = addresses - np.uint64(allocation.base)
        rows = (offsets // np.uint64(width)).view(np.int64)
        view = allocation.view(values.dtype, count)
        if observer is not None:
            observer.write(allocation, addresses, width, lanes, (view[rows] == values).all(axis=1))
        view[rows] = values
        if len(rows) > 1 and (view[rows] != values).any():
            lost = int(np.flatnonzero((view[rows] != values).any(axis=1))[0])
            raise LaneFault(
                "race",
                f"two threads store different values in one instruction, {allocation}",
                int(lanes[lost]),
                int(addresses[lost]),
            )
        if allocation.written is not None:
            start = (addresses - np.uint64(allocation.address)).view(np.int64)
            for byte in range(width):
                allocation.written[start + byte] = True

    def _covering(self, addresses: Array, width: int) -> Allocation | None:
        """The allocation that holds all accesses, if one does and all are aligned."""
        if (addresses & np.uint64(width - 1)).any():
            return None
        low, high = int(addresses.min()), int(addresses.max()) + width
        recent = self._recent
        if recent is None or low < recent.address or low >= recent.end:
            recent = self.find(low)
            self._recent = recent
        return recent if recent is not None and high <= recent.end else None

    def _by_allocation(self, addresses: Array, width: int, lanes: Array, verb: str) -> list[tuple[Allocation, Array]]:
        """The lanes of each allocation; a fault for a lane that has none or is not aligned."""
        crooked = np.flatnonzero(addresses & np.uint64(width - 1))
        if len(crooked):
            first = int(crooked[0])
            address = int(addresses[first])
            raise LaneFault(
                "misaligned", f"{verb} of {width} bytes, {self.nearest(address)}", int(lanes[first]), address
            )
        starts = np.array(self._starts, np.uint64)
        ends = np.array([a.end for a in self._allocations], np.uint64)
        place = np.searchsorted(starts, addresses, side="right").astype(np.int64) - 1
        bad = place < 0
        if len(ends):
            bad |= addresses + np.uint64(width) > ends[np.maximum(place, 0)]
        wrong = np.flatnonzero(bad)
        if len(wrong):
            first = int(wrong[0])
            address = int(addresses[first])
            raise LaneFault(
                "out of bounds", f"{verb} of {width} bytes, {self.nearest(address)}", int(lanes[first]), address
            )
        return [(self._allocations[int(p)], np.flatnonzero(place == p)) for p in np.unique(place)]

    def _check_written(self, allocation: Allocation, addresses: Array, width: int, lanes: Array) -> None:
        if allocation.written is None:
            return
        start = (addresses - np.uint64(allocation.address)).view(np.int64)
        for byte in range(width):
            missing = np.flatnonzero(~allocation.written[start + byte])
            if len(missing):
                first = int(missing[0])
                raise LaneFault(
                    "uninitialised",
                    f"read of bytes that were never written, {self.nearest(int(addresses[first]))}",
                    int(lanes[first]),
                    int(addresses[first]),
                )

    def read_bytes(self, address: int, size: int) -> bytes:
        """Bytes of registered memory, for parameters and descriptors."""
        allocation = self.find(address)
        if allocation is None or address + size > allocation.end:
            raise LaneFault("out of bounds", f"read of {size} bytes, {self.nearest(address)}", None, address)
        return ctypes.string_at(address, size)
