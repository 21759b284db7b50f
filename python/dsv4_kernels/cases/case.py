"""One declaration per problem that the tests, the selftest and the benchmark all use: a Case, and how its results are
checked.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dsv4_kernels.cases.comparison import fresh, poison, to_cpu
from dsv4_kernels.ops import OPS


@dataclass(frozen=True)
class Verdict:
    """error: worst error found. limit: largest acceptable error. what: the quantity measured."""

    error: float
    limit: float
    what: str

    @property
    def passed(self) -> bool:
        return self.error <= self.limit  # NaN fails


@dataclass(frozen=True)
class Baseline:
    """What an op's results and times are compared with.

    run: the baseline, the same computation in plain torch at the op's own precision, as an engine without this package
        would write it: the benchmark times it, and its rounding error is the measure of the op's. Takes what the op
        takes, changes in place what the op changes, and returns the outputs followed by what it changed.
    check: from (arguments where the op ran, its results and the baseline's on the CPU) to a Verdict against float64.
    moved_bytes: from the arguments to the fewest bytes that must move through device memory.
    """

    run: Callable[..., tuple[Tensor, ...]]
    check: Callable[[tuple[Any, ...], tuple[Tensor, ...], tuple[Tensor, ...]], Verdict]
    moved_bytes: Callable[..., int]

    def verdict(self, arguments: tuple[Any, ...], results: tuple[Tensor, ...]) -> Verdict:
        """Checks results against float64, with the baseline on the same device as the measure of rounding."""
        return self.check(arguments, to_cpu(results), to_cpu(self.run(*fresh(arguments))))


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
    baseline: Baseline
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
        out = op.allocate(arguments)
        for tensor in out:
            poison(tensor)
        return op(arguments, out) + op.mutated_of(arguments)


def named(op: str, arguments: tuple[Any, ...]) -> Any:
    """The arguments of an op as a named tuple, by the names of its declaration."""
    return OPS[op].inputs(*arguments)


@dataclass(frozen=True)
class Composite(Case):
    """A public function made of several ops, by its name; for the benchmark alone. function takes what make makes."""

    function: Callable[..., tuple[Tensor, ...]] = field(kw_only=True)
