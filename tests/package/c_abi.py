"""The C interface by hand, as the headers declare it: what an engine in another language would write."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path

OK, INVALID_ARGUMENT, HOST_TENSOR, NO_DRIVER, NO_IMAGE = range(5)
BOOL, INT32, INT64, BFLOAT16, FLOAT32 = 1, 4, 5, 7, 8
HOST = -1
MAX_RANK = 4
ITEM_BYTES = {BOOL: 1, INT32: 4, INT64: 8, BFLOAT16: 2, FLOAT32: 4}


class Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("dtype", ctypes.c_int32),
        ("device", ctypes.c_int32),
        ("rank", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
        ("shape", ctypes.c_int64 * MAX_RANK),
        ("stride", ctypes.c_int64 * MAX_RANK),
    )


class HashRouterArgs(ctypes.Structure):
    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        *((name, Tensor) for name in ("token_ids", "hash_lut", "padding_mask", "out_weights", "out_ids")),
    )


class HashRouterScoredArgs(ctypes.Structure):
    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        *((name, Tensor) for name in ("token_ids", "hash_lut", "logits", "padding_mask", "out_weights", "out_ids")),
        ("renormalize", ctypes.c_int32),
        ("scale", ctypes.c_float),
        ("epsilon", ctypes.c_float),
    )


class Image(ctypes.Structure):
    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        *((name, ctypes.c_char_p) for name in ("op", "symbol", "language", "architecture", "sha256")),
    )


class PageLayoutInfo(ctypes.Structure):
    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        ("name", ctypes.c_char_p),
        ("head_dim", ctypes.c_int32),
        ("quantized_dims", ctypes.c_int32),
    )  # an older caller's: the library knows more fields


def load(path: Path) -> ctypes.CDLL:
    """The library with the types of the functions that the tests call."""
    library = ctypes.CDLL(str(path))
    library.dsv4_version.restype = library.dsv4_last_error.restype = ctypes.c_char_p
    library.dsv4_image_count.restype = ctypes.c_size_t
    library.dsv4_image_at.argtypes = (ctypes.c_size_t, ctypes.POINTER(Image))
    library.dsv4_preload.argtypes = library.dsv4_device_status.argtypes = (ctypes.c_int32,)
    library.dsv4_hash_router.argtypes = (ctypes.POINTER(HashRouterArgs), ctypes.c_void_p)
    library.dsv4_hash_router_scored.argtypes = (ctypes.POINTER(HashRouterScoredArgs), ctypes.c_void_p)
    library.dsv4_observe_launches.argtypes = (ctypes.c_char_p, ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p)
    return library


class Memory:
    """Host memory for tensors; keeps it alive."""

    def __init__(self) -> None:
        self._buffers: list[ctypes.Array[ctypes.c_char]] = []

    def tensor(self, dtype: int, shape: Sequence[int], device: int = HOST) -> Tensor:
        """A contiguous zeroed tensor in host memory, whatever device it claims to be on."""
        strides: list[int] = []
        items = 1
        for extent in reversed(shape):
            strides.insert(0, items)
            items *= extent
        self._buffers.append(ctypes.create_string_buffer(max(items * ITEM_BYTES[dtype], 1) + 16))
        address = -(-ctypes.addressof(self._buffers[-1]) // 16) * 16
        extents = ctypes.c_int64 * MAX_RANK
        return Tensor(address, dtype, device, len(shape), 0, extents(*shape), extents(*strides))


def hash_router_args(memory: Memory, device: int = HOST, tokens: int = 3, vocab: int = 5, k: int = 2) -> HashRouterArgs:
    """Valid arguments."""
    return HashRouterArgs(
        struct_size=ctypes.sizeof(HashRouterArgs),
        token_ids=memory.tensor(INT64, (tokens,), device),
        hash_lut=memory.tensor(INT32, (vocab, k), device),
        out_weights=memory.tensor(FLOAT32, (tokens, k), device),
        out_ids=memory.tensor(INT32, (tokens, k), device),
    )


def hash_router_scored_args(memory: Memory, device: int = HOST) -> HashRouterScoredArgs:
    """Valid arguments."""
    return HashRouterScoredArgs(
        struct_size=ctypes.sizeof(HashRouterScoredArgs),
        token_ids=memory.tensor(INT64, (3,), device),
        hash_lut=memory.tensor(INT32, (5, 2), device),
        logits=memory.tensor(FLOAT32, (3, 8), device),
        out_weights=memory.tensor(FLOAT32, (3, 2), device),
        out_ids=memory.tensor(INT32, (3, 2), device),
        renormalize=1,
        scale=1.5,
    )
