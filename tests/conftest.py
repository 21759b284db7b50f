"""What every test shares: the devices to run on."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from dsv4_kernels import _native

from tests.emulated import ARCHITECTURES, emulated, ptx_folder

GPU = pytest.param("cuda", marks=pytest.mark.gpu)
REPRESENTATIVE = "sm_90a"  # the architecture that the representative set emulates


def why_no_gpu() -> str | None:
    """Why the gpu tests cannot run here, or None."""
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return _native.device_error(-1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--representative",
        action="store_true",
        help="leave out the tests that are marked `thorough` and the emulation of all architectures but one",
    )


def is_thorough(item: pytest.Item) -> bool:
    """Whether the representative set does without a test: a faster one, or one on another architecture, is like it."""
    call = getattr(item, "callspec", None)
    parameters = call.params.values() if call else ()
    emulated_on = {value for value in parameters if isinstance(value, str)} & ARCHITECTURES.keys()
    return item.get_closest_marker("thorough") is not None or bool(emulated_on - {REPRESENTATIVE})


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--representative"):
        left_out = [item for item in items if is_thorough(item)]
        items[:] = [item for item in items if not is_thorough(item)]
        config.hook.pytest_deselected(items=left_out)
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
