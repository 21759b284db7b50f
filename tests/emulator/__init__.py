"""A PTX emulator: executes the PTX of the shipped kernels on the CPU and checks every memory access.

    memory = Memory()
    memory.register(address, size, "logits")
    emulate(parse(ptx), symbol, grid, block, parameters=[...], memory=memory, arch="sm_100a")

raises `EmulatorFault` where the kernel does something wrong, and `UnknownInstruction`, with name and line, for what the
emulator lacks; `missing_instructions` lists that without running anything.

How it works: all threads of many blocks are lanes of numpy arrays (`wave`), the text becomes a list of callables
(`ptx_parser`, `program`), and each group of instructions has a module in `instructions`. Races are found by the order
that barriers establish, not by trying schedules (`shared_memory`, `global_order`, `cluster_life`).

What it reports, whichever schedule runs:
- Accesses out of bounds, misaligned, to read-only memory, or of bytes that nobody has written.
- Two accesses to one place of shared or global memory, of which one writes, without an order between them: in a block,
  in a cluster, and between blocks that synchronise through global memory (`shared_memory`, `global_order`).
- Shared memory of another block that may not have started or may have ended, and mbarriers that may not be initialised
  yet (`cluster_life`, `instructions.mbarrier`).
- Barriers that part of the threads reach, waits without end, asynchronous results that are used before they are waited
  for, operands and launches that the hardware refuses.

What it does not show:
- Stores are visible to all threads at once. Missing proxy fences and missing acquiring fences are not found; a missing
  releasing one is, as what it covers counts as not published.
- Order is kept for warps: after a synchronisation of part of a warp, the whole warp counts as synchronised.
- On global memory, atomics and accesses that are volatile, relaxed, acquire or release are not checked for races, nor
  are those of cp.async.bulk and of tensor copies. `global_order` has the whole list.
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
