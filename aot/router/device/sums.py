"""How blocks hand over sums, without a counter or a fence.

A place of the workspace is zero until its sum is stored, and a sum of zero is stored as -0. Who waits for a place takes
the value and leaves zero again.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, Int64, Uint32

from aot.router.device.arrays import make_registers
from aot.router.device.gate_product import HALVES, MMA_EXPERTS, MMA_TOKENS, place_of_warp

# Parts of hidden_size that a launch may have.
MAX_SPLITS = 16

MINUS_ZERO = 0x80000000


@cute.jit
def store_sums(
    accumulators: list[cute.Tensor],
    sums: cute.Pointer,
    tokens: Int32,
    experts: Int32,
    tile_experts: cutlass.Constexpr,
) -> None:
    """Stores the block's sums, zero as -0."""
    expert_tile, split, _ = cute.arch.block_idx()
    tile, quarter = place_of_warp()
    lane = cute.arch.lane_idx()
    tiles = cutlass.const_expr(len(accumulators) // HALVES)
    # Of the 16 by 8 result a lane holds columns 2 (lane % 4) and the next, of rows lane / 4 and lane / 4 + 8.
    first_expert = expert_tile * tile_experts + tile * MMA_EXPERTS + lane // 4
    first_token = quarter * tiles * MMA_TOKENS + lane % 4 * 2
    first = sums + ((Int64(split) * tokens + first_token) * experts + first_expert)
    for index in cutlass.range_constexpr(tiles):
        for item in cutlass.range_constexpr(4):
            bits = (accumulators[index][item] + accumulators[tiles + index][item]).bitcast(Uint32)
            if bits == 0:
                bits = Uint32(MINUS_ZERO)
            token = index * MMA_TOKENS + item % 2
            if first_token + token < tokens and first_expert + item // 2 * 8 < experts:
                cute.arch.store(first + (token * experts + item // 2 * 8), bits, sem="relaxed", scope="gpu")


@cute.jit
def take_logit(sums: cute.Pointer, token: Int32, tokens: Int32, expert: Int32, experts: Int32) -> Float32:
    """Waits for the sums of a logit from all blocks, leaves zeros, and adds them up."""
    _, splits, _ = cute.arch.grid_dim()
    first = sums + (Int64(token) * experts + expert)
    stride = Int64(tokens) * experts
    words = make_registers((MAX_SPLITS,), Uint32)
    for split in cutlass.range_constexpr(MAX_SPLITS):
        words[split] = Uint32(0)
        if split >= splits:
            words[split] = Uint32(MINUS_ZERO)
    missing = Boolean(True)
    while missing:
        for split in cutlass.range_constexpr(MAX_SPLITS):
            if words[split] == 0:
                words[split] = cute.arch.load(first + split * stride, Uint32, sem="relaxed", scope="gpu")
        missing = Boolean(False)
        for split in cutlass.range_constexpr(MAX_SPLITS):
            missing = missing | (words[split] == 0)
    for split in cutlass.range_constexpr(MAX_SPLITS):
        if split < splits:
            cute.arch.store(first + split * stride, Uint32(0), sem="relaxed", scope="gpu")
    values = [words[split].bitcast(Float32) for split in range(MAX_SPLITS)]
    while cutlass.const_expr(len(values) > 1):
        values = [values[2 * i] + values[2 * i + 1] for i in range(len(values) // 2)]
    return values[0]
