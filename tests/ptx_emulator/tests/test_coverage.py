"""The list of what the emulator lacks."""

from __future__ import annotations

from .. import missing_instructions, parse
from .harness import kernel


def test_missing_instructions_are_listed_with_name_and_line() -> None:
    text = kernel("add.u32 %r1, %r2, %r3;\nfrobnicate.b32 %r1, %r2;\nmma.sp.sync.aligned.m16n8k32.row.col.f32 %r1;")
    lines = text.split("\n")
    found = missing_instructions(parse(text))
    assert len(found) == 2
    assert found[0].startswith("k: line ")
    assert "frobnicate.b32" in found[0]
    assert "mma.sp" in found[1]
    assert "frobnicate" in lines[int(found[0].split()[2].rstrip(":")) - 1]


def test_nothing_is_missing_for_known_instructions() -> None:
    function = ".func (.param .b32 o) f(.param .b32 a) { ret; }"
    body = "{ .param .b32 a; st.param.b32 [a], %r1; .param .b32 o; call (o), f, (a); ld.param.b32 %r2, [o]; }"
    shared = ".shared .align 4 .b8 s[16]; mov.u32 %r3, s; ld.shared.u32 %r4, [s+4];"
    assert missing_instructions(parse(kernel(body + shared, module=function))) == []
