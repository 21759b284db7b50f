"""The window onto the library's one launch function (csrc/include/dsv4/testing.h), for tests."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.resources import files


class LaunchRecord(ctypes.Structure):
    """dsv4_launch of csrc/include/dsv4/testing.h."""

    _fields_ = [
        ("symbol", ctypes.c_char_p),
        ("language", ctypes.c_char_p),
        ("architecture", ctypes.c_char_p),
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("cluster", ctypes.c_uint32 * 3),
        ("dynamic_shared", ctypes.c_uint32),
        ("parameter_count", ctypes.c_uint32),
        ("parameters", ctypes.POINTER(ctypes.c_void_p)),
        ("parameter_sizes", ctypes.POINTER(ctypes.c_uint32)),
        ("stream", ctypes.c_void_p),
    ]


@dataclass
class Launch:
    """One launch that was observed, copied out of the library's memory."""

    symbol: str
    language: str
    architecture: str
    grid: tuple[int, ...]
    block: tuple[int, ...]
    cluster: tuple[int, ...]
    dynamic_shared: int
    parameters: list[bytes] = field(repr=False)


OBSERVER = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(LaunchRecord), ctypes.c_void_p)


def load_library() -> ctypes.CDLL:
    """The installed libdsv4_kernels.so, the same that the binding uses."""
    return ctypes.CDLL(str(files("dsv4_kernels") / "lib" / "libdsv4_kernels.so"))


@contextmanager
def observed(architecture: str | None = None, multiprocessors: int = 132) -> Iterator[list[Launch]]:
    """Collects the launches made inside. With an architecture, nothing is launched: ops take host tensors and believe
    to run on such a device."""
    library = load_library()
    launches: list[Launch] = []

    @OBSERVER
    def observer(record: ctypes._Pointer[LaunchRecord], _: object) -> int:
        r = record.contents
        values = [ctypes.string_at(r.parameters[i], r.parameter_sizes[i]) for i in range(r.parameter_count)]
        names = [text.decode() for text in (r.symbol, r.language, r.architecture)]
        launches.append(Launch(*names, tuple(r.grid), tuple(r.block), tuple(r.cluster), r.dynamic_shared, values))
        return 0

    name = architecture.encode() if architecture else None
    assert library.dsv4_observe_launches(name, multiprocessors, observer, None) == 0
    try:
        yield launches
    finally:
        library.dsv4_observe_launches(None, 0, OBSERVER(), None)
