"""The engine in C++ (tests/cpp) without a GPU: its own calls of the C interface, and the kernels in the emulator."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.emulated import ARCHITECTURES, launch_in_emulator, ptx_folder
from tests.launches import OBSERVER, LaunchRecord, load_library
from tests.ptx_emulator import Memory

CPP = Path(__file__).with_name("cpp")
STEPS = 2
CALLS = 6  # of a step: hash_router, moe_sort, two products, moe_finalize, compress_flush
MEMORY = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_size_t)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    build = tmp_path_factory.mktemp("engine")
    command = [sys.executable, "-m", "dsv4_kernels", "cmake-dir"]
    folder = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    cmake = shutil.which("cmake")
    assert cmake, "cmake is not on the PATH; it comes with the extra: pip install 'dsv4-kernels[test]'"
    subprocess.run([cmake, "-S", CPP, "-B", build, f"-Ddsv4_kernels_DIR={folder}"], check=True)
    subprocess.run([cmake, "--build", build, "--target", "engine_on_host"], check=True)
    return ctypes.CDLL(str(build / "libengine_on_host.so"))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_engine_in_cpp_gives_right_results(architecture: str, engine: ctypes.CDLL) -> None:
    ptx_folder()
    memory = Memory()
    launched: list[str] = []
    faults: list[BaseException] = []

    @MEMORY
    def register(address: int, size: int) -> None:
        memory.register(address, size, f"array {address:#x}")

    @OBSERVER
    def observe(record: ctypes._Pointer[LaunchRecord], _: object) -> int:
        try:
            launched.append(launch_in_emulator(record.contents, architecture, memory))
        except BaseException as fault:  # no exception can pass through C
            faults.append(fault)
        return 0

    name = architecture.encode()
    wrong = engine.steps_on_host(name, ARCHITECTURES[architecture], STEPS, register, observe)
    assert faults == []
    assert wrong == 0, load_library().dsv4_last_error()
    assert len(launched) == CALLS * STEPS
