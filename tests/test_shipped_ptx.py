"""The PTX that the shipped images were assembled from: whole, and within what the emulator can run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from dsv4_kernels.images import read_images

from tests.emulated import SAME_PTX, has_own_ptx, module_at, module_of, ptx_folder
from tests.ptx_emulator import missing_instructions

BUILT = sorted({image["architecture"] for image in read_images()})


def ptx_files(architecture: str) -> list[Path]:
    files = sorted((ptx_folder() / architecture).glob("*.ptx"))
    assert files
    return files


@pytest.mark.parametrize("architecture", BUILT)
def test_emulator_knows_every_instruction(architecture: str) -> None:
    missing = [text for path in ptx_files(architecture) for text in missing_instructions(module_at(path))]
    assert missing == []


@pytest.mark.parametrize("architecture", BUILT)
def test_every_kernel_has_its_ptx(architecture: str) -> None:
    for image in read_images():
        if image["architecture"] == architecture:
            assert module_of(image["symbol"], architecture).functions[image["symbol"]].is_kernel


def text_without_names(path: Path) -> str:
    """The architecture's name is in directives and in the names of kernels."""
    return re.sub(r"sm_?\d+a?", "", path.read_text())


@pytest.mark.parametrize("architecture", SAME_PTX)
def test_architectures_that_are_not_emulated_have_the_same_ptx(architecture: str) -> None:
    """What the emulator shows of one holds for the other; and the exceptions are those."""
    if architecture not in BUILT:
        pytest.skip(f"this library was built without {architecture}")
    for path in ptx_files(architecture):
        twin = ptx_folder() / SAME_PTX[architecture] / path.name
        assert (text_without_names(path) != text_without_names(twin)) == has_own_ptx(path.stem, architecture), path.name
