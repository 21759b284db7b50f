"""The C interface as a compiler sees it: layouts of structs, enumerators, constants, types, functions, a line each.

    python -m tests.package.abi        writes abi.txt anew, from the headers of this checkout

That is refused once the version in pyproject.toml is released (CHANGELOG.md has a section for it): engines are compiled
against what it was released with, so the interface changes with the version alone.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RECORD = Path(__file__).with_name("abi.txt")
HEADERS = ROOT / "csrc" / "include"

STRUCT = re.compile(r"typedef struct (\w+) \{(.*?)\} \1;", re.DOTALL)
ENUM = re.compile(r"typedef enum (\w+) \{(.*?)\} \1;", re.DOTALL)
FIELD = re.compile(r"(\w+)(?:\[[^]]*\])?;")
CONSTANT = re.compile(r"^#define (\w+) +\(?-?\d+\)?$", re.MULTILINE)
TYPE = re.compile(r"^typedef ([^{;]+);", re.MULTILINE)
FUNCTION = re.compile(r"^DSV4_API\s+([^;]+);", re.MULTILINE)


def declarations(text: str) -> tuple[list[tuple[str, str]], list[str]]:
    """What a C program shall print of a header, as pairs of printf's format and arguments; its types and functions."""
    text = re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL)
    printed = []
    for name, body in STRUCT.findall(text):
        printed.append((f"struct {name}: %zu bytes", f"sizeof({name})"))
        for field in FIELD.findall(body):
            printed.append(
                (f"  {field}: %zu bytes at %zu", f"sizeof((({name}*)0)->{field}), offsetof({name}, {field})")
            )
    for name, body in ENUM.findall(text):
        for enumerator in re.findall(r"([A-Z]\w*)\s*[=,]", body + ","):
            printed.append((f"enum {name}: {enumerator} = %d", f"(int){enumerator}"))
    printed += [(f"constant {constant} = %d", constant) for constant in CONSTANT.findall(text)]
    found = [("type", TYPE), ("function", FUNCTION)]
    return printed, [f"{kind} {' '.join(one.split())}" for kind, pattern in found for one in pattern.findall(text)]


def describe(include: Path) -> list[str]:
    """The interface that the headers below a folder declare."""
    headers = sorted((include / "dsv4").glob("*.h"))
    found = [declarations(header.read_text()) for header in headers]
    includes = "".join(f"#include <dsv4/{header.name}>\n" for header in headers)
    prints = "".join(f'  printf("{text}\\n", {values});\n' for printed, _ in found for text, values in printed)
    with tempfile.TemporaryDirectory() as folder:
        source, program = Path(folder) / "abi.c", Path(folder) / "abi"
        source.write_text(f"#include <stdio.h>\n{includes}int main(void) {{\n{prints}  return 0;\n}}\n")
        subprocess.run(["cc", "-std=c11", f"-I{include}", source, "-o", program], check=True)
        lines = subprocess.run([program], capture_output=True, text=True, check=True).stdout.splitlines()
    return lines + sorted(line for _, rest in found for line in rest)


def version() -> str:
    """Of the checkout."""
    (found,) = re.findall(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    return str(found)


def is_released(version: str) -> bool:
    """Whether the changelog has a section for it."""
    return f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text()


def recorded() -> tuple[str, list[str]]:
    """Version and lines of the record."""
    first, *lines = RECORD.read_text().splitlines()
    return first.removeprefix("version "), lines


def main() -> int:
    current = version(), describe(HEADERS)
    if RECORD.exists() and recorded()[0] == current[0] and recorded()[1] != current[1] and is_released(current[0]):
        print(f"abi: the C interface of {current[0]} is released; give the package another version first")
        return 1
    RECORD.write_text("\n".join([f"version {current[0]}", *current[1]]) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
