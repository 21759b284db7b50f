"""Integer and bit instructions against Python's integers."""
# ruff: noqa: E501 (PTX in strings)

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from .harness import compute

RANDOM = np.random.default_rng(4)
EDGES = [0, 1, 2, 31, 32, 33, 0x7FFFFFFF, 0x80000000, 0x80000001, 0xFFFFFFFF, 0xFFFFFFFE, 0xAAAAAAAA, 255, 65536]


def words(bits: int, signed: bool) -> list[int]:
    """Edge values and random ones, as integers of the type."""
    raw = [e * (1 if bits == 32 else 0x100000001) for e in EDGES] + [int(v) for v in RANDOM.integers(0, 1 << 62, 50)]
    values = [v & ((1 << bits) - 1) for v in raw]
    return [v - (1 << bits) if signed and v >> (bits - 1) else v for v in values]


def wrap(value: int, bits: int, signed: bool) -> int:
    """The value as the type holds it."""
    value &= (1 << bits) - 1
    return value - (1 << bits) if signed and value >> (bits - 1) else value


def pairs(bits: int, signed: bool) -> tuple[list[int], list[int]]:
    """Two lists of operands."""
    one = words(bits, signed)
    return one, one[7:] + one[:7]


def truncated(a: int, b: int) -> int:
    """Quotient towards zero."""
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


BINARY = {
    "add": lambda a, b, n: a + b,
    "sub": lambda a, b, n: a - b,
    "mul.lo": lambda a, b, n: a * b,
    "mul.hi": lambda a, b, n: (a * b) >> n,
    "min": lambda a, b, n: min(a, b),
    "max": lambda a, b, n: max(a, b),
    "div": lambda a, b, n: truncated(a, b) if b else None,
    "rem": lambda a, b, n: a - b * truncated(a, b) if b else None,
}


@pytest.mark.parametrize("type_name", ["u32", "s32", "u64", "s64", "u16", "s16"])
@pytest.mark.parametrize("name", BINARY)
def test_binary(name: str, type_name: str) -> None:
    bits, signed = int(type_name[1:]), type_name[0] == "s"
    a, b = pairs(bits, signed)
    got = compute(f"{name}.{type_name} R, A, B;", type_name, (type_name, a), (type_name, b))
    for x, y, value in zip(a, b, got, strict=False):
        exact = BINARY[name](x, y, bits)
        if exact is not None and not (name in ("div", "rem") and x == -(1 << (bits - 1)) and y == -1):
            assert int(value) == wrap(exact, bits, signed), (name, type_name, x, y)


@pytest.mark.parametrize("type_name", ["u32", "s32"])
def test_wide_products(type_name: str) -> None:
    signed = type_name[0] == "s"
    a, b = pairs(32, signed)
    wide = type_name[0] + "64"
    got = compute(f"mul.wide.{type_name} R, A, B;", wide, (type_name, a), (type_name, b))
    assert [int(v) for v in got] == [x * y for x, y in zip(a, b, strict=False)]
    got = compute(f"mad.wide.{type_name} R, A, B, C;", wide, (type_name, a), (type_name, b), (wide, [5]))
    assert [int(v) for v in got] == [wrap(x * y + 5, 64, signed) for x, y in zip(a, b, strict=False)]
    got = compute(f"mad.lo.{type_name} R, A, B, B;", type_name, (type_name, a), (type_name, b))
    assert [int(v) for v in got] == [wrap(x * y + y, 32, signed) for x, y in zip(a, b, strict=False)]


def test_saturation_and_signs() -> None:
    a, b = pairs(32, True)
    got = compute("add.sat.s32 R, A, B;", "s32", ("s32", a), ("s32", b))
    assert [int(v) for v in got] == [max(-(2**31), min(2**31 - 1, x + y)) for x, y in zip(a, b, strict=False)]
    assert [int(v) for v in compute("abs.s32 R, A;", "u32", ("s32", a))] == [wrap(abs(x), 32, False) for x in a]
    assert [int(v) for v in compute("neg.s32 R, A;", "s32", ("s32", a))] == [wrap(-x, 32, True) for x in a]


