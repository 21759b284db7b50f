"""Matrix instructions against numpy products. The fragment layouts are written out here from the PTX ISA's figures."""
# ruff: noqa: E501 (PTX in strings)

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from .harness import Array, kernel, run

RANDOM = np.random.default_rng(8)
LANE = np.arange(32)
GROUP, QUAD = LANE // 4, LANE % 4


def fragments(bits: int, a: Array, b: Array) -> tuple[Array, Array]:
    """Registers of A (16 x k codes) and B (k x 8 codes) for each lane: (32, registers)."""
    per = 32 // bits
    k = a.shape[1]
    registers_a = np.zeros((32, 16 * k // 32 // per), np.uint64)
    registers_b = np.zeros((32, 8 * k // 32 // per), np.uint64)
    for lane in range(32):
        group, quad = lane // 4, lane % 4
        for register in range(registers_a.shape[1]):
            for element in range(per):
                row = group + 8 * (register % 2)
                column = quad * per + element + 4 * per * (register // 2)
                registers_a[lane, register] |= np.uint64(int(a[row, column]) << (bits * element))
        for register in range(registers_b.shape[1]):
            for element in range(per):
                row = quad * per + element + 4 * per * register
                registers_b[lane, register] |= np.uint64(int(b[row, group]) << (bits * element))
    return registers_a.astype(np.uint32), registers_b.astype(np.uint32)


def multiply(
    name: str, a: Array, b: Array, c: Array, extra: str = "", more: tuple[Array, ...] = (), arch: str = "sm_90a"
) -> Array:
    """Run one mma with fragments a, b, c (lanes x registers of 32 bits); extra operands use %r60, %r61."""
    lines = ["mov.u32 %r0, %tid.x;"]
    first = {"a": 10, "b": 20, "c": 30}
    lists = {}
    for number, (key, fragment) in enumerate((("a", a), ("b", b), ("c", c))):
        count = fragment.shape[1]
        lines.append(
            f"ld.param.u64 %d{number}, [{key}]; mul.wide.u32 %d9, %r0, {4 * count}; add.u64 %d{number}, %d{number}, %d9;"
        )
        for i in range(count):
            lines.append(f"ld.global.u32 %r{first[key] + i}, [%d{number}+{4 * i}];")
        lists[key] = "{" + ", ".join(f"%r{first[key] + i}" for i in range(count)) + "}"
    for number in range(len(more)):
        lines.append(
            f"ld.param.u64 %d5, [m{number}]; mul.wide.u32 %d9, %r0, 4; add.u64 %d5, %d5, %d9; ld.global.u32 %r{60 + number}, [%d5];"
        )
    d = "{" + ", ".join(f"%r{40 + i}" for i in range(c.shape[1])) + "}"
    lines.append(f"{name} {d}, {lists['a']}, {lists['b']}, {lists['c']}{extra};")
    lines.append(f"ld.param.u64 %d3, [d]; mul.wide.u32 %d9, %r0, {4 * c.shape[1]}; add.u64 %d3, %d3, %d9;")
    lines += [f"st.global.u32 [%d3+{4 * i}], %r{40 + i};" for i in range(c.shape[1])]
    out = np.zeros(c.shape, np.uint32)
    parameters = [".u64 a", ".u64 b", ".u64 c", *(f".u64 m{i}" for i in range(len(more))), ".u64 d"]
    run(kernel("\n".join(lines), parameters, arch=arch), a, b, c, *more, out, arch=arch)
    return out


def place_f32(registers: Array) -> Array:
    """The 16 x 8 matrix from four accumulators a lane."""
    matrix = np.zeros((16, 8), registers.dtype)
    for i in range(4):
        matrix[GROUP + 8 * (i // 2), 2 * QUAD + i % 2] = registers[:, i]
    return matrix


FORMATS = {
    "bf16": (16, ml_dtypes.bfloat16, np.uint16), "f16": (16, np.float16, np.uint16),
    "e4m3": (8, ml_dtypes.float8_e4m3fn, np.uint8), "e5m2": (8, ml_dtypes.float8_e5m2, np.uint8),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "k"), [("bf16", 16), ("bf16", 8), ("f16", 16), ("e4m3", 32), ("e5m2", 32)])
def test_products_of_floats(kind: str, k: int) -> None:
    bits, dtype, code = FORMATS[kind]
    a, b = RANDOM.normal(size=(16, k)).astype(dtype), RANDOM.normal(size=(k, 8)).astype(dtype)
    c = RANDOM.normal(size=(32, 4)).astype(np.float32)
    registers = fragments(bits, a.view(code), b.view(code))
    got = multiply(f"mma.sync.aligned.m16n8k{k}.row.col.f32.{kind}.{kind}.f32", *registers, c.view(np.uint32))
    expected = a.astype(np.float64) @ b.astype(np.float64) + place_f32(c)
    assert np.abs(place_f32(got.view(np.float32)) - expected).max() <= 2e-6 * np.abs(expected).max()


def test_products_with_half_accumulators() -> None:
    a, b = RANDOM.integers(-4, 5, (16, 16)).astype(np.float16), RANDOM.integers(-4, 5, (16, 8)).astype(np.float16)
    c = RANDOM.integers(-9, 9, (32, 2, 2)).astype(np.float16)
    registers = fragments(16, a.view(np.uint16), b.view(np.uint16))
    got = multiply("mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16", *registers, c.view(np.uint32).reshape(32, 2))
    halves = got.view(np.float16).reshape(32, 4)
    expected = a.astype(np.float64) @ b.astype(np.float64) + place_f32(c.reshape(32, 4))
    assert (place_f32(halves) == expected.astype(np.float16)).all()


def test_products_of_tf32_drop_low_bits() -> None:
    a, b = RANDOM.normal(size=(16, 8)).astype(np.float32), RANDOM.normal(size=(8, 8)).astype(np.float32)
    registers = fragments(32, a.view(np.uint32), b.view(np.uint32))
    got = multiply("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32", *registers, np.zeros((32, 4), np.uint32))
    cut = [(m.view(np.uint32) & 0xFFFFE000).view(np.float32).astype(np.float64) for m in (a, b)]
    assert np.abs(place_f32(got.view(np.float32)) - cut[0] @ cut[1]).max() < 1e-5


def test_products_of_bytes() -> None:
    a, b = RANDOM.integers(-128, 128, (16, 32)).astype(np.int8), RANDOM.integers(0, 256, (32, 8)).astype(np.uint8)
    c = RANDOM.integers(-(10**6), 10**6, (32, 4)).astype(np.int32)
    registers = fragments(8, a.view(np.uint8), b)
    got = multiply("mma.sync.aligned.m16n8k32.row.col.s32.s8.u8.s32", *registers, c.view(np.uint32))
    assert (place_f32(got.view(np.int32)) == a.astype(np.int64) @ b.astype(np.int64) + place_f32(c)).all()


E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


@pytest.mark.parametrize(("thread_a", "thread_b"), [(0, 0), (1, 3)])
def test_block_scaled_products(thread_a: int, thread_b: int) -> None:
    """NVFP4: four scales per row. The pair of lanes that thread_a names has rows lane/4 and lane/4 + 8."""
    a, b = RANDOM.integers(0, 16, (16, 64)), RANDOM.integers(0, 16, (64, 8))
    scale_a, scale_b = (RANDOM.uniform(0.1, 5, shape).astype(ml_dtypes.float8_e4m3fn) for shape in ((16, 4), (8, 4)))
    words_a, words_b = (s.view(np.uint8).copy().view(np.uint32)[:, 0] for s in (scale_a, scale_b))
    held_a, held_b = (np.full(32, 0x7F7F7F7F, np.uint32) for _ in range(2))
    for lane in range(32):
        if lane % 4 // 2 == thread_a:
            held_a[lane] = words_a[lane // 4 + 8 * (lane % 2)]
        if lane % 4 == thread_b:
            held_b[lane] = words_b[lane // 4]
    got = multiply(
        "mma.sync.aligned.m16n8k64.row.col.kind::mxf4nvf4.block_scale.scale_vec::4X.f32.e2m1.e2m1.f32.ue4m3",
        *fragments(4, a, b), np.zeros((32, 4), np.uint32), f", %r60, {{0, {thread_a}}}, %r61, {{0, {thread_b}}}", (held_a, held_b), "sm_120a",
    )  # fmt: skip
    left = E2M1[a] * np.repeat(scale_a.astype(np.float64), 16, axis=1)
    right = E2M1[b] * np.repeat(scale_b.astype(np.float64), 16, axis=1).T
    assert np.abs(place_f32(got.view(np.float32)) - left @ right).max() < 1e-4


@pytest.mark.parametrize("selector", [0, 2])
def test_power_of_two_scales(selector: int) -> None:
    """MXFP4: two scales per row, in the lower or upper half of the word."""
    a, b = RANDOM.integers(0, 16, (16, 64)), RANDOM.integers(0, 16, (64, 8))
    scale_a, scale_b = RANDOM.integers(120, 134, (16, 2)), RANDOM.integers(120, 134, (8, 2))
    held_a, held_b = np.zeros(32, np.uint32), np.zeros(32, np.uint32)
    for lane in range(32):
        row = lane // 4 + 8 * (lane % 2)
        held_a[lane] = (int(scale_a[row, 0]) | int(scale_a[row, 1]) << 8) << (8 * selector)
        held_b[lane] = (int(scale_b[lane // 4, 0]) | int(scale_b[lane // 4, 1]) << 8) << (8 * selector)
    got = multiply(
        "mma.sync.aligned.m16n8k64.row.col.kind::mxf4.block_scale.scale_vec::2X.f32.e2m1.e2m1.f32.ue8m0",
        *fragments(4, a, b), np.zeros((32, 4), np.uint32), f", %r60, {{{selector}, 0}}, %r61, {{{selector}, 0}}", (held_a, held_b), "sm_120a",
    )  # fmt: skip
    left = E2M1[a] * np.repeat(2.0 ** (scale_a - 127), 32, axis=1)
    right = E2M1[b] * np.repeat(2.0 ** (scale_b - 127), 32, axis=1).T
    assert (place_f32(got.view(np.float32)) == (left @ right).astype(np.float32)).all()


COPY_IN = """
    .shared .align 16 .b8 s[1024]; mov.u32 %r0, %tid.x; mov.u32 %r1, s; mul.wide.u32 %d9, %r0, 16; shl.b32 %r2, %r0, 4; add.u32 %r2, %r1, %r2;
    ld.param.u64 %d0, [x]; add.u64 %d0, %d0, %d9; ld.param.u64 %d1, [y]; add.u64 %d1, %d1, %d9;
"""


@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix(transposed: bool) -> None:
    """Four matrices of 8 rows; lane i names row i. A lane gets elements 2q and 2q + 1 of row i / 4 (or column, if transposed)."""
    x = RANDOM.integers(0, 65536, (4, 8, 8)).astype(np.uint16)
    y = np.zeros((32, 4, 2), np.uint16)
    name = f"ldmatrix.sync.aligned.m8n8.x4{'.trans' if transposed else ''}.shared.b16"
    run(kernel(COPY_IN + f"""
        ld.global.v4.u32 {{%r4, %r5, %r6, %r7}}, [%d0]; st.shared.v4.u32 [%r2], {{%r4, %r5, %r6, %r7}}; bar.sync 0;
        {name} {{%r10, %r11, %r12, %r13}}, [%r2]; st.global.v4.u32 [%d1], {{%r10, %r11, %r12, %r13}};""", [".u64 x", ".u64 y"]), x, y)  # fmt: skip
    for lane in range(32):
        for matrix in range(4):
            m = x[matrix].T if transposed else x[matrix]
            assert y[lane, matrix].tolist() == m[lane // 4, 2 * (lane % 4) : 2 * (lane % 4) + 2].tolist()


@pytest.mark.parametrize("transposed", [False, True])
def test_stmatrix_undoes_ldmatrix(transposed: bool) -> None:
    x = RANDOM.integers(0, 65536, (4, 8, 8)).astype(np.uint16)
    y = np.zeros_like(x)
    trans = ".trans" if transposed else ""
    run(kernel(COPY_IN + f"""
        ld.global.v4.u32 {{%r4, %r5, %r6, %r7}}, [%d0]; st.shared.v4.u32 [%r2], {{%r4, %r5, %r6, %r7}}; bar.sync 0;
        ldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {{%r10, %r11, %r12, %r13}}, [%r2]; bar.sync 0;
        stmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 [%r2+512], {{%r10, %r11, %r12, %r13}}; bar.sync 0;
        ld.shared.v4.u32 {{%r4, %r5, %r6, %r7}}, [%r2+512]; st.global.v4.u32 [%d1], {{%r4, %r5, %r6, %r7}};""", [".u64 x", ".u64 y"]), x, y)  # fmt: skip
    assert (x == y).all()


def test_movmatrix_transposes() -> None:
    x = RANDOM.integers(0, 65536, (8, 8)).astype(np.uint16)
    y = np.zeros_like(x)
    text = kernel("""mov.u32 %r0, %tid.x; mul.wide.u32 %d9, %r0, 4; ld.param.u64 %d0, [x]; add.u64 %d0, %d0, %d9; ld.param.u64 %d1, [y]; add.u64 %d1, %d1, %d9;
        ld.global.u32 %r4, [%d0]; movmatrix.sync.aligned.m8n8.trans.b16 %r5, %r4; st.global.u32 [%d1], %r5;""", [".u64 x", ".u64 y"])  # fmt: skip
    run(text, x, y)
    assert (y == x.T).all()
