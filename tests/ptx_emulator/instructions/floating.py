"""Floating-point arithmetic: add, sub, mul, fma, div, min, max, square root and the approximations.

f32 and f64 follow IEEE with one rounding; f16 and bf16 are computed wider and rounded once. The approximations (ex2,
lg2, rcp, rsqrt, sqrt, sin, cos, tanh, div.approx, div.full) are computed in float64 and rounded to float32, which is
inside the error that the PTX ISA documents for each (2 ulp and more), but need not be the hardware's bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import number_formats as nf
from ..ptx_module import Instruction
from ..registry import Plain, plain
from .elementwise import allow, elementwise

if TYPE_CHECKING:
    from ..program import Scope

Array = np.ndarray[Any, np.dtype[Any]]
Function = Callable[..., Array]

ROUNDINGS = ("rn", "rz", "rm", "rp")
FLOATS = ("f16", "f16x2", "bf16", "bf16x2", "f32", "f32x2", "f64")
COMMON = (*ROUNDINGS, "ftz", "sat", "relu", "NaN", *FLOATS)


def _rounding(instruction: Instruction) -> str:
    return next((q for q in instruction.qualifiers if q in ROUNDINGS), "rn")


# -------------------------------------------------------------------------- one function for f32, lifted to the others


def _packed(function: Function, dtype: str) -> Function:
    """Apply a function to both halves of packed values."""
    half = np.dtype(dtype)

    def run(*operands: Array) -> Array:
        parts = [np.ascontiguousarray(o).view(half).reshape(-1, 2) for o in operands]
        result = np.ascontiguousarray(function(*parts))
        return result.view(operands[0].dtype).reshape(-1)

    return run


def _f32(function: Function, instruction: Instruction) -> Function:
    """float32 with .ftz, .sat, .relu and canonical NaN around the function."""
    ftz, sat, relu = (instruction.has(q) for q in ("ftz", "sat", "relu"))

    def run(*operands: Array) -> Array:
        if ftz:
            operands = tuple(nf.flush(o) for o in operands)
        result = function(*operands)
        if ftz:
            result = nf.flush(result)
        if sat:
            result = nf.saturate(result)
        if relu:
            result = np.where(result > 0, result, np.where(np.isnan(result), result, np.float32(0)))
        return nf.canonical(result.astype(np.float32, copy=False))

    return run


def _half(exact: Function, is_bf16: bool, instruction: Instruction) -> Function:
    """f16 or bf16 codes: decode, compute in float64 (exact or rounded to odd), round once."""
    sat, relu, ftz = instruction.has("sat"), instruction.has("relu"), instruction.has("ftz")
    if ftz and is_bf16:
        raise instruction.unknown("ftz of bf16")

    def decode(code: Array) -> Array:
        if is_bf16:
            return nf.bf16_to_f32(code).astype(np.float64)
        if ftz:
            code = np.where(code & np.uint16(0x7C00), code, code & np.uint16(0x8000)).astype(np.uint16)
        return code.view(np.float16).astype(np.float64)

    def run(*operands: Array) -> Array:
        result = exact(*[decode(o) for o in operands])
        if sat:
            result = nf.saturate(result)
        if relu:
            result = np.where(result > 0, result, np.where(np.isnan(result), result, 0.0))
        code = nf.f64_to_bf16(result) if is_bf16 else nf.f16_code(result)
        if ftz:
            code = np.where(code & np.uint16(0x7C00), code, code & np.uint16(0x8000)).astype(np.uint16)
        return code

    return run


def build(instruction: Instruction, scope: Scope, f32: Function, f64: Function, exact: Function) -> Plain:
    """Choose by type. `exact` works on float64 and may round to odd; it serves the 16-bit types."""
    type_name = instruction.qualifiers[-1]
    allow(instruction, *COMMON)
    d, *sources = instruction.operands
    named = [q for q in instruction.qualifiers if q in FLOATS]
    if len(named) == 2:
        return _mixed(instruction, scope, named, f32)
    if type_name == "f64":
        return elementwise(scope, d, "f64", sources, "f64", f64)
    if type_name == "f32":
        return elementwise(scope, d, "f32", sources, "f32", _f32(f32, instruction))
    if type_name == "f32x2":
        return elementwise(scope, d, "b64", sources, "b64", _packed(_f32(f32, instruction), "f4"))
    half = _half(exact, type_name.startswith("bf"), instruction)
    if type_name in ("f16", "bf16"):
        return elementwise(scope, d, "b16", sources, "b16", half)
    return elementwise(scope, d, "b32", sources, "b32", _packed(half, "u2"))


def _mixed(instruction: Instruction, scope: Scope, named: list[str], f32: Function) -> Plain:
    """add, sub and fma of f32 whose operands but the last are f16 or bf16, which are converted exactly."""
    if named[0] != "f32" or named[1] not in ("f16", "bf16") or instruction.opcode not in ("add", "sub", "fma"):
        raise instruction.unknown("types")
    function = _f32(f32, instruction)

    def run(*operands: Array) -> Array:
        wide = [
            nf.bf16_to_f32(o) if named[1] == "bf16" else o.view(np.float16).astype(np.float32) for o in operands[:-1]
        ]
        return function(*wide, operands[-1])

    d, *sources = instruction.operands
    return elementwise(scope, d, "f32", sources, ["b16"] * (len(sources) - 1) + ["f32"], run)


def _sum32(rounding: str) -> Function:
    if rounding == "rn":
        return np.add
    one = np.ones(1, np.float32)
    return lambda a, b: nf.fma32(a, one, b, rounding)


def _f64_only_rn(instruction: Instruction, function: Function) -> Function:
    if _rounding(instruction) == "rn":
        return function

    def refuse(*_: Array) -> Array:
        raise instruction.unknown("float64 with this rounding")

    if instruction.qualifiers[-1] == "f64":
        raise instruction.unknown("float64 with this rounding")
    return refuse


@plain("add", types=FLOATS)
def add(instruction: Instruction, scope: Scope) -> Plain:
    """add{.rnd}{.ftz}{.sat}"""
    return build(instruction, scope, _sum32(_rounding(instruction)), _f64_only_rn(instruction, np.add), nf.odd_sum)


@plain("sub", types=FLOATS)
def sub(instruction: Instruction, scope: Scope) -> Plain:
    """sub{.rnd}{.ftz}{.sat}"""
    total = _sum32(_rounding(instruction))
    return build(
        instruction,
        scope,
        lambda a, b: total(a, -b),
        _f64_only_rn(instruction, np.subtract),
        lambda a, b: nf.odd_sum(a, -b),
    )


@plain("mul", types=FLOATS)
def mul(instruction: Instruction, scope: Scope) -> Plain:
    """mul{.rnd}{.ftz}{.sat}"""
    rounding = _rounding(instruction)

    def product(a: Array, b: Array) -> Array:
        if rounding == "rn":
            return np.multiply(a, b)
        return nf.to_f32(a.astype(np.float64) * b, rounding)

    return build(instruction, scope, product, _f64_only_rn(instruction, np.multiply), np.multiply)


@plain("fma", "mad", types=FLOATS)
def fma(instruction: Instruction, scope: Scope) -> Plain:
    """fma.rnd{.ftz}{.sat}{.relu}; mad.f32 and mad.f64 are the same"""
    rounding = _rounding(instruction)
    return build(
        instruction,
        scope,
        lambda a, b, c: nf.fma32(a, b, c, rounding),
        _f64_only_rn(instruction, nf.fma64),
        lambda a, b, c: nf.odd_sum(a * b, c),
    )


@plain("min", "max", types=FLOATS)
def min_max(instruction: Instruction, scope: Scope) -> Plain:
    """min, max {.ftz}{.NaN}{.xorsign.abs}, of two or three operands"""
    choose = nf.minimum if instruction.opcode == "min" else nf.maximum
    nan = instruction.has("NaN")

    def run(a: Array, b: Array, *more: Array) -> Array:
        result = choose(a, b, nan)
        for c in more:
            result = choose(result, c, nan)
        return result

    return build(instruction, scope, run, run, run)


@plain("div", types=("f32", "f64"))
def div(instruction: Instruction, scope: Scope) -> Plain:
    """div.rn is IEEE; div.approx and div.full are computed like it (documented: 2 ulp)"""
    allow(instruction, "rn", "approx", "full", "ftz", "f32", "f64")
    if instruction.has("full"):
        instruction = _without(instruction, "full")
    if instruction.has("approx"):
        instruction = _without(instruction, "approx")
    return build(instruction, scope, np.divide, np.divide, np.divide)


def _without(instruction: Instruction, *names: str) -> Instruction:
    kept = tuple(q for q in instruction.qualifiers if q not in names)
    return Instruction(
        instruction.opcode,
        kept,
        instruction.operands,
        instruction.guard,
        instruction.line,
        instruction.text,
        instruction.scopes,
    )


def _unary(name: str, function: Function, *exact_roundings: str) -> None:
    """Register a function of one operand, computed in float64 and rounded to float32."""

    @plain(name, types=FLOATS)
    def builder(instruction: Instruction, scope: Scope) -> Plain:
        if _rounding(instruction) != "rn":
            raise instruction.unknown("rounding")
        instruction = _without(instruction, "approx", "full")
        return build(
            instruction, scope, lambda a: function(a.astype(np.float64)).astype(np.float32), function, function
        )

    builder.__doc__ = f"{name}{{.approx}}{{.rn}}{{.ftz}}"


# sqrt.rn and rcp.rn: float64 has more than twice the bits of float32, so that rounding again is harmless.
_unary("sqrt", np.sqrt)
_unary("rcp", lambda a: 1.0 / a)
_unary("rsqrt", lambda a: 1.0 / np.sqrt(a))
_unary("ex2", np.exp2)
_unary("lg2", np.log2)
_unary("sin", np.sin)
_unary("cos", np.cos)
_unary("tanh", np.tanh)


@plain("abs", "neg", types=FLOATS)
def sign(instruction: Instruction, scope: Scope) -> Plain:
    """abs, neg: of the sign bit alone, except for .ftz"""
    type_name = instruction.qualifiers[-1]
    allow(instruction, "ftz", type_name)
    bits = {"f16": 16, "bf16": 16, "f16x2": 32, "bf16x2": 32, "f32": 32, "f32x2": 64, "f64": 64}[type_name]
    pattern = {"f16": 0x8000, "bf16": 0x8000, "f16x2": 0x80008000, "bf16x2": 0x80008000, "f32": 0x80000000,
               "f32x2": 0x8000000080000000, "f64": 1 << 63}[type_name]  # fmt: skip
    kind = np.dtype(f"u{bits // 8}").type
    mask = kind(pattern)
    ftz = instruction.has("ftz")
    if ftz and type_name != "f32":
        raise instruction.unknown("ftz")

    def run(a: Array) -> Array:
        result = a & ~mask if instruction.opcode == "abs" else a ^ mask
        return nf.flush(result.view(np.float32)).view(np.uint32) if ftz else result

    d, *sources = instruction.operands
    return elementwise(scope, d, f"b{bits}", sources, f"b{bits}", run)


@plain("copysign")
def copysign(instruction: Instruction, scope: Scope) -> Plain:
    """copysign: the sign of a, the magnitude of b"""
    type_name = instruction.qualifiers[-1]
    allow(instruction, type_name)
    d, a, b = instruction.operands
    return elementwise(scope, d, type_name, [a, b], type_name, lambda x, y: np.copysign(y, x))
