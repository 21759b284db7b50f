"""tensormap.replace and tensormap.cp_fenceproxy: tensor maps that a kernel writes, in the emulator's own format."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ..ptx_module import Immediate, Instruction
from ..registry import Plain, plain
from ..tensor_map import ELEMENT_SIZES, SWIZZLES, place_of_field
from .load_store import load_rows, store_rows

if TYPE_CHECKING:
    from ..program import Scope
    from ..wave import Active

Array = np.ndarray[Any, np.dtype[Any]]

_WORD = np.dtype("u8")


@plain("tensormap")
def tensormap(instruction: Instruction, scope: Scope) -> Plain:
    """tensormap.replace.tile.field, tensormap.cp_fenceproxy"""
    if instruction.has("replace"):
        return _replace(instruction, scope)
    if instruction.has("cp_fenceproxy"):
        return _copy(instruction, scope)
    raise instruction.unknown()


def _replace(instruction: Instruction, scope: Scope) -> Plain:
    space = "shared" if instruction.has("shared::cta") else "global" if instruction.has("global") else "generic"
    name = instruction.qualifiers[2]
    operands = list(instruction.operands)
    address = scope.address(operands.pop(0))
    index = 0
    if len(operands) == 2:
        number = operands.pop(0)
        assert isinstance(number, Immediate)
        index = int(number.value)
    value = scope.source(operands[0], "u64" if instruction.qualifiers[-1] == "b64" else "u32")
    if name in ("interleave_layout", "fill_mode", "swizzle_atomicity"):
        if not isinstance(operands[0], Immediate) or int(operands[0].value):
            raise instruction.unknown(name)
        return lambda active: None

    def run(active: Active) -> None:
        places = active.rows(address(active))
        data = np.ascontiguousarray(load_rows(active, space, places, _WORD, 16)).view(np.uint8).reshape(-1, 128)
        for row, number in enumerate(active.rows(value(active)).tolist()):
            if name == "rank":
                number += 1
            elif name == "elemtype":
                number = ELEMENT_SIZES[number]
            elif name == "swizzle_mode":
                number = SWIZZLES[number]
            start, size = place_of_field("element_size" if name == "elemtype" else name, index)
            data[row, start : start + size] = np.frombuffer(int(number).to_bytes(size, "little"), np.uint8)
            start, size = place_of_field("magic", 0)
            data[row, start : start + size] = np.frombuffer(b"emulated", np.uint8)
        store_rows(active, space, places, data.view(_WORD))
        active.wave.launch.progress += 1

    return run


def _copy(instruction: Instruction, scope: Scope) -> Plain:
    target, source = scope.address(instruction.operands[0]), scope.address(instruction.operands[1])

    def run(active: Active) -> None:
        # All lanes of the warp execute it, and copy the same bytes.
        data = load_rows(active, "shared", active.rows(source(active)), _WORD, 16)
        store_rows(active, "global", active.rows(target(active)), np.ascontiguousarray(data))
        active.wave.launch.progress += 1

    return run
