"""The PTX that the shipped images were assembled from: whole, and within what the emulator can run."""

from __future__ import annotations

from pathlib import Path

import pytest
from dsv4_kernels.images import read_images

from tests.emulated import module_at, module_of, ptx_folder
from tests.emulator import missing_instructions

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
