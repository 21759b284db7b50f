"""Floating-point arithmetic against exact rationals (fractions) and float64."""
# ruff: noqa: E501 (PTX in strings)

from __future__ import annotations

import math
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest

from .harness import Array, compute

RANDOM = np.random.default_rng(5)


def f32_values(count: int = 300) -> Array:
    """Random bit patterns and edges, NaN left out."""
    bits = RANDOM.integers(0, 1 << 32, count, dtype=np.uint64).astype(np.uint32)
    edges = np.array(
        [0, 0x80000000, 1, 0x80000001, 0x7FFFFF, 0x800000, 0x3F800000, 0xBF800000, 0x7F7FFFFF, 0x3F800001], np.uint32
    )
    values = np.concatenate([bits, edges]).view(np.float32)
    return np.where(np.isfinite(values), values, np.float32(1.5))


def round_to_f32(exact: Fraction, mode: str) -> float:
    """Round a rational to float32, by hand."""
    if exact == 0:
        return 0.0
    magnitude = abs(exact)
    exponent = max(math.frexp(float(magnitude))[1] - 1 if float(magnitude) else -200, -126)
    while Fraction(2) ** exponent > magnitude and exponent > -126:
        exponent -= 1
    while Fraction(2) ** (exponent + 1) <= magnitude:
        exponent += 1
    quantum = Fraction(2) ** (exponent - 23)
    steps, rest = divmod(magnitude, quantum)
    away = {"rz": False, "rm": exact < 0, "rp": exact > 0}.get(mode)
    if away is None:
        away = rest > quantum / 2 or (rest == quantum / 2 and steps % 2 == 1)
    value = (steps + (1 if away and rest else 0)) * quantum
    if value >= Fraction(2) ** 128:
        overflows = mode == "rn" or away
        value_f = math.inf if overflows else float(np.finfo(np.float32).max)
    else:
        value_f = float(value)
    return value_f if exact > 0 else -value_f


@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
def test_fma_is_rounded_once(mode: str) -> None:
    a, b = f32_values(), RANDOM.permutation(f32_values())
    with np.errstate(over="ignore", under="ignore"):  # addends near the product, so that it cancels
        near = (-(a.astype(np.float64) * b) * (1 + 1e-7)).astype(np.float32)
    c = np.where((np.arange(len(a)) % 2 == 0) & np.isfinite(near), near, b)
    got = compute(f"fma.{mode}.f32 R, A, B, C;", "f32", ("f32", a), ("f32", b), ("f32", c))
    for x, y, z, value in zip(a, b, c, got, strict=False):
        exact = Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
        assert float(value) == round_to_f32(exact, mode), (x.hex(), y.hex(), z.hex())


@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
@pytest.mark.parametrize("name", ["add", "sub", "mul"])
def test_sum_and_product(name: str, mode: str) -> None:
    a, b = f32_values(), RANDOM.permutation(f32_values())
    got = compute(f"{name}.{mode}.f32 R, A, B;", "f32", ("f32", a), ("f32", b))
    for x, y, value in zip(a, b, got, strict=False):
        left, right = Fraction(float(x)), Fraction(float(y))
        exact = {"add": left + right, "sub": left - right, "mul": left * right}[name]
        assert float(value) == round_to_f32(exact, mode), (x.hex(), y.hex())


def test_division_and_roots_are_ieee() -> None:
    a, b = f32_values(), RANDOM.permutation(f32_values())
    b = np.where(b == 0, np.float32(3), b)
    got = compute("div.rn.f32 R, A, B;", "f32", ("f32", a), ("f32", b))
    for x, y, value in zip(a, b, got, strict=False):
        assert float(value) == round_to_f32(Fraction(float(x)) / Fraction(float(y)), "rn")
    got = compute("rcp.rn.f32 R, A;", "f32", ("f32", b))
    assert [float(v) for v in got] == [round_to_f32(1 / Fraction(float(y)), "rn") for y in b]
    got = compute("sqrt.rn.f32 R, A;", "f32", ("f32", np.abs(a)))
    for x, value in zip(np.abs(a), got, strict=False):
        low, high = (Fraction(float(np.nextafter(value, np.float32(s)))) for s in (-1, np.inf))
        middle = Fraction(float(value))
        assert ((low + middle) / 2) ** 2 <= Fraction(float(x)) <= ((high + middle) / 2) ** 2 or x == 0


