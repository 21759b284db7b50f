"""A PTX emulator: executes the PTX of the shipped kernels on the CPU and checks every memory access.

    memory = Memory()
    memory.register(address, size, "logits")
    emulate(parse(ptx), symbol, grid, block, parameters=[...], memory=memory, arch="sm_100a")

raises `EmulatorFault` where the kernel does something wrong, and `UnknownInstruction`, with name and line, for what the
emulator lacks; `missing_instructions` lists that without running anything.

How it works: all threads of many blocks are lanes of numpy arrays (`wave`), the text becomes a list of callables
(`ptx_parser`, `program`), and each group of instructions has a module in `instructions`. Races are found by the order
that barriers establish, not by trying schedules (`shared_memory`, `global_order`, `cluster_life`).

What it does not show:
- Stores are visible to all threads at once. A missing proxy fence is not found. Of other fences the emulator notices
  those that a relaxed arrival at the cluster's barrier needs, fence.mbarrier_init among them.
- Order is kept for warps: after a synchronisation of part of a warp, the whole warp counts as synchronised. On global
  memory only writes are remembered, so a write that comes too early after another thread's read is not found.
- Registers that were never written hold a pattern of 0xA5 bytes; reading them is no fault.
- Matrix products are summed in float64 and rounded once; ex2, lg2, rcp, rsqrt, sqrt, sin, cos, tanh and div, where
  approximate, are computed in float64 and rounded. Both are within the documented error, not the hardware's bits.
- Clocks count executed instructions. griddepcontrol does nothing: launches run one after the other.
- Not there: products of 128 rows by a pair of blocks (256 are), sparse products, im2col and reducing tensor copies,
  multimem, textures, recursion and indirect calls, float64 arithmetic with directed rounding.
"""

from .coverage import missing_instructions
from .faults import EmulatorFault, PtxSyntaxError, UnknownInstruction
from .launch import emulate
from .memory import Memory
from .ptx_module import Module
from .ptx_parser import parse
from .tensor_map import TensorMap

__all__ = [
    "EmulatorFault",
    "Memory",
    "Module",
    "PtxSyntaxError",
    "TensorMap",
    "UnknownInstruction",
    "emulate",
    "missing_instructions",
    "parse",
]
