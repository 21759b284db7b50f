"""The table of instructions: opcode -> the function that turns one parsed instruction into something executable.

Three kinds. A plain instruction is a callable of the active lanes. A control instruction decides where lanes go on. A
collective is executed by whole warps, or by the lanes that its member mask names, together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from .ptx_module import TYPE_BITS, Instruction

if TYPE_CHECKING:
    from .program import Scope
    from .wave import Active, Wave

Array = np.ndarray[Any, np.dtype[Any]]
Plain = Callable[["Active"], None]
Control = Callable[["Wave", "Active", int, tuple[int, ...]], "int | None"]
Members = Callable[["Active"], Array]
Collective: TypeAlias = "tuple[Plain, Members | None] | tuple[Plain, Members | None, int]"

PLAIN: dict[tuple[str, str], Callable[[Instruction, Scope], Plain]] = {}
CONTROL: dict[str, Callable[[Instruction, Scope], Control]] = {}
FINAL_CHECKS: list[Callable[[Wave], None]] = []  # run when all threads of a wave have ended
COLLECTIVE: dict[str, Callable[[Instruction, Scope], Collective]] = {}


def plain(
    *opcodes: str, types: Sequence[str] = ("",)
) -> Callable[[Callable[[Instruction, Scope], Plain]], Callable[[Instruction, Scope], Plain]]:
    """Register the builder of a plain instruction, for all types or for those whose last type is one of `types`."""

    def register(builder: Callable[[Instruction, Scope], Plain]) -> Callable[[Instruction, Scope], Plain]:
        for opcode in opcodes:
            for type_name in types:
                PLAIN[opcode, type_name] = builder
        return builder

    return register


def plain_builder(instruction: Instruction) -> Callable[[Instruction, Scope], Plain] | None:
    """The builder for the instruction's opcode and last type, or for its opcode with any type."""
    type_name = next((q for q in reversed(instruction.qualifiers) if q in TYPE_BITS), "")
    return PLAIN.get((instruction.opcode, type_name)) or PLAIN.get((instruction.opcode, ""))


def control(
    *opcodes: str,
) -> Callable[[Callable[[Instruction, Scope], Control]], Callable[[Instruction, Scope], Control]]:
    """Register the builder of a control instruction. The guard is handled before it is called."""

    def register(builder: Callable[[Instruction, Scope], Control]) -> Callable[[Instruction, Scope], Control]:
        for opcode in opcodes:
            CONTROL[opcode] = builder
        return builder

    return register


def collective(
    *opcodes: str,
) -> Callable[[Callable[[Instruction, Scope], Collective]], Callable[[Instruction, Scope], Collective]]:
    """Register the builder of a collective: (what the lanes do, their member masks or None for the whole warp)."""

    def register(builder: Callable[[Instruction, Scope], Collective]) -> Callable[[Instruction, Scope], Collective]:
        for opcode in opcodes:
            COLLECTIVE[opcode] = builder
        return builder

    return register
