"""The images in the library: every op on every architecture, what the sidecars say, and that they say the truth."""

from __future__ import annotations

import ctypes
import hashlib
import re
import struct
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from dsv4_kernels.ops import OPS

from aot.sidecar import Sidecar, check_parameters
from tests.package import c_abi

FIELDS = ("op", "symbol", "language", "architecture", "sha256")


@pytest.fixture(scope="module")
def architectures(root: Path) -> tuple[str, ...]:
    """The only list of them, read as text: the aot step is no part of the installed package."""
    names = re.findall(r'Architecture\("(sm_\w+)"', (root / "aot" / "architectures.py").read_text())
    assert names
    return tuple(names)


def image_faults(images: list[dict[str, Any]], families: dict[str, str], architectures: tuple[str, ...]) -> list[str]:
    """What a release may not have: kernels that an architecture lacks, kernels that spill, images of nothing."""
    kernels: dict[str, dict[str, set[str]]] = {op: {name: set() for name in architectures} for op in families}
    faults = []
    for i in images:
        where = f"{i['op']}: {i['symbol']} on {i['architecture']}"
        if i["architecture"] not in architectures or families.get(i["op"]) != i["family"]:
            faults.append(f"{where}: of no op or architecture that there is")
            continue
        kernels[i["op"]][i["architecture"]].add(i["symbol"])
        if i["stack"] or i["local"] or not 0 < i["registers"] <= 255:
            faults.append(f"{where}: spills")
        if {"cuda": "nvcc", "triton": "triton", "cute": "nvidia-cutlass-dsl"}[i["language"]] not in i["compilers"]:
            faults.append(f"{where}: names no compiler")
    for op, on in kernels.items():
        every = set().union(*on.values())
        faults += [f"{op}: nothing on {name}" for name, symbols in on.items() if not symbols]
        faults += [
            f"{op}: {', '.join(sorted(every - symbols))} not on {name}"
            for name, symbols in on.items()
            if symbols < every
        ]
    return faults


FAMILIES = {name: op.family for name, op in OPS.items()}


def test_every_op_has_whole_images_for_every_architecture(
    images: list[dict[str, Any]], architectures: tuple[str, ...]
) -> None:
    assert image_faults(images, FAMILIES, architectures) == []


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"stack": 8}, "hash_router: {symbol} on sm_100a: spills"),
        ({"registers": 0}, "hash_router: {symbol} on sm_100a: spills"),
        ({"compilers": {"gcc": "14"}}, "hash_router: {symbol} on sm_100a: names no compiler"),
        ({"architecture": "sm_80"}, "hash_router: {symbol} on sm_80: of no op or architecture that there is"),
        ({"family": "moe"}, "hash_router: {symbol} on sm_100a: of no op or architecture that there is"),
        (None, "hash_router: {symbol} not on sm_100a"),
    ],
    ids=["spills", "not compiled", "compiler", "architecture", "family", "missing"],
)
def test_bad_image_is_refused(
    change: dict[str, Any] | None, fault: str, images: list[dict[str, Any]], architectures: tuple[str, ...]
) -> None:
    bad = next(i for i in images if i["op"] == "hash_router" and i["architecture"] == "sm_100a")
    changed = [i if i is not bad else {**i, **(change or {})} for i in images if i is not bad or change is not None]
    faults = image_faults(changed, FAMILIES, architectures)
    assert fault.format(symbol=bad["symbol"]) in faults


def test_op_without_images_is_refused(images: list[dict[str, Any]], architectures: tuple[str, ...]) -> None:
    left = [i for i in images if (i["op"], i["architecture"]) != ("hash_router", "sm_121a")]
    assert image_faults(left, FAMILIES, architectures)[0] == "hash_router: nothing on sm_121a"
    assert image_faults([], FAMILIES, architectures)


def test_c_interface_lists_the_same_images(library: ctypes.CDLL, images: list[dict[str, Any]]) -> None:
    listed = []
    for index in range(library.dsv4_image_count()):
        image = c_abi.Image(struct_size=ctypes.sizeof(c_abi.Image))
        assert library.dsv4_image_at(index, ctypes.byref(image)) == c_abi.OK
        listed.append(tuple(getattr(image, field).decode() for field in FIELDS))
    assert Counter(listed) == Counter(tuple(i[field] for field in FIELDS) for i in images)


