"""Loads, stores and addresses of every state space; calls; parameters."""
# ruff: noqa: E501 (PTX in strings)

from __future__ import annotations

import struct

import numpy as np
import pytest

from .. import Memory, emulate, parse
from .harness import kernel, run

INDEX = "mov.u32 %r0, %tid.x; mov.u32 %r1, %ctaid.x; mov.u32 %r2, %ntid.x; mad.lo.u32 %r0, %r1, %r2, %r0;"


def element(pointer: str, parameter: str, width: int) -> str:
    """%d<n> = parameter + index * width"""
    return (
        f"ld.param.u64 {pointer}, [{parameter}]; mul.wide.u32 %d63, %r0, {width}; add.u64 {pointer}, {pointer}, %d63;"
    )


@pytest.mark.parametrize(("vector", "count"), [("", 1), (".v2", 2), (".v4", 4)])
@pytest.mark.parametrize("width", [8, 16, 32])
def test_vectors_move_all_elements(vector: str, count: int, width: int) -> None:
    prefix = {8: "%h", 16: "%h", 32: "%r"}[width]
    registers = ", ".join(f"{prefix}{10 + i}" for i in range(count))
    listed = f"{{{registers}}}" if count > 1 else registers
    size = width // 8 * count
    text = kernel(
        INDEX + element("%d0", "x", size) + element("%d1", "y", size)
        + f"ld.global{vector}.b{width} {listed}, [%d0]; st.global{vector}.b{width} [%d1], {listed};", [".u64 x", ".u64 y"],
    )  # fmt: skip
    x = np.random.default_rng(1).integers(0, 256, 96 * size).astype(np.uint8)
    y = np.zeros_like(x)
    run(text, x, y, grid=3, poison=[1])
    assert (x == y).all()


def test_loads_extend_by_their_type() -> None:
    text = kernel(INDEX + "ld.param.u64 %d0, [x]; ld.global.s8 %r5, [%d0]; ld.global.u8 %r6, [%d0]; ld.global.s16 %d7, [%d0];"
                  "ld.param.u64 %d1, [y]; setp.eq.u32 %p1, %r0, 0; @%p1 st.global.u32 [%d1], %r5; @%p1 st.global.u32 [%d1+4], %r6;"
                  "@%p1 st.global.u64 [%d1+8], %d7;", [".u64 x", ".u64 y"])  # fmt: skip
    y = np.zeros(2, np.int64)
    run(text, np.array([0xFF, 0xFF], np.uint8), y)
    assert y.view(np.int32)[:2].tolist() == [-1, 255]
    assert y[1] == -1


def test_shared_local_constant_and_generic_addresses() -> None:
    module = ".const .align 4 .u32 table[4] = {10, 20, 30, 40};\n.global .align 4 .u32 total;"
    text = kernel(
        ".shared .align 4 .b8 s[256]; .local .align 4 .b8 l[16];" + INDEX + element("%d0", "x", 4)
        + """
        and.b32 %r3, %r0, 3; mul.wide.u32 %d2, %r3, 4;
        mov.u64 %d3, table; add.u64 %d3, %d3, %d2; ld.const.u32 %r4, [%d3];
        mov.u64 %d4, l; cvta.local.u64 %d4, %d4; add.u64 %d5, %d4, %d2; st.u32 [%d5], %r4; ld.local.u32 %r5, [l+4];
        mov.u64 %d6, s; cvta.shared.u64 %d6, %d6; mov.u32 %r6, %tid.x; mul.wide.u32 %d7, %r6, 4; add.u64 %d7, %d6, %d7;
        st.u32 [%d7], %r4; ld.u32 %r7, [%d7];
        cvta.to.shared.u64 %d8, %d7; cvt.u32.u64 %r8, %d8; ld.shared.u32 %r9, [%r8];
        isspacep.shared %p1, %d7; isspacep.local %p2, %d7; setp.eq.u32 %p3, %r7, %r9; and.pred %p3, %p3, %p1; not.pred %p2, %p2;
        and.pred %p3, %p3, %p2; selp.u32 %r10, %r9, 0, %p3; st.global.u32 [%d0], %r10;
        """.replace("ld.local.u32 %r5, [l+4];", ""),
        [".u64 x"], module=module,
    )  # fmt: skip
    x = np.zeros(128, np.uint32)
    run(text, x, grid=2, block=64)
    assert x.tolist() == [10, 20, 30, 40] * 32


