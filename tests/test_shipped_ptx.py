"""The PTX that the shipped images were assembled from: whole, and within what the emulator can run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from dsv4_kernels.images import read_images

from tests.emulated import SAME_PTX, has_own_ptx, module_at, ptx_folder
from tests.ptx_emulator import missing_instructions

ENTRY = re.compile(r"\.visible \.entry ([\w$]+)")
BUILT = sorted({image["architecture"] for image in read_images()})


def ptx_files(architecture: str) -> list[Path]:
    files = sorted((ptx_folder() / architecture).glob("*.ptx"))
    assert files
    return files


def text_without_names(path: Path) -> str:
    """The architecture's name is in directives and in the names of kernels."""
    return re.sub(r"sm_?\d+a?", "", path.read_text())


def is_new(path: Path, architecture: str) -> bool:
    """Whether no architecture before this one has the same text."""
    others = [path.parents[1] / other / path.name for other in BUILT[: BUILT.index(architecture)]]
    return all(text_without_names(other) != text_without_names(path) for other in others)


@pytest.mark.parametrize("architecture", BUILT)
def test_emulator_knows_every_instruction(architecture: str) -> None:
    new = [path for path in ptx_files(architecture) if is_new(path, architecture)]
    assert [text for path in new for text in missing_instructions(module_at(path))] == []


@pytest.mark.parametrize("architecture", BUILT)
def test_every_kernel_has_its_ptx(architecture: str) -> None:
    entries = {name for path in ptx_files(architecture) for name in ENTRY.findall(path.read_text())}
    assert entries == {image["symbol"] for image in read_images() if image["architecture"] == architecture}


@pytest.mark.parametrize("architecture", SAME_PTX)
def test_architectures_that_are_not_emulated_have_the_same_ptx(architecture: str) -> None:
    """What the emulator shows of one holds for the other; and the exceptions are those."""
    if architecture not in BUILT:
        pytest.skip(f"this library was built without {architecture}")
    for path in ptx_files(architecture):
        twin = ptx_folder() / SAME_PTX[architecture] / path.name
        assert (text_without_names(path) != text_without_names(twin)) == has_own_ptx(path.stem, architecture), path.name
