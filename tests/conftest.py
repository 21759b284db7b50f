"""What every test shares: the devices to run on."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from dsv4_kernels import _native

from tests.emulated import ARCHITECTURES, emulated, ptx_folder

GPU = pytest.param("cuda", marks=pytest.mark.gpu)


def why_no_gpu() -> str | None:
    """Why the gpu tests cannot run here, or None."""
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return _native.device_error(-1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = why_no_gpu()
    if reason is None:
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=f"needs a GPU: {reason}"))


@pytest.fixture(params=["cpu", *ARCHITECTURES, GPU])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Where to run: the CPU implementation, the kernels of each architecture in the emulator, the kernels on a GPU.

    Emulated kernels work on host tensors: the device is "cpu" then too.
    """
    if request.param in ARCHITECTURES:
        ptx_folder()
        with emulated(request.param):
            yield "cpu"
    else:
        yield request.param


@pytest.fixture(params=["cpu", GPU])
def real_device(request: pytest.FixtureRequest) -> str:
    """For tests of torch's own machinery, to which an emulated kernel is no different."""
    return request.param