def test_carry_chain() -> None:
    a, b = pairs(64, False)
    text = """
        mov.b64 {%r10, %r11}, A; mov.b64 {%r12, %r13}, B;
        add.cc.u32 %r14, %r10, %r12; addc.u32 %r15, %r11, %r13; mov.b64 R, {%r14, %r15};
    """
    assert [int(v) for v in compute(text, "u64", ("u64", a), ("u64", b))] == [
        (x + y) % 2**64 for x, y in zip(a, b, strict=False)
    ]
    text = text.replace("add.cc", "sub.cc").replace("addc", "subc")
    assert [int(v) for v in compute(text, "u64", ("u64", a), ("u64", b))] == [
        (x - y) % 2**64 for x, y in zip(a, b, strict=False)
    ]


def test_shifts_clamp_their_amount() -> None:
    a, _ = pairs(32, False)
    for amount in (0, 1, 31, 32, 33, 1000):
        shift = min(amount, 32)
        got = compute("shl.b32 R, A, B;", "u32", ("u32", a), ("u32", [amount]))
        assert [int(v) for v in got] == [(x << shift) & 0xFFFFFFFF for x in a]
        got = compute("shr.u32 R, A, B;", "u32", ("u32", a), ("u32", [amount]))
        assert [int(v) for v in got] == [x >> shift for x in a]
        got = compute("shr.s32 R, A, B;", "s32", ("u32", a), ("u32", [amount]))
        assert [int(v) for v in got] == [wrap(x, 32, True) >> shift for x in a]


def test_funnel_shift() -> None:
    a, b = pairs(32, False)
    for amount in (0, 5, 31, 32, 40):
        joined = [(y << 32) | x for x, y in zip(a, b, strict=False)]
        got = compute("shf.l.wrap.b32 R, A, B, C;", "u32", ("u32", a), ("u32", b), ("u32", [amount]))
        assert [int(v) for v in got] == [(j << (amount & 31) >> 32) & 0xFFFFFFFF for j in joined]
        got = compute("shf.r.clamp.b32 R, A, B, C;", "u32", ("u32", a), ("u32", b), ("u32", [amount]))
        assert [int(v) for v in got] == [(j >> min(amount, 32)) & 0xFFFFFFFF for j in joined]


def test_lop3_is_its_truth_table() -> None:
    a, b = pairs(32, False)
    c = b[3:] + b[:3]
    for table, function in ((0x80, lambda x, y, z: x & y & z), (0x96, lambda x, y, z: x ^ y ^ z),
                            (0xEA, lambda x, y, z: (x & y) | z), (0xCA, lambda x, y, z: (x & y) | (~x & z))):  # fmt: skip
        got = compute(f"lop3.b32 R, A, B, C, {table:#x};", "u32", ("u32", a), ("u32", b), ("u32", c))
        assert [int(v) for v in got] == [function(x, y, z) & 0xFFFFFFFF for x, y, z in zip(a, b, c, strict=False)]


def test_permute_picks_bytes_and_signs() -> None:
    source = (0x8899AABBCCDDEEFF).to_bytes(8, "little")
    for selector in (0x3210, 0x7654, 0x0123, 0x5140, 0x8F8F, 0xCBA9, 0x4):
        got = compute("prmt.b32 R, A, B, C;", "u32", ("u32", [0xCCDDEEFF]), ("u32", [0x8899AABB]), ("u32", [selector]))
        expected = 0
        for byte in range(4):
            nibble = selector >> (4 * byte) & 15
            value = source[nibble & 7]
            expected |= (value if nibble < 8 else 255 * (value >> 7)) << (8 * byte)
        assert int(got[0]) == expected, hex(selector)


@pytest.mark.parametrize("bits", [32, 64])
def test_counting(bits: int) -> None:
    a = words(bits, False)
    kind = f"u{bits}"
    assert [int(v) for v in compute(f"popc.b{bits} R, A;", "u32", (kind, a))] == [x.bit_count() for x in a]
    assert [int(v) for v in compute(f"clz.b{bits} R, A;", "u32", (kind, a))] == [bits - x.bit_length() for x in a]
    assert [int(v) for v in compute(f"brev.b{bits} R, A;", kind, (kind, a))] == [
        int(f"{x:0{bits}b}"[::-1], 2) for x in a
    ]
    assert [int(v) for v in compute(f"bfind.u{bits} R, A;", "s32", (kind, a))] == [x.bit_length() - 1 for x in a]
    signed = [wrap(x, bits, True) for x in a]
    expected = [(x if x >= 0 else ~x).bit_length() - 1 for x in signed]
    assert [int(v) for v in compute(f"bfind.s{bits} R, A;", "s32", (kind, a))] == expected


