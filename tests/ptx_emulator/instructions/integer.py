"""Integer arithmetic: add, sub, mul, mad, div, rem, min, max, abs, neg, sad, carries, dot products."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from ..ptx_module import Instruction
from ..registry import Plain, plain
from ..values import DTYPES, wider
from .elementwise import allow, elementwise

if TYPE_CHECKING:
    from ..program import Scope
    from ..wave import Active

Array = np.ndarray[Any, np.dtype[Any]]

INTEGERS = ("u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64", "b16", "b32", "b64")
CARRY = 0  # register slot of the condition code


def _high64(a: Array, b: Array) -> Array:
    """The upper half of a 64 x 64 bit product."""
    mask = np.uint64(0xFFFFFFFF)
    half = np.uint64(32)
    ua, ub = a.view(np.uint64), b.view(np.uint64)
    low = (ua & mask) * (ub & mask)
    mid = (ua >> half) * (ub & mask) + (low >> half)
    other = (ua & mask) * (ub >> half) + (mid & mask)
    high = (ua >> half) * (ub >> half) + (mid >> half) + (other >> half)
    if a.dtype.kind == "i":
        high = high - np.where(a < 0, ub, np.uint64(0)) - np.where(b < 0, ua, np.uint64(0))
    return high.view(a.dtype)


def _multiply(part: str, type_name: str) -> tuple[Callable[[Array, Array], Array], str]:
    """The product's requested part, and the type of the result."""
    dtype = DTYPES[type_name]
    if part == "lo":
        return np.multiply, type_name
    if dtype.itemsize == 8:
        return _high64, type_name
    double = DTYPES[wider(type_name)]
    if part == "wide":
        return (lambda a, b: a.astype(double) * b.astype(double)), wider(type_name)
    shift = double.type(8 * dtype.itemsize)
    return (lambda a, b: ((a.astype(double) * b.astype(double)) >> shift).astype(dtype)), type_name


def _saturating(function: Callable[[Array, Array], Array]) -> Callable[[Array, Array], Array]:
    """.sat of s32: clamp instead of wrapping around."""
    return lambda a, b: np.clip(function(a.astype(np.int64), b.astype(np.int64)), -(2**31), 2**31 - 1).astype(np.int32)


@plain("add", "sub", types=INTEGERS)
def add_sub(instruction: Instruction, scope: Scope) -> Plain:
    """add{.sat}{.cc}, sub{.sat}{.cc}"""
    type_name = instruction.qualifiers[-1]
    allow(instruction, "sat", "cc", type_name)
    d, *sources = instruction.operands
    function: Callable[[Array, Array], Array] = np.add if instruction.opcode == "add" else np.subtract
    if instruction.has("cc"):
        return _carry(instruction, scope, takes=False)
    if instruction.has("sat"):
        function = _saturating(function)
    return elementwise(scope, d, type_name, sources, type_name, function)


@plain("addc", "subc", types=INTEGERS)
def add_sub_carry(instruction: Instruction, scope: Scope) -> Plain:
    """addc{.cc}, subc{.cc}: with the carry that an earlier .cc instruction left."""
    return _carry(instruction, scope, takes=True)


def _carry(instruction: Instruction, scope: Scope, takes: bool) -> Plain:
    type_name = instruction.qualifiers[-1]
    unsigned = "u" + type_name[1:]
    width = int(type_name[1:])
    d, a, b = instruction.operands
    first, second = scope.source(a, unsigned), scope.source(b, unsigned)
    put = scope.destination(d, unsigned)
    gives = instruction.has("cc")
    subtract = instruction.opcode.startswith("sub")
    kind = DTYPES[unsigned].type
    top = kind(width - 1)

    def run(active: Active) -> None:
        x, y = first(active), second(active)
        if subtract:  # a - b is a + ~b + 1; the borrow is the inverted carry
            y = ~y
        carry = active.read(CARRY).astype(kind) if takes else np.zeros(1, kind)
        if subtract:
            carry = kind(1) - carry
        total = x + y + carry
        out = ((x & y) | ((x | y) & ~total)) >> top
        put(active, total)
        if gives:
            active.write(CARRY, (out == 0) if subtract else (out != 0))

    return run


@plain("mul", types=INTEGERS)
def mul(instruction: Instruction, scope: Scope) -> Plain:
    """mul{.hi,.lo,.wide}"""
    type_name = instruction.qualifiers[-1]
    allow(instruction, "lo", "hi", "wide", type_name)
    function, out_type = _multiply(instruction.qualifiers[0], type_name)
    d, *sources = instruction.operands
    return elementwise(scope, d, out_type, sources, type_name, function)


@plain("mad", types=INTEGERS)
def mad(instruction: Instruction, scope: Scope) -> Plain:
    """mad{.hi,.lo,.wide}"""
    type_name = instruction.qualifiers[-1]
    allow(instruction, "lo", "hi", "wide", type_name)
    function, out_type = _multiply(instruction.qualifiers[0], type_name)
    d, *sources = instruction.operands
    return elementwise(
        scope, d, out_type, sources, [type_name, type_name, out_type], lambda a, b, c: function(a, b) + c
    )


