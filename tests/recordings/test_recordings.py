"""The emulator against an H100: the same sm_90a images on the same inputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dsv4_kernels.ops import OPS
from safetensors.torch import load_file
from torch import Tensor

from tests.emulated import emulated, ptx_folder
from tests.recordings.problems import RECORDING, poisoned_outputs, problems

PROBLEMS = problems()
RECORDED = {name: tensor.clone() for name, tensor in load_file(RECORDING).items()}  # the file aligns nothing

# The bits must be equal, but for what the PTX ISA leaves open: ex2.approx, sqrt.approx and div.full give results within
# an error of theirs, and the emulator the nearest ones; the order of the sums inside a matrix instruction is the
# hardware's own.
ULP = 2.0**-23
APPROXIMATE = {
    "hash_router_scored": 8 * ULP,
    "hash_router_fused": 8 * ULP,
    "activation_topk_0": 8 * ULP,
    "activation_topk_1": 8 * ULP,
    "activation_topk_2": 8 * ULP,
    "dense_router_decode": 16 * ULP,
}


def recorded_arguments(name: str) -> tuple[Any, ...]:
    """The recorded tensors, and the problem's numbers: random generators may change with torch."""
    return tuple(RECORDED.get(f"{name}.argument{i}", a) for i, a in enumerate(PROBLEMS[name][1]))


@pytest.mark.parametrize("name", PROBLEMS)
def test_emulator_agrees_with_the_gpu(name: str) -> None:
    ptx_folder()
    op, arguments = PROBLEMS[name][0], recorded_arguments(name)
    with emulated("sm_90a") as launched:
        results = OPS[op](arguments, poisoned_outputs(op, arguments, "cpu"))
    assert len(launched) == 1
    for i, result in enumerate(results):
        recorded: Tensor = RECORDED[f"{name}.result{i}"]
        if name in APPROXIMATE and result.dtype == torch.float32:
            torch.testing.assert_close(result, recorded, rtol=APPROXIMATE[name], atol=0, equal_nan=True)
        else:
            assert torch.equal(result.view(torch.uint8), recorded.view(torch.uint8))
