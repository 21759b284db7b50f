"""What every test shares: the devices to run on."""

from __future__ import annotations

import pytest
import torch

from dsv4_kernels import _native

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


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


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    """Where to run: the CPU implementation always, the kernels where there is a GPU."""
    return request.param
