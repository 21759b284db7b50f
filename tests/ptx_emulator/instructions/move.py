"""Moves: mov with packing and unpacking, cvta, mapa, isspacep."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ..ptx_module import Instruction, Vector
from ..registry import Plain, plain
from ..spaces import GENERIC, SPACE_SHIFT, in_block, window_of
from ..values import DTYPES, pack
from .elementwise import elementwise

if TYPE_CHECKING:
    from ..program import Scope
    from ..wave import Active

Array = np.ndarray[Any, np.dtype[Any]]


@plain("mov")
def mov(instruction: Instruction, scope: Scope) -> Plain:
    """mov: copy, take an address, pack {a, b} into a register or unpack one"""
    type_name = instruction.qualifiers[-1]
    d, a = instruction.operands
    if isinstance(d, Vector):
        return _unpack(scope, d, a, type_name)
    if isinstance(a, Vector):
        return _pack(scope, d, a, type_name)
    source, put = scope.source(a, type_name), scope.destination(d, type_name)
    return lambda active: put(active, source(active))


def _unpack(scope: Scope, d: Vector, a: Any, type_name: str) -> Plain:
    bits = DTYPES[type_name].itemsize * 8
    part = f"b{bits // len(d.items)}"
    source = scope.source(a, f"b{bits}")
    puts = [scope.destination(item, part) for item in d.items]
    dtype = DTYPES[part]

    def run(active: Active) -> None:
        rows = np.ascontiguousarray(source(active)).view(dtype).reshape(-1, len(puts))
        for column, put in enumerate(puts):
            put(active, rows[:, column].copy())

    return run


def _pack(scope: Scope, d: Any, a: Vector, type_name: str) -> Plain:
    bits = DTYPES[type_name].itemsize * 8
    part = f"b{bits // len(a.items)}"
    sources = [scope.source(item, part) for item in a.items]
    put = scope.destination(d, f"b{bits}")
    dtype = DTYPES[f"b{bits}"]
    return lambda active: put(active, pack([s(active) for s in sources]).view(dtype).reshape(-1))


@plain("cvta")
def cvta(instruction: Instruction, scope: Scope) -> Plain:
    """cvta{.to}.space: between generic addresses and addresses inside a state space"""
    space = next(q for q in instruction.qualifiers if q not in ("to", "u64", "u32")).split("::")[0]
    d, a = instruction.operands
    type_name = instruction.qualifiers[-1]
    window = np.uint64(GENERIC[space])
    operand = a
    if space == "param":
        source, put = scope.source(a, type_name), scope.destination(d, type_name)
        sign = -1 if instruction.has("to") else 1
        return lambda active: put(
            active, source(active) + np.uint64((sign * active.wave.launch.parameter_address) % (1 << 64))
        )
    if space in ("global", "const") or not window:
        return elementwise(scope, d, type_name, [operand], type_name, lambda x: x)
    if instruction.has("to"):
        return elementwise(scope, d, type_name, [operand], type_name, lambda x: x - window)
    return elementwise(scope, d, type_name, [operand], type_name, lambda x: x + window)


@plain("isspacep")
def isspacep(instruction: Instruction, scope: Scope) -> Plain:
    """isspacep: whether a generic address lies in a state space"""
    space = instruction.qualifiers[0].split("::")[0]
    d, a = instruction.operands
    if space not in ("shared", "local", "global"):
        raise instruction.unknown()
    window = window_of(space)
    return elementwise(scope, d, "pred", [a], "u64", lambda x: (x >> np.uint64(SPACE_SHIFT)) == np.uint64(window))


@plain("mapa")
def mapa(instruction: Instruction, scope: Scope) -> Plain:
    """mapa: the address of the same variable in another block of the cluster"""
    type_name = instruction.qualifiers[-1]
    d, a, rank = instruction.operands
    if instruction.qualifiers[0] == "shared::cluster":
        return elementwise(
            scope,
            d,
            type_name,
            [a, rank],
            ["u64" if type_name == "u64" else "u32", "u32"],
            lambda x, r: in_block(x.astype(np.uint64), r).astype(DTYPES[type_name]),
        )
    window = np.uint64(GENERIC["shared"])

    return elementwise(scope, d, type_name, [a, rank], ["u64", "u32"], lambda x, r: in_block(x - window, r) + window)
