"""Runs ops on the CPU with the kernels of a GPU architecture.

The launch function hands each launch to the PTX emulator instead of a device. What is tested then is the real path of a
call (argument checks, dispatch, geometry, parameters) and the PTX that the shipped image of the architecture was
assembled from.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from dsv4_kernels import _native
from dsv4_kernels.images import read_images
from dsv4_kernels.op import Op

from tests.launches import OBSERVER, LaunchRecord, load_library
from tests.ptx_emulator import Limits, Memory, Module, emulate, parse

# What is emulated, one of each generation, and the multiprocessors of a typical device.
ARCHITECTURES = {"sm_90a": 132, "sm_100a": 148, "sm_120a": 188}

# An architecture whose PTX is to the letter that of another one, but for its name, save the kernels with that prefix.
# What is shown of the one then holds for the other; tests/test_shipped_ptx.py compares them. sm_103a and sm_121a come
# from the sources of sm_100a and sm_120a, but CUDA's FP8 and FP4 headers give some kernels other instructions there.
SAME_PTX = {"sm_120a": "sm_100a"}
OWN_PTX = {"sm_120a": "moe_gemm_"}  # mma.sync, where sm_100a has tcgen05

# Where a test runs that launches none of those kernels; others are marked `every_architecture`.
DISTINCT = [name for name in ARCHITECTURES if name not in SAME_PTX]


def has_own_ptx(kernel: str, architecture: str) -> bool:
    """Whether a kernel's PTX for the architecture is another than for the one that it shares the others' with."""
    return architecture not in SAME_PTX or kernel.startswith(OWN_PTX[architecture])


def ptx_folder() -> Path:
    """The PTX that the build kept, by architecture. Its absence is a failure in CI; elsewhere a reason to skip."""
    value = os.environ.get("DSV4_TEST_PTX")
    if value is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("DSV4_TEST_PTX names no folder of PTX: run ci/test.sh")
    return Path(value)


@cache
def module_at(path: Path) -> Module:
    return parse(path.read_text())


def module_of(symbol: str, architecture: str) -> Module:
    """The parsed PTX that holds a kernel."""
    (image,) = (i for i in read_images() if i["symbol"] == symbol and i["architecture"] == architecture)
    name = image["op"] if image["language"] == "cuda" else image["name"]
    return module_at(ptx_folder() / architecture / f"{name}.ptx")


def cluster_of(module: Module, symbol: str, launched: tuple[int, ...]) -> tuple[int, int, int]:
    """The cluster of the launch, or the one that the kernel was compiled for."""
    x, y, z = (*module.functions[symbol].directives.get("reqnctapercluster", launched), 1, 1)[:3]
    return x, y, z


def launch_in_emulator(
    r: LaunchRecord, architecture: str, memory: Memory, seed: int = 0, limits: Limits | None = None
) -> str:
    """Runs an observed launch on memory that is registered; returns the kernel's symbol."""
    symbol: str = r.symbol.decode()
    module = module_of(symbol, architecture)
    emulate(
        module,
        symbol,
        grid=tuple(r.grid),
        block=tuple(r.block),
        cluster=cluster_of(module, symbol, tuple(r.cluster)),
        dynamic_shared=r.dynamic_shared,
        parameters=[ctypes.string_at(r.parameters[i], r.parameter_sizes[i]) for i in range(r.parameter_count)],
        memory=memory,
        seed=seed,
        arch=architecture,
        limits=limits,
    )
    return symbol


class Call:
    """The memory that one call of an op may touch: inputs to read, outputs to write before they are read, workspace."""

    def __init__(self, op: Op, values: Sequence[Any]) -> None:
        self.memory = Memory()
        inputs, outputs = values[: len(op.parameters)], values[len(values) - len(op.results) :]
        written = {tensor.data_ptr() for tensor in outputs if isinstance(tensor, torch.Tensor)}
        read = {tensor.data_ptr() for tensor in inputs if isinstance(tensor, torch.Tensor)}
        for number, tensor in enumerate(values):
            if not isinstance(tensor, torch.Tensor) or not tensor.numel():
                continue
            is_input, is_output = number < len(inputs), number >= len(values) - len(outputs)
            if is_input and tensor.data_ptr() in written:  # in place
                continue
            extents = zip(tensor.shape, tensor.stride(), strict=True)
            size = (1 + sum((extent - 1) * stride for extent, stride in extents)) * tensor.element_size()
            initialised = not is_output or tensor.data_ptr() in read
            read_only = is_input and number not in op.mutated
            self.memory.register(tensor.data_ptr(), size, f"argument {number}", initialised, read_only)


@contextmanager
def emulated(
    architecture: str, seed: int = 0, multiprocessors: int | None = None, limits: Limits | None = None
) -> Iterator[list[str]]:
    """Inside, ops given host tensors launch their kernels in the emulator. Yields the symbols that were launched.

    multiprocessors: fewer than a device has let a small call choose what a large one does. limits: see the emulator's.
    """
    library = load_library()
    symbols: list[str] = []
    faults: list[BaseException] = []
    current: list[Memory] = []

    @OBSERVER
    def observer(record: ctypes._Pointer[LaunchRecord], _: object) -> int:
        try:
            symbols.append(launch_in_emulator(record.contents, architecture, current[-1], seed, limits))
        except BaseException as fault:  # no exception can pass through C
            faults.append(fault)
        return 0

    def native(op: Op) -> Any:
        binding = getattr(_native, op.name)

        def call(*values: Any) -> bool:
            current.append(Call(op, values).memory)
            try:
                on_device: bool = binding(*values)
            finally:
                current.pop()
            if faults:
                raise faults.pop()
            return on_device

        return call

    original = Op.native
    count = multiprocessors or ARCHITECTURES[architecture]
    assert library.dsv4_observe_launches(architecture.encode(), count, observer, None) == 0
    Op.native = property(native)  # type: ignore[assignment]
    try:
        yield symbols
    finally:
        Op.native = original  # type: ignore[method-assign]
        library.dsv4_observe_launches(None, 0, OBSERVER(), None)
