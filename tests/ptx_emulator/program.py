"""Turn a parsed kernel and the functions that it calls into a list of executable steps."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from . import instructions
from .calls import CallSite
from .faults import LaneFault, PtxSyntaxError, UnknownInstruction
from .instructions.tcgen05 import COLLECTIVE_FORMS
from .memory import Memory
from .ptx_module import (
    TYPE_BITS,
    Address,
    Function,
    Immediate,
    Instruction,
    Module,
    Negated,
    Operand,
    Pair,
    Register,
    Sink,
    Special,
    Symbol,
    Variable,
    Vector,
)
from .registry import COLLECTIVE, CONTROL, Control, Plain, plain_builder
from .special_registers import special_register
from .values import DTYPES, REGISTER_DTYPES, immediate, pack
from .warp_waits import guarded_control, rendezvous
from .wave import Active

Array = np.ndarray[Any, np.dtype[Any]]
Fetch = Callable[[Active], Array]
Put = Callable[[Active, Array], None]


@dataclass
class Step:
    """One executable instruction: `control` if it decides where lanes go on, else `run`."""

    instruction: Instruction
    run: Plain
    control: Control | None = None


@dataclass
class Program:
    """The executable form of one kernel."""

    name: str
    directives: dict[str, tuple[int, ...]]
    parameters: list[Variable]
    parameter_offsets: dict[str, int]
    parameter_size: int
    steps: list[Step] = field(default_factory=list)
    entry: int = 0
    entries: dict[str, int] = field(default_factory=dict)
    call_sites: list[CallSite] = field(default_factory=list)
    register_bits: list[int] = field(default_factory=lambda: [1])  # slot 0: the carry of add.cc and addc
    local_size: int = 0
    static_shared: dict[str, int] = field(default_factory=dict)
    dynamic_shared_offset: int = 0
    granule: int = 4  # bytes of shared memory that are always accessed together
    global_granule: int = 4
    uses_tensor_memory: bool = False
    lane_unit: int = 32  # blocks are padded to whole warps, or to whole warpgroups if the kernel uses them

    def place_variables(self, module: Module, memory: Memory) -> dict[str, int]:
        """Addresses of the module's global and constant variables; they live as long as the memory."""
        places: dict[str, int] = module.storage.setdefault(f"variables {id(memory)}", {})  # type: ignore[assignment]
        if not places:
            module.storage[f"memory {id(memory)}"] = memory  # keeps the id from being used again
            wanted = {n: v for n, v in module.variables.items() if v.space in ("global", "const")}
            for function in module.functions.values():
                wanted.update({n: v for n, v in function.variables.items() if v.space in ("global", "const")})
            for name, variable in wanted.items():
                places[name] = memory.allocate(
                    max(variable.size, 1),
                    name,
                    variable.initial or b"",
                    max(variable.alignment, 16),
                    read_only=variable.space == "const",
                )
            for name, variable in wanted.items():
                for offset, other, addend in variable.references:
                    data = struct.pack("<Q", places[other] + addend)
                    allocation = memory.find(places[name])
                    assert allocation is not None
                    at = places[name] + offset - allocation.base
                    allocation.view(np.dtype("u1"), 1)[at : at + 8, 0] = np.frombuffer(data, np.uint8)
        return places


