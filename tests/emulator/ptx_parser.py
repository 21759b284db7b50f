"""Parse PTX text into a `Module`.

The text is split into statements (ended by ';', or opening and closing a scope, or a label); a statement is an
instruction, a declaration or a directive. Register names are resolved while parsing, so that the scopes which inline
assembly opens may reuse names. Debug directives (.loc, .file, .section) and pragmas are skipped; any other directive
that is not known raises.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

from .faults import PtxSyntaxError, UnknownInstruction

TYPE_BITS = {
    "pred": 1, "b8": 8, "u8": 8, "s8": 8, "b16": 16, "u16": 16, "s16": 16, "f16": 16, "bf16": 16,
    "b32": 32, "u32": 32, "s32": 32, "f32": 32, "f16x2": 32, "bf16x2": 32, "u16x2": 32, "s16x2": 32,
    "b64": 64, "u64": 64, "s64": 64, "f64": 64, "f32x2": 64, "b128": 128,
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------- operands


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


# ------------------------------------------------------------------------------------------- module and functions


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


def parse(text: str) -> Module:
    """Parse PTX text."""
    return _Parser(text).module


# ---------------------------------------------------------------------------------------------------- statements

_LABEL = re.compile(r"\s*([A-Za-z_$%][\w$]*)\s*:(?!:)")
_LINE_DIRECTIVES = re.compile(r"\s*\.(loc|file|version|target|address_size)\b(.*)")
_QUOTED = re.compile(r'"[^"]*"')


def _without_comments(text: str) -> str:
    text = re.sub(r"/\*.*?\*/", lambda m: "\n" * m.group(0).count("\n"), text, flags=re.S)
    return re.sub(r"//[^\n]*", "", text)


def _statements(text: str, header: dict[str, str]) -> Iterator[tuple[str, str, int]]:
    """Yield (kind, text, line), kind one of 'statement', 'label', '{', '}'."""
    lines = []
    for line in _without_comments(text).split("\n"):
        match = _LINE_DIRECTIVES.match(line)
        if match:
            header.setdefault(match.group(1), match.group(2).strip())
            line = ""
        lines.append(line)
    source = "\n".join(lines)
    position, line, start, depth = 0, 1, 0, 0
    length = len(source)
    start_line: int | None = None
    while position < length:
        char = source[position]
        if char == '"':
            position = source.index('"', position + 1)
        elif char == "\n":
            line += 1
        elif char == ";" and depth == 0:
            yield "statement", source[start:position].strip(), start_line or line
            start, start_line = position + 1, None
        elif char == "{" and depth == 0 and _opens_scope(source[start:position]):
            head = source[start:position].strip()
            if head:
                yield "statement", head, start_line or line
            yield "{", head, line
            start, start_line = position + 1, None
        elif char in "{([":
            depth += 1
        elif char == "}" and depth == 0:
            if source[start:position].strip():
                raise PtxSyntaxError(f"line {line}: statement without ';': {source[start:position].strip()}")
            yield "}", "", line
            start, start_line = position + 1, None
        elif char in "})]":
            depth -= 1
        elif char == ":" and depth == 0:
            match = _LABEL.match(source, start)
            if match and match.end() == position + 1:
                yield "label", match.group(1), line
                start, start_line = position + 1, None
        elif start_line is None and not char.isspace():
            start_line = line
        position += 1
    if source[start:].strip():
        raise PtxSyntaxError(f"line {line}: text after the last statement: {source[start:].strip()[:80]}")


def _opens_scope(head: str) -> bool:
    """A '{' opens a scope at the start of a statement and after a function's header, else it opens a vector."""
    head = head.strip()
    return not head or bool(re.match(r"(\.(visible|weak|extern|common)\s+)*\.(entry|func|section)\b", head))


def _split(text: str, separator: str = ",") -> list[str]:
    """Split at separators that are outside brackets."""
    parts, depth, start = [], 0, 0
    for position, char in enumerate(text):
        if char in "([{":
            depth += 1
        elif char in ")]}":
            depth -= 1
        elif char == separator and depth == 0:
            parts.append(text[start:position].strip())
            start = position + 1
    last = text[start:].strip()
    return [*parts, last] if last or parts else []


_INTEGER = re.compile(r"[-+]?(0[xX][0-9a-fA-F]+|0[bB][01]+|\d+)[uU]?$")
_SPECIAL = re.compile(
    r"%(tid|ntid|ctaid|nctaid|clusterid|nclusterid|cluster_ctaid|cluster_nctaid)(\.[xyzw])?$"
    r"|%(laneid|warpid|nwarpid|smid|nsmid|gridid|cluster_ctarank|cluster_nctarank|is_explicit_cluster|clock|clock_hi"
    r"|clock64|globaltimer|globaltimer_lo|globaltimer_hi|lanemask_(eq|le|lt|ge|gt)|dynamic_smem_size|total_smem_size"
    r"|aggr_smem_size|reserved_smem_offset_\w+|envreg\d+|pm\d+)$"
)


