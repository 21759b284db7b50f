"""The wheel as a file: its size, and that it holds what users of Python and of C++ need, and nothing else."""

from __future__ import annotations

import json
import re
import sys
import zipfile
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

LIMIT_MB = 30

# Everything that may be in the wheel, as patterns below the package's folder.
EXPECTED = (
    r"(\w+/)*\w+\.py",
    r"py\.typed",
    r"_native\.pyi",
    r"_native\.cpython-\w+-x86_64-linux-gnu\.so",
    r"images\.json",
    r"include/dsv4/\w+\.h(pp)?",
    r"lib/libdsv4_kernels\.so(\.\d+)*",
    r"lib/sources\.sha256",
    r"lib/pkgconfig/dsv4_kernels\.pc",
    r"lib/cmake/dsv4_kernels/dsv4_kernels-config(-version|-release)?\.cmake",
)


@pytest.fixture(scope="module")
def names(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def test_size(wheel: Path) -> None:
    assert wheel.stat().st_size < LIMIT_MB * 1e6


def test_nothing_unexpected_is_inside(names: list[str]) -> None:
    package = [name.removeprefix("dsv4_kernels/") for name in names if name.startswith("dsv4_kernels/")]
    assert [name for name in package if not any(re.fullmatch(pattern, name) for pattern in EXPECTED)] == []
    others = {name.partition("/")[0] for name in names} - {"dsv4_kernels"}
    assert len(others) == 1, others
    assert re.fullmatch(r"dsv4_kernels-[\d.]+\.dist-info", others.pop())


@pytest.mark.parametrize("pattern", EXPECTED)
def test_every_part_is_inside(names: list[str], pattern: str) -> None:
    assert any(re.fullmatch("dsv4_kernels/" + pattern, name) for name in names)


def test_every_source_file_is_inside(names: list[str], root: Path) -> None:
    """Nothing was lost on the way: the headers and the Python package are those of the checkout."""
    wanted = {f"dsv4_kernels/include/dsv4/{path.name}" for path in (root / "csrc" / "include" / "dsv4").glob("*.h")}
    python = root / "python"
    wanted |= {str(path.relative_to(python)) for path in python.rglob("*") if path.suffix in (".py", ".pyi", ".typed")}
    assert wanted - set(names) == set()


def test_licence_travels_with_the_wheel(wheel: Path, root: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("dist-info/licenses/LICENSE"))
        text = archive.read(name).decode()
    assert text == (root / "LICENSE").read_text()
    assert "Apache License" in text


def test_metadata_asks_for_torch_loosely_and_for_no_compiler(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("dist-info/METADATA"))
        lines = archive.read(name).decode().splitlines()
    requirements = [line.removeprefix("Requires-Dist: ") for line in lines if line.startswith("Requires-Dist: ")]
    always = [requirement for requirement in requirements if "extra ==" not in requirement]
    assert "torch>=2.10" in always
    assert not [r for r in requirements if re.match(r"(triton|nvidia|pybind11|cuda)", r)]
    assert "License-Expression: Apache-2.0" in lines


def test_bill_of_materials_names_every_compiler_and_image(wheel: Path, root: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if "dist-info/sboms/" in name)  # PEP 770
        components = json.loads(archive.read(name))["components"]
        images = json.loads(archive.read("dsv4_kernels/images.json"))
    pinned = {
        tuple(requirement.partition(";")[0].strip().split("=="))
        for requirement in tomllib.loads((root / "pyproject.toml").read_text())["build-system"]["requires"]
        if "==" in requirement and "*" not in requirement
    }
    assert len(pinned) >= 7
    assert pinned - {(c["name"], c.get("version")) for c in components} == set()
    hashes = {(c["name"], h["content"]) for c in components for h in c.get("hashes", ())}
    assert hashes == {(image["symbol"], image["sha256"]) for image in images}
    references = [c["bom-ref"] for c in components]
    assert len(references) == len(set(references))
