"""Bit operations: and, or, xor, not, shifts, lop3, prmt, bfe, bfi, popc, clz, brev, bfind."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from ..ptx_module import Immediate, Instruction
from ..registry import Plain, plain
from ..values import DTYPES
from .elementwise import allow, elementwise

if TYPE_CHECKING:
    from ..program import Scope

Array = np.ndarray[Any, np.dtype[Any]]


@plain("and", "or", "xor")
def logic(instruction: Instruction, scope: Scope) -> Plain:
    """and, or, xor of bits or predicates"""
    type_name = instruction.qualifiers[-1]
    allow(instruction, type_name)
    functions: dict[str, Callable[[Array, Array], Array]] = {
        "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
    }  # fmt: skip
    d, *sources = instruction.operands
    return elementwise(scope, d, type_name, sources, type_name, functions[instruction.opcode])


@plain("not")
def invert(instruction: Instruction, scope: Scope) -> Plain:
    """not"""
    type_name = instruction.qualifiers[-1]
    allow(instruction, type_name)
    d, *sources = instruction.operands
    return elementwise(scope, d, type_name, sources, type_name, np.invert)


@plain("cnot")
def cnot(instruction: Instruction, scope: Scope) -> Plain:
    """cnot: 1 for 0, else 0"""
    type_name = instruction.qualifiers[-1]
    d, *sources = instruction.operands
    return elementwise(scope, d, type_name, sources, type_name, lambda a: (a == 0).astype(a.dtype))


@plain("shl", "shr")
def shift(instruction: Instruction, scope: Scope) -> Plain:
    """shl, shr: amounts above the width count as the width; shr of a signed type keeps the sign"""
    type_name = instruction.qualifiers[-1]
    allow(instruction, type_name)
    dtype = DTYPES[type_name]
    width = dtype.itemsize * 8
    last = np.uint32(width - 1)
    left = instruction.opcode == "shl"

    def run(a: Array, b: Array) -> Array:
        amount = np.minimum(b, last).astype(dtype)
        shifted = a << amount if left else a >> amount
        if dtype.kind == "i" and not left:
            return shifted
        return np.where(b > last, dtype.type(0), shifted)

    d, *sources = instruction.operands
    return elementwise(scope, d, type_name, sources, [type_name, "u32"], run)


@plain("shf")
def funnel_shift(instruction: Instruction, scope: Scope) -> Plain:
    """shf{.l,.r}{.clamp,.wrap}: shift the 64-bit value b:a and take the upper (l) or lower (r) half"""
    direction, mode, type_name = instruction.qualifiers
    d, *sources = instruction.operands

    def run(a: Array, b: Array, c: Array) -> Array:
        joined = (b.astype(np.uint64) << np.uint64(32)) | a
        amount = (np.minimum(c, np.uint32(32)) if mode == "clamp" else c & np.uint32(31)).astype(np.uint64)
        if direction == "l":
            return ((joined << amount) >> np.uint64(32)).astype(np.uint32)
        return (joined >> amount).astype(np.uint32)

    return elementwise(scope, d, type_name, sources, "u32", run)


@plain("lop3")
def lop3(instruction: Instruction, scope: Scope) -> Plain:
    """lop3: any function of three bits, given as its truth table"""
    allow(instruction, "b32")
    d, a, b, c, table = instruction.operands
    if not isinstance(table, Immediate):
        raise instruction.unknown("the truth table is not a constant")
    code = int(table.value)

    def run(x: Array, y: Array, z: Array) -> Array:
        result = np.zeros(1, np.uint32)
        for row in range(8):
            if code >> row & 1:
                term = x if row & 4 else ~x
                term = term & (y if row & 2 else ~y)
                result = result | (term & (z if row & 1 else ~z))
        return result

    return elementwise(scope, d, "b32", [a, b, c], "b32", run)


@plain("prmt")
def permute(instruction: Instruction, scope: Scope) -> Plain:
    """prmt.b32: pick four bytes of b:a; bit 3 of a selector repeats the byte's sign"""
    allow(instruction, "b32")
    d, *sources = instruction.operands

    def run(a: Array, b: Array, c: Array) -> Array:
        joined = (b.astype(np.uint64) << np.uint64(32)) | a
        result = np.zeros(1, np.uint32)
        for byte in range(4):
            selector = (c >> np.uint32(4 * byte)) & np.uint32(15)
            picked = (joined >> ((selector & np.uint32(7)) * np.uint32(8)).astype(np.uint64)) & np.uint64(255)
            sign = np.where(picked & np.uint64(128), np.uint64(255), np.uint64(0))
            value = np.where(selector & np.uint32(8), sign, picked).astype(np.uint32)
            result = result | (value << np.uint32(8 * byte))
        return result

    return elementwise(scope, d, "b32", sources, "b32", run)


@plain("bfe")
def extract(instruction: Instruction, scope: Scope) -> Plain:
    """bfe: a field of bits, extended by its sign for signed types"""
    type_name = instruction.qualifiers[-1]
    width = int(type_name[1:])
    d, *sources = instruction.operands

    def run(a: Array, b: Array, c: Array) -> Array:
        position, length = (b & np.uint32(255)).astype(np.int64), (c & np.uint32(255)).astype(np.int64)
        result = np.zeros(np.broadcast_shapes(a.shape, b.shape, c.shape), np.uint64)
        value = (
            a.astype(f"i{width // 8}").astype(np.int64).view(np.uint64) if type_name[0] == "s" else a.astype(np.uint64)
        )
        last = np.minimum(position + length - 1, width - 1)
        sign = (value >> last.astype(np.uint64)) & np.uint64(1) if type_name[0] == "s" else np.zeros(1, np.uint64)
        sign = np.where(length == 0, np.uint64(0), sign)
        for bit in range(width):
            inside = (bit < length) & (position + bit < width)
            source = (value >> np.minimum(position + bit, 63).astype(np.uint64)) & np.uint64(1)
            result |= np.where(inside, source, sign) << np.uint64(bit)
        return result.astype(f"u{width // 8}").view(DTYPES[type_name])

    return elementwise(scope, d, type_name, sources, [type_name, "u32", "u32"], run)


