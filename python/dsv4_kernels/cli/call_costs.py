"""What the host spends on one call of the smallest op, by the way in: on host tensors, with the launch left out."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.resources import files

import torch
from torch import Tensor

from dsv4_kernels import _native
from dsv4_kernels.cli.timing import host_seconds_per_call
from dsv4_kernels.images import read_images
from dsv4_kernels.router import hash_router

DTYPES = {torch.int32: 4, torch.float32: 8}  # dsv4_dtype
HOST = -1
MAX_RANK = 4


class CTensor(ctypes.Structure):
    """dsv4_tensor of dsv4/dsv4.h."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        *((name, ctypes.c_int32) for name in ("dtype", "device", "rank", "reserved")),
        ("shape", ctypes.c_int64 * MAX_RANK),
        ("stride", ctypes.c_int64 * MAX_RANK),
    )


class CHashRouterArgs(ctypes.Structure):
    """dsv4_hash_router_args of dsv4/router.h."""

    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        *((name, CTensor) for name in ("token_ids", "hash_lut", "padding_mask", "out_weights", "out_ids")),
    )


def c_tensor(tensor: Tensor) -> CTensor:
    """A view of a host tensor, as the C interface takes it."""
    extents = ctypes.c_int64 * MAX_RANK
    return CTensor(
        tensor.data_ptr(),
        DTYPES[tensor.dtype],
        HOST,
        tensor.dim(),
        0,
        extents(*tensor.shape),
        extents(*tensor.stride()),
    )


class Library:
    """libdsv4_kernels.so through ctypes, the same that the binding uses."""

    def __init__(self) -> None:
        self._library = ctypes.PyDLL(str(files("dsv4_kernels") / "lib" / "libdsv4_kernels.so"))  # keeps the GIL

    def function(self, name: str) -> Callable[..., int]:
        """A function of the library, called with two addresses; returns an int."""
        found = self._library[name]
        found.argtypes, found.restype = (ctypes.c_void_p, ctypes.c_void_p), ctypes.c_int
        return found

    @contextmanager
    def launches_left_out(self) -> Iterator[None]:
        """Inside, ops take host tensors and do everything but launch: every op of the process (dsv4/testing.h)."""
        observe = self._library.dsv4_observe_launches
        observe.argtypes = (ctypes.c_char_p, ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p)
        if observe(read_images()[0]["architecture"].encode(), 1, None, None):
            raise RuntimeError("dsv4_observe_launches failed")
        try:
            yield
        finally:
            observe(None, 0, None, None)


def call_costs() -> dict[str, float]:
    """Microseconds of one call, by the way in, and of two of torch's own functions to compare with.

    The C function is called through ctypes; what ctypes takes to call a function that returns at once is subtracted.
    """
    token_ids = torch.zeros(1, dtype=torch.int32, device="cpu")
    table = torch.zeros(8, 6, dtype=torch.int32, device="cpu")
    weights = torch.empty(1, 6, dtype=torch.float32, device="cpu")
    ids = torch.empty(1, 6, dtype=torch.int32, device="cpu")
    library = Library()
    args = CHashRouterArgs(
        struct_size=ctypes.sizeof(CHashRouterArgs),
        token_ids=c_tensor(token_ids),
        hash_lut=c_tensor(table),
        out_weights=c_tensor(weights),
        out_ids=c_tensor(ids),
    )
    address = ctypes.addressof(args)
    c_function, empty = library.function("dsv4_hash_router"), library.function("dsv4_version")
    ways: dict[str, Callable[[], object]] = {
        "C function": lambda: c_function(address, None),
        "empty": lambda: empty(address, None),
        "binding": lambda: _native.hash_router(token_ids, table, None, False, weights, ids),
        "python function": lambda: hash_router(token_ids, table, out_weights=weights, out_ids=ids),
        "python function, allocating": lambda: hash_router(token_ids, table),
        "torch op": lambda: torch.ops.dsv4.hash_router.out(token_ids, table, None, False, weights, ids),
        "torch op, allocating": lambda: torch.ops.dsv4.hash_router(token_ids, table, None),
        "torch.empty twice": lambda: (
            torch.empty(1, 6, dtype=torch.float32, device="cpu"),
            torch.empty(1, 6, dtype=torch.int32, device="cpu"),
        ),
        "Tensor.add_": lambda: weights.add_(1.0),
    }
    with library.launches_left_out():
        if c_function(address, None):
            raise RuntimeError("dsv4_hash_router failed")
        costs = {name: host_seconds_per_call(way) * 1e6 for name, way in ways.items()}
    through_ctypes = costs.pop("empty")
    return costs | {"C function": costs["C function"] - through_ctypes}
