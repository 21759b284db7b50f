"""What a PTX text says once it is parsed: a module of functions and variables, their instructions and operands."""

from __future__ import annotations

from dataclasses import dataclass, field

from .faults import PtxSyntaxError, UnknownInstruction

TYPE_BITS = {
    "pred": 1, "b8": 8, "u8": 8, "s8": 8, "b16": 16, "u16": 16, "s16": 16, "f16": 16, "bf16": 16,
    "b32": 32, "u32": 32, "s32": 32, "f32": 32, "f16x2": 32, "bf16x2": 32, "u16x2": 32, "s16x2": 32,
    "b64": 64, "u64": 64, "s64": 64, "f64": 64, "f32x2": 64, "b128": 128,
}  # fmt: skip


@dataclass(frozen=True)
class Register:
    """A register of a function: its place in the function's register file and its width in bits (1: predicate)."""

    name: str
    index: int
    bits: int


@dataclass(frozen=True)
class Special:
    """A special register such as %tid.x."""

    name: str


@dataclass(frozen=True)
class Immediate:
    """A literal. `bits` holds the IEEE pattern of 0f and 0d literals together with its width."""

    value: int | float
    pattern_bits: int = 0


@dataclass(frozen=True)
class Symbol:
    """A variable, parameter, function or label, by name, with a constant offset."""

    name: str
    offset: int = 0


@dataclass(frozen=True)
class Address:
    """[base + offset], and for tensor copies the coordinates and further lists."""

    base: Operand
    offset: int = 0
    extra: tuple[Operand, ...] = ()


@dataclass(frozen=True)
class Vector:
    """{a, b, ...}"""

    items: tuple[Operand, ...]


@dataclass(frozen=True)
class Pair:
    """a|b, the two destinations of setp, shfl, match and elect."""

    first: Operand
    second: Operand


@dataclass(frozen=True)
class Negated:
    """!%p"""

    operand: Operand


@dataclass(frozen=True)
class Group:
    """(a, b, ...), the argument lists of call."""

    items: tuple[Operand, ...]


@dataclass(frozen=True)
class Sink:
    """_, a destination that is not wanted."""


Operand = Register | Special | Immediate | Symbol | Address | Vector | Pair | Negated | Group | Sink


@dataclass(frozen=True)
class Variable:
    """A declared variable or parameter: name, state space, alignment and size in bytes, initial bytes if any."""

    name: str
    space: str
    alignment: int
    size: int
    initial: bytes | None = None
    external: bool = False
    references: tuple[tuple[int, str, int], ...] = ()


@dataclass(frozen=True)
class Instruction:
    """One instruction: opcode 'ld', qualifiers ('global', 'v4', 'f32'), operands, guard, line number and text."""

    opcode: str
    qualifiers: tuple[str, ...]
    operands: tuple[Operand, ...]
    guard: tuple[Register, bool] | None
    line: int
    text: str
    scopes: tuple[int, ...] = (0,)

    @property
    def name(self) -> str:
        """The full name, as written: ld.global.v4.f32"""
        return ".".join((self.opcode, *self.qualifiers))

    def has(self, qualifier: str) -> bool:
        """Whether the qualifier is present."""
        return qualifier in self.qualifiers

    def unknown(self, what: str = "") -> UnknownInstruction:
        """The exception for a form that is not implemented."""
        return UnknownInstruction(f"line {self.line}: {self.name}{': ' + what if what else ''}: {self.text}")


@dataclass
class Function:
    """A kernel (.entry) or device function (.func)."""

    name: str
    is_kernel: bool
    parameters: list[Variable] = field(default_factory=list)
    returns: list[Variable] = field(default_factory=list)
    registers: list[Register] = field(default_factory=list)
    variables: dict[str, Variable] = field(default_factory=dict)
    body: list[Instruction] = field(default_factory=list)
    labels: dict[tuple[int, str], int] = field(default_factory=dict)
    branch_tables: dict[str, list[str]] = field(default_factory=dict)
    directives: dict[str, tuple[int, ...]] = field(default_factory=dict)
    defined: bool = True

    def label(self, name: str, scopes: tuple[int, ...]) -> int:
        """Index into `body` of the label as seen from inside these nested scopes: inline assembly repeats labels."""
        for scope in reversed(scopes):
            if (scope, name) in self.labels:
                return self.labels[scope, name]
        raise PtxSyntaxError(f"{self.name}: no label {name}")


@dataclass
class Module:
    """All of one PTX text. `storage` is filled by the memory that the module is first used with."""

    version: str = ""
    target: str = ""
    variables: dict[str, Variable] = field(default_factory=dict)
    functions: dict[str, Function] = field(default_factory=dict)
    storage: dict[str, object] = field(default_factory=dict)

    @property
    def kernels(self) -> dict[str, Function]:
        """The entry functions by name."""
        return {name: f for name, f in self.functions.items() if f.is_kernel}
