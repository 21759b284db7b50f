"""The library's face to the linker: what it exports, and what it needs."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

# What glibc provides, and nothing else: no driver, no CUDA runtime, no torch, no Python, no libstdc++ of a certain age.
GLIBC = {"libc.so.6", "libm.so.6", "libdl.so.2", "librt.so.1", "libpthread.so.0", "ld-linux-x86-64.so.2"}
CPP_RUNTIME = {"libstdc++.so.6", "libgcc_s.so.1"}


def binutil(name: str, *arguments: str | Path) -> str:
    """What a tool of binutils prints; every C++ compiler brings them."""
    program = shutil.which(name)
    assert program, f"{name} is not installed; it comes with the C++ compiler (binutils)"
    return subprocess.run([program, *arguments], capture_output=True, text=True, check=True).stdout


def dynamic(path: Path, tag: str) -> set[str]:
    """The values of a tag of the dynamic section."""
    return set(re.findall(rf"\({tag}\).*\[(.*)\]", binutil("readelf", "-dW", path)))


@pytest.fixture
def module_path(package: Path) -> Path:
    (path,) = package.glob("_native.*.so")
    return path


def declared_functions(headers: list[Path]) -> set[str]:
    """The functions that the headers mark as the interface."""
    text = re.sub(r"/\*.*?\*/", "", "".join(path.read_text() for path in headers), flags=re.DOTALL)
    return set(re.findall(r"^DSV4_API\b[^;(]*?(\w+)\s*\(", text, flags=re.MULTILINE))


def test_exports_are_what_the_headers_declare(package: Path, library_path: Path) -> None:
    headers = sorted((package / "include" / "dsv4").glob("*.h"))
    declared = declared_functions(headers)
    assert {"dsv4_version", "dsv4_hash_router", "dsv4_observe_launches"} <= declared  # the parsing works
    lines = binutil("nm", "-D", "--defined-only", library_path).splitlines()
    exported = {line.split()[-1].partition("@")[0] for line in lines if " A " not in line}  # A: the version's own name
    assert exported == declared


@pytest.mark.torch
def test_every_op_has_its_c_function(library_path: Path) -> None:
    from dsv4_kernels.op_table import OPS

    exported = binutil("nm", "-D", "--defined-only", library_path)
    assert {name for name in OPS if f" dsv4_{name}@" not in exported} == set()


def test_library_needs_only_glibc(library_path: Path) -> None:
    assert dynamic(library_path, "NEEDED") <= GLIBC


def test_module_needs_only_the_library(module_path: Path) -> None:
    needed = dynamic(module_path, "NEEDED")
    (own,) = (name for name in needed if name.startswith("libdsv4_kernels.so"))
    assert needed - {own} <= GLIBC | CPP_RUNTIME


def test_soname_is_the_name_that_the_module_needs(library_path: Path, module_path: Path) -> None:
    (soname,) = dynamic(library_path, "SONAME")
    assert soname in dynamic(module_path, "NEEDED")
    assert (library_path.parent / soname).exists()


def test_libraries_are_looked_for_in_the_package_only(library_path: Path, module_path: Path) -> None:
    assert dynamic(library_path, "RUNPATH") | dynamic(library_path, "RPATH") == set()
    assert dynamic(module_path, "RUNPATH") | dynamic(module_path, "RPATH") == {"$ORIGIN/lib"}


@pytest.mark.parametrize("which", ["library_path", "module_path"])
def test_no_path_of_the_build_machine_is_inside(which: str, root: Path, request: pytest.FixtureRequest) -> None:
    data = request.getfixturevalue(which).read_bytes()
    assert (data.find(str(root).encode()), data.find(b"pip-build-env")) == (-1, -1)
