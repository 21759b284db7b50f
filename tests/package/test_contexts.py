"""An op on one GPU leaves the others alone: no context where there was none, and the caller's device as it was."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

# In a process of its own, without torch, by the driver's functions alone: a thread that has no context, or that of
# device 0, calls an op on device 1.
PROGRAM = """
import ctypes, sys
sys.path.insert(0, sys.argv[2])
from tests.package import c_abi

driver = ctypes.CDLL("libcuda.so.1")

def cuda(name, *arguments):
    status = getattr(driver, name)(*arguments)
    assert status == 0, (name, status)

def is_active(device):
    flags, active = ctypes.c_uint(), ctypes.c_int()
    cuda("cuDevicePrimaryCtxGetState", device, ctypes.byref(flags), ctypes.byref(active))
    return bool(active.value)

def current():
    context = ctypes.c_void_p()
    cuda("cuCtxGetCurrent", ctypes.byref(context))
    return context.value

class DeviceMemory(c_abi.Memory):
    def tensor(self, dtype, shape, device=1):
        tensor = super().tensor(dtype, shape, device)
        address = ctypes.c_uint64()
        cuda("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(1024))
        cuda("cuMemsetD8_v2", address, ctypes.c_ubyte(0), ctypes.c_size_t(1024))
        tensor.data = address.value
        return tensor

cuda("cuInit", 0)
owner = ctypes.c_void_p()
cuda("cuDevicePrimaryCtxRetain", ctypes.byref(owner), 1)
cuda("cuCtxPushCurrent_v2", owner)
args = c_abi.hash_router_args(DeviceMemory(), device=1)
popped = ctypes.c_void_p()
cuda("cuCtxPopCurrent_v2", ctypes.byref(popped))
library = c_abi.load(sys.argv[1])

def call():
    before = current()
    assert library.dsv4_hash_router(ctypes.byref(args), None) == c_abi.OK, library.dsv4_last_error()
    assert current() == before
    cuda("cuCtxPushCurrent_v2", owner)
    cuda("cuCtxSynchronize")
    weights = (ctypes.c_float * 6)()
    cuda("cuMemcpyDtoH_v2", weights, ctypes.c_uint64(args.out_weights.data), ctypes.c_size_t(24))
    cuda("cuMemsetD8_v2", ctypes.c_uint64(args.out_weights.data), ctypes.c_ubyte(0), ctypes.c_size_t(24))
    cuda("cuCtxPopCurrent_v2", ctypes.byref(popped))
    assert list(weights) == [0.5] * 6, list(weights)

assert not is_active(0)
for _ in range(3):
    call()
    assert not is_active(0), "a context appeared on device 0"
first = ctypes.c_void_p()
cuda("cuDevicePrimaryCtxRetain", ctypes.byref(first), 0)
cuda("cuCtxSetCurrent", first)
for _ in range(3):
    call()
    assert current() == first.value
print("right")
"""


def device_count() -> int:
    import torch

    return torch.cuda.device_count()


@pytest.mark.gpu
def test_no_context_appears_on_another_device(library_path: Path, root: Path) -> None:
    if device_count() < 2:
        pytest.skip("needs two GPUs, this machine has one")
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM, library_path, root], capture_output=True, text=True, check=False
    )
    assert ran.stdout == "right\n", ran.stderr
