"""Parse PTX text into a `Module`.

The text is split into statements (ended by ';', or opening and closing a scope, or a label); a statement is an
instruction, a declaration or a directive. Register names are resolved while parsing, so that the scopes which inline
assembly opens may reuse names. Debug directives (.loc, .file, .section) and pragmas are skipped; any other directive
that is not known raises.
"""

from __future__ import annotations

import re

from .faults import PtxSyntaxError, UnknownInstruction
from .ptx_declarations import function_header, variable
from .ptx_module import (
    TYPE_BITS,
    Address,
    Function,
    Group,
    Immediate,
    Instruction,
    Module,
    Negated,
    Operand,
    Pair,
    Register,
    Sink,
    Special,
    Symbol,
    Vector,
)
from .ptx_text import INTEGER, parse_integer, split, statements

_SPECIAL = re.compile(
    r"%(tid|ntid|ctaid|nctaid|clusterid|nclusterid|cluster_ctaid|cluster_nctaid)(\.[xyzw])?$"
    r"|%(laneid|warpid|nwarpid|smid|nsmid|gridid|cluster_ctarank|cluster_nctarank|is_explicit_cluster|clock|clock_hi"
    r"|clock64|globaltimer|globaltimer_lo|globaltimer_hi|lanemask_(eq|le|lt|ge|gt)|dynamic_smem_size|total_smem_size"
    r"|aggr_smem_size|reserved_smem_offset_\w+|envreg\d+|pm\d+)$"
)


def parse(text: str) -> Module:
    """Parse PTX text."""
    return _Parser(text).module


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
        for kind, statement, line in statements(text, header):
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
        for name in split(names_text):
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
            header = function_header(words, self.line)
            self.module.functions.setdefault(header.name, header)
            return header
        if re.match(r"\.(global|const|shared)\b", words):
            declared = variable(words, self.line, external=".extern" in statement.split(words)[0])
            self.module.variables[declared.name] = declared
            return None
        if statement.startswith(".pragma") or not statement:
            return None
        raise UnknownInstruction(f"line {self.line}: directive: {statement[:120]}")

    # ------------------------------------------------------------------------------------------------ instructions

    def _in_function(self, statement: str) -> None:
        assert self.function is not None
        if not statement:
            return
        if statement.startswith(".reg"):
            self._declare_registers(statement)
        elif re.match(r"\.(param|shared|local|global|const)\b", statement):
            declared = variable(statement, self.line)
            unique = declared.name
            if unique in self.function.variables:
                unique = f"{declared.name}@{self.line}.{len(self.function.variables)}"
            self.symbols[-1][declared.name] = unique
            self.function.variables[unique] = declared
        elif statement.startswith(".branchtargets"):
            self.function.branch_tables[self._last_label] = split(statement.split(None, 1)[1])
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
        operands = tuple(self._operand(part) for part in split(arguments.strip()))
        return Instruction(opcode, tuple(qualifiers), operands, guard, self.line, text, tuple(self.scope_numbers))

    def _operand(self, text: str) -> Operand:
        text = text.strip()
        if text == "_":
            return Sink()
        if text.startswith("{"):
            return Vector(tuple(self._operand(part) for part in split(text[1:-1])))
        if text.startswith("("):
            return Group(tuple(self._operand(part) for part in split(text[1:-1])))
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
        if INTEGER.match(text):
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
        parts = split(text)
        match = re.match(r"(.+?)\s*([+-])\s*([-+]?\s*\w+)$", parts[0])
        base, offset = parts[0], 0
        if match and not INTEGER.match(parts[0]):
            base = match.group(1).strip()
            offset = parse_integer(match.group(3).replace(" ", "")) * (-1 if match.group(2) == "-" else 1)
        operand = self._operand(base)
        if isinstance(operand, Symbol) and operand.offset:
            offset += operand.offset
            operand = Symbol(operand.name)
        return Address(operand, offset, tuple(self._operand(part) for part in parts[1:]))
