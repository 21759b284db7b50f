"""What compress_flush has to give, from the definitions, in numpy and ml_dtypes: nothing of the package is used."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]
ROPE = 64


@dataclass(frozen=True)
class Format:
    """A page layout, as its engines describe it."""

    head_dim: int
    quantized: int
    element: Any
    group: int
    scale: str
    row: int  # bytes of an entry's values
    footer: int  # bytes of an entry's scales
    alignment: int
    floor: float
    separate: bool = False  # scales and what is not quantised lie in tensors of their own
    exact: bool = False  # float32 scales are not rounded up to a power of two

    @property
    def scale_bytes(self) -> int:
        """Of an entry, without padding."""
        return self.quantized // self.group * (4 if self.scale == "float32" else 1) if self.group else 0

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Of a separate layout's pages, scales and rest: extents behind pages and entries."""
        groups = self.quantized // self.group
        rest = self.head_dim - self.quantized
        return [(self.row,), (groups,) if groups > 1 else (), *([(rest,)] if rest else [])]


E4M3, E2M1, BF16 = ml_dtypes.float8_e4m3fn, ml_dtypes.float4_e2m1fn, ml_dtypes.bfloat16
FORMATS = {
    "bf16": Format(512, 0, BF16, 0, "", 1024, 0, 1, 0.0),
    "indexer_bf16": Format(128, 0, BF16, 0, "", 256, 0, 1, 0.0),
    "fp8_ds_mla": Format(512, 448, E4M3, 64, "e8m0", 576, 8, 576, 1e-4),
    "indexer_fp8": Format(128, 128, E4M3, 128, "float32", 128, 4, 1, 1e-4),
    "indexer_mxfp4": Format(128, 128, E2M1, 32, "e8m0", 64, 4, 1, 6 * 2.0**-126),
    "v41_fp8": Format(512, 512, E4M3, 32, "e8m0", 512, 16, 512, 1e-4),
    "v41_fp4": Format(512, 512, E2M1, 16, "e4m3", 256, 32, 256, 6 * 2.0**-9),
    "split": Format(512, 448, E4M3, 448, "float32", 448, 4, 1, 448 * 2.0**-126, separate=True, exact=True),
    "split_indexer": Format(128, 128, E2M1, 16, "e4m3", 64, 8, 1, 0.0, separate=True),
}


def bf16(values: Array) -> Array:
    """Rounded to bfloat16, as float32."""
    return values.astype(np.float32).astype(BF16).astype(np.float32)


def compress(values: Array, scores: Array) -> Array:
    """sum softmax(scores) * values over axis 1 of [entries, rows, channels], in float64."""
    with np.errstate(invalid="ignore", divide="ignore"):
        top = scores.max(axis=1, keepdims=True).astype(np.float64)
        weights = np.exp(scores - np.where(np.isneginf(top), 0.0, top))
        total = weights.sum(axis=1)
        return np.where(total == 0, 0.0, (weights * values).sum(axis=1) / total)


