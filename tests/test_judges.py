"""What judges results is independent of what it judges: it shares no code with the CPU implementation, and rejects it
where it is wrong, so that the selftest on a machine without a GPU can fail.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dsv4_kernels
import pytest
import torch
from dsv4_kernels.cases import all_cases, is_poison, same_bits
from dsv4_kernels.cli.selftest import check
from dsv4_kernels.op_table import OPS

PACKAGE = Path(dsv4_kernels.__file__).parent
JUDGING = sorted(
    path
    for pattern in ("cases.py", "baselines.py", "code_tables.py", "*/*cases.py", "*/yardsticks.py", "*/definitions.py")
    for path in PACKAGE.glob(pattern)
)
# Of modules that the CPU implementation is made of, what is data.
CODECS = {"number_formats", "page_layouts"}
DATA = {"LAYOUTS_BY_INDEX", "PAGE_LAYOUTS", "PageLayout", "Pages", "Quantization"}


def borrowed(source: str) -> list[str]:
    """What a module takes from the CPU implementation: imports of its modules, and ops' `reference`."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            module = (node.module or "").rpartition(".")[2]
            names = [alias.name for alias in node.names]
            found += [f"{module}.{name}" for name in names if module.endswith("reference")]
            found += [name for name in names if name.endswith("reference")]
            found += [
                f"{module}.{name}" for name in names if module in CODECS and name not in DATA and not name.isupper()
            ]
        elif isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.endswith("reference")]
        elif isinstance(node, ast.Attribute):
            if node.attr == "reference":
                found.append(".reference")
            of = node.value
            if isinstance(of, ast.Name) and of.id in CODECS and not node.attr.isupper():
                found.append(f"{of.id}.{node.attr}")
    return found


@pytest.mark.parametrize("path", JUDGING, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_is_borrowed_from_the_cpu_implementation(path: Path) -> None:
    assert not borrowed(path.read_text())


def test_there_is_something_to_look_at() -> None:
    assert len(JUDGING) >= 15


@pytest.mark.parametrize(
    "source",
    [
        "from dsv4_kernels.router import reference",
        "from dsv4_kernels.router.reference import weigh",
        "from dsv4_kernels.moe import grouped_gemm_reference as other",
        "import dsv4_kernels.cache.reference",
        "OPS[op].reference(*arguments)",
        "from dsv4_kernels.cache.page_layouts import read_entries",
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
    op, right = OPS[name], OPS[name].reference

    def implementation(*values: Any) -> None:
        before = [values[i].clone() if i in op.mutated and values[i] is not None else None for i in range(len(values))]
        right(*values)
        for i, old in enumerate(before):
            if old is not None:  # only what has changed
                flat, changed = values[i].view(-1), ~equal_elements(values[i], old).view(-1)
                as_bytes = flat.view(torch.uint8) if flat.element_size() == 1 else flat
                new = spoiled(flat)
                as_bytes[changed] = (new.view(torch.uint8) if flat.element_size() == 1 else new)[changed]
        for out in values[len(op.schema) :]:
            out.copy_(spoiled(out))

    return implementation


def equal_elements(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Which elements have the same bits."""
    size = a.element_size()
    bits = (t.contiguous().view(-1).view(torch.uint8).view(-1, size) for t in (a, b))
    return (next(bits) == next(bits)).all(dim=1).view(a.shape)


CHECKED = 3  # cases of each op, the smallest of those whose results are then other ones


@pytest.mark.parametrize("op", OPS)
def test_a_wrong_cpu_implementation_is_rejected(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the op's own judge, and with it by the selftest. A sum of nothing is 0, and so is its double: such a case
    cannot tell.
    """
    cases = [case for case in all_cases() if case.op == op and not case.large]
    cases.sort(key=lambda case: case.yardstick.moved_bytes(*case.arguments("cpu")))
    right, seen = OPS[op].reference, 0
    for case in cases:
        arguments = case.arguments("cpu")
        expected = case.run(arguments)
        monkeypatch.setitem(vars(OPS[op]), "reference", wrong(op))
        got = case.run(arguments)
        if not all(same_bits(a, b) for a, b in zip(expected, got, strict=True)):
            assert not check(case, "cpu", judge_on_cpu=False)["passed"], case.id
            seen += 1
        monkeypatch.setitem(vars(OPS[op]), "reference", right)
        if seen == CHECKED:
            break
    assert seen
