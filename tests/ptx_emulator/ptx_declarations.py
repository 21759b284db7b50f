"""Declarations in PTX text: headers of functions, and variables with their initial values."""

from __future__ import annotations

import re
import struct

from .faults import PtxSyntaxError, UnknownInstruction
from .ptx_module import TYPE_BITS, Function, Variable
from .ptx_text import INTEGER, parenthesis, parse_integer, split

_POINTED_TO = (".global", ".const", ".shared", ".local", ".param")


def function_header(text: str, line: int) -> Function:
    """Parse the header of a function or kernel: name, parameters, results and directives. It has no body yet."""
    text = re.sub(r"\s+", " ", text)
    is_kernel = text.startswith(".entry")
    rest = text.split(" ", 1)[1].strip()
    rest = re.sub(r"^(\.(noreturn|attribute\s*\([^)]*\))\s*)+", "", rest)
    returns: list[Variable] = []
    if rest.startswith("("):
        inside, rest = parenthesis(rest)
        returns = [variable(p, line) for p in split(inside)]
    match = re.match(r"([\w$%.]+)\s*", rest)
    if not match:
        raise PtxSyntaxError(f"line {line}: function header: {text[:120]}")
    name, rest = match.group(1), rest[match.end() :]
    parameters: list[Variable] = []
    if rest.startswith("("):
        inside, rest = parenthesis(rest)
        parameters = [variable(p, line) for p in split(inside)]
    function = Function(name, is_kernel, parameters, returns, defined=False)
    for key, values in re.findall(r"\.(\w+)((?:\s*[\d,]+)*)", rest):
        function.directives[key] = tuple(int(v) for v in re.findall(r"\d+", values))
    return function


def variable(text: str, line: int, external: bool = False) -> Variable:
    """Parse the declaration of a variable or parameter."""
    declaration, _, initial = text.partition("=")
    tokens = re.findall(r"\.\w+(?:::\w+)?|[\w$%]+|\[[^\]]*\]|<\d+>|\([^)]*\)", declaration)
    space, type_name, name, alignment, count, repeat, vector = "", "", "", 0, 1, 1, 1
    position = 0
    while position < len(tokens):
        token = tokens[position]
        if token == ".align":
            alignment = int(tokens[position + 1])
            position += 1
        elif token == ".ptr":
            while position + 1 < len(tokens) and tokens[position + 1] in _POINTED_TO:
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
            raise UnknownInstruction(f"line {line}: declaration {text.strip()[:120]}")
        else:
            name = token
        position += 1
    if not type_name or not name or repeat != 1:
        raise UnknownInstruction(f"line {line}: declaration {text.strip()[:120]}")
    element = TYPE_BITS[type_name] // 8 * vector
    data, references = _initial(initial, line, type_name, element * count) if initial.strip() else (None, ())
    return Variable(name, space.replace("::cta", ""), alignment or element, element * count, data, external, references)


def _initial(text: str, line: int, type_name: str, size: int) -> tuple[bytes, tuple[tuple[int, str, int], ...]]:
    data = bytearray()
    references = []
    width = TYPE_BITS[type_name] // 8
    for item in split(text.replace("{", " ").replace("}", " ").strip()):
        if not item:
            continue
        if INTEGER.match(item):
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
                raise UnknownInstruction(f"line {line}: initial value {item}")
            references.append((len(data), match.group(1), int(match.group(2) or 0)))
            data += bytes(8)
    return bytes(data).ljust(size, b"\0"), tuple(references)
