"""cvt: between integers and floating-point formats, with roundings and saturations."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import number_formats as nf
from ..ptx_module import Instruction
from ..registry import Plain, plain
from ..values import DTYPES
from .elementwise import allow, elementwise

if TYPE_CHECKING:
    from ..program import Scope

Array = np.ndarray[Any, np.dtype[Any]]

INTEGRAL = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
FLOAT = ("f16", "bf16", "f32", "f64", "tf32")
PACKED = ("f16x2", "bf16x2", "e4m3x2", "e5m2x2", "e2m1x2", "e2m3x2", "e3m2x2", "ue8m0x2")


@plain("cvt")
def cvt(instruction: Instruction, scope: Scope) -> Plain:
    """cvt{.rounding}{.ftz}{.sat}{.satfinite}{.relu}.dtype.atype"""
    *modifiers, out, source = instruction.qualifiers
    allow(instruction, "rn", "rz", "rm", "rp", "rna", *INTEGRAL, "ftz", "sat", "satfinite", "relu", out, source)
    if out in PACKED or source in PACKED:
        return _packed(instruction, scope, modifiers, out, source)
    rounding = next((m for m in modifiers if m in ("rn", "rz", "rm", "rp", "rna", *INTEGRAL)), "")
    d, a = instruction.operands
    if out in FLOAT and source in FLOAT:
        function = _float_to_float(instruction, modifiers, rounding, out, source)
    elif out in FLOAT:
        function = _integer_to_float(instruction, modifiers, rounding or "rn", out, source)
    elif source in FLOAT:
        function = _float_to_integer(instruction, modifiers, rounding or "rzi", out, source)
    else:
        function = _integer_to_integer(modifiers, out, source)
    kinds = {"bf16": "b16", "tf32": "b32", "f16": "b16"}
    return elementwise(scope, d, kinds.get(out, out), [a], kinds.get(source, source), function)


def _integer_to_integer(modifiers: list[str], out: str, source: str) -> Callable[[Array], Array]:
    target = DTYPES[out]
    if "sat" not in modifiers:
        return lambda a: a.astype(target)
    info = np.iinfo(target)
    low, high = max(info.min, np.iinfo(DTYPES[source]).min), min(info.max, np.iinfo(DTYPES[source]).max)
    return lambda a: np.clip(a, DTYPES[source].type(low), DTYPES[source].type(high)).astype(target)


def _decode(name: str) -> Callable[[Array], Array]:
    """From the operand's bits to float64."""
    if name == "bf16":
        return lambda a: nf.bf16_to_f32(a).astype(np.float64)
    if name == "f16":
        return lambda a: a.view(np.float16).astype(np.float64)
    if name == "tf32":
        return lambda a: (a & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64)
    return lambda a: a.astype(np.float64)


def _encode(name: str, rounding: str) -> Callable[[Array], Array]:
    """From float64 to the result's bits."""
    if name == "bf16":
        return lambda v: nf.f64_to_bf16(v, rounding)
    if name == "f16":
        return lambda v: nf.f16_code(v, rounding)
    if name == "f32":
        return lambda v: nf.canonical(nf.to_f32(v, rounding))
    if name == "f64" and rounding == "rn":
        return lambda v: v
    raise KeyError(f"{name} {rounding}")


def _to_tf32(rounding: str) -> Callable[[Array], Array]:
    """float32 to tf32: 10 bits of mantissa, the low 13 bits zero."""
    if rounding not in ("rn", "rna", "rz"):
        raise KeyError(rounding)

    def run(value: Array) -> Array:
        bits = value.astype(np.float32).view(np.uint32)
        if rounding == "rn":
            rounded = bits + np.uint32(0xFFF) + ((bits >> np.uint32(13)) & np.uint32(1))
        elif rounding == "rna":
            rounded = bits + np.uint32(0x1000)
        else:
            rounded = bits
        special = (bits & np.uint32(0x7F800000)) == np.uint32(0x7F800000)
        return np.where(np.isnan(value), nf.F32_NAN, np.where(special, bits, rounded & np.uint32(0xFFFFE000)))

    return run


def _float_to_float(
    instruction: Instruction, modifiers: list[str], rounding: str, out: str, source: str
) -> Callable[[Array], Array]:
    decode = _decode(source)
    ftz, sat, relu, satfinite = (m in modifiers for m in ("ftz", "sat", "relu", "satfinite"))
    if satfinite and out != "tf32":
        raise instruction.unknown(".satfinite")
    if out == "tf32":
        encode = _to_tf32(rounding)
    elif rounding in INTEGRAL:
        encode = _encode(out, "rn")
    else:
        encode = _encode(out, rounding or "rn")
    integral = INTEGRAL.get(rounding)

    def run(a: Array) -> Array:
        if ftz and a.dtype == np.float32:
            a = nf.flush(a)
        value = decode(a)
        if integral is not None:
            value = integral(value)
        if sat:
            value = nf.saturate(value)
        if relu:
            value = np.where((value > 0) | np.isnan(value), value, 0.0)
        result = encode(value)
        return nf.flush(result) if ftz and result.dtype == np.float32 else result

    return run


