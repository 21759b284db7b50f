"""The PTX that the shipped images were assembled from: whole, and within what the emulator can run."""

from __future__ import annotations

from pathlib import Path

import pytest

from dsv4_kernels.images import read_images
from tests.emulated import ARCHITECTURES, module_at, module_of, ptx_folder
from tests.emulator import missing_instructions

SAME_PTX = {"sm_103a": "sm_100a", "sm_121a": "sm_120a"}


def ptx_files(architecture: str) -> list[Path]:
    files = sorted((ptx_folder() / architecture).glob("*.ptx"))
    assert files
    return files


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_emulator_knows_every_instruction(architecture: str) -> None:
    missing = [text for path in ptx_files(architecture) for text in missing_instructions(module_at(path))]
    assert missing == []


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kernel_has_its_ptx(architecture: str) -> None:
    for image in read_images():
        if image["architecture"] == architecture:
            assert module_of(image["symbol"], architecture).functions[image["symbol"]].is_kernel


def without_target(path: Path) -> list[str]:
    """The text but for comments and the name of the architecture."""
    lines = path.read_text().splitlines()
    return [line for line in lines if line and not line.startswith(("//", ".target"))]


@pytest.mark.parametrize("architecture", SAME_PTX)
def test_other_architectures_have_the_emulated_ptx(architecture: str) -> None:
    """So what the emulator shows of one holds for the other, up to the assembler."""
    emulated = ptx_folder() / SAME_PTX[architecture]
    differing = [p.name for p in ptx_files(architecture) if without_target(p) != without_target(emulated / p.name)]
    assert differing == []
