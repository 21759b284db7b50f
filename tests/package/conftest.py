"""What the tests of the installed package look at."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

import dsv4_kernels
import pytest

from tests.package import c_abi

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout: its documents and sources."""
    return ROOT


@pytest.fixture(scope="session")
def package() -> Path:
    """The folder that the package is installed in."""
    return Path(dsv4_kernels.__file__).parent


@pytest.fixture(scope="session")
def library_path(package: Path) -> Path:
    return package / "lib" / "libdsv4_kernels.so"


@pytest.fixture(scope="session")
def library(library_path: Path) -> ctypes.CDLL:
    """The C interface, as an engine that is not Python sees it."""
    return c_abi.load(library_path)


@pytest.fixture(scope="session")
def images() -> list[dict[str, Any]]:
    """The sidecars of the images in the library."""
    return list(dsv4_kernels.info()["images"])


def has_driver() -> bool:
    """Whether a CUDA driver with a device is there; asked of the driver itself, not of the package under test."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    count = ctypes.c_int(0)
    return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0


@pytest.fixture
def without_driver() -> None:
    """For tests of what happens on a machine without a GPU."""
    if has_driver():
        pytest.skip("this machine has a CUDA device")


def from_test_script(variable: str, what: str) -> Path:
    """A path that ci/test.sh hands to the tests. Its absence is a failure in CI; elsewhere a reason to skip."""
    value = os.environ.get(variable)
    if value is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"{variable} names no {what}: run ci/test.sh")
    path = Path(value)
    assert path.exists(), f"{variable}: {path} does not exist"
    return path


@pytest.fixture(scope="session")
def distributions() -> Path:
    """The folder that holds the wheel and the sdist."""
    return from_test_script("DSV4_TEST_DIST", "folder of wheel and sdist")


@pytest.fixture(scope="session")
def wheel(distributions: Path) -> Path:
    (path,) = distributions.glob("*.whl")
    return path


@pytest.fixture(scope="session")
def sdist(distributions: Path) -> Path:
    (path,) = distributions.glob("*.tar.gz")
    return path


@pytest.fixture(scope="session")
def build_python() -> Path:
    """The Python of an environment with the build requirements; the tests' own has neither Triton nor the CuTe DSL."""
    return from_test_script("DSV4_TEST_BUILD_PYTHON", "Python with the build requirements")


@pytest.fixture(scope="session")
def aot_output() -> Path:
    """What the aot step made for the wheel, for every architecture."""
    return from_test_script("DSV4_TEST_AOT", "output of the aot step")
