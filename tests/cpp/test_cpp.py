"""A C++ engine builds against the installed package with CMake alone, and runs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import dsv4_kernels
import pytest

from tests.package import c_abi
from tests.package.conftest import has_driver

REFUSED = 10  # of engine.cpp
HERE = Path(__file__).resolve().parent


def run(*command: str | Path, expected: int = 0) -> subprocess.CompletedProcess[str]:
    """The finished process; what it printed if it exited otherwise than expected."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == expected, f"{command[0]} exited with {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture(scope="module")
def cmake_folder() -> str:
    return run(sys.executable, "-m", "dsv4_kernels", "cmake-dir").stdout.strip()


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory, cmake_folder: str) -> Path:
    """The program, and with it every header compiled alone as C11 and C++17."""
    cmake = shutil.which("cmake")
    assert cmake, "cmake is not on the PATH; it comes with the extra: pip install 'dsv4-kernels[test]'"
    build = tmp_path_factory.mktemp("engine")
    run(cmake, "-S", HERE, "-B", build, f"-Ddsv4_kernels_DIR={cmake_folder}")
    run(cmake, "--build", build)
    return build / "engine"


def test_pkg_config_is_enough_to_build(tmp_path: Path) -> None:
    """A build that knows neither CMake nor Python, beyond asking where the package is."""
    folder = run(sys.executable, "-m", "dsv4_kernels", "pkgconfig-dir").stdout.strip()
    (tmp_path / "version.c").write_text(
        "#include <dsv4/dsv4.h>\n#include <stdio.h>\nint main(void) { return puts(dsv4_version()) < 0; }\n"
    )
    environment = os.environ | {"PKG_CONFIG_PATH": folder}
    command = [sys.executable, "-m", "pkgconf", "--cflags", "--libs", "dsv4_kernels"]
    flags = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split()
    program = tmp_path / "version"
    run("cc", "-std=c11", "-Wall", "-Werror", tmp_path / "version.c", *flags, "-o", program)
    assert run(program).stdout.strip() == dsv4_kernels.__version__


@pytest.mark.skipif(has_driver(), reason="this machine has a CUDA device")
def test_engine_says_that_there_is_no_driver(engine: Path) -> None:
    done = run(engine, expected=REFUSED + c_abi.NO_DRIVER)
    assert done.stdout.startswith("dsv4-kernels 0.")
    assert done.stderr.startswith("preload: needs a CUDA ")
    assert "found no" in done.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not has_driver(), reason="this machine has no CUDA device")
def test_engine_runs_its_steps_in_a_graph(engine: Path) -> None:
    assert "3 steps of 32 tokens: routed, through 6 experts each, flushed; 0 values wrong" in run(engine).stdout


def test_another_minor_version_is_refused(tmp_path: Path, cmake_folder: str) -> None:
    """Structs may grow from one minor version to the next; a program says which one it was written for."""
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.26)\nproject(other LANGUAGES CXX)\nfind_package(dsv4_kernels 0.99 REQUIRED)\n"
    )
    command = ["cmake", "-S", tmp_path, "-B", tmp_path / "build", f"-Ddsv4_kernels_DIR={cmake_folder}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert 'compatible with requested version "0.99"' in " ".join(done.stderr.split())
