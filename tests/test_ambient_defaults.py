"""torch's default dtype and device are the caller's: they change nothing in this package."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import dsv4_kernels
import pytest
import torch
from dsv4_kernels import moe, router, stash
from dsv4_kernels.cases import all_cases, same_bits
from dsv4_kernels.ops import OPS
from torch import Tensor

PACKAGE = Path(dsv4_kernels.__file__).parent
OF_INTEGERS = {"arange", "randint", "randperm"}  # int64 by default, whatever the default dtype is
FACTORIES = OF_INTEGERS | {
    *("as_tensor", "empty", "empty_strided", "eye", "full", "linspace", "logspace", "ones", "rand", "randn"),
    *("scalar_tensor", "tensor", "zeros"),
}


def unnamed(source: str) -> list[str]:
    """Calls that make a tensor of the default dtype or on the default device."""
    faults = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        if ast.unparse(node.func.value) != "torch" or node.func.attr not in FACTORIES:
            continue
        needed = {"device"} | (set() if node.func.attr in OF_INTEGERS else {"dtype"})
        for name in sorted(needed - {keyword.arg for keyword in node.keywords}):
            faults.append(f"line {node.lineno}: {ast.unparse(node)}: no {name}")
    return faults


def test_every_tensor_is_made_with_a_dtype_and_a_device() -> None:
    files = sorted(PACKAGE.rglob("*.py"))
    assert len(files) > 60
    assert {str(path): unnamed(path.read_text()) for path in files if unnamed(path.read_text())} == {}
    assert len(unnamed("torch.zeros(3)")) == 2
    assert len(unnamed("torch.arange(3, dtype=torch.float32)")) == 1


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


AMBIENTS: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "float64": lambda: default_dtype(torch.float64),
    "meta": lambda: torch.device("meta"),
}


def assert_same(got: object, expected: object) -> None:
    if isinstance(expected, Tensor):
        assert isinstance(got, Tensor)
        assert (got.dtype, got.device) == (expected.dtype, expected.device)
        assert same_bits(got, expected)
    else:
        assert got == expected


@pytest.mark.parametrize("ambient", AMBIENTS)
@pytest.mark.parametrize("op", OPS)
def test_ops_and_their_cases(op: str, ambient: str) -> None:
    """The arguments of every case, and the results and the verdict of the smallest ones."""
    cases = [case for case in all_cases() if case.op == op and not case.large]
    arguments = {case.id: case.arguments("cpu") for case in cases}
    cases.sort(key=lambda case: case.baseline.moved_bytes(*arguments[case.id]))
    results = {case.id: case.run(arguments[case.id]) for case in cases[:3]}
    with AMBIENTS[ambient]():
        for case in cases:
            for got, expected in zip(case.arguments("cpu"), arguments[case.id], strict=True):
                assert_same(got, expected)
        for case in cases[:3]:
            again = case.run(arguments[case.id])
            for got, expected in zip(again, results[case.id], strict=True):
                assert_same(got, expected)
            assert case.baseline.verdict(arguments[case.id], again).passed


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32, device="cpu")


HIDDEN = random(5, 128).to(torch.bfloat16)
WEIGHTS = random(5, 2).abs()
IDS = torch.tensor([[0, 1], [1, 0], [0, 1], [1, 0], [0, 1]], dtype=torch.int32)


def layer(nvfp4: bool, activations: str) -> Tensor:
    made = moe.Nvfp4MoE(2, 128, 128, top_k=2, activations=activations, device="cpu")
    made.prepare_weights_from_dequantized(random(2, 256, 128) / 11, random(2, 128, 128) / 11, nvfp4=nvfp4)
    if activations == "nvfp4":
        made.compute_activation_global_scales(HIDDEN, WEIGHTS, IDS)
    return made.run(HIDDEN, WEIGHTS, IDS)


def routed(mode: router.router.Mode) -> Tensor:
    vocabulary = {"vocab_size": 10} if mode == "hash" else {}
    made = router.Router(mode, hidden_size=128, experts=16, top_k=4, device="cpu", **vocabulary)
    table = torch.arange(40, device="cpu").view(10, 4) % 16
    tensors = {"bias": random(16)} if mode == "dense" else {"tid2eid": table}
    made.load_state_dict({"weight": random(16, 128).to(torch.bfloat16), **tensors})
    return made(HIDDEN, torch.arange(5, device="cpu"))[0]


def stashed() -> Tensor:
    made = stash.PagedStash({(torch.bfloat16, 128): stash.PoolSize(4)}, page_size=2, device="cpu")
    return made.pop(made.stash(HIDDEN))


MODULES: dict[str, Callable[[], Tensor]] = {
    "Router, dense": lambda: routed("dense"),
    "Router, hash": lambda: routed("hash"),
    "Nvfp4MoE, MXFP4": lambda: layer(False, "bfloat16"),
    "Nvfp4MoE, NVFP4": lambda: layer(True, "bfloat16"),
    "Nvfp4MoE, W4A8": lambda: layer(False, "mxfp8"),
    "Nvfp4MoE, W4A4": lambda: layer(True, "nvfp4"),
    "PagedStash": stashed,
    "quantize_weight_to_nvfp4": lambda: moe.quantize_weight_to_nvfp4(random(128, 8))[2],
    "quantize_activation_nvfp4": lambda: moe.quantize_activation_nvfp4(random(8, 128), 0.01)[1].view(torch.uint8),
}


@pytest.mark.parametrize("ambient", AMBIENTS)
@pytest.mark.parametrize("name", MODULES)
def test_modules(name: str, ambient: str) -> None:
    expected = MODULES[name]()
    with AMBIENTS[ambient]():
        assert_same(MODULES[name](), expected)
