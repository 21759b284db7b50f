"""Shared-memory matrix descriptors of wgmma and tcgen05, and the canonical layouts that they name.

With T the number of elements in 16 bytes, S and L the descriptor's stride and leading byte offsets, W the swizzle
width, an element (row, k) of a K-major operand, and (row, k) of an MN-major one, lies at

    K-major, no swizzle    (row % 8) * 16 + row / 8 * S + k / T * L + k % T
    K-major, swizzle W     (row % 8) * W + row / 8 * S + k                              (k inside the W bytes)
    MN-major, no swizzle   row % T + row / T * S + (k % 8) * 16 + k / 8 * L
    MN-major, swizzle W    row % (W/16 T) + row / (W/16 T) * L + (k % 8) * W + k / 8 * S

in bytes from the start address; the sum's bits 4.. are then xor'ed with bits 7.. as the swizzle says. These are the
layouts of the PTX ISA's sections on shared-memory layout for wgmma and tcgen05.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .faults import LaneFault
from .tensor_map import swizzled

Array = np.ndarray[Any, np.dtype[Any]]

_HOPPER_SWIZZLE = {0: 0, 1: 128, 2: 64, 3: 32}
_BLACKWELL_SWIZZLE = {0: 0, 2: 128, 4: 64, 6: 32}


@dataclass(frozen=True)
class Descriptor:
    """A decoded descriptor; addresses and offsets in bytes."""

    start: int
    leading: int
    stride: int
    swizzle: int
    base_offset: int

    @classmethod
    def hopper(cls, bits: int) -> Descriptor:
        """For wgmma: swizzle mode in bits 62 and 63."""
        return cls._decode(bits, _HOPPER_SWIZZLE[bits >> 62 & 3])

    @classmethod
    def blackwell(cls, bits: int) -> Descriptor:
        """For tcgen05: swizzle mode in bits 61 to 63, bits 46 to 48 hold 1."""
        mode = bits >> 61 & 7
        if mode not in _BLACKWELL_SWIZZLE:
            raise LaneFault(
                "invalid operand", f"shared-memory descriptor {bits:#x}: swizzle mode {mode} is not implemented"
            )
        if bits >> 46 & 7 != 1:
            raise LaneFault("invalid operand", f"shared-memory descriptor {bits:#x}: bits 46 to 48 must hold 1")
        if bits >> 52 & 1:
            raise LaneFault(
                "invalid operand", f"shared-memory descriptor {bits:#x}: absolute leading offset is not implemented"
            )
        return cls._decode(bits, _BLACKWELL_SWIZZLE[mode])

    @classmethod
    def _decode(cls, bits: int, swizzle: int) -> Descriptor:
        return cls(
            (bits & 0x3FFF) << 4, (bits >> 16 & 0x3FFF) << 4, (bits >> 32 & 0x3FFF) << 4, swizzle, bits >> 49 & 7
        )

    def places(self, rows: int, k: int, element_bits: int, k_major: bool) -> Array:
        """Byte offsets in shared memory of the elements, as (rows, k); of pairs of 4-bit elements, (rows, k / 2)."""
        size = max(element_bits // 8, 1)
        if element_bits == 4:
            k //= 2
        per = 16 // size
        row = np.arange(rows)[:, None]
        column = np.arange(k)[None, :]
        if k_major and not self.swizzle:
            offset = row % 8 * 16 + row // 8 * self.stride + column // per * self.leading + column % per * size
        elif k_major:
            offset = row % 8 * self.swizzle + row // 8 * self.stride + column * size
        elif not self.swizzle:
            offset = row % per * size + row // per * self.stride + column % 8 * 16 + column // 8 * self.leading
        else:
            wide = self.swizzle // size
            offset = (
                row % wide * size + row // wide * self.leading + column % 8 * self.swizzle + column // 8 * self.stride
            )
        if self.base_offset:
            raise LaneFault("invalid operand", "shared-memory descriptor: base offset is not implemented")
        return swizzled(self.start + offset, self.swizzle)
