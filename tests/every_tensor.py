"""Calls of every op that together hand it every tensor that it knows, for tests of what holds for all of them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from dsv4_kernels import InvalidArgumentError
from dsv4_kernels.cases import Case, all_cases, poison
from dsv4_kernels.op import Op
from dsv4_kernels.ops import OPS

from tests.launches import observed

ARCHITECTURE = "sm_90a"


@dataclass(frozen=True)
class Call:
    """An op, everything that it is given by name (inputs, workspace, outputs), and the tensors that this call is to
    stand for: those that no smaller call has.
    """

    op: Op
    case: str
    given: dict[str, Any]
    chosen: tuple[str, ...]

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors that are given, by name."""
        return {name: value for name, value in self.given.items() if isinstance(value, torch.Tensor)}

    def copies(self) -> dict[str, torch.Tensor]:
        """All tensors anew, each at the start of an allocation; outputs poisoned."""
        fresh = {name: tensor.clone() for name, tensor in self.tensors.items()}
        for name in self.op.results:
            poison(fresh[name])
        return fresh

    def run(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Runs the op with these in place of its own. Returns what it may have written, by name."""
        given = self.given | tensors
        arguments = tuple(given[parameter.name] for parameter in self.op.parameters)
        self.op.run(arguments, tuple(given[name] for name in self.op.results), given.get("workspace"))
        written = [self.op.parameters[i].name for i in self.op.mutated]
        return {name: given[name] for name in (*written, *self.op.results) if given[name] is not None}

    def refusal(self, tensors: dict[str, torch.Tensor]) -> str | None:
        """What the library's checks say against these in place of its own, or None; the launch is left out."""
        with observed(ARCHITECTURE):
            try:
                self.run(tensors)
            except InvalidArgumentError as error:
                return str(error)
        return None


def tensor_names(op: Op) -> list[str]:
    """Every tensor that an op knows."""
    inputs = [parameter.name for parameter in op.parameters if "Tensor" in str(parameter.type)]
    return [*inputs, *(["workspace"] if op.workspace_size else []), *op.results]


def given_to(case: Case) -> dict[str, Any]:
    """What a case hands to its op, by name, outputs and workspace included."""
    op = OPS[case.op]
    arguments = case.arguments("cpu")
    given = {parameter.name: value for parameter, value in zip(op.parameters, arguments, strict=True)}
    if op.workspace_size:
        given["workspace"] = torch.zeros(op.workspace_bytes(arguments), dtype=torch.uint8)
    return given | dict(zip(op.results, op.allocate(arguments), strict=True))


@cache
def calls_of(name: str) -> tuple[Call, ...]:
    """Few and small calls of an op in which each of its tensors is given, with as few extents below 2 as there are."""
    op = OPS[name]
    candidates = [(case.name, given_to(case)) for case in all_cases() if case.op == name and not case.large]

    def size(given: dict[str, Any]) -> int:
        return sum(value.numel() for value in given.values() if isinstance(value, torch.Tensor))

    candidates.sort(key=lambda candidate: size(candidate[1]))
    chosen: dict[int, list[str]] = {}
    for tensor in tensor_names(op):
        having = [i for i, (_, given) in enumerate(candidates) if given[tensor] is not None]
        single = [sum(extent < 2 for extent in candidates[i][1][tensor].shape) for i in having]
        if having:
            chosen.setdefault(having[single.index(min(single))], []).append(tensor)
    return tuple(Call(op, *candidates[i], tuple(names)) for i, names in sorted(chosen.items()))
