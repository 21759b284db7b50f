"""Every function of the C interface with NULL and with structs of garbage: a refusal, never a crash.

Each function is called in a process of its own, which must end by itself. Its numbers are 0.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.package import abi, c_abi

FUNCTIONS = {
    match["name"]: (match["result"], match["arguments"])
    for line in abi.recorded()[1]
    if (match := re.fullmatch(r"function (?P<result>.+?)(?P<name>dsv4_\w+)\((?P<arguments>.*)\)", line))
}
SIZES = {m[1]: int(m[2]) for line in abi.recorded()[1] if (m := re.fullmatch(r"struct (\w+): (\d+) bytes", line))}

# Functions that take a pointer, with the struct that it leads to.
POINTED = {
    name: match[1]
    for name, (_, arguments) in FUNCTIONS.items()
    if (match := re.search(r"(?:const )?(dsv4_\w+)\* \w+", arguments))
}

CALL = """
import ctypes, sys
path, name, parameters, *structs = sys.argv[1:]
library = ctypes.CDLL(path)
library.dsv4_last_error.restype = ctypes.c_char_p
for one in structs:
    size, known, fill = map(int, one.split(","))
    struct = None
    if size:
        struct = (ctypes.c_ubyte * size)(*[fill] * size)
        ctypes.c_size_t.from_buffer(struct).value = known
    given = ctypes.c_void_p(ctypes.addressof(struct) if size else None)
    others = {"stream": None, "number": ctypes.c_size_t(0), "struct": given}
    status = getattr(library, name)(*(others[one] for one in parameters.split(",")))
    print(status, library.dsv4_last_error().decode(), flush=True)
"""

Struct = tuple[int, int, int]  # its bytes (0: NULL), its struct_size, what each other byte is


def call(library: Path, name: str, structs: list[Struct]) -> list[tuple[int, str]]:
    """Status and error text of a call with each of these structs."""
    parameters = ",".join(
        "struct" if "*" in one else "stream" if "stream" in one else "number" for one in FUNCTIONS[name][1].split(",")
    )
    command = [sys.executable, "-c", CALL, str(library), name, parameters]
    command += [",".join(map(str, one)) for one in structs]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, f"{name}: ended with {ran.returncode} after {ran.stdout}: {ran.stderr}"
    return [(int(status), text) for status, _, text in (line.partition(" ") for line in ran.stdout.splitlines())]


def test_the_list_is_whole() -> None:
    """Pointers that are not to structs: none but the name of an architecture."""
    others = {name for name, (_, arguments) in FUNCTIONS.items() if "*" in arguments} - POINTED.keys()
    assert others == {"dsv4_observe_launches"}
    assert len(POINTED) > 30
    assert set(POINTED.values()) <= SIZES.keys()


@pytest.mark.parametrize("name", POINTED)
def test_null_and_bad_structs_are_refused(library_path: Path, name: str) -> None:
    """NULL; a struct_size that cannot be; fields of garbage: all zero, all ones, and numbers that overflow products."""
    size = SIZES[POINTED[name]]
    op = name.removeprefix("dsv4_")
    impossible = (0, 7, size + 1, 2**64 - 1) if POINTED[name] != "dsv4_tensor" else ()  # which has no struct_size
    fills = (0, 1, 0x7F, 0x80, 0xFF) if POINTED[name].endswith("_args") else ()  # which are read, not written
    structs = [(0, 0, 0), *((size, known, 0) for known in impossible), *((size, size, fill) for fill in fills)]
    results = call(library_path, name, structs)
    assert len(results) == len(structs)
    assert all(status == c_abi.INVALID_ARGUMENT for status, _ in results)
    null, *texts = [text for _, text in results]
    assert re.fullmatch(rf"{op}: \w+: expected .+, got NULL", null), null
    for known, text in zip(impossible, texts, strict=False):
        assert text.startswith(f"{op}: struct_size: expected up to {size}, got {known}; "), text
    for text in texts[len(impossible) :]:
        assert re.fullmatch(rf"{op}: .+: expected .+, got .+", text), text


def test_functions_of_numbers_take_any(library_path: Path) -> None:
    """Sizes of what cannot be are 0, and nothing overflows."""
    program = """
import ctypes, sys
library = ctypes.CDLL(sys.argv[1])
for name in sys.argv[2:]:
    function = getattr(library, name)
    function.restype = ctypes.c_int64
    for value in (0, -1, 2**31, -2**31, 2**63 - 1, -2**63):
        assert function(*[ctypes.c_int64(value)] * 3) is not None
print("right")
"""
    names = [n for n, (result, _) in FUNCTIONS.items() if result.strip() in ("size_t", "int64_t")]
    assert len(names) > 4
    ran = subprocess.run(
        [sys.executable, "-c", program, library_path, *names], capture_output=True, text=True, check=False
    )
    assert ran.stdout == "right\n", ran.stderr
    assert ran.returncode == 0
