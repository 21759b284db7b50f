"""A PTX emulator: executes the PTX of the shipped kernels on the CPU and checks every memory access."""

from .faults import EmulatorFault, PtxSyntaxError, UnknownInstruction
from .launch import emulate
from .memory import Memory
from .ptx_parser import Module, parse

__all__ = ["EmulatorFault", "Memory", "Module", "PtxSyntaxError", "UnknownInstruction", "emulate", "parse"]
