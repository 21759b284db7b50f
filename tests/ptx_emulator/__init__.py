"""A PTX emulator: executes the PTX of CUDA kernels on the CPU and checks every memory access.

    memory = Memory()
    memory.register(address, size, "logits")
    emulate(parse(ptx), symbol, grid, block, parameters=[...], memory=memory, arch="sm_100a")

raises `EmulatorFault` where the kernel does something wrong, and `UnknownInstruction`, with name and line, for what the
emulator lacks; `missing_instructions` lists that without running anything. README.md says how it works, what it finds,
and what it does not show.
"""

from .coverage import missing_instructions
from .faults import EmulatorFault, PtxSyntaxError, UnknownInstruction
from .launch import Launch, Limits, emulate
from .memory import Memory
from .ptx_module import Module
from .ptx_parser import parse
from .tensor_map import TensorMap

__all__ = [
    "EmulatorFault",
    "Launch",
    "Limits",
    "Memory",
    "Module",
    "PtxSyntaxError",
    "TensorMap",
    "UnknownInstruction",
    "emulate",
    "missing_instructions",
    "parse",
]