class Scope:
    """What the builder of an instruction needs to know: registers, symbols, labels of the function it is in."""

    def __init__(self, program: Program, module: Module, function: Function, slot_base: int, local_base: int) -> None:
        self.program = program
        self.module = module
        self.function = function
        self.slot_base = slot_base
        self.locals: dict[str, int] = {}
        self.pc = 0
        self.body_base = 0
        for name, variable in function.variables.items():
            if variable.space == "local":
                local_base = -(-local_base // variable.alignment) * variable.alignment
                self.locals[name] = local_base
                local_base += variable.size
        self.local_end = local_base

    # ------------------------------------------------------------------------------------------------------ operands

    def slot(self, register: Register) -> int:
        """Place of a register in the wave's register file."""
        return self.slot_base + register.index

    def label(self, operand: Operand, instruction: Instruction) -> int:
        """The pc of a label."""
        if not isinstance(operand, Symbol):
            raise PtxSyntaxError(f"line {instruction.line}: label expected: {instruction.text}")
        return self.body_base + self.function.label(operand.name, instruction.scopes)

    def source(self, operand: Operand, type_name: str) -> Fetch:
        """A function that reads the operand as the type, in the layout of the active lanes."""
        if type_name == "pred":
            return self.predicate(operand)
        dtype = DTYPES[type_name]
        if isinstance(operand, Register):
            slot = self.slot(operand)
            register = REGISTER_DTYPES[operand.bits]
            if operand.bits == 1:
                raise PtxSyntaxError(f"predicate {operand.name} is read as .{type_name}")
            if register == dtype:
                return lambda active: active.read(slot)
            if register.itemsize == dtype.itemsize:
                return lambda active: active.read(slot).view(dtype)
            if register.itemsize > dtype.itemsize:
                unsigned = np.dtype(f"u{dtype.itemsize}")
                return lambda active: active.read(slot).astype(unsigned).view(dtype)
            unsigned = np.dtype(f"u{dtype.itemsize}")
            return lambda active: active.read(slot).astype(unsigned).view(dtype)
        if isinstance(operand, Immediate):
            constant = immediate(operand, dtype, type_name)
            return lambda active: constant
        if isinstance(operand, Special):
            return special_register(operand.name, dtype)
        if isinstance(operand, Symbol):
            address = self.symbol(operand)
            return lambda active: address(active).astype(dtype)
        if isinstance(operand, Vector):  # packed: {lo, hi} read as one wide value
            part = (
                {4: "b16", 8: "b32"}[dtype.itemsize]
                if len(operand.items) == 2
                else "b8"
                if dtype.itemsize == 4
                else "b16"
            )
            parts = [self.source(item, part) for item in operand.items]
            return lambda active: pack([p(active) for p in parts]).view(dtype).reshape(-1)
        raise PtxSyntaxError(f"operand {operand} is not a value")

    def predicate(self, operand: Operand) -> Fetch:
        """A function that reads a predicate, negated or constant too."""
        if isinstance(operand, Negated):
            inner = self.predicate(operand.operand)
            return lambda active: ~inner(active)
        if isinstance(operand, Register) and operand.bits == 1:
            slot = self.slot(operand)
            return lambda active: active.read(slot)
        if isinstance(operand, Immediate):
            constant = np.array([bool(operand.value)])
            return lambda active: constant
        raise PtxSyntaxError(f"operand {operand} is not a predicate")

    def wide(self, operand: Operand, type_name: str) -> Fetch:
        """Like `source`, but with a row for every lane of the wave. For collectives."""
        fetch = self.source(operand, type_name)

        def read(active: Active) -> Array:
            whole = active.wave.state.get("all lanes")
            if whole is None:
                whole = active.wave.state["all lanes"] = Active(
                    active.wave, np.ones(active.wave.lanes, np.bool_), False
                )
            value = fetch(whole)
            return np.broadcast_to(value, (active.wave.lanes, *value.shape[1:])) if value.shape[0] == 1 else value

        return read

    def destination(self, operand: Operand, type_name: str) -> Put:
        """A function that writes values of the type; a wider register gets them extended, as ld and cvt do."""
        if isinstance(operand, Sink):
            return lambda active, value: None
        if not isinstance(operand, Register):
            raise PtxSyntaxError(f"destination {operand} is not a register")
        slot = self.slot(operand)
        register = REGISTER_DTYPES[operand.bits]
        if operand.bits == 1:
            if type_name != "pred":
                raise PtxSyntaxError(f"predicate {operand.name} is written as .{type_name}")
            return lambda active, value: active.write(slot, value)
        dtype = DTYPES[type_name]
        if register.itemsize == dtype.itemsize:
            if register == dtype:
                return lambda active, value: active.write(slot, value)
            return lambda active, value: active.write(slot, value.view(register))
        if register.itemsize > dtype.itemsize:
            if dtype.kind == "i":
                signed = np.dtype(f"i{register.itemsize}")
                return lambda active, value: active.write(slot, value.astype(signed).view(register))
            unsigned = np.dtype(f"u{dtype.itemsize}")
            return lambda active, value: active.write(slot, value.view(unsigned).astype(register))
        raise PtxSyntaxError(f"register {operand.name} is too narrow for .{type_name}")

    def pair(self, operand: Operand) -> tuple[Operand, Operand]:
        """The two halves of a|b; the second is a sink if there is none."""
        return (operand.first, operand.second) if isinstance(operand, Pair) else (operand, Sink())

    # ------------------------------------------------------------------------------------------------------- symbols

    def variable(self, name: str) -> Variable | None:
        """The declaration of a name."""
        if name in self.function.variables:
            return self.function.variables[name]
        for one in (*self.function.parameters, *self.function.returns):
            if one.name == name:
                return one
        return self.module.variables.get(name)

    def symbol(self, symbol: Symbol) -> Fetch:
        """A function that gives the address of a variable inside its state space, as u64."""
        name, offset = symbol.name, symbol.offset
        variable = self.variable(name)
        if variable is None:
            if name in self.module.functions:
                raise UnknownInstruction(f"address of function {name}")
            raise PtxSyntaxError(f"{self.function.name}: unknown name {name}")
        if variable.space == "shared":
            place = self.program.dynamic_shared_offset if variable.external else self.program.static_shared[name]
            return _shared_address(place + offset)
        if variable.space == "local":
            local = np.array([self.locals[name] + offset], np.uint64)
            return lambda active: local
        if variable.space == "param" and self.function.is_kernel:
            inside = np.array([self.program.parameter_offsets[name] + offset], np.uint64)
            return lambda active: inside
        if variable.space in ("global", "const"):
            return lambda active: np.array([active.wave.launch.symbols[name] + offset], np.uint64)
        raise UnknownInstruction(f"address of {name} in .{variable.space}")

    def address(self, operand: Operand, bits: int = 64) -> Fetch:
        """A function that gives base + offset as u64, in the layout of the active lanes."""
        if not isinstance(operand, Address):
            raise PtxSyntaxError(f"address expected, not {operand}")
        base, offset = operand.base, operand.offset
        if isinstance(base, Symbol):
            return self.symbol(Symbol(base.name, base.offset + offset))
        if isinstance(base, Immediate):
            constant = np.array([int(base.value) + offset], np.uint64)
            return lambda active: constant
        if not isinstance(base, Register):
            raise PtxSyntaxError(f"address {operand}")
        fetch = self.source(base, f"u{base.bits}")
        if base.bits == 32:
            step = np.array([offset & 0xFFFFFFFF], np.uint32)
            if not offset:
                return lambda active: fetch(active).astype(np.uint64)
            return lambda active: (fetch(active) + step).astype(np.uint64)
        if not offset:
            return fetch
        step64 = np.array([offset & 0xFFFFFFFFFFFFFFFF], np.uint64)
        return lambda active: fetch(active) + step64


def _shared_address(offset: int) -> Fetch:
    """The address of shared memory of the executing block, which names the block's rank in its cluster."""
    constant = np.array([offset], np.uint64)

    def read(active: Active) -> Array:
        if active.wave.cluster_size == 1:
            return constant
        return active.from_wide(active.wave.rank_bits) + constant

    return read


# ------------------------------------------------------------------------------------------------------- compilation


def compile_program(module: Module, kernel: str) -> Program:
    """The executable form of a kernel; kept in the module."""
    programs: dict[str, Program] = module.storage.setdefault("programs", {})  # type: ignore[assignment]
    if kernel not in programs:
        programs[kernel] = _compile(module, module.functions[kernel])
    return programs[kernel]


def _reachable(module: Module, kernel: Function) -> list[Function]:
    found, todo = [kernel], [kernel]
    while todo:
        for instruction in todo.pop().body:
            if instruction.opcode != "call":
                continue
            for operand in instruction.operands:
                if isinstance(operand, Symbol):
                    function = module.functions.get(operand.name)
                    if function is not None and function.defined and function not in found:
                        found.append(function)
                        todo.append(function)
    return found


def _compile(module: Module, kernel: Function) -> Program:
    offsets, size = {}, 0
    for parameter in kernel.parameters:
        size = -(-size // parameter.alignment) * parameter.alignment
        offsets[parameter.name] = size
        size += parameter.size
    program = Program(kernel.name, kernel.directives, kernel.parameters, offsets, size)
    functions = _reachable(module, kernel)
    _place_shared(program, module, functions)
    everything = [i for f in functions for i in f.body]
    program.granule = min([4, *(_access_size(i, "shared") for i in everything)])
    program.global_granule = min([4, *(_access_size(i, "global") for i in everything)])
    program.uses_tensor_memory = any(i.opcode == "tcgen05" for f in functions for i in f.body)
    if any(i.opcode == "wgmma" for f in functions for i in f.body):
        program.lane_unit = 128
    scopes = []
    pc = 0
    for function in functions:
        scope = Scope(program, module, function, len(program.register_bits), program.local_size)
        program.register_bits += [r.bits for r in function.registers]
        program.local_size = scope.local_end
        scope.body_base = pc
        program.entries[function.name] = pc
        pc += len(function.body) + 1
        scopes.append(scope)
    for function, scope in zip(functions, scopes, strict=False):
        for number, instruction in enumerate(function.body):
            scope.pc = scope.body_base + number
            program.steps.append(build_step(instruction, scope))
        line = function.body[-1].line if function.body else 0
        program.steps.append(build_step(Instruction("ret", (), (), None, line, "end of the function"), scope))
    return program


def _place_shared(program: Program, module: Module, functions: list[Function]) -> None:
    declared = {n: v for n, v in module.variables.items() if v.space == "shared"}
    for function in functions:
        declared.update({n: v for n, v in function.variables.items() if v.space == "shared"})
    place, alignment = 0, 16
    used = {o.name for f in functions for i in f.body for o in _symbols(i.operands)}
    for name, variable in declared.items():
        if variable.external:
            alignment = max(alignment, variable.alignment)
        elif name in used:
            place = -(-place // variable.alignment) * variable.alignment
            program.static_shared[name] = place
            place += variable.size
    program.dynamic_shared_offset = -(-place // alignment) * alignment


def _symbols(operands: tuple[Operand, ...]) -> list[Symbol]:
    found: list[Symbol] = []
    for operand in operands:
        if isinstance(operand, Symbol):
            found.append(operand)
        elif isinstance(operand, Address):
            found += _symbols((operand.base, *operand.extra))
        elif isinstance(operand, Vector):
            found += _symbols(operand.items)
    return found


def _access_size(instruction: Instruction, space: str) -> int:
    """The smallest piece of shared or global memory that an instruction may access on its own."""
    spaces = {q.split("::")[0] for q in instruction.qualifiers} & {"global", "shared", "param", "local", "const"}
    if instruction.opcode not in ("ld", "st", "atom", "red") or (spaces and space not in spaces):
        return 4
    return min([4, *(TYPE_BITS[q] // 8 for q in instruction.qualifiers if q in TYPE_BITS)])


def build_step(instruction: Instruction, scope: Scope) -> Step:
    """The executable form of one instruction, guard included."""
    opcode = instruction.opcode
    guard = instruction.guard
    slot, negated = (scope.slot(guard[0]), guard[1]) if guard else (-1, False)
    try:
        builder = plain_builder(instruction)
        if opcode == "tcgen05" and instruction.qualifiers[0] in COLLECTIVE_FORMS:
            builder = None
        if builder is not None:
            run = builder(instruction, scope)
            if guard is None:
                return Step(instruction, run)

            def guarded(active: Active) -> None:
                part = active.where(active.registers[slot], negated)
                if part is None:
                    return
                try:
                    run(part)
                except LaneFault as fault:
                    fault.lane = int(part.index[0]) if fault.lane is None else fault.lane
                    raise

            return Step(instruction, guarded)
        if opcode in CONTROL:
            control = CONTROL[opcode](instruction, scope)
        elif opcode in COLLECTIVE:
            control = rendezvous(instruction, *COLLECTIVE[opcode](instruction, scope))
        else:
            raise instruction.unknown()
    except KeyError as missing:
        raise instruction.unknown(f"no form for {missing}") from missing
    except (PtxSyntaxError, UnknownInstruction) as problem:
        if f"line {instruction.line}" in str(problem):
            raise
        raise type(problem)(f"line {instruction.line}: {instruction.text}: {problem}") from problem
    return Step(instruction, lambda active: None, control if guard is None else guarded_control(control, slot, negated))


assert instructions  # importing the package fills the tables
