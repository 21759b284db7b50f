"""Comparison and selection: setp, set, selp, slct, testp."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from ..number_formats import bf16_to_f32, flush
from ..ptx_module import Instruction
from ..registry import Plain, plain
from ..values import DTYPES
from .elementwise import elementwise

if TYPE_CHECKING:
    from ..program import Scope
    from ..wave import Active

Array = np.ndarray[Any, np.dtype[Any]]
Compare = Callable[[Array, Array], Array]

_ORDERED: dict[str, Compare] = {
    "eq": np.equal, "ne": lambda a, b: (a != b) & ~(_nan(a) | _nan(b)), "lt": np.less, "le": np.less_equal,
    "gt": np.greater, "ge": np.greater_equal,
}  # fmt: skip


def _nan(a: Array) -> Array:
    return np.isnan(a) if a.dtype.kind == "f" else np.zeros(1, np.bool_)


def _comparison(name: str, type_name: str) -> Compare:
    """The predicate of a comparison: eq .. ge, lo ls hi hs (unsigned), equ .. geu (true for NaN), num, nan."""
    if type_name[0] == "b" and type_name[1:].isdigit() and name not in ("eq", "ne"):
        raise KeyError(name)
    unsigned = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}
    if name == "num":
        return lambda a, b: ~(_nan(a) | _nan(b))
    if name == "nan":
        return lambda a, b: _nan(a) | _nan(b)
    if name in unsigned:
        return _ORDERED[unsigned[name]]
    if name in _ORDERED:
        return _ORDERED[name] if type_name[0] == "f" or type_name[:2] == "bf" or name != "ne" else np.not_equal
    ordered = _ORDERED[name[:-1]] if name.endswith("u") else None
    if ordered is None:
        raise KeyError(name)
    return lambda a, b: ordered(a, b) | _nan(a) | _nan(b)


_COMBINE: dict[str, Callable[[Array, Array], Array]] = {
    "and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor,
}  # fmt: skip


def _prepare(type_name: str, ftz: bool) -> Callable[[Array], Array]:
    """From the operand's type to something numpy compares."""
    if type_name == "bf16":
        return bf16_to_f32
    if type_name == "f32" and ftz:
        return flush
    if type_name in ("f16x2", "bf16x2"):
        raise KeyError(type_name)
    return lambda a: a


@plain("setp")
def setp(instruction: Instruction, scope: Scope) -> Plain:
    """setp.CmpOp{.BoolOp}{.ftz}.type p|q, a, b{, c}"""
    comparison, *rest = instruction.qualifiers
    type_name = rest[-1]
    combine = next((q for q in rest if q in _COMBINE), None)
    if type_name in ("f16x2", "bf16x2"):
        return _setp_pair(instruction, scope, comparison, type_name)
    compare = _comparison(comparison, type_name)
    prepare = _prepare(type_name, "ftz" in rest)
    target, other = scope.pair(instruction.operands[0])
    put, put_other = scope.destination(target, "pred"), scope.destination(other, "pred")
    first, second = (scope.source(o, type_name) for o in instruction.operands[1:3])
    if combine is None and target is not other and len(instruction.operands) == 3:
        pair = instruction.operands[0] is not target

        def run(active: Active) -> None:
            result = compare(prepare(first(active)), prepare(second(active)))
            put(active, result)
            if pair:
                put_other(active, ~result)

        return run
    third = scope.predicate(instruction.operands[3])
    join = _COMBINE[combine or "and"]

    def combined(active: Active) -> None:
        result = compare(prepare(first(active)), prepare(second(active)))
        extra = third(active)
        put(active, join(result, extra))
        put_other(active, join(~result, extra))

    return combined


def _setp_pair(instruction: Instruction, scope: Scope, comparison: str, type_name: str) -> Plain:
    """setp of two packed halves: p for the lower, q for the upper."""
    compare = _comparison(comparison, "f32")
    low, high = scope.pair(instruction.operands[0])
    put_low, put_high = scope.destination(low, "pred"), scope.destination(high, "pred")
    first, second = (scope.source(o, "b32") for o in instruction.operands[1:3])

    def run(active: Active) -> None:
        result = compare(_halves(first(active), type_name), _halves(second(active), type_name))
        put_low(active, result[:, 0])
        put_high(active, result[:, 1])

    return run


