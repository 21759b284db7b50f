"""PTX text cut into statements, lists and integers."""

from __future__ import annotations

import re
from collections.abc import Iterator

from .faults import PtxSyntaxError

_LABEL = re.compile(r"\s*([A-Za-z_$%][\w$]*)\s*:(?!:)")
_LINE_DIRECTIVES = re.compile(r"\s*\.(loc|file|version|target|address_size)\b(.*)")


def _without_comments(text: str) -> str:
    text = re.sub(r"/\*.*?\*/", lambda m: "\n" * m.group(0).count("\n"), text, flags=re.S)
    return re.sub(r"//[^\n]*", "", text)


def statements(text: str, header: dict[str, str]) -> Iterator[tuple[str, str, int]]:
    """Yield (kind, text, line), kind one of 'statement', 'label', '{', '}'."""
    lines = []
    for text_line in _without_comments(text).split("\n"):
        match = _LINE_DIRECTIVES.match(text_line)
        if match:
            header.setdefault(match.group(1), match.group(2).strip())
        lines.append("" if match else text_line)
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


def split(text: str, separator: str = ",") -> list[str]:
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


def parenthesis(text: str) -> tuple[str, str]:
    """Split '(inside) rest'."""
    depth = 0
    for position, char in enumerate(text):
        depth += {"(": 1, ")": -1}.get(char, 0)
        if depth == 0:
            return text[1:position], text[position + 1 :].strip()
    raise PtxSyntaxError(f"parenthesis is not closed: {text[:80]}")


INTEGER = re.compile(r"[-+]?(0[xX][0-9a-fA-F]+|0[bB][01]+|\d+)[uU]?$")


def parse_integer(text: str) -> int:
    """An integer literal of PTX: decimal, hexadecimal, octal or binary, optional sign and U."""
    text = text.strip().rstrip("uU")
    sign = -1 if text.startswith("-") else 1
    digits = text.lstrip("+-")
    if len(digits) > 1 and digits[0] == "0" and digits[1].isdigit():
        return sign * int(digits, 8)
    return sign * int(digits, 0)