def rope(values: Array, cos_sin: Array) -> Array:
    """Neighbouring pairs of the last 64 channels, in float32."""
    out = values.astype(np.float32).copy()
    even, odd = out[:, -ROPE::2].copy(), out[:, -ROPE + 1 :: 2].copy()
    cosine, sine = cos_sin[:, : ROPE // 2], cos_sin[:, ROPE // 2 :]
    out[:, -ROPE::2] = even * cosine - odd * sine
    out[:, -ROPE + 1 :: 2] = odd * cosine + even * sine
    return out


def hadamard_matrix(size: int) -> Array:
    """Entry (i, j) is +-1 by the parity of the bits that i and j share."""
    parity = np.array([[bin(i & j).count("1") % 2 for j in range(size)] for i in range(size)])
    return (1.0 - 2.0 * parity).astype(np.float64)


def finish(entries: Array, weight: Array, cos_sin: Array, epsilon: float, hadamard: bool, round_once: bool) -> Array:
    """Norm, rotation, Hadamard, each in float64 where order matters; rounded to bfloat16 where the models round."""

    def step(values: Array) -> Array:
        return values if round_once else bf16(values).astype(values.dtype)

    entries = step(entries.astype(np.float64))
    normed = entries / np.sqrt((entries**2).mean(axis=1, keepdims=True) + epsilon) * weight
    rotated = rope(step(normed.astype(np.float32)), cos_sin)
    if hadamard:
        rotated = (step(rotated).astype(np.float64) @ hadamard_matrix(rotated.shape[1])) * rotated.shape[1] ** -0.5
    return bf16(rotated)


def power_of_two_above(scale: Array) -> Array:
    """The exponent of the least power of two that is not below."""
    mantissa, exponent = np.frexp(scale.astype(np.float64))
    return np.where(mantissa == 0.5, exponent - 1, exponent)


def encode_e2m1(values: Array, toward_zero: bool) -> Array:
    codes = values.clip(-6, 6).astype(E2M1).view(np.uint8) & 15
    if toward_zero:
        for tie, code in ((0.75, 1), (1.75, 3), (3.5, 5)):
            codes = np.where(np.abs(values) == tie, code | (codes & 8), codes)
    return codes


def encode(
    values: Array,
    layout: str,
    *,
    amax_floor: float | None = None,
    scale_floor: float = 0.0,
    fp4_ties_toward_zero: bool = False,
    exact_scale: bool | None = None,
) -> tuple[Array, Array]:
    """Bytes of values and of scales, one row per entry, from bfloat16 numbers [entries, head_dim]."""
    form = FORMATS[layout]
    rest = np.ascontiguousarray(values[:, form.quantized :].astype(BF16)).view(np.uint8)
    if not form.quantized:
        return rest, np.zeros((len(values), 0), np.uint8)
    grouped = values[:, : form.quantized].reshape(len(values), -1, form.group).astype(np.float32)
    floor = np.float32(form.floor if amax_floor is None else amax_floor)
    largest = np.float32(448 if form.element is E4M3 else 6)
    wanted = np.maximum(np.maximum(np.abs(grouped).max(axis=2), floor) / largest, np.float32(scale_floor))
    if form.scale == "e4m3":
        code = wanted.astype(E4M3)
        scale, scale_bytes = code.astype(np.float32), code.view(np.uint8)
    elif form.scale == "float32" and (form.exact if exact_scale is None else exact_scale):
        scale, scale_bytes = wanted, wanted.view(np.uint8)
    else:
        exponent = power_of_two_above(wanted)
        scale = np.ldexp(np.float32(1), exponent).astype(np.float32)
        scale_bytes = scale.view(np.uint8) if form.scale == "float32" else (exponent + 127).astype(np.uint8)
    with np.errstate(invalid="ignore", divide="ignore"):
        scaled = np.where(scale[..., None] == 0, 0, grouped / scale[..., None]).astype(np.float32)
    scaled = scaled.reshape(len(values), -1)
    if form.element is E4M3:
        codes = scaled.clip(-448, 448).astype(E4M3).view(np.uint8)
    else:
        nibbles = encode_e2m1(scaled, fp4_ties_toward_zero)
        codes = nibbles[:, 0::2] | nibbles[:, 1::2] << 4
    return np.concatenate((codes, rest), axis=1), scale_bytes.reshape(len(values), -1)


def write(parts: list[Array], slot: int, entries_per_page: int, layout: str, values: Array, scales: Array) -> None:
    """Puts the bytes of one entry where the layout has them. parts: bytes of pages, or of a separate layout's tensors,
    each [pages, bytes]."""
    form = FORMATS[layout]
    page, place = divmod(slot, entries_per_page)
    if form.separate:
        for part, row in zip(parts, (values[: form.row], scales, values[form.row :]), strict=False):
            part[page, place * len(row) : (place + 1) * len(row)] = row
        return
    parts[0][page, place * form.row : (place + 1) * form.row] = values
    start = entries_per_page * form.row + place * form.footer
    parts[0][page, start : start + len(scales)] = scales


def read(parts: list[Array], slot: int, entries_per_page: int, layout: str) -> tuple[Array, Array]:
    """The bytes that write() takes."""
    form = FORMATS[layout]
    page, place = divmod(slot, entries_per_page)
    if form.separate:
        sizes = [form.row, form.scale_bytes, 2 * (form.head_dim - form.quantized)]
        rows = [part[page, place * n : (place + 1) * n] for part, n in zip(parts, sizes, strict=False)]
        return np.concatenate((rows[0], *rows[2:])), rows[1].copy()
    start = entries_per_page * form.row + place * form.footer
    values = parts[0][page, place * form.row : (place + 1) * form.row]
    return values.copy(), parts[0][page, start : start + form.scale_bytes].copy()


def page_bytes(layout: str, entries_per_page: int) -> int:
    form = FORMATS[layout]
    size = form.row + (0 if form.separate else form.footer)
    return -(-entries_per_page * size // form.alignment) * form.alignment


def ulps_apart(got: Array, expected: Array) -> Array:
    """Steps between bfloat16 numbers."""

    def ordered(values: Array) -> Array:
        bits = values.astype(BF16).view(np.int16).astype(np.int32)
        return np.where(bits < 0, -(bits & 0x7FFF), bits)

    return np.abs(ordered(got) - ordered(expected))