@plain("bfi")
def insert(instruction: Instruction, scope: Scope) -> Plain:
    """bfi: put the low bits of a into a field of b"""
    type_name = instruction.qualifiers[-1]
    width = int(type_name[1:])
    d, *sources = instruction.operands

    def run(a: Array, b: Array, c: Array, e: Array) -> Array:
        position, length = (
            (c & np.uint32(255)).astype(np.uint64),
            np.minimum(e & np.uint32(255), np.uint32(64)).astype(np.uint64),
        )
        ones = np.where(length >= 64, ~np.uint64(0), (np.uint64(1) << np.minimum(length, np.uint64(63))) - np.uint64(1))
        reachable = position < np.uint64(width)
        place = np.minimum(position, np.uint64(63))
        mask = np.where(reachable, ones << place, np.uint64(0))
        field = np.where(reachable, a.astype(np.uint64) << place, np.uint64(0))
        return ((b.astype(np.uint64) & ~mask) | (field & mask)).astype(DTYPES[type_name])

    return elementwise(scope, d, type_name, sources, [type_name, type_name, "u32", "u32"], run)


@plain("bmsk")
def bit_mask(instruction: Instruction, scope: Scope) -> Plain:
    """bmsk{.clamp,.wrap}.b32: ones from position a on, b of them"""
    mode = instruction.qualifiers[0]
    d, *sources = instruction.operands

    def run(a: Array, b: Array) -> Array:
        start, length = a.astype(np.uint64), b.astype(np.uint64)
        if mode == "wrap":
            start, length = start & np.uint64(31), length & np.uint64(31)
        length = np.minimum(length, np.uint64(32))
        mask = ((np.uint64(1) << length) - np.uint64(1)) << np.minimum(start, np.uint64(32))
        return mask.astype(np.uint32)

    return elementwise(scope, d, "b32", sources, "u32", run)


@plain("popc")
def popc(instruction: Instruction, scope: Scope) -> Plain:
    """popc: number of ones"""
    d, *sources = instruction.operands
    return elementwise(
        scope, d, "u32", sources, instruction.qualifiers[-1], lambda a: np.bitwise_count(a).astype(np.uint32)
    )


def _highest(a: Array, width: int) -> Array:
    """Place of the highest one, -1 for 0."""
    high = (a.astype(np.uint64) >> np.uint64(32)).astype(np.float64)
    low = (a.astype(np.uint64) & np.uint64(0xFFFFFFFF)).astype(np.float64)
    return np.where(high > 0, np.frexp(high)[1] + 31, np.frexp(low)[1] - 1)


@plain("clz")
def clz(instruction: Instruction, scope: Scope) -> Plain:
    """clz: number of leading zeros"""
    width = int(instruction.qualifiers[-1][1:])
    d, *sources = instruction.operands
    return elementwise(
        scope, d, "u32", sources, f"u{width}", lambda a: (width - 1 - _highest(a, width)).astype(np.uint32)
    )


@plain("bfind")
def bfind(instruction: Instruction, scope: Scope) -> Plain:
    """bfind{.shiftamt}: place of the highest bit that is not a sign bit, all ones if there is none"""
    type_name = instruction.qualifiers[-1]
    width = int(type_name[1:])
    amount = instruction.has("shiftamt")
    d, *sources = instruction.operands

    def run(a: Array) -> Array:
        bits = np.where(a < 0, ~a, a).astype(f"u{width // 8}")
        place = _highest(bits, width)
        result = np.where(place < 0, -1, width - 1 - place if amount else place)
        return result.astype(np.int32).view(np.uint32)

    return elementwise(scope, d, "u32", sources, type_name, run)


@plain("brev")
def brev(instruction: Instruction, scope: Scope) -> Plain:
    """brev: bits in reverse order"""
    width = int(instruction.qualifiers[-1][1:])
    d, *sources = instruction.operands

    def run(a: Array) -> Array:
        rows = np.ascontiguousarray(a).view(np.uint8).reshape(-1, width // 8)
        flipped = np.packbits(np.unpackbits(rows, axis=1, bitorder="little"), axis=1, bitorder="big")[:, ::-1]
        return np.ascontiguousarray(flipped[:, ::-1][:, ::-1]).view(a.dtype).reshape(-1)

    return elementwise(scope, d, f"u{width}", sources, f"u{width}", run)


@plain("fns", "szext")
def rare(instruction: Instruction, scope: Scope) -> Plain:
    """szext{.clamp,.wrap}: keep the low b bits, extend by sign or zero. fns is not implemented."""
    if instruction.opcode == "fns":
        raise instruction.unknown()
    mode, type_name = instruction.qualifiers
    d, *sources = instruction.operands

    def run(a: Array, b: Array) -> Array:
        length = (b & np.uint32(31) if mode == "wrap" else np.minimum(b, np.uint32(32))).astype(np.int64)
        value = a.astype(np.int64) & ((np.int64(1) << length) - 1)
        if type_name == "s32":
            sign = np.where(length > 0, (value >> np.maximum(length - 1, 0)) & 1, 0)
            value = value - (sign << length)
        return value.astype(np.uint64).astype(np.uint32).view(DTYPES[type_name])

    return elementwise(scope, d, type_name, sources, [type_name, "u32"], run)
