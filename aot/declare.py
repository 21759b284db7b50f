"""What a kernel's author declares, and what the ahead-of-time step makes of it.

Importing this module imports no kernel language, so that the build can list kernels without a compiler.

A kernel's arguments are a dict, name to type, in the order in which a launch passes them. Types are scalars ("int32",
"int64", "float32") or pointers to global memory ("bf16*", "const int32*"), spelt as in C.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

# Scalar types: bytes in the parameter list.
SCALAR_SIZES: dict[str, int] = {"int32": 4, "int64": 8, "float32": 4}

# Element types that a pointer may name.
ELEMENT_TYPES = frozenset({"bf16", "fp16", "float32", "int32", "int64", "uint32", "uint8", "fp8e4m3", "bool"})


class KernelError(Exception):
    """A kernel that does not compile, or that is not what its declaration says. The text is for the kernel's author."""


def is_pointer(argument_type: str) -> bool:
    return argument_type.endswith("*")


def element_type(argument_type: str) -> str:
    """The "bf16" of "const bf16*"."""
    return argument_type.removesuffix("*").removeprefix("const ").strip()


def argument_size(argument_type: str) -> int:
    """Bytes that a parameter of this type takes; ValueError for a type that is none."""
    if is_pointer(argument_type):
        if element_type(argument_type) not in ELEMENT_TYPES:
            raise ValueError(f"unknown element type in {argument_type!r}; known: {sorted(ELEMENT_TYPES)}")
        return 8
    if argument_type not in SCALAR_SIZES:
        raise ValueError(f"unknown argument type {argument_type!r}; known: {sorted(SCALAR_SIZES)} and pointers")
    return SCALAR_SIZES[argument_type]


@dataclass(frozen=True)
class TritonKernel:
    """One specialisation of a `@triton.jit` function.

    function: its parameters are `arguments`, then `constants`, by the same names.
    name: unique in the package; the kernel's function in C++ (dsv4::aot::<name>).
    constants: values of the tl.constexpr parameters.
    aligned: arguments that the caller promises to be multiples of 16 (pointers: 16-byte aligned). What makes wide loads
        possible; the C entry point must check it.
    warps_on: architectures on which num_warps would spill, with the number that does not.
    constants_on: architectures on which some of the constants are others: those.
    stages_on: architectures whose shared memory holds fewer stages than num_stages, with the number that fits.
    registers_on: architectures on which a thread may take so many registers at most, so that more blocks fit.
    op: the op that launches it, if that is not the module's name.
    exports: further numbers that a launch depends on, for C++ to read beside the constants.
    """

    function: Any
    name: str
    arguments: dict[str, str]
    constants: dict[str, object] = field(default_factory=dict)
    aligned: tuple[str, ...] = ()
    num_warps: int = 4
    num_stages: int = 3
    warps_on: dict[str, int] = field(default_factory=dict)
    constants_on: dict[str, dict[str, object]] = field(default_factory=dict)
    stages_on: dict[str, int] = field(default_factory=dict)
    registers_on: dict[str, int] = field(default_factory=dict)
    op: str = ""
    exports: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        unknown = set(self.aligned) - set(self.arguments)
        if unknown:
            raise ValueError(f"{self.name}: aligned names no argument: {sorted(unknown)}")

    def constants_for(self, arch: str) -> dict[str, object]:
        """The constants that the image of an architecture is compiled with."""
        return self.constants | self.constants_on.get(arch, {})


@dataclass(frozen=True)
class CuteKernel:
    """One specialisation of a CuTe DSL kernel.

    function: the `@cute.kernel` function; its parameters are `arguments`, then `constants`, by the same names.
    name: unique in the package; the kernel's function in C++ (dsv4::aot::<name>).
    constants: compile-time values.
    threads: threads in a block.
    dynamic_shared: bytes of dynamic shared memory that a launch must pass; static shared memory is not counted.
    op: the op that launches it, if that is not the module's name.
    exports: further numbers that a launch depends on, for C++ to read beside the constants.
    """

    function: Callable[..., Any]
    name: str
    arguments: dict[str, str]
    constants: dict[str, object]
    threads: int
    dynamic_shared: int = 0
    op: str = ""
    exports: dict[str, int] = field(default_factory=dict)

    def constants_for(self, arch: str) -> dict[str, object]:
        """The constants that the image of an architecture is compiled with: the same for all."""
        return self.constants


def exported(kernel: TritonKernel | CuteKernel, arch: str) -> dict[str, bool | int | str]:
    """What C++ may read of a kernel: constants and exports, under lower-case names. KernelError if a name is taken."""
    found: dict[str, bool | int | str] = {}
    for name, value in (*kernel.constants_for(arch).items(), *kernel.exports.items()):
        if name.lower() in found:
            raise KernelError(f"{kernel.name}: exports: {name} is a constant's name already")
        if not isinstance(value, (bool, int, str)):
            raise KernelError(f"{kernel.name}: constant {name}: expected a number, a flag or a text, got {value!r}")
        found[name.lower()] = value
    return found


def check_declaration(kernel: TritonKernel | CuteKernel) -> None:
    """KernelError unless the name is an identifier, the types are known, and the arguments are the function's own.

    The order matters: a launch passes arguments in the declaration's, compilers lay them out in the function's.
    """
    if not kernel.name.isidentifier():
        raise KernelError(f"{kernel.name!r}: name: expected an identifier")
    for name, argument_type in kernel.arguments.items():
        try:
            argument_size(argument_type)
        except ValueError as error:
            raise KernelError(f"{kernel.name}: argument {name}: {error}") from None
    declared = [*kernel.arguments, *kernel.constants]
    # Triton wraps the function; the DSL leaves it one.
    parameters = list(inspect.signature(getattr(kernel.function, "fn", kernel.function)).parameters)
    if declared != parameters:
        raise KernelError(
            f"{kernel.name}: the declaration's arguments and constants must be the function's parameters, in order:"
            f" expected {parameters}, got {declared}"
        )


@dataclass(frozen=True)
class CompiledKernel:
    """A kernel's image for one architecture, and what a launch needs to know about it.

    trailing_pointers: parameters that the compiler added after the declared ones; a launch passes null for each.
    """

    name: str
    symbol: str
    arch: str
    cubin: bytes
    ptx: str
    arguments: dict[str, str]
    threads: int
    dynamic_shared: int
    trailing_pointers: int = 0