@plain("set")
def set_value(instruction: Instruction, scope: Scope) -> Plain:
    """set.CmpOp.dtype.stype: all ones or 1.0 where the comparison holds"""
    comparison, *rest = instruction.qualifiers
    out_type, type_name = rest[-2:]
    d, *sources = instruction.operands
    if any(q in _COMBINE for q in rest):
        raise instruction.unknown("combination with a predicate")
    if type_name in ("f16x2", "bf16x2"):
        return _set_pair(instruction, scope, comparison, out_type, type_name)
    compare, prepare = _comparison(comparison, type_name), _prepare(type_name, "ftz" in rest)
    dtype = DTYPES[out_type]
    true = {"f16": 1.0, "f32": 1.0, "bf16": 0x3F80}.get(out_type, ~dtype.type(0) if dtype.kind != "f" else 1.0)
    yes, no = np.array([true]).astype(dtype), np.zeros(1, dtype)
    kind = "b16" if type_name == "bf16" else type_name
    return elementwise(
        scope,
        d,
        "b16" if out_type == "bf16" else out_type,
        sources,
        kind,
        lambda a, b: np.where(compare(prepare(a), prepare(b)), yes, no),
    )


_ONE = {"f16x2": 0x3C00, "bf16x2": 0x3F80}


def _set_pair(instruction: Instruction, scope: Scope, comparison: str, out_type: str, type_name: str) -> Plain:
    """set of two packed halves: ones or 1.0 in each."""
    compare = _comparison(comparison, "f32")
    true = np.uint16(_ONE.get(out_type, 0xFFFF))
    d, *sources = instruction.operands

    def run(a: Array, b: Array) -> Array:
        result = np.where(compare(_halves(a, type_name), _halves(b, type_name)), true, np.uint16(0))
        return result.view(np.uint32).reshape(-1)

    return elementwise(scope, d, "b32", sources, "b32", run)


def _halves(value: Array, type_name: str) -> Array:
    """Both halves of packed values as float32."""
    codes = np.ascontiguousarray(value).view(np.uint16).reshape(-1, 2)
    return bf16_to_f32(codes) if type_name == "bf16x2" else codes.view(np.float16).astype(np.float32)


def _where(a: Array, b: Array, condition: Array) -> Array:
    return np.where(condition, a, b)


@plain("selp")
def selp(instruction: Instruction, scope: Scope) -> Plain:
    """selp: a where the predicate holds, else b"""
    type_name = instruction.qualifiers[-1]
    d, a, b, p = instruction.operands
    unsigned = {"f": "b", "s": "b", "u": "b", "b": "b"}[type_name[0]]
    bits = f"{unsigned}{8 * DTYPES[type_name].itemsize}"
    kind = type_name if type_name in ("f32", "f64", "f16") else bits
    return elementwise(scope, d, kind, [a, b, p], [kind, kind, "pred"], _where)


@plain("slct")
def slct(instruction: Instruction, scope: Scope) -> Plain:
    """slct: a where c >= 0, else b"""
    *_, type_name, condition = instruction.qualifiers
    d, a, b, c = instruction.operands
    types = [type_name, type_name, condition]
    return elementwise(scope, d, type_name, [a, b, c], types, lambda x, y, z: _where(x, y, z >= 0))


@plain("testp")
def testp(instruction: Instruction, scope: Scope) -> Plain:
    """testp: class of a floating-point number"""
    what, type_name = instruction.qualifiers
    tiny = np.finfo(DTYPES[type_name]).tiny
    tests: dict[str, Callable[[Array], Array]] = {
        "finite": np.isfinite, "infinite": np.isinf, "number": lambda a: ~np.isnan(a), "notanumber": np.isnan,
        "normal": lambda a: np.isfinite(a) & (np.abs(a) >= tiny),
        "subnormal": lambda a: (np.abs(a) < tiny) & (a != 0),
    }  # fmt: skip
    d, *sources = instruction.operands
    return elementwise(scope, d, "pred", sources, type_name, tests[what])
