"""Branches, calls and returns, exit, trap, fences, nanosleep."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ..calls import CallSite
from ..faults import LaneFault
from ..ptx_module import Group, Instruction, Symbol
from ..registry import Control, Plain, control, plain
from .warp import cluster_and_warp

if TYPE_CHECKING:
    from ..program import Scope
    from ..wave import Active, Stack, Wave

Array = np.ndarray[Any, np.dtype[Any]]


@control("bra")
def bra(instruction: Instruction, scope: Scope) -> Control:
    """bra{.uni} label"""
    target = scope.label(instruction.operands[0], instruction)
    return lambda wave, active, pc, stack: target


@control("brx")
def brx(instruction: Instruction, scope: Scope) -> Control:
    """brx.idx index, table"""
    index = scope.source(instruction.operands[0], "u32")
    table = instruction.operands[1]
    if not isinstance(table, Symbol):
        raise instruction.unknown("table")
    targets = [scope.label(Symbol(name), instruction) for name in scope.function.branch_tables[table.name]]

    def run(wave: Wave, active: Active, pc: int, stack: Stack) -> int | None:
        values = active.rows(index(active))
        for value in np.unique(values):
            lanes = active.index[values == value]
            if value >= len(targets):
                raise LaneFault(
                    "invalid operand", f"branch table has {len(targets)} entries, index {value}", int(lanes[0])
                )
            mask = np.zeros(wave.lanes, np.bool_)
            mask[lanes] = True
            wave.add(targets[int(value)], stack, mask)
        return None

    return run


@control("exit")
def exit_(instruction: Instruction, scope: Scope) -> Control:
    """exit"""

    def run(wave: Wave, active: Active, pc: int, stack: Stack) -> None:
        wave.exit(active.mask)

    return run


@control("ret")
def ret(instruction: Instruction, scope: Scope) -> Control:
    """ret: back to the caller; the end of the thread in a kernel"""

    def run(wave: Wave, active: Active, pc: int, stack: Stack) -> None:
        if not stack:
            wave.exit(active.mask)
            return
        site = wave.program.call_sites[stack[-1]]
        for source, target in site.results:
            _copy_parameter(wave, active, source, target)
        wave.add(site.return_pc, stack[:-1], active.mask)

    return run


def _copy_parameter(wave: Wave, active: Active, source: tuple[str, str], target: tuple[str, str]) -> None:
    values = wave.parameters[source]
    kept = wave.parameters.get(target)
    kept = np.zeros_like(values) if kept is None else kept
    kept[active.index] = values[active.index]
    wave.parameters[target] = kept


@control("call")
def call(instruction: Instruction, scope: Scope) -> Control:
    """call{.uni} (results), function, (arguments)"""
    operands = list(instruction.operands)
    results = operands.pop(0).items if isinstance(operands[0], Group) else ()  # type: ignore[union-attr]
    function = operands.pop(0)
    arguments = operands.pop(0).items if operands and isinstance(operands[0], Group) else ()  # type: ignore[union-attr]
    if not isinstance(function, Symbol) or operands:
        raise instruction.unknown("indirect call")
    callee = scope.module.functions.get(function.name)
    if callee is None or not callee.defined:
        return _system_call(instruction, function.name, [(scope.function.name, r.name) for r in results])  # type: ignore[union-attr]
    caller = scope.function.name
    if callee is scope.function:
        raise instruction.unknown("recursion")
    places = [(caller, a.name) for a in arguments if isinstance(a, Symbol)]
    if len(places) != len(arguments) or len(places) != len(callee.parameters) or len(results) != len(callee.returns):
        raise instruction.unknown("arguments")
    copies = [(place, (callee.name, p.name)) for place, p in zip(places, callee.parameters, strict=False)]
    site = CallSite(
        scope.pc + 1, [((callee.name, r.name), (caller, o.name)) for r, o in zip(callee.returns, results, strict=False)]
    )
    number = len(scope.program.call_sites)
    scope.program.call_sites.append(site)
    entry = scope.program.entries[callee.name]

    def run(wave: Wave, active: Active, pc: int, stack: Stack) -> None:
        if len(stack) > 64:
            raise LaneFault("deadlock", "calls are nested more than 64 deep")
        for source, target in copies:
            _copy_parameter(wave, active, source, target)
        wave.add(entry, (*stack, number), active.mask)

    return run


def _system_call(instruction: Instruction, name: str, results: list[tuple[str, str]]) -> Control:
    """Functions of the CUDA runtime: printing is ignored, a failed assertion is a fault."""
    if name not in ("vprintf", "__assertfail"):
        raise instruction.unknown(f"function {name} is not defined")

    def run(wave: Wave, active: Active, pc: int, stack: Stack) -> int:
        if name == "__assertfail":
            raise LaneFault("trap", "device assertion failed")
        for result in results:
            wave.parameters[result] = np.zeros((wave.lanes, 8), np.uint8)
        return pc + 1

    return run


@plain("trap", "brkpt")
def trap(instruction: Instruction, scope: Scope) -> Plain:
    """trap"""

    def run(active: Active) -> None:
        raise LaneFault("trap", "the kernel executed trap")

    return run


@plain("membar", "fence")
def fence(instruction: Instruction, scope: Scope) -> Plain:
    """Fences change what relaxed operations publish. Proxy fences and acquiring ones do nothing here."""
    if instruction.has("mbarrier_init"):
        return lambda active: active.wave.clocks.fence_mbarrier_init(*cluster_and_warp(active))
    reach = "cluster" if instruction.has("cluster") else "gpu"
    if any(q in ("cta", "acquire", "alias") or q.startswith("proxy") for q in instruction.qualifiers):
        return lambda active: None
    return lambda active: active.wave.clocks.fence(*cluster_and_warp(active), reach)


@plain("nop", "setmaxnreg", "pmevent", "griddepcontrol")
def nothing(instruction: Instruction, scope: Scope) -> Plain:
    """Register counts and launch dependencies change nothing here.

    griddepcontrol: the emulator runs a launch when the one before it is complete.
    """
    return lambda active: None


@control("nanosleep")
def nanosleep(instruction: Instruction, scope: Scope) -> Control:
    """nanosleep: others go first"""

    def run(wave: Wave, active: Active, pc: int, stack: Stack) -> None:
        wave.poll()
        wave.step_aside(pc + 1, stack, active.mask)

    return run
