"""The images in the library: every op on every architecture, what the sidecars say, and that they say the truth."""

from __future__ import annotations

import ctypes
import hashlib
import re
import struct
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from dsv4_kernels.op_table import OPS

from tests.package import c_abi

FIELDS = ("op", "symbol", "language", "architecture", "sha256")


@pytest.fixture(scope="module")
def architectures(root: Path) -> tuple[str, ...]:
    """The only list of them, read as text: the aot step is no part of the installed package."""
    names = re.findall(r'Architecture\("(sm_\w+)"', (root / "aot" / "architectures.py").read_text())
    assert names
    return tuple(names)


@pytest.mark.parametrize("op", OPS)
def test_every_op_has_images_for_every_architecture(
    op: str, images: list[dict[str, Any]], architectures: tuple[str, ...]
) -> None:
    by_architecture = {
        architecture: {i["symbol"] for i in images if i["op"] == op and i["architecture"] == architecture}
        for architecture in architectures
    }
    assert all(by_architecture.values()), by_architecture
    assert len({frozenset(symbols) for symbols in by_architecture.values()}) == 1, "kernels differ by architecture"


def test_no_image_is_of_an_unknown_op_or_architecture(
    images: list[dict[str, Any]], architectures: tuple[str, ...]
) -> None:
    assert {i["op"] for i in images} == set(OPS)
    assert {i["architecture"] for i in images} == set(architectures)
    assert all(i["family"] == OPS[i["op"]].family for i in images)


def test_c_interface_lists_the_same_images(library: ctypes.CDLL, images: list[dict[str, Any]]) -> None:
    listed = []
    for index in range(library.dsv4_image_count()):
        image = c_abi.Image()
        assert library.dsv4_image_at(index, ctypes.byref(image)) == c_abi.OK
        listed.append(tuple(getattr(image, field).decode() for field in FIELDS))
    assert Counter(listed) == Counter(tuple(i[field] for field in FIELDS) for i in images)


def test_image_at_refuses_an_index_beyond_the_last(library: ctypes.CDLL) -> None:
    count = library.dsv4_image_count()
    assert library.dsv4_image_at(count, ctypes.byref(c_abi.Image())) == c_abi.INVALID_ARGUMENT
    assert library.dsv4_last_error().decode() == (
        f"image_at: index: expected an index below {count} and a place to write to, got {count}"
    )


def test_no_kernel_spills(images: list[dict[str, Any]]) -> None:
    assert [(i["symbol"], i["architecture"]) for i in images if i["stack"] or i["local"]] == []
    assert all(0 < i["registers"] <= 255 for i in images)


def test_compilers_are_recorded(images: list[dict[str, Any]]) -> None:
    compiler = {"cuda": "nvcc", "triton": "triton", "cute": "nvidia-cutlass-dsl"}
    assert all(compiler[i["language"]] in i["compilers"] for i in images)


def elf_offsets(data: bytes) -> list[int]:
    """Where ELF files begin in the data, itself excepted."""
    return [match.start() for match in re.finditer(rb"\x7fELF", data) if match.start()]


def test_sidecars_are_of_the_embedded_bytes(library_path: Path, images: list[dict[str, Any]]) -> None:
    """Triton's and CuTe's images lie in the library as they are: each is found by its hash, and none is left over."""
    data = library_path.read_bytes()
    expected = {(i["sha256"], i["bytes"]) for i in images if i["language"] != "cuda"}
    lengths = {length for _, length in expected}
    found = {
        (digest, length)
        for offset in elf_offsets(data)
        for length in lengths
        if ((digest := hashlib.sha256(data[offset : offset + length]).hexdigest()), length) in expected
    }
    assert found == expected
    assert len(elf_offsets(data)) == len(expected), "an image without a sidecar"


def fat_binary_entries(data: bytes) -> list[tuple[int, int]]:
    """(kind, architecture) of each entry of the library's fat binaries; kind 1 is PTX, 2 is a cubin.

    The container is a header (magic, version, header bytes, size of all) and entries that begin with kind, version,
    header bytes, size.
    """
    entries = []
    for match in re.finditer(re.escape(struct.pack("<I", 0xBA55ED50)), data):
        _, _, header, size = struct.unpack_from("<IHHQ", data, match.start())
        position, end = match.start() + header, match.start() + header + size
        while position < end:
            kind, _, header, size = struct.unpack_from("<HHIQ", data, position)
            (architecture,) = struct.unpack_from("<I", data, position + 28)
            entries.append((kind, architecture))
            position += header + size
    return entries


def test_no_ptx_is_inside(library_path: Path, images: list[dict[str, Any]], architectures: tuple[str, ...]) -> None:
    data = library_path.read_bytes()
    assert (data.find(b".target sm_"), data.find(b".version ")) == (-1, -1)
    entries = fat_binary_entries(data)
    cuda_ops = {i["op"] for i in images if i["language"] == "cuda"}
    # CUDA C++ is one cubin for each source file and architecture, and no PTX (compressed, so text would not show).
    assert {kind for kind, _ in entries} == {2}
    assert {f"sm_{architecture}a" for _, architecture in entries} == set(architectures)
    assert len(entries) == len(cuda_ops) * len(architectures)
