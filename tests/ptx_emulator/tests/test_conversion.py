"""cvt against ml_dtypes, numpy and values written out by hand."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from .harness import Array, compute

RANDOM = np.random.default_rng(6)
SMALL = {"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}
LARGEST = {"e4m3": 448.0, "e5m2": 57344.0, "e2m1": 6.0}


def spread_values(count: int = 500) -> Array:
    """float32 over many magnitudes, with edges."""
    values = RANDOM.normal(size=count) * 2.0 ** RANDOM.integers(-20, 20, count)
    return np.concatenate([values, [0, -0.0, 0.5, 1.5, 2.5, -2.5, 1e9, -1e9, 1e30, np.inf, -np.inf]]).astype(np.float32)


def test_f32_to_bf16_rounds_to_even() -> None:
    a = spread_values()
    got = compute("cvt.rn.bf16.f32 R, A;", "b16", ("f32", a))
    assert (got == a.astype(ml_dtypes.bfloat16).view(np.uint16)).all()
    assert compute("cvt.rn.bf16.f32 R, A;", "b16", ("f32", [np.nan])).tolist() == [0x7FFF]
    assert compute("cvt.rz.bf16.f32 R, A;", "b16", ("u32", [0x3F80FFFF, 0xBF80FFFF])).tolist() == [0x3F80, 0xBF80]


def test_f32_to_f16_and_back() -> None:
    a = spread_values()
    got = compute("cvt.rn.f16.f32 R, A;", "b16", ("f32", a))
    with np.errstate(over="ignore"):
        assert (got == a.astype(np.float16).view(np.uint16)).all()
    codes = np.arange(65536, dtype=np.uint16)
    finite = codes[~np.isnan(codes.view(np.float16))]
    back = compute("cvt.f32.f16 R, A;", "f32", ("b16", finite))
    assert (back == finite.view(np.float16).astype(np.float32)).all()


def test_first_operand_goes_up() -> None:
    got = compute("cvt.rn.bf16x2.f32 R, A, B;", "b32", ("f32", [1.0]), ("f32", [2.0]))
    assert got.tolist() == [0x3F804000]
    got = compute("cvt.rn.f16x2.f32 R, A, B;", "b32", ("f32", [1.0]), ("f32", [2.0]))
    assert got.tolist() == [0x3C004000]
    got = compute("cvt.rn.relu.bf16x2.f32 R, A, B;", "b32", ("f32", [-1.0]), ("f32", [2.0]))
    assert got.tolist() == [0x4000]


@pytest.mark.parametrize("name", SMALL)
def test_eight_bit_formats(name: str) -> None:
    a = spread_values(2000)
    got = compute(f"cvt.rn.satfinite.{name}x2.f32 R, A, B;", "b16", ("f32", a), ("f32", a[::-1]))
    largest = LARGEST[name]
    expected = np.clip(a, -largest, largest).astype(SMALL[name]).view(np.uint8)
    assert ((got >> 8) == expected).all()
    assert ((got & 255) == expected[::-1]).all()
    assert compute(f"cvt.rn.satfinite.{name}x2.f32 R, A, A;", "b16", ("f32", [np.nan])).tolist() == [0x7F7F]
    codes = np.arange(256, dtype=np.uint16)
    back = (
        compute(f"cvt.rn.f16x2.{name}x2 R, A;", "b32", ("b16", codes | (codes[::-1] << 8)))
        .view(np.float16)
        .reshape(-1, 2)
    )
    table = codes.astype(np.uint8).view(SMALL[name]).astype(np.float16)
    assert np.array_equal(back[:, 0], table, equal_nan=True)
    assert np.array_equal(back[:, 1], table[::-1], equal_nan=True)


def test_four_bit_format() -> None:
    """Every midpoint goes to the even code; the first operand is the upper nibble; NaN is the largest value."""
    values = [
        0,
        0.25,
        0.26,
        0.5,
        0.75,
        0.76,
        1,
        1.25,
        1.5,
        1.75,
        1.76,
        2,
        2.5,
        2.51,
        3,
        3.5,
        3.51,
        4,
        5,
        5.01,
        6,
        7,
        1e9,
        np.inf,
    ]
    codes = [0, 0, 1, 1, 2, 2, 2, 2, 3, 4, 4, 4, 4, 5, 5, 6, 6, 6, 6, 7, 7, 7, 7, 7]
    text = "cvt.rn.satfinite.e2m1x2.f32 %c1, A, B; mov.b16 R, {%c1, 0};"
    got = compute(text, "b16", ("f32", values), ("f32", [-float(v) for v in values]), arch="sm_100a")
    assert [int(v) >> 4 for v in got] == codes
    assert [int(v) & 15 for v in got] == [c | 8 for c in codes]
    assert compute(text, "b16", ("f32", [np.nan]), ("f32", [0.0]), arch="sm_100a").tolist() == [0x70]
    unpack = "mov.b16 {%c1, %c2}, A; cvt.rn.f16x2.e2m1x2 R, %c1;"
    every = np.arange(256, dtype=np.uint16)
    back = compute(unpack, "b32", ("b16", every), arch="sm_100a").view(np.float16).reshape(-1, 2)
    table = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float16)
    assert (back[:, 0] == table[every & 15]).all()
    assert (back[:, 1] == table[every >> 4]).all()


def test_exponent_format() -> None:
    values = np.array([1.0, 1.5, 2.0, 0.75, 2.0**-127, 2.0**-128, 3e38, 2.0**127], np.float32)
    down = compute("cvt.rz.satfinite.ue8m0x2.f32 R, A, A;", "b16", ("f32", values), arch="sm_100a")
    up = compute("cvt.rp.satfinite.ue8m0x2.f32 R, A, A;", "b16", ("f32", values), arch="sm_100a")
    assert (down & 255).tolist() == [127, 127, 128, 126, 0, 0, 254, 254]
    assert (up >> 8).tolist() == [127, 128, 128, 127, 0, 0, 254, 254]
    assert compute("cvt.rp.satfinite.ue8m0x2.f32 R, A, A;", "b16", ("f32", [np.nan]), arch="sm_100a").tolist() == [
        0xFFFF
    ]
    codes = np.arange(255, dtype=np.uint16)
    back = compute("cvt.rn.bf16x2.ue8m0x2 R, A;", "b32", ("b16", codes | (codes << 8)), arch="sm_100a")
    low = (back << 16).astype(np.uint32).view(np.float32)
    assert (low.astype(np.float64) == 2.0 ** (codes - 127.0)).all()


def test_float_to_integer_rounds_and_clamps() -> None:
    a = np.array([0.5, 1.5, -0.5, -1.5, 2.7, -2.7, 3e9, -3e9, np.nan, np.inf], np.float32)
    expected = {
        "rni": [0, 2, 0, -2, 3, -3, 2**31 - 1, -(2**31), 0, 2**31 - 1],
        "rzi": [0, 1, 0, -1, 2, -2, 2**31 - 1, -(2**31), 0, 2**31 - 1],
        "rmi": [0, 1, -1, -2, 2, -3, 2**31 - 1, -(2**31), 0, 2**31 - 1],
        "rpi": [1, 2, 0, -1, 3, -2, 2**31 - 1, -(2**31), 0, 2**31 - 1],
    }
    for mode, row in expected.items():
        assert compute(f"cvt.{mode}.s32.f32 R, A;", "s32", ("f32", a)).tolist() == row, mode
    assert compute("cvt.rzi.u32.f32 R, A;", "u32", ("f32", a)).tolist() == [
        0,
        1,
        0,
        0,
        2,
        0,
        3000000000,
        0,
        0,
        2**32 - 1,
    ]
    assert compute("cvt.rzi.u64.f64 R, A;", "u64", ("f64", [1e30, -1.0, np.nan])).tolist() == [2**64 - 1, 0, 2**63]


def test_integer_to_float() -> None:
    a = RANDOM.integers(-(2**63), 2**63 - 1, 300, dtype=np.int64)
    got = compute("cvt.rn.f32.s64 R, A;", "f32", ("s64", a))
    for x, value in zip(a, got, strict=False):
        below, above = (float(np.nextafter(value, np.float32(s))) for s in (-np.inf, np.inf))
        assert abs(int(x) - int(value)) <= min(abs(int(x) - int(below)), abs(int(x) - int(above)))
    assert compute("cvt.rz.f32.u32 R, A;", "f32", ("u32", [0xFFFFFFFF])).tolist() == [4294967040.0]
    assert compute("cvt.rp.f32.u32 R, A;", "f32", ("u32", [0xFFFFFFFF])).tolist() == [4294967296.0]


def test_integers_extend_truncate_and_saturate() -> None:
    assert compute("cvt.s64.s32 R, A;", "s64", ("s32", [-5])).tolist() == [-5]
    assert compute("cvt.u64.u32 R, A;", "u64", ("s32", [-5])).tolist() == [2**32 - 5]
    assert compute("cvt.u16.u32 R, A;", "u16", ("u32", [0x12345])).tolist() == [0x2345]
    assert compute("cvt.s32.s8 R, A;", "s32", ("u32", [0x1FF])).tolist() == [-1]
    assert compute("cvt.sat.u16.s32 R, A;", "u16", ("s32", [-5, 70000, 7])).tolist() == [0, 65535, 7]
    assert compute("cvt.sat.s8.s32 %h1, A; cvt.s16.s8 R, %h1;", "s16", ("s32", [-500, 500])).tolist() == [-128, 127]


def test_rounding_to_integral_values() -> None:
    a = np.array([0.5, 1.5, -0.5, 2.4], np.float32)
    assert compute("cvt.rni.f32.f32 R, A;", "f32", ("f32", a)).tolist() == [0, 2, 0, 2]
    assert compute("cvt.rpi.f32.f32 R, A;", "f32", ("f32", a)).tolist() == [1, 2, 0, 3]
    assert compute("cvt.sat.f32.f32 R, A;", "f32", ("f32", [np.nan, 3, -1])).tolist() == [0, 1, 0]


def test_tf32_drops_thirteen_bits() -> None:
    a = np.array([0x3F800FFF, 0x3F801000, 0x3F803000, 0x3F802FFF], np.uint32)
    assert compute("cvt.rna.tf32.f32 R, A;", "u32", ("u32", a)).tolist() == [
        0x3F800000,
        0x3F802000,
        0x3F804000,
        0x3F802000,
    ]
    assert compute("cvt.rn.tf32.f32 R, A;", "u32", ("u32", a)).tolist() == [
        0x3F800000,
        0x3F800000,
        0x3F804000,
        0x3F802000,
    ]


def test_double_to_single_rounds_once() -> None:
    a = RANDOM.normal(size=300)
    assert (compute("cvt.rn.f32.f64 R, A;", "f32", ("f64", a)) == a.astype(np.float32)).all()
    down, up = (compute(f"cvt.{m}.f32.f64 R, A;", "f32", ("f64", a)).astype(np.float64) for m in ("rm", "rp"))
    assert (down <= a).all()
    assert (up >= a).all()
    assert (np.nextafter(down.astype(np.float32), np.float32(9)) >= up).all()


@pytest.mark.parametrize("kind", ["bf16", "f16"])
def test_directed_rounding_of_halves(kind: str) -> None:
    dtype = ml_dtypes.bfloat16 if kind == "bf16" else np.float16
    a = RANDOM.normal(size=300).astype(np.float32)
    exact = a.astype(np.float64)
    down, up, cut = (
        compute(f"cvt.{mode}.{kind}.f32 R, A;", "b16", ("f32", a)).view(dtype).astype(np.float64)
        for mode in ("rm", "rp", "rz")
    )
    assert (down <= exact).all()
    assert (up >= exact).all()
    assert (cut == np.where(exact > 0, down, up)).all()
    step = np.spacing(np.abs(down).astype(dtype)).astype(np.float64)
    assert (up - down <= 2 * step).all()
    assert ((up == down) == (exact == down)).all()


def test_comparison_of_packed_halves() -> None:
    a, b = np.array([1, 5, np.nan, 2], np.float16), np.array([1, 2, np.nan, 9], np.float16)
    packed = [("b32", v.view(np.uint32)) for v in (a, b)]
    assert compute("set.eq.f16x2.f16x2 R, A, B;", "b32", *packed).view(np.float16).tolist() == [1, 0, 0, 0]
    assert compute("set.lt.u32.f16x2 R, A, B;", "b32", *packed).view(np.uint16).tolist() == [0, 0, 0, 0xFFFF]
    text = "setp.gt.f16x2 %p5|%p6, A, B; selp.u32 R, 1, 0, %p5; @%p6 add.u32 R, R, 2;"
    assert compute(text, "u32", *packed).tolist() == [2, 0]
