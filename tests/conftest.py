"""What every test shares: the devices to run on."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
import torch
from dsv4_kernels import _native

from tests.emulated import ARCHITECTURES, DISTINCT, SAME_PTX, emulated, has_own_ptx, ptx_folder

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
    others = any(
        isinstance(value, str) and re.fullmatch(r"sm_\d+a", value) for value in parameters if value != REPRESENTATIVE
    )
    return item.get_closest_marker("thorough") is not None or others


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


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Where the tests with the fixture `device` run; see `tests.emulated.DISTINCT`."""
    if "device" in metafunc.fixturenames:
        architectures = ARCHITECTURES if metafunc.definition.get_closest_marker("every_architecture") else DISTINCT
        metafunc.parametrize("device", ["cpu", *architectures, GPU], indirect=True)


@pytest.fixture
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Where to run: the CPU implementation, the kernels of an architecture in the emulator, the kernels on a GPU.

    Emulated kernels work on host tensors: the device is "cpu" then too.
    """
    if request.param not in ARCHITECTURES:
        yield request.param
        return
    ptx_folder()
    with emulated(request.param) as symbols:
        yield "cpu"
    if not request.node.get_closest_marker("every_architecture"):
        own = {symbol for symbol in symbols for one in SAME_PTX if has_own_ptx(symbol, one)}
        assert not own, f"mark this test every_architecture: it launches {', '.join(sorted(own))}"


@pytest.fixture(params=["cpu", REPRESENTATIVE, GPU])
def device_of_each_kind(request: pytest.FixtureRequest) -> Iterator[str]:
    """Like `device`, for what is the same on every architecture if the results are."""
    if request.param not in ARCHITECTURES:
        yield request.param
        return
    ptx_folder()
    with emulated(request.param):
        yield "cpu"


@pytest.fixture(params=["cpu", GPU])
def real_device(request: pytest.FixtureRequest) -> str:
    """For tests of torch's own machinery, to which an emulated kernel is no different."""
    return request.param
