"""What the assembler made of the sources: the images' machine code holds the instructions that it should."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.emulated import ptx_folder

# The conversion of two float32 to E2M1, in PTX and in machine code.
E2M1_PTX = "cvt.rn.satfinite.e2m1x2.f32"
E2M1_CODE = re.compile(r"\bF2FP\.SATFINITE\.E2M1\.F32")
FP4_OPS = ("quantize_nvfp4", "quantize_nvfp4_gpu_fused", "quantize_mx")


def kernels_that_encode_fp4(images: list[dict[str, Any]], architecture: str) -> list[dict[str, Any]]:
    """Of each op those for bfloat16 as it is: of quantize_mx, for instance, <__nv_bfloat16, 8, false, true>."""
    name = re.compile(r"_ZN4dsv4\d+quantize_\w+_kernelI13__nv_bfloat16Li8ELb0E(Lb1E)?EEv")
    mine = [i for i in images if i["op"] in FP4_OPS and i["architecture"] == architecture]
    return [i for i in mine if name.match(i["symbol"])]


@pytest.fixture(scope="module")
def disassembler(build_python: Path) -> Path:
    """cuobjdump, which comes with Triton."""
    code = "import triton; print(triton.__path__[0])"
    found = subprocess.run([build_python, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    return Path(found.stdout.strip()) / "backends" / "nvidia" / "bin" / "cuobjdump"


@pytest.mark.parametrize("architecture", ["sm_90a", "sm_100a", "sm_103a", "sm_120a", "sm_121a"])
def test_fp4_is_encoded_by_the_hardware_that_can(
    architecture: str, images: list[dict[str, Any]], library_path: Path, disassembler: Path
) -> None:
    kernels = kernels_that_encode_fp4(images, architecture)
    assert len({i["op"] for i in kernels}) == len(FP4_OPS)
    names = ",".join(i["symbol"] for i in kernels)
    command = [disassembler, "-sass", "-arch", architecture, "-fun", names, library_path]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    bodies = dict(zip(*[iter(re.split(r"Function : (\S+)", done.stdout)[1:])] * 2, strict=True))
    for image in kernels:
        conversions = len(E2M1_CODE.findall(bodies[image["symbol"]]))
        # 8 for the 16 values of a thread, ties to even; 8 more for the other rule.
        assert (conversions >= 8) == (architecture != "sm_90a"), image["symbol"]


@pytest.mark.parametrize("op", FP4_OPS)
@pytest.mark.parametrize("architecture", ["sm_90a", "sm_100a", "sm_103a", "sm_120a", "sm_121a"])
def test_ptx_of_fp4(op: str, architecture: str) -> None:
    path = ptx_folder() / architecture / f"{op}.ptx"
    if not path.exists():
        pytest.skip(f"this build has no {architecture}")
    assert (E2M1_PTX in path.read_text()) == (architecture != "sm_90a")
