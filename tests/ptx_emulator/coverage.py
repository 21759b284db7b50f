"""Which instructions of a module the emulator lacks."""

from __future__ import annotations

from .faults import PtxSyntaxError, UnknownInstruction
from .program import Program, Scope, build_step
from .ptx_module import Module


def missing_instructions(module: Module) -> list[str]:
    """A text with name and line for every instruction of every kernel and function that cannot be executed."""
    missing: list[str] = []
    for function in module.functions.values():
        if not function.defined:
            continue
        program = Program(function.name, {}, function.parameters, {p.name: 0 for p in function.parameters}, 0)
        shared = {**module.variables, **function.variables}
        program.static_shared = {name: 0 for name, variable in shared.items() if variable.space == "shared"}
        program.entries = dict.fromkeys(module.functions, 0)
        scope = Scope(program, module, function, 1, 0)
        for instruction in function.body:
            try:
                build_step(instruction, scope)
            except (UnknownInstruction, PtxSyntaxError) as problem:
                missing.append(f"{function.name}: {problem}")
    return missing
