"""Build instructions that apply a function to every lane."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..ptx_module import Instruction, Operand
from ..registry import Plain

if TYPE_CHECKING:
    from ..program import Scope
    from ..wave import Active

Array = np.ndarray[Any, np.dtype[Any]]


def elementwise(
    scope: Scope,
    destination: Operand,
    out_type: str,
    operands: Sequence[Operand],
    in_types: Sequence[str] | str,
    function: Callable[..., Array],
) -> Plain:
    """destination = function(operands), with the operands read as the given types."""
    types = [in_types] * len(operands) if isinstance(in_types, str) else in_types
    sources = [scope.source(operand, kind) for operand, kind in zip(operands, types, strict=True)]
    put = scope.destination(destination, out_type)
    if len(sources) == 1:
        (first,) = sources
        return lambda active: put(active, function(first(active)))
    if len(sources) == 2:
        left, right = sources
        return lambda active: put(active, function(left(active), right(active)))
    if len(sources) == 3:
        one, two, three = sources
        return lambda active: put(active, function(one(active), two(active), three(active)))

    def run(active: Active) -> None:
        put(active, function(*[source(active) for source in sources]))

    return run


def allow(instruction: Instruction, *known: str) -> None:
    """Raise for a qualifier that the builder does not know."""
    for qualifier in instruction.qualifiers:
        if qualifier not in known:
            raise instruction.unknown(f"qualifier .{qualifier}")