def test_a_global_variable_keeps_its_value_between_launches() -> None:
    module = parse(kernel("mov.u64 %d0, count; ld.global.u32 %r0, [%d0]; add.u32 %r0, %r0, 1; st.global.u32 [%d0], %r0;"
                          "ld.param.u64 %d1, [x]; st.global.u32 [%d1], %r0;", [".u64 x"], module=".global .u32 count = 5;"))  # fmt: skip
    memory, x = Memory(), np.zeros(1, np.uint32)
    address = struct.pack("<Q", memory.register_array(x, "x"))
    for expected in (6, 7):
        emulate(module, "k", (1, 1, 1), (1, 1, 1), parameters=[address], memory=memory)
        assert x[0] == expected


def test_structures_as_parameters() -> None:
    text = kernel(INDEX + "ld.param.u32 %r5, [s+4]; ld.param.v2.u32 {%r6, %r7}, [s+8]; mov.b64 %d5, s; add.u64 %d5, %d5, 16; ld.param.u16 %h1, [%d5];"
                  "cvt.u32.u16 %r8, %h1; add.u32 %r5, %r5, %r6; add.u32 %r5, %r5, %r7; add.u32 %r5, %r5, %r8;"
                  "ld.param.u64 %d0, [x]; st.global.u32 [%d0], %r5;", [".align 8 .b8 s[24]", ".u64 x"])  # fmt: skip
    x = np.zeros(1, np.uint32)
    run(text, struct.pack("<IIIIHHI", 1, 10, 100, 1000, 10000, 7, 7), x)
    assert x[0] == 11110


def test_calls_with_diverged_callers() -> None:
    function = """
    .func (.param .b32 out) twice_plus(.param .b32 a, .param .b64 b)
    { .reg .b32 %r<4>; .reg .b64 %d<2>; .reg .pred %p<2>;
      ld.param.u32 %r0, [a]; ld.param.u64 %d0, [b]; cvt.u32.u64 %r1, %d0;
      setp.gt.u32 %p0, %r0, 20; @%p0 bra BIG; mad.lo.u32 %r2, %r0, 2, %r1; st.param.b32 [out], %r2; ret;
      BIG: st.param.b32 [out], %r0; ret; }
    """
    call = "{{ .param .b32 p0; st.param.b32 [p0], %r0; .param .b64 p1; st.param.b64 [p1], {}; .param .b32 q; call.uni (q), twice_plus, (p0, p1); ld.param.b32 %r5, [q]; }}"
    text = kernel(INDEX + element("%d0", "x", 4) + "mov.u64 %d5, 1000; mov.u64 %d6, 2000; and.b32 %r6, %r0, 1; setp.eq.u32 %p1, %r6, 1; @%p1 bra ODD;"
                  + call.format("%d5") + "bra END; ODD:" + call.format("%d6") + "END: st.global.u32 [%d0], %r5;", [".u64 x"], module=function)  # fmt: skip
    x = np.zeros(32, np.uint32)
    run(text, x)
    assert x.tolist() == [i if i > 20 else 2 * i + (2000 if i % 2 else 1000) for i in range(32)]


def test_jump_table() -> None:
    text = kernel(INDEX + element("%d0", "x", 4) + "and.b32 %r5, %r0, 3; TABLE: .branchtargets A, B, C, D; brx.idx %r5, TABLE;"
                  "A: mov.u32 %r6, 7; bra END; B: mov.u32 %r6, 8; bra END; C: mov.u32 %r6, 9; bra END; D: mov.u32 %r6, 6;"
                  "END: st.global.u32 [%d0], %r6;", [".u64 x"])  # fmt: skip
    x = np.zeros(32, np.uint32)
    run(text, x)
    assert x.tolist() == [7, 8, 9, 6] * 8


def test_registering_overlapping_memory_is_refused() -> None:
    memory = Memory()
    memory.register(4096, 100, "a")
    with pytest.raises(ValueError, match="overlaps"):
        memory.register(4190, 10, "b")
    memory.register(4196, 10, "c")
    memory.unregister(4096)
    memory.register(4100, 20, "d")
    assert "5 bytes past the end of 'd'" in memory.nearest(4125)