def test_double_fma_is_rounded_once() -> None:
    a = RANDOM.normal(size=200)
    b = RANDOM.normal(size=200)
    c = -(a * b) * (1 + RANDOM.integers(-3, 3, 200) * 2.0**-52)
    got = compute("fma.rn.f64 R, A, B, C;", "f64", ("f64", a), ("f64", b), ("f64", c))
    for x, y, z, value in zip(a, b, c, got, strict=False):
        assert value == float(Fraction(x) * Fraction(y) + Fraction(z))


def test_flushing_subnormals() -> None:
    tiny = np.array([1e-40, -1e-40, 1e-38, 2e-38], np.float32)
    got = compute("add.ftz.f32 R, A, B;", "f32", ("f32", tiny), ("f32", [0]))
    assert got.tolist() == [0, 0, 0, float(tiny[3])]
    got = compute("mul.ftz.f32 R, A, B;", "f32", ("f32", tiny), ("f32", [0.25]))
    assert got.tolist() == [0, 0, 0, 0]
    assert np.signbit(got).tolist() == [False, True, False, False]
    assert compute("mul.f32 R, A, B;", "f32", ("f32", tiny), ("f32", [0.25]))[2] == np.float32(1e-38) / 4


def test_nan_results_are_canonical() -> None:
    a = np.array([np.inf, 0, np.nan, -1], np.float32)
    got = compute("sub.f32 R, A, A; @%p31 trap; ", "u32", ("f32", a))
    assert got.tolist() == [0x7FFFFFFF, 0, 0x7FFFFFFF, 0]
    assert compute("sqrt.approx.f32 R, A;", "u32", ("f32", a[3:])).tolist() == [0x7FFFFFFF]


def test_min_and_max() -> None:
    a = np.array([1, np.nan, np.nan, 0.0, -0.0, -3], np.float32)
    b = np.array([2, 5, np.nan, -0.0, 0.0, -np.inf], np.float32)
    low = compute("min.f32 R, A, B;", "f32", ("f32", a), ("f32", b))
    high = compute("max.f32 R, A, B;", "f32", ("f32", a), ("f32", b))
    assert low[:2].tolist() == [1, 5]
    assert np.isnan(low[2])
    assert low[5] == -np.inf
    assert high[:2].tolist() == [2, 5]
    assert high[5] == -3
    assert np.signbit(low[3:5]).all()
    assert not np.signbit(high[3:5]).any()
    assert np.isnan(compute("max.NaN.f32 R, A, B;", "f32", ("f32", a), ("f32", b))[1])


def test_saturation() -> None:
    a = np.array([-1, 0.25, 2, np.nan], np.float32)
    assert compute("add.sat.f32 R, A, B;", "f32", ("f32", a), ("f32", [0])).tolist() == [0, 0.25, 1, 0]


@pytest.mark.parametrize(("name", "function", "low", "high"), [
    ("ex2.approx.f32", np.exp2, -120, 120), ("lg2.approx.f32", np.log2, 1e-3, 1e6), ("rcp.approx.f32", np.reciprocal, 1e-3, 1e6),
    ("rsqrt.approx.f32", lambda x: x**-0.5, 1e-3, 1e6), ("sqrt.approx.f32", np.sqrt, 0, 1e6), ("tanh.approx.f32", np.tanh, -8, 8),
    ("sin.approx.f32", np.sin, -3, 3), ("cos.approx.f32", np.cos, -3, 3),
])  # fmt: skip
def test_approximations_are_within_one_unit(name: str, function: object, low: float, high: float) -> None:
    a = RANDOM.uniform(low, high, 500).astype(np.float32)
    got = compute(f"{name} R, A;", "f32", ("f32", a)).astype(np.float64)
    expected = function(a.astype(np.float64))  # type: ignore[operator]
    assert (np.abs(got - expected) <= np.spacing(np.abs(expected).astype(np.float32))).all()


