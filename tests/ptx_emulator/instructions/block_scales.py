"""Scale factors of block-scaled mma.sync.

A register of scale data holds four bytes. For A, thread-id 0 or 1 chooses the lower or upper pair of each group of four
lanes; the pair's first lane holds the scales of row lane/4, its second those of row lane/4 + 8. For B, thread-id 0 to 3
chooses one lane of the four; it holds the scales of column lane/4. byte-id is the first byte used.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import number_formats as nf
from ..ptx_module import Immediate, Instruction, Vector

if TYPE_CHECKING:
    from ..program import Scope
    from ..wave import Active

Array = np.ndarray[Any, np.dtype[Any]]
Scales = Callable[["Active", Array], tuple[Array, Array]]

_DEFAULT = {"mxf8f6f4": 1, "mxf4": 2}


def mma_scales(instruction: Instruction, scope: Scope, operands: list[Any], type_name: str, k: int) -> Scales:
    """A function that gives the scales of A as (warps, 16, blocks) and of B as (warps, blocks, 8)."""
    kind = next(q[6:] for q in instruction.qualifiers if q.startswith("kind::"))
    vector = next(
        (int(q[len("scale_vec::") : -1]) for q in instruction.qualifiers if q.startswith("scale_vec::")), None
    )
    count = vector or _DEFAULT[kind]
    table = nf.DECODE["ue4m3" if type_name == "ue4m3" else "ue8m0"]
    data_a, ids_a, data_b, ids_b = operands
    source_a, source_b = scope.wide(data_a, "b32"), scope.wide(data_b, "b32")
    byte_a, thread_a = (_constant(scope, i, instruction) for i in _pair(ids_a))
    byte_b, thread_b = (_constant(scope, i, instruction) for i in _pair(ids_b))
    lanes_a = np.empty(16, np.int64)
    for row in range(16):
        lanes_a[row] = 4 * (row % 8) + 2 * thread_a + row // 8
    lanes_b = 4 * np.arange(8) + thread_b
    if thread_a > 1 or thread_b > 3 or byte_a + count > 4 or byte_b + count > 4 or k % count:
        raise instruction.unknown("selectors of scale data")
    shifts_a = (8 * (byte_a + np.arange(count))).astype(np.uint32)
    shifts_b = (8 * (byte_b + np.arange(count))).astype(np.uint32)

    def run(active: Active, warps: Array) -> tuple[Array, Array]:
        words_a = source_a(active).reshape(-1, 32)[warps][:, lanes_a]
        words_b = source_b(active).reshape(-1, 32)[warps][:, lanes_b]
        codes_a = (words_a[:, :, None] >> shifts_a) & np.uint32(255)
        codes_b = (words_b[:, None, :] >> shifts_b[:, None]) & np.uint32(255)
        return table[codes_a], table[codes_b]

    return run


def _pair(operand: Any) -> tuple[Any, ...]:
    return operand.items if isinstance(operand, Vector) else (operand,)


def _constant(scope: Scope, operand: Any, instruction: Instruction) -> int:
    if not isinstance(operand, Immediate):
        raise instruction.unknown("selector that is not a constant")
    return int(operand.value)
