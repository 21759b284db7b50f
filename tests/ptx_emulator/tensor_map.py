"""Tensor maps: what a tensor copy needs to know of a tensor in global memory.

The driver's 128-byte format is not public and there is no driver here, so the emulator has a format of its own. A test
that stands in for cuTensorMapEncodeTiled calls `TensorMap.pack`; the kernel gets those bytes as its parameter.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .faults import LaneFault
from .memory import Memory

Array = np.ndarray[Any, np.dtype[Any]]

_MAGIC = b"emulated"
_LAYOUT = "<8sQBBBB5Q4Q5H5B"

# Codes of tensormap.replace: bytes of each element type, and widths of the swizzle modes.
ELEMENT_SIZES = {0: 1, 1: 2, 2: 4, 3: 4, 4: 8, 5: 8, 6: 2, 7: 4, 8: 4, 9: 8, 10: 2, 11: 4, 12: 4}
SWIZZLES = {0: 0, 1: 32, 2: 64, 3: 128}

_FIELDS = {
    "magic": (0, 8),
    "global_address": (8, 8),
    "element_size": (16, 1),
    "rank": (17, 1),
    "swizzle_mode": (18, 1),
    "global_dim": (20, 8),
    "global_stride": (60, 8),
    "box_dim": (92, 2),
    "element_stride": (102, 1),
}


def place_of_field(name: str, index: int) -> tuple[int, int]:
    """First byte and size of a field, of its element `index` if it is a list."""
    start, size = _FIELDS[name]
    return start + index * size, size


@dataclass(frozen=True)
class TensorMap:
    """A tiled tensor map. Sizes are in elements, innermost first; strides in bytes, without the innermost one.

    swizzle: 0, 32, 64 or 128, the width in bytes of the pattern in shared memory. Elements outside the tensor are read
    as zero and not written. element_size 0 stands for 4 bits, two elements to a byte.
    """

    address: int
    element_size: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    swizzle: int = 0
    element_strides: tuple[int, ...] = ()

    def pack(self) -> bytes:
        """128 bytes."""
        rank = len(self.sizes)
        steps = self.element_strides or (1,) * rank
        data = struct.pack(
            _LAYOUT,
            _MAGIC,
            self.address,
            self.element_size,
            rank,
            self.swizzle,
            0,
            *_pad(self.sizes, 5),
            *_pad(self.strides, 4),
            *_pad(self.box, 5),
            *_pad(steps, 5),
        )
        return data.ljust(128, b"\0")

    @classmethod
    def unpack(cls, data: bytes) -> TensorMap:
        """The inverse of `pack`."""
        fields = struct.unpack_from(_LAYOUT, data)
        if fields[0] != _MAGIC:
            raise LaneFault("invalid operand", "the tensor map was not made by the emulator's TensorMap.pack")
        address, element, rank, swizzle = fields[1:5]
        sizes, strides, box, steps = fields[6:11], fields[11:15], fields[15:20], fields[20:25]
        return cls(address, element, sizes[:rank], strides[: rank - 1], box[:rank], swizzle, steps[:rank])

    def in_bytes(self, coordinates: list[int], lane: int) -> tuple[TensorMap, list[int]]:
        """The same copy with whole bytes as elements, if the elements are of 4 bits."""
        if self.element_size:
            return self, coordinates
        if coordinates[0] % 2 or self.sizes[0] % 2 or self.box[0] % 2:
            raise LaneFault("misaligned", "tensor copy of 4-bit elements from the middle of a byte", lane)
        halved = replace(
            self, element_size=1, sizes=(self.sizes[0] // 2, *self.sizes[1:]), box=(self.box[0] // 2, *self.box[1:])
        )
        return halved, [coordinates[0] // 2, *coordinates[1:]]

    @property
    def box_bytes(self) -> int:
        """Bytes that a copy moves."""
        return int(np.prod(self.box)) * self.element_size

    def check(self, coordinates: list[int], lane: int) -> None:
        """What the hardware asks of map and coordinates."""
        if len(coordinates) != len(self.sizes):
            raise LaneFault(
                "invalid operand", f"{len(coordinates)} coordinates for a map of rank {len(self.sizes)}", lane
            )
        inner = self.box[0] * self.element_size
        if self.address % 16 or any(s % 16 for s in self.strides) or inner % 16:
            raise LaneFault(
                "misaligned",
                "tensor map: address, strides and inner box must be multiples of 16 bytes",
                lane,
                self.address,
            )
        if self.swizzle and inner > self.swizzle:
            raise LaneFault(
                "invalid operand", f"tensor map: an inner box of {inner} bytes with a swizzle of {self.swizzle}", lane
            )
        if any(s != 1 for s in self.element_strides):
            raise LaneFault("invalid operand", "tensor map: element strides other than 1 are not implemented", lane)

    def _places(self, coordinates: list[int]) -> tuple[Array, Array]:
        """Global address of each element of the box, innermost fastest, and whether it is inside the tensor."""
        address = np.full(1, self.address, np.int64)
        inside = np.ones(1, np.bool_)
        for axis in reversed(range(len(self.sizes))):
            index = coordinates[axis] + np.arange(self.box[axis], dtype=np.int64)
            stride = self.element_size if axis == 0 else self.strides[axis - 1]
            good = (index >= 0) & (index < self.sizes[axis])
            address = (address[:, None] + index * stride).reshape(-1)
            inside = (inside[:, None] & good).reshape(-1)
        return address.astype(np.uint64), inside

    def _order(self, offset: int) -> Array:
        """For each byte of the box its place in shared memory, relative to `offset`."""
        linear = np.arange(self.box_bytes)
        return swizzled(linear + offset, self.swizzle) - offset

    def load(self, memory: Memory, coordinates: list[int], offset: int, lane: int) -> Array:
        """The box as it lies in shared memory at `offset`."""
        address, inside = self._places(coordinates)
        data = np.zeros((len(address), self.element_size), np.uint8)
        rows = np.flatnonzero(inside)
        if len(rows):
            unit = np.dtype(f"u{min(self.element_size, 8)}")
            count = self.element_size // unit.itemsize
            data[rows] = memory.load(address[rows], unit, count, np.full(len(rows), lane)).view(np.uint8)
        result = np.empty(self.box_bytes, np.uint8)
        result[self._order(offset)] = data.reshape(-1)
        return result

    def store(self, memory: Memory, coordinates: list[int], offset: int, data: Array, lane: int) -> None:
        """Write the part of the box that is inside the tensor."""
        address, inside = self._places(coordinates)
        rows = np.flatnonzero(inside)
        if len(rows):
            elements = np.ascontiguousarray(data[self._order(offset)].reshape(-1, self.element_size)[rows])
            memory.store(address[rows], elements.view(f"u{self.element_size}"), np.full(len(rows), lane))


def swizzled(offsets: Array, width: int) -> Array:
    """The place of bytes under a swizzle of 32, 64 or 128 bytes: 16-byte units exclusive-or'ed with the row number.

    Of the address, bits 4.. (1, 2 or 3 of them) are xor'ed with as many bits from bit 7 on.
    """
    bits = {0: 0, 32: 1, 64: 2, 128: 3}[width]
    mask = ((1 << bits) - 1) << 7
    return offsets ^ ((offsets & mask) >> 3)


def _pad(values: tuple[int, ...], count: int) -> tuple[int, ...]:
    return tuple(values) + (0,) * (count - len(values))