def test_approximations_at_their_ends() -> None:
    assert compute("ex2.approx.ftz.f32 R, A;", "f32", ("f32", [-np.inf, np.inf, -200, 128])).tolist() == [
        0,
        np.inf,
        0,
        np.inf,
    ]
    assert compute("lg2.approx.f32 R, A;", "f32", ("f32", [0, np.inf])).tolist() == [-np.inf, np.inf]
    assert compute("rcp.approx.ftz.f32 R, A;", "f32", ("f32", [0, -0.0, np.inf])).tolist() == [np.inf, -np.inf, 0]


@pytest.mark.parametrize(("kind", "dtype"), [("bf16", ml_dtypes.bfloat16), ("f16", np.float16)])
def test_half_arithmetic(kind: str, dtype: type) -> None:
    a: Array = (RANDOM.normal(size=400) * 2.0 ** RANDOM.integers(-10, 10, 400)).astype(dtype)
    b: Array = RANDOM.normal(size=400).astype(dtype)
    c: Array = (-(a.astype(np.float64) * b.astype(np.float64)) * (1 + RANDOM.normal(size=400) * 0.01)).astype(dtype)
    wide = [v.astype(np.float64) for v in (a, b, c)]
    operands = [("b16", v.view(np.uint16)) for v in (a, b, c)]
    exact = {"add.rn": wide[0] + wide[1], "mul.rn": wide[0] * wide[1], "fma.rn": wide[0] * wide[1] + wide[2]}
    for name, value in exact.items():
        count = 3 if name == "fma.rn" else 2
        got = compute(f"{name}.{kind} R, {', '.join('ABC'[:count])};", "b16", *operands[:count])
        quantum = np.spacing(np.abs(got.view(dtype).astype(dtype)).astype(dtype)).astype(np.float64)
        assert (np.abs(got.view(dtype).astype(np.float64) - value) <= quantum * 0.5000001).all(), name


def test_packed_halves_are_independent() -> None:
    a = RANDOM.normal(size=(50, 2)).astype(ml_dtypes.bfloat16)
    b = RANDOM.normal(size=(50, 2)).astype(ml_dtypes.bfloat16)
    packed = [("b32", v.view(np.uint16).copy().view(np.uint32).reshape(-1)) for v in (a, b)]
    got = compute("max.bf16x2 R, A, B;", "b32", *packed).view(np.uint16).view(ml_dtypes.bfloat16).reshape(-1, 2)
    assert (got == np.maximum(a, b)).all()
    got = compute("neg.bf16x2 R, A;", "b32", packed[0]).view(np.uint16).view(ml_dtypes.bfloat16).reshape(-1, 2)
    assert (got == -a).all()


def test_pairs_of_floats() -> None:
    a, b, c = (RANDOM.normal(size=(50, 2)).astype(np.float32) for _ in range(3))
    packed = [("b64", v.view(np.uint64).reshape(-1)) for v in (a, b, c)]
    got = compute("fma.rn.f32x2 R, A, B, C;", "b64", *packed, arch="sm_100a").view(np.float32).reshape(-1, 2)
    expected = [[round_to_f32(Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z)), "rn") for x, y, z in zip(*rows, strict=False)]
                for rows in zip(a, b, c, strict=False)]  # fmt: skip
    assert got.tolist() == expected


def test_sums_of_mixed_precision() -> None:
    a, b = (RANDOM.normal(size=50).astype(ml_dtypes.bfloat16) for _ in range(2))
    c = RANDOM.normal(size=50).astype(np.float32)
    halves = [("b16", v.view(np.uint16)) for v in (a, b)]
    got = compute("fma.rn.f32.bf16 R, A, B, C;", "f32", *halves, ("f32", c), arch="sm_100a")
    wide = [v.astype(np.float32) for v in (a, b)]
    assert got.tolist() == [
        round_to_f32(Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z)), "rn")
        for x, y, z in zip(*wide, c, strict=True)
    ]
    got = compute("sub.rn.f32.bf16 R, A, B;", "f32", halves[0], ("f32", c), arch="sm_100a")
    assert (got == wide[0] - c).all()
