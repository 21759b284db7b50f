"""The library's face to the linker: what it exports, and what it needs."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

# What glibc provides, and nothing else: no driver, no CUDA runtime, no torch, no Python, no libstdc++ of a certain age.
GLIBC = {"libc.so.6", "libm.so.6", "libdl.so.2", "librt.so.1", "libpthread.so.0"}
GLIBC |= {"ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1"}
CPP_RUNTIME = {"libstdc++.so.6", "libgcc_s.so.1"}

# With what a library could start a compiler.
PROCESSES = re.compile(r"(v?fork|exec[lv]p?e?|execvpe|fexecve|posix_spawnp?|system|popen)")


def binutil(name: str, *arguments: str | Path) -> str:
    """What a tool of binutils prints; every C++ compiler brings them."""
    program = shutil.which(name)
    assert program, f"{name} is not installed; it comes with the C++ compiler (binutils)"
    return subprocess.run([program, *arguments], capture_output=True, text=True, check=True).stdout


def dynamic(path: Path, tag: str) -> set[str]:
    """The values of a tag of the dynamic section."""
    return set(re.findall(rf"\({tag}\).*\[(.*)\]", binutil("readelf", "-dW", path)))


def symbols(path: Path, which: str) -> set[str]:
    """The dynamic symbols, "--defined-only" or "--undefined-only", without their versions."""
    lines = binutil("nm", "-D", which, path).splitlines()
    return {line.split()[-1].partition("@")[0] for line in lines if " A " not in line}  # A: the version's own name


def run_paths(path: Path) -> set[str]:
    return dynamic(path, "RUNPATH") | dynamic(path, "RPATH")


def library_faults(path: Path, declared: set[str], build_folder: Path) -> list[str]:
    """What keeps a library from being one that loads everywhere, beside anything, and starts no compiler."""
    exported, needed = symbols(path, "--defined-only"), dynamic(path, "NEEDED")
    found = {
        "exported and not declared": exported - declared,
        "declared and not exported": declared - exported,
        "needed": needed - GLIBC,
        "looked for in": run_paths(path),
        "could start a process by": {name for name in symbols(path, "--undefined-only") if PROCESSES.fullmatch(name)},
        "holds the path": {text for text in (str(build_folder), "pip-build-env") if text.encode() in path.read_bytes()},
    }
    return [f"{fault}: {', '.join(sorted(names))}" for fault, names in found.items() if names]


@pytest.fixture
def module_path(package: Path) -> Path:
    (path,) = package.glob("_native.*.so")
    return path


@pytest.fixture(scope="module")
def declared(package: Path) -> set[str]:
    """The functions that the headers mark as the interface."""
    text = "".join(path.read_text() for path in sorted((package / "include" / "dsv4").glob("*.h")))
    text = re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL)
    names = set(re.findall(r"^DSV4_API\b[^;(]*?(\w+)\s*\(", text, flags=re.MULTILINE))
    assert {"dsv4_version", "dsv4_hash_router", "dsv4_observe_launches"} <= names  # the parsing works
    return names


def test_library_loads_everywhere_and_exports_the_interface_alone(
    library_path: Path, declared: set[str], root: Path
) -> None:
    assert library_faults(library_path, declared, root) == []


BAD = """
#include <cstdlib>
#include <string>
extern "C" int dsv4_version() { return std::system(__FILE__); }
extern "C" std::string* helper() { return new std::string; }
"""


def test_bad_library_is_refused(declared: set[str], tmp_path: Path) -> None:
    (tmp_path / "bad.cpp").write_text(BAD)
    command = [
        "c++",
        "-shared",
        "-fPIC",
        "-Wl,-rpath," + str(tmp_path),
        tmp_path / "bad.cpp",
        "-o",
        tmp_path / "bad.so",
    ]
    subprocess.run(command, check=True)
    faults = {text.partition(":")[0]: text for text in library_faults(tmp_path / "bad.so", declared, tmp_path)}
    assert len(faults) == 6, faults
    assert "helper" in faults["exported and not declared"]
    assert "dsv4_hash_router" in faults["declared and not exported"]
    assert "libstdc++" in faults["needed"]
    assert faults["could start a process by"].endswith(": system")


@pytest.mark.torch
def test_every_op_has_its_c_function(library_path: Path) -> None:
    from dsv4_kernels.ops import OPS

    exported = symbols(library_path, "--defined-only")
    assert {name for name in OPS if f"dsv4_{name}" not in exported} == set()


def test_module_needs_only_the_library(module_path: Path, root: Path) -> None:
    needed = dynamic(module_path, "NEEDED")
    (own,) = (name for name in needed if name.startswith("libdsv4_kernels.so"))
    assert needed - {own} <= GLIBC | CPP_RUNTIME
    assert run_paths(module_path) == {"$ORIGIN/lib"}
    data = module_path.read_bytes()
    assert (data.find(str(root).encode()), data.find(b"pip-build-env")) == (-1, -1)


def test_soname_is_the_name_that_the_module_needs(library_path: Path, module_path: Path) -> None:
    (soname,) = dynamic(library_path, "SONAME")
    assert soname in dynamic(module_path, "NEEDED")
    assert (library_path.parent / soname).exists()
