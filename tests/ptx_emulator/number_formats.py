"""Exact arithmetic and rounding of the number formats of PTX, vectorised.

Sums and products that IEEE wants rounded once are formed in float64 and, where float64 is not wide enough, rounded to
odd: a result so rounded, with two bits to spare, can be rounded again to the target format as if it were exact
(Boldo and Melquiond, "Emulation of FMA and correctly rounded sums", IEEE Trans. Computers 57 (2008)).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

F32_NAN = np.uint32(0x7FFFFFFF)
F16_NAN = np.uint16(0x7FFF)


# ---------------------------------------------------------------------------------------------- float64, round to odd


def two_sum(a: Array, b: Array) -> tuple[Array, Array]:
    """a + b rounded, and what rounding lost (Knuth)."""
    s = a + b
    t = s - a
    return s, (a - (s - t)) + (b - t)


def two_product(a: Array, b: Array) -> tuple[Array, Array]:
    """a * b rounded, and what rounding lost (Dekker, with Veltkamp's split)."""
    p = a * b
    ah, al = _halves(a)
    bh, bl = _halves(b)
    return p, ((ah * bh - p) + ah * bl + al * bh) + al * bl


def _halves(a: Array) -> tuple[Array, Array]:
    c = a * 134217729.0
    high = c - (c - a)
    return high, a - high


def odd_sum(a: Array, b: Array) -> Array:
    """a + b in float64, rounded to odd."""
    s, error = two_sum(a, b)
    inexact = (error != 0) & np.isfinite(error) & np.isfinite(s)
    if not inexact.any():
        return s
    bits = s.view(np.int64)
    step = np.where((error > 0) == (s > 0), 1, -1)
    return np.where(inexact & (bits & 1 == 0), bits + step, bits).view(np.float64)


def fma64(a: Array, b: Array, c: Array) -> Array:
    """a * b + c rounded once to float64. Exact unless a product or its error term leaves float64's range."""
    a, b, c = np.broadcast_arrays(a, b, c)
    product, low = two_product(a, b)
    t_high, t_low = two_sum(c, low)
    v_high, v_low = two_sum(product, t_high)
    result = v_high + odd_sum(t_low, v_low)
    plain = a * b + c
    usable = np.isfinite(result) & (np.abs(product) > 1e-280) & (np.abs(product) < 1e300)
    return np.where(usable, result, plain)


def to_f32(value: Array, rounding: str = "rn") -> Array:
    """Round float64 (exact, or rounded to odd) to float32."""
    nearest = value.astype(np.float32)
    if rounding == "rn":
        return nearest
    wide = nearest.astype(np.float64)
    if rounding == "rz":
        wrong = np.abs(wide) > np.abs(value)
        target = np.float32(0)
    elif rounding == "rm":
        wrong, target = wide > value, np.float32(-np.inf)
    elif rounding == "rp":
        wrong, target = wide < value, np.float32(np.inf)
    else:
        raise KeyError(rounding)
    return np.where(wrong, np.nextafter(nearest, target), nearest).astype(np.float32)


def fma32(a: Array, b: Array, c: Array, rounding: str = "rn") -> Array:
    """a * b + c rounded once to float32. The product of two float32 is exact in float64."""
    product = a.astype(np.float64) * b
    total = odd_sum(product, c.astype(np.float64))
    result = to_f32(total, rounding)
    if rounding == "rm":  # an exact zero sum of opposite terms is -0 when rounding down
        result = np.where((total == 0) & (np.signbit(product) != np.signbit(c)), np.float32(-0.0), result)
    return result


def flush(value: Array) -> Array:
    """.ftz: subnormal float32 become zero of the same sign."""
    bits = value.view(np.uint32)
    small = (bits & np.uint32(0x7F800000)) == 0
    return np.where(small, bits & np.uint32(0x80000000), bits).view(np.float32)


def canonical(value: Array) -> Array:
    """float32 results that are NaN have the pattern 0x7fffffff."""
    wrong = np.isnan(value)
    if not wrong.any():
        return value
    return np.where(wrong, F32_NAN, value.view(np.uint32)).view(np.float32)


def minimum(a: Array, b: Array, propagate_nan: bool) -> Array:
    """min of PTX: a NaN loses against a number unless .NaN is given; -0 is less than +0."""
    result = np.minimum(a, b) if propagate_nan else np.fmin(a, b)
    both = (a == 0) & (b == 0)
    return np.where(both, np.where(np.signbit(a) | np.signbit(b), a.dtype.type(-0.0), a.dtype.type(0.0)), result)


def maximum(a: Array, b: Array, propagate_nan: bool) -> Array:
    """max of PTX."""
    result = np.maximum(a, b) if propagate_nan else np.fmax(a, b)
    both = (a == 0) & (b == 0)
    return np.where(both, np.where(np.signbit(a) & np.signbit(b), a.dtype.type(-0.0), a.dtype.type(0.0)), result)


def saturate(value: Array) -> Array:
    """.sat: clamp to [0, 1]; NaN becomes +0."""
    one, zero = value.dtype.type(1), value.dtype.type(0)
    return np.where(value >= one, one, np.where(value > zero, value, zero))


# ------------------------------------------------------------------------------------------------------ bfloat16


def bf16_to_f32(code: Array) -> Array:
    """Exact."""
    return (code.astype(np.uint32) << np.uint32(16)).view(np.float32)


def f32_to_bf16(value: Array, rounding: str = "rn") -> Array:
    """float32 to the bits of bfloat16; NaN becomes 0x7fff."""
    bits = value.view(np.uint32)
    if rounding == "rn":
        code = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    else:
        away = {"rz": np.uint32(0), "rm": bits >> np.uint32(31), "rp": ~bits >> np.uint32(31)}[rounding]
        code = (bits + away * np.uint32(0xFFFF)) >> np.uint32(16)
        code = np.where(np.isinf(value), bits >> np.uint32(16), code)
    return np.where(np.isnan(value), np.uint32(0x7FFF), code).astype(np.uint16)


def f64_to_odd_f32(value: Array) -> Array:
    """float64 to float32, rounded to odd."""
    nearest = value.astype(np.float32)
    wide = nearest.astype(np.float64)
    bits = nearest.view(np.uint32)
    inexact = (wide != value) & ~np.isnan(value)
    truncated = np.where(np.abs(wide) > np.abs(value), bits - np.uint32(1), bits)
    return np.where(inexact, truncated | np.uint32(1), bits).astype(np.uint32).view(np.float32)


def f64_to_bf16(value: Array, rounding: str = "rn") -> Array:
    """float64 (exact or rounded to odd) to the bits of bfloat16."""
    return f32_to_bf16(f64_to_odd_f32(value), rounding)


def f16_code(value: Array, rounding: str = "rn") -> Array:
    """A float to the bits of float16; NaN becomes 0x7fff."""
    nearest = value.astype(np.float16)
    if rounding != "rn":
        wide, exact = nearest.astype(np.float64), value.astype(np.float64)
        wrong, target = {
            "rz": (np.abs(wide) > np.abs(exact), 0.0), "rm": (wide > exact, -np.inf), "rp": (wide < exact, np.inf),
        }[rounding]  # fmt: skip
        nearest = np.where(wrong, np.nextafter(nearest, np.float16(target)), nearest)
    return np.where(np.isnan(value), F16_NAN, nearest.view(np.uint16)).astype(np.uint16)


# ---------------------------------------------------------------------------------------------------- small formats


@dataclass(frozen=True)
class SmallFormat:
    """A floating-point format of at most 8 bits: mantissa bits, smallest normal exponent, largest finite code."""

    bits: int
    mantissa: int
    least_exponent: int
    largest: int
    nan: int | None
    infinity: int | None = None

    def decode_table(self) -> Array:
        """The value of every code, as float64."""
        codes = np.arange(1 << self.bits)
        half = 1 << (self.bits - 1)
        magnitude = codes & (half - 1)
        exponent = magnitude >> self.mantissa
        fraction = (magnitude & ((1 << self.mantissa) - 1)).astype(np.float64) / (1 << self.mantissa)
        normal = (1 + fraction) * 2.0 ** (exponent - 1.0 + self.least_exponent)
        values = np.where(exponent > 0, normal, fraction * 2.0**self.least_exponent)
        values = np.where(magnitude > self.largest, np.nan, values)
        if self.infinity is not None:
            values = np.where(magnitude == self.infinity, np.inf, values)
        return np.where(codes >= half, -values, values)


SMALL_FORMATS = {
    "e4m3": SmallFormat(8, 3, -6, 0x7E, 0x7F),
    "e5m2": SmallFormat(8, 2, -14, 0x7B, 0x7F, 0x7C),
    "e2m3": SmallFormat(6, 3, 0, 0x1F, None),
    "e3m2": SmallFormat(6, 2, -2, 0x1F, None),
    "e2m1": SmallFormat(4, 1, 0, 0x7, None),
}
DECODE = {name: one.decode_table() for name, one in SMALL_FORMATS.items()}
DECODE["ue8m0"] = np.where(np.arange(256) == 255, np.nan, 2.0 ** (np.arange(256) - 127.0))
DECODE["ue4m3"] = np.where(np.arange(256) < 128, DECODE["e4m3"], DECODE["e4m3"][np.arange(256) & 127])


def encode_small(value: Array, name: str) -> Array:
    """Nearest code (ties to even), saturated to the largest finite value, as `.rn.satfinite` asks.

    NaN gives the format's NaN, or the largest positive value where it has none.
    """
    form = SMALL_FORMATS[name]
    wide = value.astype(np.float64)
    magnitude = np.minimum(np.abs(wide), 2.0**40)
    _, exponent = np.frexp(magnitude)
    exponent = np.where(magnitude == 0, form.least_exponent, np.maximum(exponent - 1, form.least_exponent))
    steps = np.rint(np.ldexp(magnitude, form.mantissa - exponent))
    code = ((exponent - form.least_exponent) << form.mantissa) + np.nan_to_num(steps).astype(np.int64)
    code = np.minimum(code, form.largest) | np.where(np.signbit(wide), 1 << (form.bits - 1), 0)
    nan_code = form.nan if form.nan is not None else form.largest
    return np.where(np.isnan(wide), nan_code, code).astype(np.uint8)


def encode_ue8m0(value: Array, rounding: str) -> Array:
    """The power of two at or below ('rz') or at or above ('rp') a float32, as its biased exponent, saturated.

    The sign is dropped; NaN gives 0xff; what is below 2^-127 gives 0 when rounded towards zero.
    """
    bits = value.view(np.uint32) & np.uint32(0x7FFFFFFF)
    exponent = (bits >> np.uint32(23)).astype(np.int64)
    fraction = (bits & np.uint32(0x7FFFFF)).astype(np.int64)
    if rounding == "rp":
        # 2^-127 is the float32 pattern 0x00400000
        up = np.where(exponent == 0, fraction > 0x400000, fraction > 0)
        exponent = exponent + up
    elif rounding != "rz":
        raise KeyError(rounding)
    exponent = np.minimum(exponent, 254)
    return np.where(np.isnan(value), 255, exponent).astype(np.uint8)
