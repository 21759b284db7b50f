"""The parser on the shapes of text that nvcc, Triton and the CuTe DSL emit."""
# ruff: noqa: E501 (PTX in strings)

from __future__ import annotations

import numpy as np
import pytest

from .. import PtxSyntaxError, UnknownInstruction, parse
from ..ptx_module import Address, Immediate, Pair, Register, Symbol, Vector
from .harness import kernel, run


def body(text: str) -> list[object]:
    """The operands of the first instruction of a kernel."""
    return list(parse(kernel(text)).kernels["k"].body[0].operands)


def test_header_and_parameters() -> None:
    module = parse(
        """
        // a comment
        .version 9.0
        .target sm_100a, debug
        .address_size 64
        /* two
           lines */
        .visible .entry foo(
            .param .u64 .ptr .global .align 16 foo_param_0,
            .param .align 8 .b8 foo_param_1[24],
            .param .f32 foo_param_2
        )
        .reqntid 128
        .maxntid 256, 2, 1
        .minnctapersm 2
        { ret; }
        """
    )
    foo = module.kernels["foo"]
    assert (module.target, module.version) == ("sm_100a", "9.0")
    assert [(p.size, p.alignment) for p in foo.parameters] == [(8, 8), (24, 8), (4, 4)]
    assert foo.directives["reqntid"] == (128,)
    assert foo.directives["maxntid"] == (256, 2, 1)


def test_variables_and_initial_values() -> None:
    module = parse(
        """
        .global .align 4 .u32 counter;
        .const .align 2 .b8 table[6] = {1, 0xFF, 3};
        .global .align 8 .u64 pointer[2] = {generic(counter), 5};
        .extern .shared .align 16 .b8 dynamic[];
        .global .align 4 .f32 half = 0f3F000000;
        """
    )
    v = module.variables
    assert v["counter"].size == 4
    assert v["table"].initial == bytes([1, 255, 3, 0, 0, 0])
    assert v["pointer"].references == ((0, "counter", 0),)
    assert v["pointer"].initial == bytes(8) + bytes([5]) + bytes(7)
    assert v["dynamic"].external
    assert v["dynamic"].size == 0
    assert v["half"].initial == bytes.fromhex("0000003f")


def test_operands() -> None:
    (d, a) = body("ld.global.v2.u32 {%r1, %r2}, [%d1+-16];")
    assert isinstance(d, Vector)
    assert isinstance(a, Address)
    assert a.offset == -16
    assert isinstance(a.base, Register)
    (d, *_) = body("shfl.sync.bfly.b32 %r1|%p1, %r2, 1, 31, -1;")
    assert isinstance(d, Pair)
    (_, a, b) = body("add.f32 %r1, 0f3F800000, -1.5;")
    assert a == Immediate(0x3F800000, 32)
    assert b == Immediate(-1.5)
    (_, a) = body("mov.u32 %r1, name+8;")
    assert a == Symbol("name", 8)
    (_, a, _) = body("cp.async.bulk.tensor.2d.x [%r1], [%d1, {%r2, %r3}], [%r4 + 8];")
    assert isinstance(a, Address)
    assert isinstance(a.extra[0], Vector)


def test_scopes_may_repeat_registers_and_labels() -> None:
    """Inline assembly opens a scope each time it appears."""
    wait = """
    { .reg .pred done; .reg .b32 t;
      mov.u32 t, 0;
      AGAIN: add.u32 t, t, 1; setp.ge.u32 done, t, %r1; @done bra DONE; bra AGAIN;
      DONE: add.u32 %r5, %r5, t; }
    """
    x = np.zeros(32, np.uint32)
    text = kernel("mov.u32 %r5, 0; mov.u32 %r1, 3;" + wait + "mov.u32 %r1, 4;" + wait + (
        "ld.param.u64 %d0, [x]; mov.u32 %r0, %tid.x; mul.wide.u32 %d1, %r0, 4; add.u64 %d0, %d0, %d1; st.global.u32 [%d0], %r5;"
    ), [".u64 x"])  # fmt: skip
    run(text, x)
    assert (x == 7).all()


def test_line_numbers_and_texts() -> None:
    text = kernel("nop;\n\n  @!%p1   add.u32\n  %r1, %r2,\n  %r3;")
    instruction = parse(text).kernels["k"].body[1]
    assert instruction.text == "@!%p1 add.u32 %r1, %r2, %r3"
    assert instruction.guard is not None
    assert instruction.guard[1]
    assert "@!%p1" in text.split("\n")[instruction.line - 1]


def test_debug_directives_are_skipped() -> None:
    parse(".version 8.7\n.target sm_90a\n.file 1 \"a.cu\"\n" + kernel(".loc 1 2 3\nnop;\n.pragma \"nounroll\";").split("\n", 3)[3]
          + "\n.section .debug_abbrev\n{\n.b8 1,2,3;\n.b8 4;\n}\n")  # fmt: skip


@pytest.mark.parametrize(("text", "error"), [
    ("add.u32 %r1, %nothing, %r2;", PtxSyntaxError), ("bra NOWHERE;", PtxSyntaxError), (".reg .v4 .b32 %q;", UnknownInstruction),
    ("@%p99 add.u32 %r1, %r2, %r3;", PtxSyntaxError), ("mov.u32 %r1, %unknown.x;", PtxSyntaxError),
])  # fmt: skip
def test_what_is_not_understood_is_refused(text: str, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"line \d+|no label"):
        run(kernel(text))