def parse_integer(text: str) -> int:
    """An integer literal of PTX: decimal, hexadecimal, octal or binary, optional sign and U."""
    text = text.strip().rstrip("uU")
    sign = -1 if text.startswith("-") else 1
    digits = text.lstrip("+-")
    if len(digits) > 1 and digits[0] == "0" and digits[1].isdigit():
        return sign * int(digits, 8)
    return sign * int(digits, 0)


class _Parser:
    def __init__(self, text: str) -> None:
        self.module = Module()
        self.function: Function | None = None
        self.scopes: list[dict[str, Register]] = []
        self.scope_numbers: list[int] = []
        self.next_scope = 1
        self.symbols: list[dict[str, str]] = []
        self.skip_depth = 0
        self.line = 0
        header: dict[str, str] = {}
        pending: Function | None = None
        for kind, statement, line in _statements(text, header):
            self.line = line
            if self.skip_depth:
                self.skip_depth += {"{": 1, "}": -1}.get(kind, 0)
            elif kind == "{":
                if statement.startswith(".section"):
                    self.skip_depth = 1
                else:
                    self._open(pending)
                    pending = None
            elif kind == "}":
                self._close()
            elif kind == "label":
                self._label(statement)
            elif statement.startswith(".section"):
                continue
            elif self.function is None:
                pending = self._top_level(statement)
            else:
                self._in_function(statement)
        self.module.version = header.get("version", "")
        self.module.target = header.get("target", "").split(",")[0].strip()

    # ------------------------------------------------------------------------------------------- scopes and names

    def _open(self, pending: Function | None) -> None:
        if self.function is None:
            if pending is None:
                raise PtxSyntaxError(f"line {self.line}: '{{' outside a function")
            self.function = pending
            pending.defined = True
        self.scopes.append({})
        self.symbols.append({})
        self.scope_numbers.append(self.next_scope if self.scope_numbers else 0)
        self.next_scope += 1

    def _close(self) -> None:
        if not self.scopes:
            raise PtxSyntaxError(f"line {self.line}: '}}' without '{{'")
        self.scopes.pop()
        self.symbols.pop()
        self.scope_numbers.pop()
        if not self.scopes:
            assert self.function is not None
            self.module.functions[self.function.name] = self.function
            self.function = None

    def _label(self, name: str) -> None:
        assert self.function is not None
        key = (self.scope_numbers[-1], name)
        if key in self.function.labels:
            raise PtxSyntaxError(f"line {self.line}: label {name} appears twice")
        self.function.labels[key] = len(self.function.body)
        self._last_label = name

    def _declare_registers(self, statement: str) -> None:
        assert self.function is not None
        match = re.match(r"\.reg\s*\.(\w+)\s*(.*)", statement, re.S)
        if not match:
            raise PtxSyntaxError(f"line {self.line}: {statement}")
        type_name, names_text = match.groups()
        if type_name.startswith("v") and type_name[1:].isdigit():
            raise UnknownInstruction(f"line {self.line}: vector registers: {statement}")
        bits = TYPE_BITS.get(type_name)
        if bits is None:
            raise UnknownInstruction(f"line {self.line}: register type .{type_name}")
        for name in _split(names_text):
            many = re.match(r"(.+)<(\d+)>$", name)
            names = [f"{many.group(1)}{i}" for i in range(int(many.group(2)))] if many else [name]
            for one in names:
                register = Register(one, len(self.function.registers), bits)
                self.function.registers.append(register)
                self.scopes[-1][one] = register

    def _register(self, name: str) -> Register | None:
        for scope in reversed(self.scopes):
            if name in scope:
                return scope[name]
        return None

    def _symbol(self, name: str) -> str:
        for scope in reversed(self.symbols):
            if name in scope:
                return scope[name]
        return name

    # ------------------------------------------------------------------------------------------------ declarations

    def _top_level(self, statement: str) -> Function | None:
        words = re.sub(r"^(\.(visible|weak|extern|common|alias)\s+)*", "", statement)
        if re.match(r"\.(entry|func)\b", words):
            return self._header(words, defined=not statement.startswith(".extern"))
        if re.match(r"\.(global|const|shared)\b", words):
            variable = self._variable(words, external=".extern" in statement.split(words)[0])
            self.module.variables[variable.name] = variable
            return None
        if statement.startswith(".pragma") or not statement:
            return None
        raise UnknownInstruction(f"line {self.line}: directive: {statement[:120]}")

    def _header(self, text: str, defined: bool) -> Function:
        text = re.sub(r"\s+", " ", text)
        is_kernel = text.startswith(".entry")
        rest = text.split(" ", 1)[1].strip()
        rest = re.sub(r"^(\.(noreturn|attribute\s*\([^)]*\))\s*)+", "", rest)
        returns: list[Variable] = []
        if rest.startswith("("):
            inside, rest = _parenthesis(rest)
            returns = [self._variable(p) for p in _split(inside)]
        match = re.match(r"([\w$%.]+)\s*", rest)
        if not match:
            raise PtxSyntaxError(f"line {self.line}: function header: {text[:120]}")
        name, rest = match.group(1), rest[match.end() :]
        parameters: list[Variable] = []
        if rest.startswith("("):
            inside, rest = _parenthesis(rest)
            parameters = [self._variable(p) for p in _split(inside)]
        function = Function(name, is_kernel, parameters, returns, defined=False)
        for key, values in re.findall(r"\.(\w+)((?:\s*[\d,]+)*)", rest):
            function.directives[key] = tuple(int(v) for v in re.findall(r"\d+", values))
        self.module.functions.setdefault(name, function)
        return function

    def _variable(self, text: str, external: bool = False) -> Variable:
        declaration, _, initial = text.partition("=")
        tokens = re.findall(r"\.\w+(?:::\w+)?|[\w$%]+|\[[^\]]*\]|<\d+>|\([^)]*\)", declaration)
        space, type_name, name, alignment, count, repeat, vector = "", "", "", 0, 1, 1, 1
        position = 0
        while position < len(tokens):
            token = tokens[position]
            if token in (".align",):
                alignment = int(tokens[position + 1])
                position += 1
            elif token in (".ptr",):
                while position + 1 < len(tokens) and tokens[position + 1] in (
                    ".global",
                    ".const",
                    ".shared",
                    ".local",
                    ".param",
                ):
                    position += 1
                if position + 1 < len(tokens) and tokens[position + 1] == ".align":
                    position += 2
            elif token in (".v2", ".v4"):
                vector = int(token[2:])
            elif token.startswith(".") and token[1:] in TYPE_BITS:
                type_name = token[1:]
            elif token in (".param", ".global", ".const", ".shared", ".local", ".shared::cta", ".reg"):
                space = token[1:]
            elif token.startswith("["):
                count *= parse_integer(token[1:-1]) if token[1:-1].strip() else 0
            elif token.startswith("<"):
                repeat = int(token[1:-1])
            elif token in (".visible", ".weak", ".extern", ".common", ".managed", ".unified"):
                pass
            elif token == ".attribute":
                position += 1
            elif token.startswith("."):
                raise UnknownInstruction(f"line {self.line}: declaration {text.strip()[:120]}")
            else:
                name = token
            position += 1
        if not type_name or not name or repeat != 1:
            raise UnknownInstruction(f"line {self.line}: declaration {text.strip()[:120]}")
        element = TYPE_BITS[type_name] // 8 * vector
        data, references = self._initial(initial, type_name, element * count) if initial.strip() else (None, ())
        return Variable(
            name, space.replace("::cta", ""), alignment or element, element * count, data, external, references
        )

    def _initial(self, text: str, type_name: str, size: int) -> tuple[bytes, tuple[tuple[int, str, int], ...]]:
        data = bytearray()
        references = []
        width = TYPE_BITS[type_name] // 8
        for item in _split(text.replace("{", " ").replace("}", " ").strip()):
            if not item:
                continue
            if _INTEGER.match(item):
                data += (parse_integer(item) & ((1 << (8 * width)) - 1)).to_bytes(width, "little")
            elif item[:2] in ("0f", "0F"):
                data += int(item[2:], 16).to_bytes(4, "little")
            elif item[:2] in ("0d", "0D"):
                data += int(item[2:], 16).to_bytes(8, "little")
            elif type_name in ("f32", "f64"):
                data += struct.pack("<f" if type_name == "f32" else "<d", float(item))
            else:
                match = re.match(r"(?:generic\s*\(\s*)?([\w$%]+)\s*\)?\s*(?:\+\s*(\d+))?$", item)
                if not match or width != 8:
                    raise UnknownInstruction(f"line {self.line}: initial value {item}")
                references.append((len(data), match.group(1), int(match.group(2) or 0)))
                data += bytes(8)
        return bytes(data).ljust(size, b"\0"), tuple(references)

    # ------------------------------------------------------------------------------------------------ instructions

    def _in_function(self, statement: str) -> None:
        assert self.function is not None
        if not statement:
            return
        if statement.startswith(".reg"):
            self._declare_registers(statement)
        elif re.match(r"\.(param|shared|local|global|const)\b", statement):
            variable = self._variable(statement)
            unique = variable.name
            if unique in self.function.variables:
                unique = f"{variable.name}@{self.line}.{len(self.function.variables)}"
            self.symbols[-1][variable.name] = unique
            self.function.variables[unique] = variable
        elif statement.startswith(".branchtargets"):
            self.function.branch_tables[self._last_label] = _split(statement.split(None, 1)[1])
        elif re.match(r"\.(pragma|callprototype|calltargets|maxnreg|noreturn)\b", statement):
            return
        elif statement.startswith("."):
            raise UnknownInstruction(f"line {self.line}: directive: {statement[:120]}")
        else:
            self.function.body.append(self._instruction(statement))

    def _instruction(self, statement: str) -> Instruction:
        text = re.sub(r"\s+", " ", statement)
        guard: tuple[Register, bool] | None = None
        rest = text
        if rest.startswith("@"):
            match = re.match(r"@\s*(!?)\s*([\w$%]+)\s*(.*)", rest)
            register = self._register(match.group(2)) if match else None
            if not match or register is None:
                raise PtxSyntaxError(f"line {self.line}: guard: {text}")
            guard, rest = (register, bool(match.group(1))), match.group(3)
        name, _, arguments = rest.partition(" ")
        if "{" in name or "[" in name or "(" in name:  # no blank after the opcode
            cut = min(i for i in (name.find(c) for c in "{[(") if i >= 0)
            name, arguments = name[:cut], rest[cut:]
        opcode, *qualifiers = name.split(".")
        if not re.match(r"[a-z][a-z0-9_]*$", opcode):
            raise PtxSyntaxError(f"line {self.line}: not an instruction: {text}")
        operands = tuple(self._operand(part) for part in _split(arguments.strip()))
        return Instruction(opcode, tuple(qualifiers), operands, guard, self.line, text, tuple(self.scope_numbers))

    def _operand(self, text: str) -> Operand:
        text = text.strip()
        if text == "_":
            return Sink()
        if text.startswith("{"):
            return Vector(tuple(self._operand(part) for part in _split(text[1:-1])))
        if text.startswith("("):
            return Group(tuple(self._operand(part) for part in _split(text[1:-1])))
        if text.startswith("["):
            return self._address(text[1:-1])
        if text.startswith("!"):
            return Negated(self._operand(text[1:]))
        if "|" in text:
            first, second = text.split("|")
            return Pair(self._operand(first), self._operand(second))
        register = self._register(text)
        if register is not None:
            return register
        if text.startswith("%") and _SPECIAL.match(text):
            return Special(text)
        if _INTEGER.match(text):
            return Immediate(parse_integer(text))
        if re.match(r"0[fF][0-9a-fA-F]{8}$", text):
            return Immediate(int(text[2:], 16), 32)
        if re.match(r"0[dD][0-9a-fA-F]{16}$", text):
            return Immediate(int(text[2:], 16), 64)
        if re.match(r"[-+]?(\d+\.\d*|\.\d+|\d+)([eE][-+]?\d+)?$", text):
            return Immediate(float(text))
        if text == "WARP_SZ":
            return Immediate(32)
        match = re.match(r"([A-Za-z_$%][\w$%.]*)\s*(?:([+-])\s*(\w+))?$", text)
        if match and not (text.startswith("%") and self._symbol(match.group(1)) == match.group(1) and "." in text):
            offset = parse_integer(match.group(3)) if match.group(3) else 0
            return Symbol(self._symbol(match.group(1)), -offset if match.group(2) == "-" else offset)
        raise PtxSyntaxError(f"line {self.line}: operand {text}")

    def _address(self, text: str) -> Address:
        parts = _split(text)
        match = re.match(r"(.+?)\s*([+-])\s*([-+]?\s*\w+)$", parts[0])
        base, offset = parts[0], 0
        if match and not _INTEGER.match(parts[0]):
            base = match.group(1).strip()
            offset = parse_integer(match.group(3).replace(" ", "")) * (-1 if match.group(2) == "-" else 1)
        operand = self._operand(base)
        if isinstance(operand, Symbol) and operand.offset:
            offset += operand.offset
            operand = Symbol(operand.name)
        return Address(operand, offset, tuple(self._operand(part) for part in parts[1:]))


def _parenthesis(text: str) -> tuple[str, str]:
    """Split '(inside) rest'."""
    depth = 0
    for position, char in enumerate(text):
        depth += {"(": 1, ")": -1}.get(char, 0)
        if depth == 0:
            return text[1:position], text[position + 1 :].strip()
    raise PtxSyntaxError(f"parenthesis is not closed: {text[:80]}")
