"""What is in a captured CUDA graph, as CUDA itself lists it."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from functools import cache

import torch

KERNEL = 0  # cudaGraphNodeTypeKernel


@cache
def cudart() -> ctypes.CDLL:
    """The CUDA runtime that torch has loaded."""
    assert torch.version.cuda is not None
    return ctypes.CDLL(f"libcudart.so.{torch.version.cuda.split('.')[0]}")


def node_types(graph: torch.cuda.CUDAGraph) -> list[int]:
    """The cudaGraphNodeType of each node of a graph made with keep_graph=True."""
    handle, count = ctypes.c_void_p(graph.raw_cuda_graph()), ctypes.c_size_t()
    assert cudart().cudaGraphGetNodes(handle, None, ctypes.byref(count)) == 0
    nodes = (ctypes.c_void_p * count.value)()
    assert cudart().cudaGraphGetNodes(handle, nodes, ctypes.byref(count)) == 0
    kinds = []
    for node in nodes:
        kind = ctypes.c_int(-1)
        assert cudart().cudaGraphNodeGetType(ctypes.c_void_p(node), ctypes.byref(kind)) == 0
        kinds.append(kind.value)
    return kinds


def until(holds: Callable[[], bool], seconds: float = 10.0) -> None:
    """Waits for what a thread of CUDA does once a graph is destroyed; fails after so long."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "did not come true"
        time.sleep(0.01)
