"""Arrays that a thread or a block keeps: in registers and in shared memory."""

import cutlass
import cutlass.cute as cute
from cutlass import Int32

LANES = 32

# The widest access of a thread, and what it must be aligned to.
CHUNK_BYTES = 16


def make_registers(shape: tuple[int, ...], dtype: type[cutlass.Numeric]) -> cute.Tensor:
    """An array in registers, last index fastest. Every index must be known at compile time."""
    return cute.make_rmem_tensor(cute.make_ordered_layout(shape, order=tuple(reversed(range(len(shape))))), dtype)


def shared_array(address: Int32, dtype: type[cutlass.Numeric], size: int) -> cute.Tensor:
    pointer = cute.make_ptr(dtype, address, cute.AddressSpace.smem, assumed_align=CHUNK_BYTES)
    return cute.make_tensor(pointer, cute.make_layout(size))
