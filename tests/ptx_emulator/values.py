"""Types of values, literals, and packing several registers into one."""

from __future__ import annotations

from typing import Any

import numpy as np

from .faults import PtxSyntaxError
from .ptx_module import Immediate

Array = np.ndarray[Any, np.dtype[Any]]

DTYPES: dict[str, np.dtype[Any]] = {
    name: np.dtype(kind)
    for name, kind in {
        "b8": "u1", "u8": "u1", "s8": "i1", "b16": "u2", "u16": "u2", "s16": "i2", "f16": "f2", "bf16": "u2",
        "b32": "u4", "u32": "u4", "s32": "i4", "f32": "f4", "f16x2": "u4", "bf16x2": "u4", "tf32": "u4",
        "b64": "u8", "u64": "u8", "s64": "i8", "f64": "f8", "f32x2": "u8", "pred": "?",
    }.items()
}  # fmt: skip
REGISTER_DTYPES = {1: np.dtype("?"), 8: np.dtype("u1"), 16: np.dtype("u2"), 32: np.dtype("u4"), 64: np.dtype("u8"),
                   128: np.dtype("u8")}  # fmt: skip


def immediate(operand: Immediate, dtype: np.dtype[Any], type_name: str) -> Array:
    """A literal as an array of one element of the type."""
    value = operand.value
    if operand.pattern_bits:
        pattern = np.array([value], np.uint32 if operand.pattern_bits == 32 else np.uint64)
        if dtype.itemsize * 8 == operand.pattern_bits:
            return pattern.view(dtype)
        number = pattern.view(np.float32 if operand.pattern_bits == 32 else np.float64)
        if dtype.kind == "f":
            return number.astype(dtype)
        raise PtxSyntaxError(f"literal {value:#x} of {operand.pattern_bits} bits used as .{type_name}")
    if dtype.kind == "f":
        if isinstance(value, int):  # an integer literal in a floating-point place is a bit pattern only for .b types
            return np.array([value], dtype)
        return np.array([value], dtype)
    if dtype == np.bool_:
        return np.array([bool(value)])
    width = dtype.itemsize * 8
    return np.array([int(value) & ((1 << width) - 1)], np.dtype(f"u{dtype.itemsize}")).view(dtype)


def pack(parts: list[Array]) -> Array:
    """Join parts into rows; a part of one row is repeated."""
    rows = max(p.shape[0] for p in parts)
    result = np.empty((rows, len(parts)), parts[0].dtype)
    for column, part in enumerate(parts):
        result[:, column] = part
    return result


def wider(type_name: str) -> str:
    """The type of twice the width: u16 for u8, s64 for s32."""
    return type_name[0] + str(2 * int(type_name[1:]))
