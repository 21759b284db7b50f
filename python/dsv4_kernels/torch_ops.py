"""Registers every op of the table as torch.ops.dsv4.<op>, once.

    dsv4::<op>(inputs) -> (outputs)
    dsv4::<op>.out(inputs, outputs) -> ()

An op without outputs, which changes its inputs in place, has the first form alone. Where an op needs a workspace, both
forms end in `Tensor(w!)? workspace=None`.

Runs at the first use of a family. Call register() yourself only to use torch.ops.dsv4 without importing one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch

from dsv4_kernels.op import Op
from dsv4_kernels.op_table import OPS

_library: torch.library.Library | None = None  # once every op is in it
_registering = threading.Lock()


def register() -> None:
    """Registers the ops with torch: all of them, or none if it raises. Does nothing the second time; may be called from
    several threads, and returns once the ops are there.
    """
    global _library
    if _library is not None:
        return
    # Nothing of this package may be imported under the lock: its families call register() while they are imported.
    with _registering:
        if _library is not None:
            return
        library = torch.library.Library("dsv4", "DEF")
        try:
            for op in OPS.values():
                _register(op, library)
        except BaseException:
            library._destroy()
            raise
        _library = library


def _register(op: Op, library: torch.library.Library) -> None:
    results = ", ".join(["Tensor"] * len(op.results))
    workspace = "" if op.workspace_size is None else ", Tensor(w!)? workspace=None"
    library.define(f"{op.name}({op.arguments}{workspace}) -> {results if len(op.results) == 1 else f'({results})'}")
    functional, out, fake = _functional(op), _out(op), _fake(op)
    for key in ("CPU", "CUDA"):
        library.impl(op.name, functional, key)
    library.impl(op.name, fake, "Meta")
    if not op.results:
        return
    mutated = ", ".join(f"Tensor(out{i}!) {name}" for i, name in enumerate(op.results))
    # Outputs are positional: the dispatcher takes 1.6 us longer with keyword arguments.
    inputs = ", ".join(argument.partition("=")[0] for argument in op.arguments.split(", "))
    library.define(f"{op.name}.out({inputs}, {mutated}{workspace}) -> ()")
    for key in ("CPU", "CUDA"):
        library.impl(f"{op.name}.out", out, key)
    library.impl(f"{op.name}.out", _fake_out, "Meta")


def _one_or_all(results: tuple[torch.Tensor, ...]) -> Any:
    return results[0] if len(results) == 1 else results or None


def _functional(op: Op) -> Callable[..., Any]:
    nothing, count = (None,) * len(op.results), len(op.schema)

    def functional(*arguments: Any) -> Any:
        return _one_or_all(op.run(_with_defaults(op, arguments), nothing))

    def functional_with_workspace(*values: Any) -> Any:
        return _one_or_all(op.run(_with_defaults(op, values[:count]), nothing, *values[count:]))

    return functional if op.workspace_size is None else functional_with_workspace


def _out(op: Op) -> Callable[..., None]:
    native, count, results = op.native, len(op.schema), len(op.results)

    def out(*values: Any) -> None:
        if not native(*values):
            with torch.no_grad():
                op.reference(*values)

    def out_with_workspace(*values: Any) -> None:
        op.run(values[:count], values[count:][:results], *values[count + results :])

    return out if op.workspace_size is None else out_with_workspace


def _fake(op: Op) -> Callable[..., Any]:
    count = len(op.schema)

    def fake(*values: Any) -> Any:
        arguments = _with_defaults(op, values[:count])
        return _one_or_all(op.allocate(arguments, arguments[0].device))

    return fake


def _fake_out(*values: Any) -> None:
    return None


def _with_defaults(op: Op, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The dispatcher drops trailing arguments that equal their defaults; the binding wants them all."""
    return arguments + tuple(parameter.default_value for parameter in op.schema[len(arguments) :])
