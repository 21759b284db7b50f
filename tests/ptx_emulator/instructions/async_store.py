"""st.async: a store into shared memory of the cluster that an mbarrier there counts. It arrives when that is polled."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ..ptx_module import Instruction, Vector
from ..registry import Plain
from ..values import DTYPES
from .elementwise import allow
from .load_store import shared_place, vector_length
from .mbarrier import Barrier, barriers_of, locate

if TYPE_CHECKING:
    from ..program import Scope
    from ..wave import Active, Wave

Array = np.ndarray[Any, np.dtype[Any]]


def async_store(instruction: Instruction, scope: Scope) -> Plain:
    """st.async{.weak}.shared::cluster.mbarrier::complete_tx::bytes{.vec}.type [a], b, [mbarrier]"""
    type_name = instruction.qualifiers[-1]
    count = vector_length(instruction)
    signal = "mbarrier::complete_tx::bytes"
    allow(instruction, "async", "weak", "shared::cluster", signal, "v2", "v4", type_name)
    target, value, barrier = instruction.operands
    items = value.items if isinstance(value, Vector) else (value,)
    bits = f"b{8 * DTYPES[type_name].itemsize}"
    sources = [scope.source(item, type_name) for item in items]
    dtype = DTYPES[bits]
    width = dtype.itemsize * count
    address, signal_address = scope.address(target), scope.address(barrier)

    def run(active: Active) -> None:
        wave = active.wave
        blocks, offsets = shared_place(active, active.rows(address(active)), deferred=True)
        flat = wave.shared.check_range(blocks, offsets, width, width, active.index, "asynchronous store")
        data = np.empty((active.count, count), dtype)
        for column, source in enumerate(sources):
            data[:, column] = active.rows(source(active)).view(dtype)
        signals = locate(active, active.rows(signal_address(active)), deferred=True)
        wave.shared.begin_copy(flat, width, blocks, active.index, active.threads)
        raw = data.view(np.uint8)
        for row, lane, block, offset in signals:
            found = barriers_of(wave).find(wave, block, offset, lane)
            found.writes += 1
            part = slice(row, row + 1)
            found.deliveries.append(_Delivery(wave, found, flat[part], raw[part], blocks[part]))
        wave.launch.progress += 1

    return run


class _Delivery:
    """The arrival of one thread's store."""

    def __init__(self, wave: Wave, barrier: Barrier, flat: Array, data: Array, blocks: Array) -> None:
        self.wave, self.barrier = wave, barrier
        self.flat, self.data, self.blocks = flat, data, blocks

    def __call__(self) -> None:
        self.wave.shared.end_copy(self.flat, self.data, self.blocks, None)
        self.barrier.bytes -= self.data.shape[1]
        self.barrier.writes -= 1
        barriers_of(self.wave).settle(self.wave, self.barrier)
