"""Checks of results are independent of what they check: they share no code with the CPU implementation, and reject it
where it is wrong, so that the selftest on a machine without a GPU can fail.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dsv4_kernels
import pytest
import torch
from dsv4_kernels.cases import all_cases, is_poison, same_bits
from dsv4_kernels.cli.selftest import check
from dsv4_kernels.ops import OPS

PACKAGE = Path(dsv4_kernels.__file__).parent
CASES = sorted((PACKAGE / "cases").rglob("*.py"))
# A module of conversions that the CPU implementation is made of too: only its constants may be taken.
CODEC = "number_formats"


def borrowed(source: str) -> list[str]:
    """What a module takes from the CPU implementation: imports of its package, ops' `cpu`, functions of the codec."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found += [name for name in names if name.startswith("dsv4_kernels.cpu")]
            found += [name for name in names if f".{CODEC}." in name and not name.rpartition(".")[2].isupper()]
        elif isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.startswith("dsv4_kernels.cpu")]
        elif isinstance(node, ast.Attribute):
            of = node.value
            if isinstance(of, ast.Name) and of.id == CODEC and not node.attr.isupper():
                found.append(f"{of.id}.{node.attr}")
            if node.attr == "cpu" and isinstance(of, ast.Subscript):
                found.append(ast.unparse(node))
    return found


@pytest.mark.parametrize("path", CASES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_is_borrowed_from_the_cpu_implementation(path: Path) -> None:
    assert not borrowed(path.read_text())


def test_there_is_something_to_look_at() -> None:
    assert len(CASES) >= 15


@pytest.mark.parametrize(
    "source",
    [
        "from dsv4_kernels import cpu",
        "from dsv4_kernels.cpu.router import functions",
        "from dsv4_kernels.cpu.router.functions import weigh",
        "from dsv4_kernels.cpu.moe import grouped_gemm as other",
        "import dsv4_kernels.cpu.cache.functions",
        "OPS[op].cpu(*arguments)",
        "from dsv4_kernels.number_formats import encode_e4m3",
        "from dsv4_kernels import number_formats\nnumber_formats.encode_e4m3(x)",
    ],
)
def test_what_is_borrowed_is_found(source: str) -> None:
    assert borrowed(source)


def spoiled(tensor: torch.Tensor) -> torch.Tensor:
    """Floats doubled; integers, flags and codes with every bit flipped; what was not written left alone."""
    if tensor.dtype == torch.bool:
        return ~tensor
    if tensor.is_floating_point() and tensor.element_size() > 1:
        return torch.where(is_poison(tensor), tensor, 2 * tensor)
    codes = tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor
    return torch.where(is_poison(codes), codes, ~codes).view(tensor.dtype)


def wrong(name: str) -> Callable[..., None]:
    """The CPU implementation of an op, with everything that it writes spoiled."""
    op, right = OPS[name], OPS[name].cpu

    @functools.wraps(right)  # the dispatcher reads its parameters
    def implementation(**values: Any) -> None:
        inputs = {op.names[i]: values.get(op.names[i]) for i in op.mutated}
        before = {name: tensor.clone() for name, tensor in inputs.items() if tensor is not None}
        right(**values)
        for name, old in before.items():  # only what has changed
            flat, changed = values[name].view(-1), ~equal_elements(values[name], old).view(-1)
            as_bytes = flat.view(torch.uint8) if flat.element_size() == 1 else flat
            new = spoiled(flat)
            as_bytes[changed] = (new.view(torch.uint8) if flat.element_size() == 1 else new)[changed]
        for name in op.results:
            values[name].copy_(spoiled(values[name]))

    return implementation


def equal_elements(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Which elements have the same bits."""
    size = a.element_size()
    bits = (t.contiguous().view(-1).view(torch.uint8).view(-1, size) for t in (a, b))
    return (next(bits) == next(bits)).all(dim=1).view(a.shape)


CHECKED = 3  # cases of each op, the smallest of those whose results are then other ones


@pytest.mark.parametrize("op", OPS)
def test_a_wrong_cpu_implementation_is_rejected(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the op's own check, and with it by the selftest. A sum of nothing is 0, and so is its double: such a case
    cannot tell.
    """
    cases = [case for case in all_cases() if case.op == op and not case.large]
    cases.sort(key=lambda case: case.baseline.moved_bytes(*case.arguments("cpu")))
    right, seen = OPS[op].cpu, 0
    for case in cases:
        arguments = case.arguments("cpu")
        expected = case.run(arguments)
        monkeypatch.setitem(vars(OPS[op]), "cpu", wrong(op))
        got = case.run(arguments)
        if not all(same_bits(a, b) for a, b in zip(expected, got, strict=True)):
            assert not check(case, "cpu", check_on_cpu=False)["passed"], case.id
            seen += 1
        monkeypatch.setitem(vars(OPS[op]), "cpu", right)
        if seen == CHECKED:
            break
    assert seen