def _integer_to_float(
    instruction: Instruction, modifiers: list[str], rounding: str, out: str, source: str
) -> Callable[[Array], Array]:
    wide = source in ("u64", "s64")
    if "sat" in modifiers:
        raise instruction.unknown(".sat")

    def exact(a: Array) -> Array:
        """float64, rounded to odd for 64-bit integers, so that the next rounding is right."""
        if not wide:
            return a.astype(np.float64)
        low = (a & a.dtype.type(0xFFFFFFFF)).astype(np.float64)
        high = (a >> a.dtype.type(32)).astype(np.float64) * 4294967296.0
        return nf.odd_sum(high, low)

    if out == "f64":
        if rounding != "rn":
            raise instruction.unknown("rounding")
        return lambda a: a.astype(np.float64)
    encode = _encode(out, rounding)
    return lambda a: encode(exact(a))


def _float_to_integer(
    instruction: Instruction, modifiers: list[str], rounding: str, out: str, source: str
) -> Callable[[Array], Array]:
    """Clamped to the range. NaN: 0 for 32-bit results of f32 and shorter, else the top bit alone."""
    decode, integral, target = _decode(source), INTEGRAL[rounding], DTYPES[out]
    info = np.iinfo(target)
    bits = target.itemsize * 8
    nan = 0 if source != "f64" and bits < 64 else 1 << (bits - 1)
    nan_value = np.array([nan], f"u{target.itemsize}").view(target)[0]
    ftz = "ftz" in modifiers

    def run(a: Array) -> Array:
        if ftz and a.dtype == np.float32:
            a = nf.flush(a)
        value = integral(decode(a))
        above, below = value >= float(info.max), value <= float(info.min)
        inside = np.where(above | below | np.isnan(value), 0.0, value)
        result = inside.astype(target)
        result = np.where(above, target.type(info.max), np.where(below, target.type(info.min), result))
        return np.where(np.isnan(value), nan_value, result).astype(target)

    return run


def _packed(instruction: Instruction, scope: Scope, modifiers: list[str], out: str, source: str) -> Plain:
    """Two values at once: the first operand goes to the upper half."""
    d, *operands = instruction.operands
    relu, satfinite = "relu" in modifiers, "satfinite" in modifiers
    rounding = next((m for m in modifiers if m in ("rn", "rz", "rp")), "rn")
    if source == "f32" and len(operands) == 2:
        form = out[:-2]
        narrow = form == "e2m1"
        kind = "b8" if narrow else "b32" if form in ("f16", "bf16") else "b16"

        def code(value: Array) -> Array:
            if relu:
                value = np.where((value > 0) | np.isnan(value), value, np.float32(0))
            if form == "bf16":
                return (
                    _finite(nf.f32_to_bf16(value, rounding), 0x7F7F) if satfinite else nf.f32_to_bf16(value, rounding)
                )
            if form == "f16":
                return _finite(nf.f16_code(value, rounding), 0x7BFF) if satfinite else nf.f16_code(value, rounding)
            if form == "ue8m0":
                return nf.encode_ue8m0(value, rounding)
            if not satfinite:
                raise instruction.unknown("without .satfinite")
            return nf.encode_small(value, form)

        shift = DTYPES[kind].type(4 if narrow else 8 if kind == "b16" else 16)
        return elementwise(
            scope,
            d,
            kind,
            operands,
            "f32",
            lambda a, b: (code(a).astype(DTYPES[kind]) << shift) | code(b).astype(DTYPES[kind]),
        )
    if out in ("f16x2", "bf16x2") and len(operands) == 1:
        form = source[:-2]
        narrow = form == "e2m1"
        table = nf.DECODE[form]
        if out == "f16x2":
            codes = np.where(np.isnan(table), nf.F16_NAN, table.astype(np.float16).view(np.uint16)).astype(np.uint32)
        else:
            codes = nf.f64_to_bf16(table).astype(np.uint32)
        if relu:
            codes = np.where((codes & 0x8000) & (~np.isnan(table)) * 0x8000, 0, codes).astype(np.uint32)
        shift, mask = (4, 15) if narrow else (8, len(codes) - 1)
        return elementwise(
            scope,
            d,
            "b32",
            operands,
            "b8" if narrow else "b16",
            lambda a: (
                (codes[(a >> a.dtype.type(shift)) & a.dtype.type(mask)] << np.uint32(16))
                | codes[a & a.dtype.type(mask)]
            ),
        )
    if source in ("f16x2", "bf16x2") and out[:-2] in nf.SMALL_FORMATS and len(operands) == 1:
        form = out[:-2]

        def shrink(a: Array) -> Array:
            halves = np.ascontiguousarray(a).view(np.uint16).reshape(-1, 2)
            wide = halves.view(np.float16).astype(np.float32) if source == "f16x2" else nf.bf16_to_f32(halves)
            if relu:
                wide = np.where((wide > 0) | np.isnan(wide), wide, np.float32(0))
            small = nf.encode_small(wide, form).astype(np.uint16)
            return small[:, 0] | (small[:, 1] << np.uint16(4 if form == "e2m1" else 8))

        if form == "e2m1":
            return elementwise(scope, d, "b8", operands, "b32", lambda a: shrink(a).astype(np.uint8))
        return elementwise(scope, d, "b16", operands, "b32", shrink)
    raise instruction.unknown()


def _finite(code: Array, largest: int) -> Array:
    """.satfinite of 16-bit formats: infinities become the largest finite value."""
    magnitude = code & np.uint16(0x7FFF)
    return np.where(magnitude == largest + 1, (code & np.uint16(0x8000)) | np.uint16(largest), code).astype(np.uint16)
