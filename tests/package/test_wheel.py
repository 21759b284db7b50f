"""The wheel as a file: its size, and that it holds what users of Python and of C++ need, and nothing else."""

from __future__ import annotations

import json
import re
import sys
import zipfile
from pathlib import Path
from typing import Any

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
    r"_native\.cpython-\w+-(x86_64|aarch64)-linux-gnu\.so",
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
        return [name for name in archive.namelist() if not name.endswith("/")]  # auditwheel writes folders too


def test_size(wheel: Path) -> None:
    assert wheel.stat().st_size < LIMIT_MB * 1e6


def unexpected(names: list[str]) -> list[str]:
    """What a wheel of the package should not hold: sources, tests, PTX, other libraries."""
    package = [name for name in names if name.startswith("dsv4_kernels/")]
    return [n for n in package if not any(re.fullmatch("dsv4_kernels/" + pattern, n) for pattern in EXPECTED)]


def test_nothing_unexpected_is_inside(names: list[str]) -> None:
    assert unexpected(names) == []
    bad = [f"dsv4_kernels/{name}" for name in ("lib/libcudart.so.13", "sm_90a/append.ptx", "moe/moe_sort.cu")]
    assert unexpected(names + bad) == bad
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


def bill_faults(bill: dict[str, Any], images: list[dict[str, Any]], pins: set[tuple[str, str]]) -> list[str]:
    """What the bill of materials leaves out, has too much, or names twice."""
    components = bill["components"]
    named = {(c["name"], c.get("version")) for c in components}
    hashes = {(c["name"], h["content"]) for c in components for h in c.get("hashes", ())}
    expected = {(image["symbol"], image["sha256"]) for image in images}
    references = [c["bom-ref"] for c in components]
    return [
        *(f"{name} {version} is not named" for name, version in sorted(pins - named)),
        *(f"{symbol} is not named, or with another hash" for symbol, _ in sorted(expected - hashes)),
        *(f"{symbol} is no image of the wheel" for symbol, _ in sorted(hashes - expected)),
        *(f"{one} is there twice" for one in sorted(set(references)) if references.count(one) > 1),
    ]


def test_bill_of_materials_names_every_compiler_and_image(wheel: Path, root: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if re.search(r"dist-info/sboms/.", name))  # PEP 770
        bill = json.loads(archive.read(name))
        images = json.loads(archive.read("dsv4_kernels/images.json"))
    pins = {
        tuple(requirement.partition(";")[0].strip().split("=="))
        for requirement in tomllib.loads((root / "pyproject.toml").read_text())["build-system"]["requires"]
        if "==" in requirement and "*" not in requirement
    }
    assert len(pins) >= 7
    assert bill_faults(bill, images, pins) == []
    first, *rest = images
    other = {**first, "sha256": "0" * 64}
    assert bill_faults(bill, rest, pins) == [f"{first['symbol']} is no image of the wheel"]
    assert bill_faults(bill, [other, *rest], pins)[0] == f"{first['symbol']} is not named, or with another hash"
    assert bill_faults(bill, images, pins | {("nvcc", "1")}) == ["nvcc 1 is not named"]
    twice = {"components": [*bill["components"], bill["components"][0]]}
    assert bill_faults(twice, images, pins) == [f"{bill['components'][0]['bom-ref']} is there twice"]