@pytest.mark.parametrize(("place", "length"), [(0, 32), (3, 5), (28, 10), (31, 1), (5, 0), (40, 3)])
def test_fields(place: int, length: int) -> None:
    a, b = pairs(32, False)
    got = compute("bfe.u32 R, A, B, C;", "u32", ("u32", a), ("u32", [place]), ("u32", [length]))
    mask = (1 << length) - 1
    assert [int(v) for v in got] == [(x >> place) & mask for x in a]
    inside = (mask << place) & 0xFFFFFFFF
    got = compute("bfi.b32 R, A, B, C, D;", "u32", ("u32", a), ("u32", b), ("u32", [place]), ("u32", [length]))
    assert [int(v) for v in got] == [((x << place) & inside) | (y & ~inside) for x, y in zip(a, b, strict=False)]


def test_signed_field_is_extended_from_its_top_bit() -> None:
    got = compute("bfe.s32 R, A, B, C;", "s32", ("u32", [0x000000F0, 0x00000070]), ("u32", [4]), ("u32", [4]))
    assert [int(v) for v in got] == [-1, 7]


def test_dot_of_bytes() -> None:
    a, b = pairs(32, False)
    for kinds, signed in (("u32.u32", False), ("s32.s32", True)):
        got = compute(f"dp4a.{kinds} R, A, B, C;", "u32", ("u32", a), ("u32", b), ("u32", [7]))

        def element(x: int, byte: int) -> int:
            return wrap(x >> (8 * byte), 8, signed)  # noqa: B023

        assert [int(v) for v in got] == [
            (sum(element(x, i) * element(y, i) for i in range(4)) + 7) & 0xFFFFFFFF for x, y in zip(a, b, strict=False)
        ]


COMPARISONS: dict[str, Any] = {
    "eq": lambda a, b: a == b, "ne": lambda a, b: a != b, "lt": lambda a, b: a < b, "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b, "ge": lambda a, b: a >= b,
}  # fmt: skip


@pytest.mark.parametrize("name", COMPARISONS)
def test_setp(name: str) -> None:
    for type_name in ("u32", "s32", "s64"):
        bits, signed = int(type_name[1:]), type_name[0] == "s"
        a, b = pairs(bits, signed)
        b = [x if i % 3 == 0 else y for i, (x, y) in enumerate(zip(a, b, strict=False))]
        got = compute(f"setp.{name}.{type_name} R, A, B;", "pred", (type_name, a), (type_name, b))
        assert [bool(v) for v in got] == [COMPARISONS[name](x, y) for x, y in zip(a, b, strict=False)]


def test_setp_of_floats_with_nan() -> None:
    a = np.array([1, 2, np.nan, np.nan, 3], np.float32)
    b = np.array([2, 2, 1, np.nan, 1], np.float32)
    expected = {
        "lt": [1, 0, 0, 0, 0], "ltu": [1, 0, 1, 1, 0], "eq": [0, 1, 0, 0, 0], "equ": [0, 1, 1, 1, 0],
        "ne": [1, 0, 0, 0, 1], "neu": [1, 0, 1, 1, 1], "num": [1, 1, 0, 0, 1], "nan": [0, 0, 1, 1, 0],
    }  # fmt: skip
    for name, row in expected.items():
        assert compute(f"setp.{name}.f32 R, A, B;", "pred", ("f32", a), ("f32", b)).tolist() == row, name


def test_setp_second_destination_and_combination() -> None:
    text = "setp.lt.u32 %p1|%p2, A, 5; setp.gt.and.u32 R, A, 1, %p1; @%p2 setp.eq.u32 R, A, 9;"
    got = compute(text, "pred", ("u32", list(range(12))))
    assert got.tolist() == [0, 0, 1, 1, 1, 0, 0, 0, 0, 1, 0, 0]


def test_packed_halves() -> None:
    a, b = pairs(32, False)
    for name, function in (("min", min), ("max", max), ("add", lambda x, y: x + y)):
        for kind, signed in (("u16x2", False), ("s16x2", True)):
            got = compute(f"{name}.{kind} R, A, B;", "u32", ("u32", a), ("u32", b))
            for x, y, value in zip(a, b, got, strict=True):
                expected = 0
                for half in (0, 16):
                    result = function(wrap(x >> half, 16, signed), wrap(y >> half, 16, signed))
                    expected |= (result & 0xFFFF) << half
                assert int(value) == expected
