"""Registers every op as torch.ops.dsv4.<op>, once.

    dsv4::<op>(inputs) -> (outputs)
    dsv4::<op>.out(inputs, outputs) -> ()

An op without outputs, which changes its inputs in place, has the first form alone. Where an op needs a workspace, both
forms end in `Tensor(w!)? workspace=None`.

A family registers its ops when it is imported. Call register() only to use torch.ops.dsv4 without importing families.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

from dsv4_kernels import _native
from dsv4_kernels.errors import KernelError
from dsv4_kernels.op import OPS, Op

_libraries: list[torch.library.Library] = []  # torch forgets the ops of one that is gone


def register() -> None:
    """Registers the ops of every family, by importing them. May be called more than once, and from several threads."""
    importlib.import_module("dsv4_kernels.ops")


def register_family(family: str) -> None:
    """Registers the ops of a family, all of them or none if it raises. Each family calls this once, while it is
    imported: what is imported in one thread is complete in another.
    """
    library = torch.library.Library("dsv4", "FRAGMENT")
    try:
        for op in OPS.values():
            if op.family == family:
                _register(op, library)
    except BaseException:
        library._destroy()
        raise
    _libraries.append(library)


def _register(op: Op, library: torch.library.Library) -> None:
    results = ", ".join(["Tensor"] * len(op.results))
    workspace = "" if op.workspace_size is None else ", Tensor(w!)? workspace=None"
    library.define(f"{op.name}({op.schema}{workspace}) -> {results if len(op.results) == 1 else f'({results})'}")
    functional, out, fake = _functional(op), _out(op), _fake(op)
    for key in ("CPU", "CUDA"):
        library.impl(op.name, functional, key)
    library.impl(op.name, fake, "Meta")
    if not op.results:
        return
    mutated = ", ".join(f"Tensor(out{i}!) {name}" for i, name in enumerate(op.results))
    # Outputs are positional: the dispatcher takes 1.6 us longer with keyword arguments.
    inputs = ", ".join(argument.partition("=")[0] for argument in op.schema.split(", "))
    library.define(f"{op.name}.out({inputs}, {mutated}{workspace}) -> ()")
    for key in ("CPU", "CUDA"):
        library.impl(f"{op.name}.out", out, key)
    library.impl(f"{op.name}.out", _fake_out(op), "Meta")


def _one_or_all(results: tuple[torch.Tensor, ...]) -> Any:
    return results[0] if len(results) == 1 else results or None


def _functional(op: Op) -> Callable[..., Any]:
    nothing, count = (None,) * len(op.results), len(op.parameters)

    def functional(*arguments: Any) -> Any:
        return _one_or_all(op.run(_with_defaults(op, arguments), nothing, dispatched=True))

    def functional_with_workspace(*values: Any) -> Any:
        return _one_or_all(op.run(_with_defaults(op, values[:count]), nothing, *values[count:], dispatched=True))

    return functional if op.workspace_size is None else functional_with_workspace


def _out(op: Op) -> Callable[..., None]:
    native, mark_written = op.native, _native.mark_written
    count, results = len(op.parameters), len(op.results)

    def through_run(*values: Any) -> None:
        op.run(values[:count], values[count : count + results], *values[count + results :], dispatched=True)

    def out(*values: Any) -> None:
        try:
            on_device = native(*values)
        except KernelError:
            raise
        except Exception:
            return through_run(*values)  # which says what is wrong
        if not on_device:
            op.run_on_cpu(values[:count], values[count:])
        return mark_written(values[count:])

    # Which also marks inputs that have changed.
    return out if op.workspace_size is None and not op.mutated else through_run


def _fake(op: Op) -> Callable[..., Any]:
    count = len(op.parameters)

    def fake(*values: Any) -> Any:
        arguments = _with_defaults(op, values[:count])
        op.refuse_gradients(arguments)
        return _one_or_all(op.allocate(arguments))

    return fake


def _fake_out(op: Op) -> Callable[..., None]:
    count, results = len(op.parameters), len(op.results)

    def fake(*values: Any) -> None:
        op.refuse_gradients(values[:count], values[count : count + results])

    return fake


def _with_defaults(op: Op, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The dispatcher drops trailing arguments that equal their defaults; the binding wants them all."""
    return arguments + tuple(parameter.default_value for parameter in op.parameters[len(arguments) :])
