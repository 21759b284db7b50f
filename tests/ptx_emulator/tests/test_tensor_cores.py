"""wgmma and tcgen05 with operands in shared memory: layouts named by descriptors, results against numpy, and what
happens when a wait is missing. Shared memory is filled byte by byte from an image that the test lays out by hand."""
# ruff: noqa: E501 (PTX in strings)

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np
import pytest

from .. import EmulatorFault
from .harness import Array, kernel, run

RANDOM = np.random.default_rng(10)
IMAGE = 49152
B_PLACE = 24576

COPY = f"""
    .shared .align 1024 .b8 s[{IMAGE}]; .shared .align 16 .b8 extra[64];
    mov.u32 %r0, %tid.x; mov.u32 %r1, s; ld.param.u64 %d0, [x]; mul.wide.u32 %d9, %r0, 16; add.u64 %d0, %d0, %d9; shl.b32 %r2, %r0, 4; add.u32 %r2, %r1, %r2;
    mov.u32 %r3, 0;
    COPY: ld.global.v4.u32 {{%r4, %r5, %r6, %r7}}, [%d0]; st.shared.v4.u32 [%r2], {{%r4, %r5, %r6, %r7}}; add.u64 %d0, %d0, 2048; add.u32 %r2, %r2, 2048;
    add.u32 %r3, %r3, 2048; setp.lt.u32 %p0, %r3, {IMAGE}; @%p0 bra COPY;
    fence.proxy.async.shared::cta; bar.sync 0; setp.eq.u32 %p0, %r0, 0;
"""


def fault(text: str, *arguments: object, **options: object) -> EmulatorFault:
    """The fault that running the kernel raises."""
    with pytest.raises(EmulatorFault) as caught:
        run(text, *arguments, **options)  # type: ignore[arg-type]
    return caught.value


def flip(byte: int, width: int) -> int:
    """The swizzle: 16-byte units xor'ed with bits of the 128-byte row number."""
    return byte ^ {0: 0, 32: byte >> 3 & 0x10, 64: byte >> 3 & 0x30, 128: byte >> 3 & 0x70}[width]