def test_image_at_refuses_an_index_beyond_the_last(library: ctypes.CDLL) -> None:
    count = library.dsv4_image_count()
    assert library.dsv4_image_at(count, ctypes.byref(c_abi.Image(ctypes.sizeof(c_abi.Image)))) == c_abi.INVALID_ARGUMENT
    assert library.dsv4_last_error().decode() == (f"image_at: index: expected an index below {count}, got {count}")


def aot_images(images: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those of Triton and the CuTe DSL: whole files in the library, and kernels whose arguments were declared."""
    return [i for i in images if i["language"] != "cuda"]


def embedding_faults(data: bytes, images: list[dict[str, Any]]) -> list[str]:
    """Images that the library does not hold, by their hash, and files in it that are none of them."""
    expected = {(i["sha256"], i["bytes"]) for i in aot_images(images)}
    lengths = {length for _, length in expected}
    offsets = [match.start() for match in re.finditer(rb"\x7fELF", data) if match.start()]  # 0: the library itself
    found = {
        offset: (digest, length)
        for offset in offsets
        for length in lengths
        if ((digest := hashlib.sha256(data[offset : offset + length]).hexdigest()), length) in expected
    }
    faults = [f"{digest} is not in the library" for digest, _ in sorted(expected - set(found.values()))]
    return faults + [f"no sidecar is of the image at {offset}" for offset in offsets if offset not in found]


def test_sidecars_are_of_the_embedded_bytes(library_path: Path, images: list[dict[str, Any]]) -> None:
    data = library_path.read_bytes()
    assert embedding_faults(data, images) == []
    first, *rest = aot_images(images)
    assert embedding_faults(data, [{**first, "sha256": "0" * 64}, *rest]) != []
    assert len(embedding_faults(data, rest)) == 1
    at = data.index(b"\x7fELF", 1) + 1000
    assert len(embedding_faults(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :], images)) == 2


def test_parameters_of_aot_kernels_are_those_that_launches_pass(images: list[dict[str, Any]]) -> None:
    """As the image's own metadata lays them out. The build refuses others; here, that what was built is right still."""
    for image in aot_images(images):
        check_parameters(Sidecar(**image))
    image = next(i for i in aot_images(images) if "int32" in i["arguments"].values() and i["trailing_pointers"])
    (name, *_) = (name for name, of in image["arguments"].items() if of == "int32")
    for change in (
        {"arguments": image["arguments"] | {name: "int64"}},
        {"arguments": {key: of for key, of in image["arguments"].items() if key != name}},
        {"trailing_pointers": image["trailing_pointers"] + 1},
        {"parameters": image["parameters"][:-1]},
    ):
        with pytest.raises(SystemExit, match=r"declared parameters are \[offset, bytes\] .*, the image's are "):
            check_parameters(Sidecar(**{**image, **change}))


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


BAD_KERNELS = """
__global__ void spilling(float* x, int n) {
  float kept[64];
  for (int i = 0; i < n; ++i) kept[i % 64] = x[i];
  for (int i = 0; i < n; ++i) x[i] += kept[(i * 7) % 64];
}
"""


def test_cuda_kernel_that_spills_or_brings_ptx_is_seen(root: Path, build_python: Path, tmp_path: Path) -> None:
    """An object as the build makes them, but with PTX beside the image, and a kernel that lives in local memory."""
    folder = tmp_path / "csrc" / "moe"
    folder.mkdir(parents=True)
    (folder / "spilling.cu").write_text(BAD_KERNELS)
    locate = (
        "import importlib.metadata as m; print(*(f.locate() for f in m.files('nvidia-cuda-nvcc') if f.name == 'nvcc'))"
    )
    nvcc = subprocess.run([build_python, "-c", locate], capture_output=True, text=True, check=True).stdout.strip()
    bad = folder / "spilling.cu.o"
    command = [nvcc, "-gencode", "arch=compute_90,code=[sm_90,compute_90]", "-c", folder / "spilling.cu", "-o", bad]
    subprocess.run(command, check=True, timeout=120)
    assert {kind for kind, _ in fat_binary_entries(bad.read_bytes())} == {1, 2}
    options = ["--aot", tmp_path, "--nvcc-dir", tmp_path, "--nvcc-version", "13.0", "--out", tmp_path]
    read = [build_python, "-m", "aot.images", *options, bad]
    done = subprocess.run(read, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert re.search(r"aot: spilling: kernel \w+ spills on sm_90: [1-9]\d* bytes of stack", done.stderr), done.stderr