@plain("mul24", "mad24")
def mul24(instruction: Instruction, scope: Scope) -> Plain:
    """mul24.lo, mad24.lo of operands that fit in 24 bits"""
    type_name = instruction.qualifiers[-1]
    allow(instruction, "lo", type_name)
    d, *sources = instruction.operands
    shift = DTYPES[type_name].type(8)

    def product(a: Array, b: Array) -> Array:
        return ((a << shift) >> shift) * ((b << shift) >> shift)

    if instruction.opcode == "mul24":
        return elementwise(scope, d, type_name, sources, type_name, product)
    return elementwise(scope, d, type_name, sources, type_name, lambda a, b, c: product(a, b) + c)


def _divide(a: Array, b: Array) -> tuple[Array, Array]:
    """Quotient towards zero and remainder; what PTX leaves open for a divisor of 0 is all ones and the dividend."""
    a, b = np.broadcast_arrays(a, b)
    safe = np.where(b == 0, b.dtype.type(1), b)
    if a.dtype.kind == "u":
        quotient, remainder = a // safe, a % safe
    else:
        remainder = np.fmod(a, safe)
        quotient = (a - remainder) // safe
    ones = ~a.dtype.type(0)
    return np.where(b == 0, ones, quotient), np.where(b == 0, a, remainder)


@plain("div", types=INTEGERS)
def div(instruction: Instruction, scope: Scope) -> Plain:
    """div of integers"""
    type_name = instruction.qualifiers[-1]
    allow(instruction, type_name)
    d, *sources = instruction.operands
    return elementwise(scope, d, type_name, sources, type_name, lambda a, b: _divide(a, b)[0])


@plain("rem")
def rem(instruction: Instruction, scope: Scope) -> Plain:
    """rem"""
    type_name = instruction.qualifiers[-1]
    allow(instruction, type_name)
    d, *sources = instruction.operands
    return elementwise(scope, d, type_name, sources, type_name, lambda a, b: _divide(a, b)[1])


@plain("min", "max", types=INTEGERS)
def min_max(instruction: Instruction, scope: Scope) -> Plain:
    """min, max of integers, with .relu for s32"""
    type_name = instruction.qualifiers[-1]
    allow(instruction, "relu", type_name)
    function: Callable[[Array, Array], Array] = np.minimum if instruction.opcode == "min" else np.maximum
    d, *sources = instruction.operands
    if instruction.has("relu"):
        return elementwise(scope, d, type_name, sources, type_name, lambda a, b: np.maximum(function(a, b), 0))
    return elementwise(scope, d, type_name, sources, type_name, function)


@plain("add", "min", "max", types=("u16x2", "s16x2"))
def halves(instruction: Instruction, scope: Scope) -> Plain:
    """add, min, max of two packed 16-bit integers, with .relu for s16x2"""
    type_name = instruction.qualifiers[-1]
    allow(instruction, "relu", type_name)
    dtype = np.dtype("u2" if type_name[0] == "u" else "i2")
    function: Callable[[Array, Array], Array] = {"add": np.add, "min": np.minimum, "max": np.maximum}[
        instruction.opcode
    ]
    relu = instruction.has("relu")

    def run(a: Array, b: Array) -> Array:
        parts = [np.ascontiguousarray(v).view(dtype).reshape(-1, 2) for v in (a, b)]
        result = function(*parts)
        return (np.maximum(result, dtype.type(0)) if relu else result).view(np.uint32).reshape(-1)

    d, *sources = instruction.operands
    return elementwise(scope, d, "b32", sources, "b32", run)


@plain("abs", types=INTEGERS)
def absolute(instruction: Instruction, scope: Scope) -> Plain:
    """abs of integers; the most negative value stays as it is"""
    type_name = instruction.qualifiers[-1]
    d, *sources = instruction.operands
    return elementwise(scope, d, type_name, sources, type_name, np.abs)


@plain("neg", types=INTEGERS)
def negate(instruction: Instruction, scope: Scope) -> Plain:
    """neg of integers"""
    type_name = instruction.qualifiers[-1]
    d, *sources = instruction.operands
    return elementwise(scope, d, type_name, sources, type_name, np.negative)


@plain("sad")
def sad(instruction: Instruction, scope: Scope) -> Plain:
    """sad: c + |a - b|"""
    type_name = instruction.qualifiers[-1]
    allow(instruction, type_name)
    d, *sources = instruction.operands
    return elementwise(
        scope, d, type_name, sources, type_name, lambda a, b, c: c + np.where(a < b, b - a, a - b).astype(a.dtype)
    )


def _lanes_of(value: Array, dtype: str) -> Array:
    """The bytes or half words of 32-bit values, as rows of int64."""
    kind = np.dtype(dtype)
    return np.ascontiguousarray(value).view(kind).reshape(-1, 4 // kind.itemsize).astype(np.int64)


@plain("dp4a")
def dp4a(instruction: Instruction, scope: Scope) -> Plain:
    """dp4a: c + the dot product of four bytes"""
    a_type, b_type = instruction.qualifiers
    out = "s32" if "s32" in (a_type, b_type) else "u32"
    d, *sources = instruction.operands

    def dot(a: Array, b: Array, c: Array) -> Array:
        total = (_lanes_of(a, a_type[0].replace("s", "i") + "1") * _lanes_of(b, b_type[0].replace("s", "i") + "1")).sum(
            1
        )
        return (total + c).astype(np.uint64).astype(np.uint32).view(DTYPES[out])

    return elementwise(scope, d, out, sources, ["b32", "b32", out], dot)