def lay_out(image: Array, start: int, matrix: Array, k_major: bool, swizzle: int) -> tuple[int, int]:
    """Write a matrix (rows, k) of codes into the image; returns leading and stride byte offsets.

    K-major: groups of 8 rows; without swizzle each group is two 128-byte blocks, one for each 16 bytes of k.
    MN-major (16-bit elements): without swizzle, blocks of 8 k by 16 bytes of rows; with swizzle, rows of W bytes.
    """
    size = matrix.itemsize
    raw = matrix[..., None].view(np.uint8)
    rows, k = matrix.shape
    per = 16 // size
    if k_major:
        leading, stride = (128, 256) if not swizzle else (0, 8 * swizzle)
    elif not swizzle:
        leading, stride = 128 * (rows // per), 128
    else:
        leading, stride = swizzle * k, swizzle * 8
    for row in range(rows):
        for column in range(k):
            if k_major and not swizzle:
                place = row % 8 * 16 + row // 8 * stride + column // per * leading + column % per * size
            elif k_major:
                place = row % 8 * swizzle + row // 8 * stride + column * size
            elif not swizzle:
                place = row % per * size + row // per * stride + column % 8 * 16 + column // 8 * leading
            else:
                wide = swizzle // size
                place = row % wide * size + row // wide * leading + column % 8 * swizzle + column // 8 * stride
            for byte in range(size):
                image[flip(start + place + byte, swizzle)] = raw[row, column, byte]
    return leading, stride


def hopper(start: int, leading: int, stride: int, swizzle: int) -> int:
    """A wgmma descriptor."""
    return start >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | {0: 0, 128: 1, 64: 2, 32: 3}[swizzle] << 62


def blackwell(start: int, leading: int, stride: int, swizzle: int) -> int:
    """A tcgen05 descriptor."""
    return start >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | 1 << 46 | {0: 0, 128: 2, 64: 4, 32: 6}[swizzle] << 61


# ------------------------------------------------------------------------------------------------------------ wgmma


def wgmma_text(n: int, kind: str, k: int, descriptors: tuple[int, int], flips: str, after: str, count: int = 1) -> str:
    """D = A B for one warpgroup; accumulators go out as (threads, n / 2)."""
    registers = ", ".join(f"acc{i}" for i in range(n // 2))
    lines = [COPY, f".reg .b32 acc<{n // 2}>; mov.b64 %d5, {descriptors[0]:#x}; mov.b64 %d6, {descriptors[1]:#x};"]
    lines += [f"mov.b32 acc{i}, 0;" for i in range(n // 2)]
    lines.append("wgmma.fence.sync.aligned;")
    lines += [
        f"wgmma.mma_async.sync.aligned.m64n{n}k{k}.f32.{kind}.{kind} {{{registers}}}, %d5, %d6, 1, 1, 1{flips};"
    ] * count
    lines.append("wgmma.commit_group.sync.aligned;" + after)
    lines.append(f"ld.param.u64 %d1, [y]; mul.wide.u32 %d9, %r0, {2 * n}; add.u64 %d1, %d1, %d9;")
    lines += [f"st.global.u32 [%d1+{4 * i}], acc{i};" for i in range(n // 2)]
    return kernel("\n".join(lines), [".u64 x", ".u64 y"])


def warpgroup_matrix(y: Array, n: int) -> Array:
    """(64, n) from the accumulators: warp w has rows 16 w on; four registers for every 8 columns."""
    matrix = np.zeros((64, n), np.float32)
    for thread in range(128):
        for i in range(n // 2):
            row = thread // 32 * 16 + thread % 32 // 4 + 8 * (i // 2 % 2)
            matrix[row, i // 4 * 8 + thread % 4 * 2 + i % 2] = y[thread, i]
    return matrix


WAIT_WGMMA = "wgmma.wait_group.sync.aligned 0;"


@pytest.mark.parametrize(("a_major", "b_major"), [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("swizzle", [0, 32, 64, 128])
def test_wgmma_layouts(swizzle: int, a_major: bool, b_major: bool) -> None:
    n = 64
    image = np.zeros(IMAGE, np.uint8)
    a, b = (RANDOM.normal(size=(rows, 16)).astype(ml_dtypes.bfloat16) for rows in (64, n))
    da = hopper(0, *lay_out(image, 0, a.view(np.uint16), a_major, swizzle), swizzle)
    db = hopper(B_PLACE, *lay_out(image, B_PLACE, b.view(np.uint16), b_major, swizzle), swizzle)
    y = np.zeros((128, n // 2), np.float32)
    run(
        wgmma_text(n, "bf16", 16, (da, db), f", {int(not a_major)}, {int(not b_major)}", WAIT_WGMMA, count=2),
        image,
        y,
        block=128,
    )
    expected = 2 * (a.astype(np.float64) @ b.astype(np.float64).T)
    assert np.abs(warpgroup_matrix(y, n) - expected).max() < 1e-5 * np.abs(expected).max()


def test_wgmma_of_eight_bit_floats() -> None:
    image = np.zeros(IMAGE, np.uint8)
    a, b = (RANDOM.normal(size=(rows, 32)).astype(ml_dtypes.float8_e4m3fn) for rows in (64, 16))
    da = hopper(0, *lay_out(image, 0, a.view(np.uint8), True, 128), 128)
    db = hopper(B_PLACE, *lay_out(image, B_PLACE, b.view(np.uint8), True, 32), 32)
    y = np.zeros((128, 8), np.float32)
    run(wgmma_text(16, "e4m3", 32, (da, db), "", WAIT_WGMMA), image, y, block=128)
    assert np.abs(warpgroup_matrix(y, 16) - a.astype(np.float64) @ b.astype(np.float64).T).max() < 1e-4


def wgmma_case(after: str) -> tuple[str, Array, Array]:
    """A small product with the given text behind the commit."""
    image = RANDOM.integers(0, 100, IMAGE).astype(np.uint8)
    return (
        wgmma_text(8, "bf16", 16, (hopper(0, 128, 256, 0), hopper(B_PLACE, 128, 256, 0)), ", 0, 0", after),
        image,
        np.zeros((128, 4), np.float32),
    )


def test_wgmma_without_wait() -> None:
    text, image, y = wgmma_case("")
    found = fault(text, image, y, block=128)
    assert found.kind == "missing wait"
    assert "st.global" in str(found.text)


def test_wgmma_waiting_for_an_older_group_only() -> None:
    text, image, y = wgmma_case("wgmma.wait_group.sync.aligned 1;")
    assert fault(text, image, y, block=128).kind == "missing wait"


def test_wgmma_whose_operand_is_overwritten_before_the_wait() -> None:
    text, image, y = wgmma_case("bar.sync 0; @%p0 st.shared.u32 [%r1], 123456; bar.sync 0; " + WAIT_WGMMA)
    found = fault(text, image, y, block=128)
    assert found.kind == "missing wait"
    assert "changed" in found.detail


def test_wgmma_in_part_of_a_warpgroup() -> None:
    text, image, y = wgmma_case(WAIT_WGMMA)
    text = text.replace("wgmma.fence", "setp.lt.u32 %p5, %r0, 64; @%p5 bra OUT; wgmma.fence").replace(
        WAIT_WGMMA, WAIT_WGMMA + " OUT:"
    )
    assert fault(text, image, y, block=128).kind == "divergent warp"


def test_wgmma_operand_outside_shared_memory() -> None:
    text, image, y = wgmma_case(WAIT_WGMMA)
    text = text.replace(f"{hopper(0, 128, 256, 0):#x}", f"{hopper(IMAGE - 256, 128, 256, 0):#x}")
    assert fault(text, image, y, block=128).kind == "out of bounds"


# ---------------------------------------------------------------------------------------------------------- tcgen05

ALLOCATE = """
    .shared .align 8 .b64 bar; .shared .align 4 .b32 tmem; mov.u32 %r20, bar; mov.u32 %r21, tmem; setp.lt.u32 %p2, %r0, 32;
    @%p2 tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r21], 128; @%p2 tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned;
    @%p0 mbarrier.init.shared::cta.b64 [%r20], 1; bar.sync 0; ld.shared.u32 %r22, [%r21];
    shr.u32 %r23, %r0, 5; and.b32 %r23, %r23, 3; shl.b32 %r23, %r23, 21; add.u32 %r23, %r23, %r22;
"""
COMMIT = "@%p0 tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%r20];"
WAIT_MMA = (
    "WAIT: mbarrier.try_wait.parity.shared::cta.b64 %p1, [%r20], 0; @!%p1 bra WAIT; tcgen05.fence::after_thread_sync;"
)
FREE = "bar.sync 0; @%p2 tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r22, 128;"


def read_out(n: int, wait: str = "tcgen05.wait::ld.sync.aligned;") -> str:
    """Every thread stores its lane of the n columns."""
    registers = ", ".join(f"out{i}" for i in range(n))
    text = f".reg .b32 out<{n}>; tcgen05.ld.sync.aligned.32x32b.x{n}.b32 {{{registers}}}, [%r23]; {wait} ld.param.u64 %d1, [y]; mul.wide.u32 %d9, %r0, {4 * n}; add.u64 %d1, %d1, %d9;"
    return text + "".join(f"st.global.u32 [%d1+{4 * i}], out{i};" for i in range(n))


def mma_text(
    instruction: str,
    n: int,
    wait: str = WAIT_MMA,
    free: str = FREE,
    wait_ld: str = "tcgen05.wait::ld.sync.aligned;",
    before: str = "",
) -> str:
    """A kernel around one tcgen05.mma that thread 0 issues."""
    return kernel(
        COPY + ALLOCATE + before + instruction + COMMIT + wait + read_out(n, wait_ld) + free,
        [".u64 x", ".u64 y"],
        arch="sm_100a",
    )


def descriptor_bits(m: int, n: int, a_type: int, b_type: int, a_mn: bool = False, b_mn: bool = False) -> int:
    """Instruction descriptor of kinds f16, tf32 and f8f6f4 with float32 results."""
    return 1 << 4 | a_type << 7 | b_type << 10 | int(a_mn) << 15 | int(b_mn) << 16 | n >> 3 << 17 | m >> 4 << 24


def f16_case(
    m: int = 128, n: int = 32, swizzle: int = 128, a_major: bool = True, b_major: bool = True
) -> tuple[str, Array, Array]:
    """The mma instruction of a bfloat16 product, the image, and the expected result."""
    image = np.zeros(IMAGE, np.uint8)
    a, b = (RANDOM.normal(size=(rows, 16)).astype(ml_dtypes.bfloat16) for rows in (m, n))
    da = blackwell(0, *lay_out(image, 0, a.view(np.uint16), a_major, swizzle), swizzle)
    db = blackwell(B_PLACE, *lay_out(image, B_PLACE, b.view(np.uint16), b_major, swizzle), swizzle)
    bits = descriptor_bits(m, n, 1, 1, not a_major, not b_major)
    text = f"mov.b64 %d5, {da:#x}; mov.b64 %d6, {db:#x}; mov.b32 %r30, {bits:#x}; setp.ne.u32 %p5, 0, 0; @%p0 tcgen05.mma.cta_group::1.kind::f16 [%r22], %d5, %d6, %r30, %p5;"
    return text, image, a.astype(np.float64) @ b.astype(np.float64).T


@pytest.mark.parametrize(
    ("swizzle", "a_major", "b_major"),
    [(0, True, True), (32, True, True), (64, True, False), (128, False, True), (128, False, False), (0, False, False)],
)
def test_tcgen05_layouts(swizzle: int, a_major: bool, b_major: bool) -> None:
    n = 64
    instruction, image, expected = f16_case(n=n, swizzle=swizzle, a_major=a_major, b_major=b_major)
    y = np.zeros((128, n), np.float32)
    run(mma_text(instruction, n), image, y, block=128, arch="sm_100a", poison=[1])
    assert np.abs(y - expected).max() < 1e-5 * np.abs(expected).max()


def test_tcgen05_of_64_rows_uses_half_of_the_lanes() -> None:
    """Rows 16 i to 16 i + 15 are in lanes 32 i on."""
    instruction, image, expected = f16_case(m=64, n=8)
    y = np.zeros((128, 8), np.float32)
    prologue = (
        "mov.b32 %r40, 0;"
        + "tcgen05.st.sync.aligned.32x32b.x8.b32 [%r23], {%r40, %r40, %r40, %r40, %r40, %r40, %r40, %r40}; tcgen05.wait::st.sync.aligned; bar.sync 0;"
    )
    run(mma_text(instruction, 8, before=prologue), image, y, block=128, arch="sm_100a")
    got = y.reshape(4, 32, 8)
    assert np.abs(got[:, :16].reshape(64, 8) - expected).max() < 1e-5
    assert (got[:, 16:] == 0).all()


def scaled_image(kind: str) -> tuple[Array, Array, str]:
    """Image, expected product and instruction of a block-scaled product of 128 x 32 x 64 four-bit elements.

    The scales lie behind the operands as 32 rows of 16 bytes, row r % 32, bytes 4 (r / 32) on: what 32x128b copies take.
    """
    e2m1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    image = np.zeros(IMAGE, np.uint8)
    a, b = RANDOM.integers(0, 16, (128, 64)), RANDOM.integers(0, 16, (32, 64))
    packed = [(m[:, 0::2] | m[:, 1::2] << 4).astype(np.uint8) for m in (a, b)]
    descriptors = [
        blackwell(start, *lay_out(image, start, m, True, 128), 128)
        for start, m in ((0, packed[0]), (B_PLACE, packed[1]))
    ]
    count = 4 if kind == "mxf4nvf4" else 2
    scales = []
    for number, rows in enumerate((128, 32)):
        if kind == "mxf4nvf4":
            codes = RANDOM.uniform(0.1, 9, (rows, count)).astype(ml_dtypes.float8_e4m3fn)
            scales.append(codes.astype(np.float64))
            raw = codes.view(np.uint8)
        else:
            raw = RANDOM.integers(120, 135, (rows, count)).astype(np.uint8)
            scales.append(2.0 ** (raw.astype(np.float64) - 127))
        block = np.zeros((32, 16), np.uint8)
        for row in range(rows):
            block[row % 32, 4 * (row // 32) : 4 * (row // 32) + count] = raw[row]
        place = 40960 + 512 * number
        image[place : place + 512] = block.reshape(-1)
        descriptors.append(blackwell(place, 128, 128, 0))
    expected = (e2m1[a] * np.repeat(scales[0], 64 // count, axis=1)) @ (
        e2m1[b] * np.repeat(scales[1], 64 // count, axis=1)
    ).T
    bits = 1 << 7 | 1 << 10 | 32 >> 3 << 17 | int(kind == "mxf4") << 23 | 128 >> 7 << 27
    text = (
        "".join(f"mov.b64 %d{5 + i}, {d:#x};" for i, d in enumerate(descriptors))
        + f"""
        mov.b32 %r30, {bits:#x}; setp.ne.u32 %p5, 0, 0; add.u32 %r31, %r22, 64; add.u32 %r32, %r22, 96;
        @%p0 tcgen05.cp.cta_group::1.32x128b.warpx4 [%r31], %d7; @%p0 tcgen05.cp.cta_group::1.32x128b.warpx4 [%r32], %d8;
        @%p0 tcgen05.mma.cta_group::1.kind::{kind}.block_scale.block{64 // count} [%r22], %d5, %d6, %r30, [%r31], [%r32], %p5;"""
    )
    return image, expected, text


@pytest.mark.parametrize("kind", ["mxf4nvf4", "mxf4"])
def test_block_scaled_products(kind: str) -> None:
    image, expected, instruction = scaled_image(kind)
    y = np.zeros((128, 32), np.float32)
    run(mma_text(instruction, 32), image, y, block=128, arch="sm_100a")
    assert np.abs(y - expected).max() < 1e-5 * np.abs(expected).max()


def test_scaled_products_of_bytes_choose_their_scale() -> None:
    """MXFP8: one scale for 32 elements; the descriptor says which byte of the column."""
    image = np.zeros(IMAGE, np.uint8)
    a, b = (RANDOM.normal(size=(rows, 32)).astype(ml_dtypes.float8_e4m3fn) for rows in (128, 16))
    da = blackwell(0, *lay_out(image, 0, a.view(np.uint8), True, 128), 128)
    db = blackwell(B_PLACE, *lay_out(image, B_PLACE, b.view(np.uint8), True, 128), 128)
    codes = RANDOM.integers(120, 135, (2, 32, 16)).astype(np.uint8)
    image[40960 : 40960 + 1024] = codes.reshape(-1)
    a_id, b_id = 2, 1
    row = np.arange(128)
    scale_a = 2.0 ** (codes[0][row % 32, 4 * (row // 32) + a_id] - 127.0)
    scale_b = 2.0 ** (codes[1][row[:16], b_id] - 127.0)
    bits = b_id << 4 | 16 >> 3 << 17 | 1 << 23 | 128 >> 7 << 27 | a_id << 29
    text = f"""
        mov.b64 %d5, {da:#x}; mov.b64 %d6, {db:#x}; mov.b64 %d7, {blackwell(40960, 128, 128, 0):#x}; mov.b64 %d8, {blackwell(41472, 128, 128, 0):#x};
        mov.b32 %r30, {bits:#x}; setp.ne.u32 %p5, 0, 0; add.u32 %r31, %r22, 64; add.u32 %r32, %r22, 96;
        @%p0 tcgen05.cp.cta_group::1.32x128b.warpx4 [%r31], %d7; @%p0 tcgen05.cp.cta_group::1.32x128b.warpx4 [%r32], %d8;
        @%p0 tcgen05.mma.cta_group::1.kind::mxf8f6f4.block_scale.block32 [%r22], %d5, %d6, %r30, [%r31], [%r32], %p5;"""
    y = np.zeros((128, 16), np.float32)
    run(mma_text(text, 16), image, y, block=128, arch="sm_100a")
    expected = (a.astype(np.float64) * scale_a[:, None]) @ (b.astype(np.float64) * scale_b[:, None]).T
    assert np.abs(y - expected).max() < 1e-5 * np.abs(expected).max()


def planted(change: Callable[[dict[str, str]], None], strict: tuple[str, ...] = ()) -> EmulatorFault:
    """The fault of a bfloat16 product after a change to the kernel's parts."""
    instruction, image, _ = f16_case()
    parts = {"instruction": instruction, "wait": WAIT_MMA, "free": FREE, "wait_ld": "tcgen05.wait::ld.sync.aligned;"}
    change(parts)
    return fault(
        mma_text(parts.pop("instruction"), 32, **parts),
        image,
        np.zeros((128, 32), np.float32),
        block=128,
        arch="sm_100a",
        strict=strict,
    )


def test_reading_a_product_without_waiting_for_it() -> None:
    found = planted(lambda p: p.update(wait=""))
    assert found.kind == "missing wait"
    assert "tcgen05.ld" in str(found.text)


def test_using_loaded_registers_without_waiting() -> None:
    found = planted(lambda p: p.update(wait_ld=""), strict=("tcgen05.ld",))
    assert found.kind == "missing wait"
    assert "st.global" in str(found.text)


def test_tensor_memory_that_is_not_freed() -> None:
    assert planted(lambda p: p.update(free="")).kind == "leak"


def test_freeing_something_else() -> None:
    assert planted(lambda p: p.update(free=FREE.replace("128", "64"))).kind == "invalid operand"


def test_overwriting_an_operand_before_the_product_is_complete() -> None:
    found = planted(lambda p: p.update(wait="@%p0 st.shared.u32 [%r1], 123456;" + WAIT_MMA))
    assert found.kind == "missing wait"
    assert "changed" in found.detail


def test_accumulating_on_tensor_memory_that_was_never_written() -> None:
    found = planted(lambda p: p.update(instruction=p["instruction"].replace("setp.ne", "setp.eq")))
    assert found.kind == "uninitialised"


def test_columns_that_were_not_allocated() -> None:
    found = planted(
        lambda p: p.update(instruction=p["instruction"].replace("setp.ne", "add.u32 %r22, %r22, 112; setp.ne"))
    )
    assert found.kind == "out of bounds"


def test_lanes_of_another_warp() -> None:
    found = planted(lambda p: p.update(wait=WAIT_MMA + "mov.u32 %r23, %r22;"))
    assert found.kind == "out of bounds"
    assert found.thread == (32, 0, 0)


def test_stored_tensor_memory_must_be_waited_for() -> None:
    body = COPY + ALLOCATE + "tcgen05.st.sync.aligned.32x32b.x1.b32 [%r23], {%r0}; {wait}" + read_out(1) + FREE
    y = np.zeros((128, 1), np.uint32)
    run(
        kernel(body.replace("{wait}", "tcgen05.wait::st.sync.aligned;"), [".u64 x", ".u64 y"], arch="sm_100a"),
        np.zeros(IMAGE, "u1"),
        y,
        block=128,
        arch="sm_100a",
    )
    assert y[:, 0].tolist() == list(range(128))
    assert (
        fault(
            kernel(body.replace("{wait}", ""), [".u64 x", ".u64 y"], arch="sm_100a"),
            np.zeros(IMAGE, "u1"),
            y,
            block=128,
            arch="sm_100a",
        ).kind
        == "missing wait"
    )


def fragment_by_hand(shape: str, repeat: int) -> list[list[tuple[int, int]]]:
    """(lane of tensor memory, column) of each thread's registers, from the figures of tcgen05.ld."""
    result = []
    for thread in range(32):
        cells = []
        for n in range(repeat):
            if shape == "16x64b":
                cells.append((thread // 2 % 8 + 8 * (thread // 16), thread % 2 + 2 * n))
            elif shape == "16x128b":
                cells += [(thread // 4 + 8 * half, thread % 4 + 4 * n) for half in (0, 1)]
            elif shape == "16x256b":
                cells += [(thread // 4 + 8 * half, thread % 4 * 2 + i + 8 * n) for half in (0, 1) for i in (0, 1)]
            else:
                cells.append((thread % 16, n + (32 if thread >= 16 else 0)))
        result.append(cells)
    return result


@pytest.mark.parametrize(
    ("shape", "repeat", "count", "split"),
    [("16x64b", 2, 2, ""), ("16x128b", 2, 4, ""), ("16x256b", 1, 4, ""), ("16x32bx2", 4, 4, ", 32")],
)
def test_shapes_of_tensor_memory_loads(shape: str, repeat: int, count: int, split: str) -> None:
    """Tensor memory is filled with 1000 * lane + column by 32x32b stores, and read back in another shape."""
    stored = ", ".join(f"in{i}" for i in range(64))
    loaded = ", ".join(f"out{i}" for i in range(count))
    body = COPY + ALLOCATE + f".reg .b32 in<64>; .reg .b32 out<{count}>; mul.lo.u32 %r40, %r0, 1000;"
    body += "".join(f"add.u32 in{i}, %r40, {i};" for i in range(64))
    body += f"tcgen05.st.sync.aligned.32x32b.x64.b32 [%r23], {{{stored}}}; tcgen05.wait::st.sync.aligned;"
    body += f"tcgen05.ld.sync.aligned.{shape}.x{repeat}.b32 {{{loaded}}}, [%r23]{split}; tcgen05.wait::ld.sync.aligned;"
    body += f"ld.param.u64 %d1, [y]; mul.wide.u32 %d9, %r0, {4 * count}; add.u64 %d1, %d1, %d9;"
    body += "".join(f"st.global.u32 [%d1+{4 * i}], out{i};" for i in range(count))
    y = np.zeros((128, count), np.uint32)
    text = kernel(body + FREE, [".u64 x", ".u64 y"], arch="sm_100a")
    run(text, np.zeros(IMAGE, "u1"), y, block=128, arch="sm_100a", strict=("tcgen05.ld",))
    table = fragment_by_hand(shape, repeat)
    for thread in range(128):
        expected = [1000 * (thread // 32 * 32 + row) + column for row, column in table[thread % 32]]
        assert y[thread].tolist() == expected


PAIR = (
    COPY
    + ALLOCATE.replace("cta_group::1", "cta_group::2")
    + """
    barrier.cluster.arrive; barrier.cluster.wait; mov.u32 %r41, %cluster_ctarank; setp.eq.and.u32 %p6, %r41, 0, %p0; mov.u16 %h1, 3;
    {instruction}
    @%p6 tcgen05.commit.cta_group::2.mbarrier::arrive::one.shared::cluster.multicast::cluster.b64 [%r20], %h1;
    """
    + WAIT_MMA
    + "{read} barrier.cluster.arrive; barrier.cluster.wait;"
    + FREE.replace("cta_group::1", "cta_group::2")
)


def test_product_of_a_pair_of_blocks() -> None:
    """256 x 64: each block holds 128 rows of A and of the result, and 32 rows of B; block 0 issues for both."""
    a, b = (RANDOM.normal(size=(rows, 16)).astype(ml_dtypes.bfloat16) for rows in (256, 64))
    images = np.zeros((2, IMAGE), np.uint8)
    for rank in range(2):
        left, right = (m.view(np.uint16) for m in (a[128 * rank : 128 * rank + 128], b[32 * rank : 32 * rank + 32]))
        da = blackwell(0, *lay_out(images[rank], 0, left, True, 128), 128)
        db = blackwell(B_PLACE, *lay_out(images[rank], B_PLACE, right, True, 128), 128)
    instruction = f"mov.b64 %d5, {da:#x}; mov.b64 %d6, {db:#x}; mov.b32 %r30, {descriptor_bits(256, 64, 1, 1):#x};"
    instruction += "setp.ne.u32 %p5, 0, 0; @%p6 tcgen05.mma.cta_group::2.kind::f16 [%r22], %d5, %d6, %r30, %p5;"
    to_own = "mov.u32 %r42, %ctaid.x; mul.wide.u32 %d11, %r42, 32768;"
    read = to_own + read_out(64).replace("add.u64 %d1, %d1, %d9;", "add.u64 %d1, %d1, %d9; add.u64 %d1, %d1, %d11;")
    text = PAIR.replace("{instruction}", instruction).replace("{read}", read)
    own_image = f"mov.u32 %r42, %ctaid.x; mul.wide.u32 %d11, %r42, {IMAGE}; add.u64 %d0, %d0, %d11;"
    text = text.replace("mov.u32 %r3, 0;\n", own_image + "mov.u32 %r3, 0;\n", 1)
    y = np.zeros((256, 64), np.float32)
    run(kernel(text, [".u64 x", ".u64 y"], arch="sm_100a"), images, y, grid=2, block=128, cluster=2, arch="sm_100a")
    expected = a.astype(np.float64) @ b.astype(np.float64).T
    assert np.abs(y - expected).max() < 1e-5 * np.abs(expected).max()
