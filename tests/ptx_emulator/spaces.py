"""Where generic addresses of each state space lie, and how an address names a block of the cluster.

Global and constant memory are host memory at its own address, always below 2^48; a parameter's address is its offset
among the parameters until cvta.param makes it a host address. Shared and local memory have windows above those. Inside
the shared window an address is `rank << 24 | offset`, with the block's rank in its cluster, as on the hardware: kernels
clear bit 24 to name the even one of two neighbours.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

SPACE_SHIFT = 56
SHARED_WINDOW, LOCAL_WINDOW = 0x11, 0x12
GENERIC = {
    "global": 0,
    "const": 0,
    "param": 0,
    "shared": SHARED_WINDOW << SPACE_SHIFT,
    "local": LOCAL_WINDOW << SPACE_SHIFT,
}
RANK_SHIFT = 24


def window_of(space: str) -> int:
    """The upper byte of generic addresses of a space."""
    return GENERIC[space] >> SPACE_SHIFT


def in_block(address: Array, rank: Array) -> Array:
    """A shared address, moved into the block of a rank."""
    offset = address & np.uint64((1 << RANK_SHIFT) - 1)
    return offset | (rank.astype(np.uint64) << np.uint64(RANK_SHIFT))
