"""What happens where things are not as they should be: drivers that cannot serve, two copies of the library, many
threads, a forked child."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import dsv4_kernels
import pytest

from tests.launches import OBSERVER
from tests.package import c_abi
from tests.package.c_abi import Memory
from tests.package.conftest import has_driver

ASK = """
import dsv4_kernels
print(dsv4_kernels.info()["device_error"])
try:
    dsv4_kernels.preload()
except dsv4_kernels.NoDriverError as error:
    print(error)
"""


@pytest.fixture(scope="module")
def stub_driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a libcuda.so.1 that only answers what it is asked to."""
    folder = tmp_path_factory.mktemp("driver")
    source = Path(__file__).with_name("stub_driver.c")
    subprocess.run(["cc", "-shared", "-fPIC", "-Wall", "-Werror", source, "-o", folder / "libcuda.so.1"], check=True)
    return folder


@pytest.mark.parametrize(
    ("setting", "text"),
    [
        ("STUB_VERSION=12040", "needs a CUDA 13 driver (R580 or later), found one for CUDA 12.4; update the driver"),
        ("STUB_INIT=100", "needs a CUDA device, found none (is one visible? see CUDA_VISIBLE_DEVICES)"),
    ],
    ids=["old driver", "no device"],
)
def test_driver_that_cannot_serve_is_said_so(stub_driver: Path, setting: str, text: str) -> None:
    name, _, value = setting.partition("=")
    environment = os.environ | {"LD_LIBRARY_PATH": str(stub_driver), name: value}
    done = subprocess.run([sys.executable, "-c", ASK], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"device_status: {text}", f"preload: {text}"]


def test_two_copies_of_the_library_keep_apart(library_path: Path, library: ctypes.CDLL, tmp_path: Path) -> None:
    """Two engines in a process may each bring one: symbols, error texts and observers are each copy's own."""
    other = c_abi.load(Path(shutil.copy(library_path, tmp_path / "libother.so")))
    seen: list[str] = []

    @OBSERVER
    def observe(launch: object, user: object) -> int:
        seen.append("launch")
        return c_abi.OK

    assert other.dsv4_observe_launches(b"sm_90a", 132, observe, None) == c_abi.OK
    try:
        args = c_abi.hash_router_args(Memory())
        assert library.dsv4_hash_router(ctypes.byref(args), None) == c_abi.HOST_TENSOR
        assert other.dsv4_hash_router(ctypes.byref(args), None) == c_abi.OK
    finally:
        other.dsv4_observe_launches(None, 0, OBSERVER(), None)
    assert seen == ["launch"]
    other.dsv4_image_at(10**6, None)
    assert other.dsv4_last_error().startswith(b"image_at: ")
    assert library.dsv4_last_error().startswith(b"hash_router: token_ids: ")


def test_sixty_four_threads_at_once(library: ctypes.CDLL) -> None:
    """Valid and invalid calls side by side: each thread gets its own statuses and texts."""
    count, calls = 64, 200
    start = threading.Barrier(count)
    wrong: list[str] = []

    def work(number: int) -> None:
        args = c_abi.hash_router_args(Memory())
        bad = number % 2 == 1
        if bad:
            args.token_ids.dtype = c_abi.FLOAT32
        start.wait()
        for _ in range(calls):
            status = library.dsv4_hash_router(ctypes.byref(args), None)
            text = library.dsv4_last_error()
            expected = b"expected dtype int32 or int64" if bad else b"expected a CUDA tensor"
            if status != (c_abi.INVALID_ARGUMENT if bad else c_abi.HOST_TENSOR) or expected not in text:
                wrong.append(f"{number}: {status} {text!r}")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


FORK = """
import os, sys
import dsv4_kernels
PREPARE
child = os.fork()
if child == 0:
    try:
        dsv4_kernels.preload()
        print("loaded")
    except dsv4_kernels.KernelError as error:
        print(type(error).__name__)
    sys.stdout.flush()
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
"""


def run_fork(prepare: str) -> str:
    program = FORK.replace("PREPARE", prepare)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_child_forked_before_the_first_use_works_as_its_parent() -> None:
    assert run_fork("") == ("loaded" if has_driver() else "NoDriverError")


@pytest.mark.gpu
@pytest.mark.skipif(not has_driver(), reason="this machine has no CUDA device")
def test_child_forked_after_cuda_was_used_is_refused() -> None:
    """CUDA does not survive a fork. The child gets an error, and neither hangs nor crashes."""
    assert run_fork("dsv4_kernels.preload()") == "CudaError"


CAPTURE = """
import torch
from dsv4_kernels.cases import all_cases, poison
from dsv4_kernels.ops import OPS

cases = {case.op: case for case in reversed(all_cases()) if not case.large and case.launches}
assert cases.keys() == OPS.keys()
for case in cases.values():
    op, given, arguments = OPS[case.op], case.arguments("cuda"), case.arguments("cuda")
    out = tuple(map(poison, op.allocate(arguments)))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        op(arguments, out)
    graph.replay()
    torch.cuda.synchronize()
    verdict = case.baseline.verdict(given, out + op.mutated_of(arguments))
    assert verdict.passed, (case.id, verdict)
"""


@pytest.mark.gpu
@pytest.mark.torch
@pytest.mark.skipif(not has_driver(), reason="this machine has no CUDA device")
def test_first_call_of_every_op_may_be_captured() -> None:
    """In a process that has not preloaded: loading leaves the capture intact."""
    done = subprocess.run([sys.executable, "-c", CAPTURE], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr


def test_package_works_from_a_read_only_copy(package: Path, tmp_path: Path) -> None:
    """Nothing is written beside the package, in HOME or in the temporary folder."""
    copy = tmp_path / "site" / "dsv4_kernels"
    shutil.copytree(package, copy)
    for path in (copy, *copy.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*")}
    nowhere = "/nonexistent"
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(copy.parent), "HOME": nowhere, "TMPDIR": nowhere}
    program = "import dsv4_kernels; print(dsv4_kernels.__file__, len(dsv4_kernels.info()['images']))"
    command = [sys.executable, "-B", "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.split() == [str(copy / "__init__.py"), str(len(dsv4_kernels.info()["images"]))], done.stderr
    assert {path: path.stat().st_mtime_ns for path in copy.rglob("*")} == before
