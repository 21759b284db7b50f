"""Helpers of the emulator's own tests: small PTX kernels around the instructions under test."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import numpy as np

from .. import Launch, Limits, Memory, emulate, parse
from ..values import DTYPES

Array = np.ndarray[Any, np.dtype[Any]]

REGISTERS = """
    .reg .pred %p<32>;
    .reg .b8 %c<16>;
    .reg .b16 %h<64>;
    .reg .b32 %r<128>;
    .reg .b64 %d<64>;
"""


def kernel(
    body: str, parameters: Sequence[str] = (), directives: str = "", module: str = "", arch: str = "sm_90a"
) -> str:
    """PTX text of a kernel 'k'. Parameters are declarations such as '.u64 x'; %d0.. %r0.. %h0.. %p0.. exist."""
    declared = ", ".join(f".param {p}" for p in parameters)
    return f"""
.version 9.0
.target {arch}
.address_size 64
{module}
.visible .entry k({declared}) {directives}
{{
{REGISTERS}
{body}
    ret;
}}
"""


def run(
    text: str,
    *arguments: Array | int | float | bytes,
    grid: int | tuple[int, int, int] = 1,
    block: int | tuple[int, int, int] = 32,
    cluster: int = 1,
    dynamic_shared: int = 0,
    seed: int = 0,
    poison: Sequence[int] = (),
    arch: str = "sm_90a",
    strict: Sequence[str] = (),
    limits: Limits | None = None,
) -> Launch:
    """Run kernel 'k'. Arrays are registered and passed by address, int as .u32, float as .f32, bytes as they are."""
    memory = Memory()
    packed: list[bytes] = []
    for number, argument in enumerate(arguments):
        if isinstance(argument, np.ndarray):
            address = memory.register_array(argument, f"argument {number}", initialised=number not in poison)
            packed.append(struct.pack("<Q", address))
        elif isinstance(argument, bytes):
            packed.append(argument)
        elif isinstance(argument, float):
            packed.append(struct.pack("<f", argument))
        else:
            packed.append(struct.pack("<I", argument & 0xFFFFFFFF))
    return emulate(
        parse(text),
        "k",
        grid if isinstance(grid, tuple) else (grid, 1, 1),
        block if isinstance(block, tuple) else (block, 1, 1),
        (cluster, 1, 1),
        dynamic_shared,
        packed,
        memory,
        seed,
        arch,
        strict,
        limits,
    )


def compute(
    instructions: str, out: str, *inputs: tuple[str, Any], threads: int | None = None, arch: str = "sm_90a"
) -> Array:
    """Run instructions in one thread for each element.

    Inputs are pairs (type, values); input i is in register A, B, C, D. The result is what they leave in register R of
    the type `out`.
    """
    arrays = [np.array(values, DTYPES[kind]) for kind, values in inputs]
    count = max(len(a) for a in arrays)
    arrays = [np.broadcast_to(a, (count,)).copy() for a in arrays]
    result = np.zeros(count, DTYPES[out] if out != "pred" else np.uint32)
    lines = ["mov.u32 %r0, %ctaid.x; mov.u32 %r1, %ntid.x; mov.u32 %r2, %tid.x; mad.lo.u32 %r0, %r0, %r1, %r2;",
             f"setp.ge.u32 %p0, %r0, {count}; @%p0 exit;"]  # fmt: skip
    for name, (_kind, _), array in zip("ABCD", inputs, arrays, strict=False):
        width = array.itemsize
        lines.append(f".reg .b{8 * width} {name}; ld.param.u64 %d0, [{name}_address]; mul.wide.u32 %d1, %r0, {width};")
        lines.append(f"add.u64 %d0, %d0, %d1; ld.global.b{8 * width} {name}, [%d0];")
    width = result.itemsize
    lines.append(f".reg .{'pred' if out == 'pred' else f'b{8 * width}'} R;")
    lines.append(instructions)
    stored = "R"
    if out == "pred":
        lines.append("selp.u32 %r3, 1, 0, R;")
        stored = "%r3"
    lines.append(f"ld.param.u64 %d0, [result]; mul.wide.u32 %d1, %r0, {width}; add.u64 %d0, %d0, %d1;")
    lines.append(f"st.global.b{8 * width} [%d0], {stored};")
    text = kernel(
        "\n".join(lines),
        [f".u64 {n}_address" for n, _ in zip("ABCD", inputs, strict=False)] + [".u64 result"],
        arch=arch,
    )
    run(text, *arrays, result, grid=-(-count // 64), block=threads or 64, arch=arch)
    return result
