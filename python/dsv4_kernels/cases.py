"""Cases of an op: one declaration that the tests, the selftest and the benchmark all use.

A family's cases.py makes them. This module holds what they have in common: the Case itself, and how a result is judged.
"""

from __future__ import annotations

import importlib
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dsv4_kernels.op_table import OPS

FLOAT32_ULP = 2.0**-23


@dataclass(frozen=True)
class Verdict:
    """error: the worst one found; limit: the largest that is right; what: the quantity that they are of."""

    error: float
    limit: float
    what: str

    @property
    def passed(self) -> bool:
        return self.error <= self.limit  # NaN fails


@dataclass(frozen=True)
class Yardstick:
    """What an op's results and times are measured against.

    plain: the same computation in plain torch at the op's own precision, as an engine without this package would write
        it: the benchmark's rival, and the measure of rounding. Takes what the op does, changes in place what the op
        changes, and returns the outputs followed by what it changed.
    judge: from (arguments where the op ran, its results and plain's on the CPU) to a Verdict against float64.
    moved_bytes: from the arguments to the fewest bytes that must move through device memory.
    """

    plain: Callable[..., tuple[Tensor, ...]]
    judge: Callable[[tuple[Any, ...], tuple[Tensor, ...], tuple[Tensor, ...]], Verdict]
    moved_bytes: Callable[..., int]

    def verdict(self, arguments: tuple[Any, ...], results: tuple[Tensor, ...]) -> Verdict:
        """Judges results against float64, with plain torch on the same device as the measure of rounding."""
        return self.judge(arguments, to_cpu(results), to_cpu(self.plain(*fresh(arguments))))


@dataclass(frozen=True)
class Case:
    """One problem for one op.

    make: from a seeded CPU generator to the op's arguments, on the CPU.
    benched: whether the benchmark times it.
    launches: how many kernels the op launches for it.
    large: whether only the benchmark on a GPU runs it, neither selftest nor tests.
    """

    op: str
    name: str
    make: Callable[[torch.Generator], tuple[Any, ...]]
    yardstick: Yardstick
    benched: bool = False
    launches: int = 1
    large: bool = False
    labels: dict[str, Any] = field(default_factory=dict)

    @property
    def id(self) -> str:
        return f"{self.op}[{self.name}]"

    def arguments(self, device: torch.device | str, salt: int = 0) -> tuple[Any, ...]:
        """The same random inputs every time for this case and salt."""
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.id} {salt}".encode()))
        return tuple(a.to(device) if isinstance(a, Tensor) else a for a in self.make(generator))

    def run(self, arguments: tuple[Any, ...]) -> tuple[Tensor, ...]:
        """The op on these arguments, into outputs that were poisoned before.

        Returns the outputs, then copies of the arguments that the op changes in place, as it left them.
        """
        op = OPS[self.op]
        arguments = tuple(a.clone() if i in op.mutated and a is not None else a for i, a in enumerate(arguments))
        out = op.allocate(arguments, arguments[0].device)
        for tensor in out:
            poison(tensor)
        return op(arguments, out) + op.mutated_of(arguments)


@dataclass(frozen=True)
class Composite(Case):
    """A public function made of several ops, by its name; for the benchmark alone. function takes what make makes."""

    function: Callable[..., tuple[Tensor, ...]] = field(kw_only=True)


def fresh(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same values in memory of their own."""
    return tuple(a.clone() if isinstance(a, Tensor) else a for a in arguments)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one dtype are equal byte for byte: NaN equals itself, and any dtype can be compared."""
    return a.shape == b.shape and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def to_cpu(values: Sequence[Any]) -> tuple[Any, ...]:
    """The same values with tensors on the CPU."""
    return tuple(value.cpu() if isinstance(value, Tensor) else value for value in values)


POISON_BYTE = 0xA5


def poison(tensor: Tensor) -> Tensor:
    """Fills a contiguous tensor with a pattern that no kernel writes, so that what it left alone can be told."""
    tensor.view(-1).view(torch.uint8).fill_(POISON_BYTE)
    return tensor


def is_poison(tensor: Tensor) -> Tensor:
    """Which elements still hold the pattern."""
    bytes_of = tensor.reshape(-1).view(torch.uint8).reshape(*tensor.shape, tensor.element_size())
    return (bytes_of == POISON_BYTE).all(dim=-1)


def worst_relative_error(got: Tensor, expected: Tensor) -> float:
    """max |got - expected| / |expected|, where 0 must be met exactly; NaN or infinity if only one of them has it."""
    got, expected = got.to(torch.float64), expected.to(torch.float64)
    same = (got == expected) | (got.isnan() & expected.isnan())
    error = torch.where(same, 0.0, (got - expected).abs() / expected.abs())
    return float(error.max()) if error.numel() else 0.0


def all_cases() -> list[Case]:
    """The cases of every family, in the order of the op table."""
    families = dict.fromkeys(op.family for op in OPS.values())
    cases = [case for family in families for case in importlib.import_module(f"dsv4_kernels.{family}.cases").CASES]
    order = list(OPS)
    return sorted(cases, key=lambda case: order.index(case.op))


def composites() -> list[Composite]:
    """What the families have composed of their ops."""
    families = dict.fromkeys(op.family for op in OPS.values())
    modules = [importlib.import_module(f"dsv4_kernels.{family}.cases") for family in families]
    return [composite for module in modules for composite in getattr(module, "COMPOSITES", ())]
