"""dense_router_decode: gate product, activation and top-k of up to 64 tokens in one launch.

    logits[t, e] = sum over h of hidden[t, h] * weight[e, h]        bfloat16 operands, float32 products and sums
    s            = sqrt(softplus(logits))
    ids[t]       = the top_k largest of s[t] + bias, largest first; at a tie the lower expert first
    weights[t]   = s[t, ids[t]], divided by their sum if `renormalize`, times `scale`

Tokens go in groups of 8, the smaller side of the MMA. For each group the product is spread over the device: a block
multiplies the group by 16 experts, over a part of hidden_size where there are blocks to spare. The block of a group
that finishes last selects for the group's tokens, so no second launch is needed, and groups finish side by side.
mma.sync is enough for a product this small, and every architecture has it.

Launch: grid (ceil(experts / 16), hidden_splits, ceil(tokens / 8)), THREADS threads, no dynamic shared memory.

    hidden        [tokens, hidden_size] bfloat16, rows hidden_stride elements apart, each aligned to 16 bytes
    weight        [experts, hidden_size] bfloat16, rows weight_stride elements apart, each aligned to 16 bytes
    bias          [experts] float32, or null
    logits        [hidden_splits, tokens, experts] float32 workspace: the sums over the parts of hidden_size
    arrivals      [8] uint32, one for each group, zero before the launch, zero after it; two launches that may overlap
                  need their own
    out_weights   [tokens, top_k] float32
    out_ids       [tokens, top_k] int32

    tokens 1 to 64, hidden_size a multiple of 64, experts 1 to max_experts, top_k 1 to min(32, experts)

A selection score that is NaN is below all others, -inf included; a logit that is NaN makes it so and gives weight 0.
Ids are valid and distinct in any case. Sums are taken in a fixed order: the same input and grid give the same bits.
"""

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float32, Int32, Int64, Uint32

from aot.declare import CuteKernel

LANES = 32
WARPS = 8
THREADS = WARPS * LANES

# The shape of one mma.sync.m16n8k16: experts by tokens, over 16 elements of hidden_size.
TILE_EXPERTS = 16
TILE_TOKENS = 8
TILE = TILE_EXPERTS * TILE_TOKENS

# A chunk is what a lane loads at once: 16 bytes, 8 elements of a row, enough for two MMAs; see `multiply_slice`.
CHUNK = 8
CHUNK_BYTES = 16
MMAS_PER_CHUNK = 2

# A slice is the unit of work of a warp: 32 elements of hidden_size, a chunk for each of the 4 lanes that share a row.
LANES_PER_ROW = 4
SLICE = CHUNK * LANES_PER_ROW
SLICE_BYTES = SLICE * 2

# Slices that a warp loads before it multiplies the first. What bounds a small batch is the latency of memory: with 4,
# a block has 1024 elements of each of its rows in flight at once.
SLICES_IN_FLIGHT = 4

# Parts of hidden_size whose sums the last block loads at once.
SPLITS_IN_FLIGHT = 4

# The kernel is compiled for each of these; a lane of the selecting warp keeps max_experts / 32 candidates in registers.
MAX_EXPERTS = (256, 384, 512)

# Of sqrt_softplus: half of log2(e) and what float32 leaves of it; beyond FLAT, exp(-|x| / 2) is 0; below LINEAR,
# log(1 + e^x) is e^x to the last bit of float32; log(1 + u) is u times the polynomial of least relative error on
# [0, 1], coefficients from degree 9 down.
HALF_LOG2E = 0.72134752
HALF_LOG2E_REST = 9.6298149e-09
LN2 = 0.69314718
FLAT = 200.0
LINEAR = -17.0
LOG1P_OVER_U = (
    -0.0032440233,
    0.0198514536,
    -0.0569595173,
    0.106036536,
    -0.153055921,
    0.196759388,
    -0.249541342,
    0.333299637,
    -0.499999017,
    1.0,
)

# Selection keys: unsigned integers in the order of the float32 scores. The key of -inf is 0x007FFFFF, so that the small
# values are free for what ranks below it.
KEY_TAKEN = 0
KEY_NAN = 1
SIGN_BIT = 0x80000000
NO_EXPERT = 0xFFFFFFFF


def make_registers(shape: tuple[int, ...], dtype: type[cutlass.Numeric]) -> cute.Tensor:
    """An array in registers, last index fastest. Every index must be known at compile time."""
    return cute.make_rmem_tensor(cute.make_ordered_layout(shape, order=tuple(reversed(range(len(shape))))), dtype)


def row_address(matrix: cute.Pointer, row: Int32, stride: Int64) -> Int64:
    """The address of this lane's first chunk of a row: lanes that share a row take neighbouring chunks."""
    lane_in_row = cute.arch.lane_idx() % LANES_PER_ROW
    return matrix.toint() + (Int64(row) * stride + lane_in_row * CHUNK) * (BFloat16.width // 8)


def load_chunk(address: Int64, chunk: cute.Tensor) -> None:
    """Loads this lane's chunk of one row of a slice."""
    source = cute.make_ptr(BFloat16, address, cute.AddressSpace.gmem, assumed_align=CHUNK_BYTES)
    cute.autovec_copy(cute.make_tensor(source, cute.make_layout(CHUNK)), chunk)


def multiply_slice(
    mma: cute.MmaAtom, weight_chunks: cute.Tensor, hidden_chunk: cute.Tensor, accumulator: cute.Tensor
) -> None:
    """Adds the product of one slice.

    An MMA's lane wants, of its row, the elements 2q, 2q + 1, 2q + 8 and 2q + 9 of 16, where q = lane % 4. Any
    assignment of the real elements to these 16 positions gives the same sum, as long as both operands use the same.
    Here a lane gives the first four elements of its chunk to the first MMA and the last four to the second: so it loads
    16 bytes at once, and no value moves between lanes.
    """
    weight_operand = cute.make_rmem_tensor(8, BFloat16)
    hidden_operand = cute.make_rmem_tensor(4, BFloat16)
    weight_pairs = cute.recast_tensor(weight_operand, Uint32)
    low_row = cute.recast_tensor(weight_chunks[0, None], Uint32)
    high_row = cute.recast_tensor(weight_chunks[1, None], Uint32)
    for step in range(MMAS_PER_CHUNK):
        # Operand registers alternate between the expert rows lane / 4 and lane / 4 + 8.
        for half in range(2):
            weight_pairs[2 * half] = low_row[2 * step + half]
            weight_pairs[2 * half + 1] = high_row[2 * step + half]
        for element in range(4):
            hidden_operand[element] = hidden_chunk[4 * step + element]
        cute.mma_atom_call(mma, accumulator, weight_operand, hidden_operand, accumulator)


@cute.jit
def multiply_slices_of_warp(
    hidden: cute.Pointer,
    weight: cute.Pointer,
    hidden_stride: Int64,
    weight_stride: Int64,
    tokens: Int32,
    hidden_size: Int32,
    experts: Int32,
) -> cute.Tensor:
    """The warp's part of the product of the block's experts and tokens: four sums, in the MMA's layout."""
    expert_block, split, group = cute.arch.block_idx()
    _, splits, _ = cute.arch.grid_dim()
    warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
    row_in_tile = cute.arch.lane_idx() // LANES_PER_ROW

    # Rows past the end are read from the last row instead; what comes of them is never stored.
    hidden_row = cutlass.min(group * TILE_TOKENS + row_in_tile, tokens - 1)
    hidden_address = row_address(hidden, hidden_row, hidden_stride)
    weight_addresses = [
        row_address(
            weight, cutlass.min(expert_block * TILE_EXPERTS + half * 8 + row_in_tile, experts - 1), weight_stride
        )
        for half in range(2)
    ]

    mma = cute.make_mma_atom(cute.nvgpu.warp.MmaF16BF16Op(BFloat16, Float32, (16, 8, 16)))
    accumulator = make_registers((4,), Float32)
    accumulator.fill(0.0)
    hidden_chunks = [make_registers((CHUNK,), BFloat16) for _ in range(SLICES_IN_FLIGHT)]
    # By half: the expert rows lane / 4 and lane / 4 + 8 of the tile.
    weight_chunks = [make_registers((2, CHUNK), BFloat16) for _ in range(SLICES_IN_FLIGHT)]

    # Slices go round robin to the warps of a block, then to the blocks that share experts and tokens.
    slices = hidden_size // SLICE
    first_slice = split * WARPS + warp
    slice_step = splits * WARPS
    for next_slice in cutlass.range(first_slice, slices, slice_step * SLICES_IN_FLIGHT, unroll=1):
        for index in cutlass.range_constexpr(SLICES_IN_FLIGHT):
            slice_index = next_slice + index * slice_step
            if slice_index < slices:
                offset = Int64(slice_index) * SLICE_BYTES
                for half in cutlass.range_constexpr(2):
                    load_chunk(weight_addresses[half] + offset, weight_chunks[index][half, None])
                load_chunk(hidden_address + offset, hidden_chunks[index])
        for index in cutlass.range_constexpr(SLICES_IN_FLIGHT):
            if next_slice + index * slice_step < slices:
                multiply_slice(mma, weight_chunks[index], hidden_chunks[index], accumulator)
    return accumulator


@cute.jit
def store_block_logits(
    accumulator: cute.Tensor, shared: cute.Pointer, logits: cute.Pointer, tokens: Int32, experts: Int32
) -> None:
    """Adds up the warps' sums, in the order of the warps, and stores the block's logits."""
    thread, _, _ = cute.arch.thread_idx()
    expert_block, split, group = cute.arch.block_idx()
    warp = cute.arch.warp_idx()
    lane = cute.arch.lane_idx()
    sums = cute.make_tensor(
        shared, cute.make_layout((WARPS, TILE_TOKENS, TILE_EXPERTS), stride=(TILE, TILE_EXPERTS, 1))
    )

    # Of the 16 by 8 result a lane holds columns 2 (lane % 4) and the next, of rows lane / 4 and lane / 4 + 8.
    for half in cutlass.range_constexpr(2):
        for column in cutlass.range_constexpr(2):
            token_in_tile = lane % LANES_PER_ROW * 2 + column
            sums[warp, token_in_tile, half * 8 + lane // LANES_PER_ROW] = accumulator[2 * half + column]
    cute.arch.sync_threads()

    if thread < TILE:
        token_in_tile = thread // TILE_EXPERTS
        expert_in_tile = thread % TILE_EXPERTS
        token = group * TILE_TOKENS + token_in_tile
        expert = expert_block * TILE_EXPERTS + expert_in_tile
        if token < tokens and expert < experts:
            total = Float32(0.0)
            for source in cutlass.range_constexpr(WARPS):
                total += sums[source, token_in_tile, expert_in_tile]
            (logits + ((Int64(split) * tokens + token) * experts + expert)).store(total)


@cute.jit
def is_last_block(arrivals: cute.Pointer, shared: cute.Pointer) -> cutlass.Boolean:
    """Counts this block in. True in the last block of its group, which then sees what all the others have stored."""
    thread, _, _ = cute.arch.thread_idx()
    _, _, group = cute.arch.block_idx()
    grid_x, grid_y, _ = cute.arch.grid_dim()

    # Also orders the block's reads of `shared` before the write below.
    cute.arch.sync_threads()
    if thread == 0:
        # Release: the block's stores, which the barrier puts before this, are seen by who sees the count. Acquire: a
        # block that sees the full count sees the stores of all.
        arrived = cute.arch.atomic_add(arrivals + group, Uint32(1), sem="acq_rel", scope="gpu")
        is_last = arrived == Uint32(grid_x * grid_y - 1)
        if is_last:
            # All have arrived: ready for the next launch.
            (arrivals + group).store(Uint32(0))
        cute.recast_ptr(shared, dtype=Int32).store(Int32(is_last))
    cute.arch.sync_threads()
    result = cute.recast_ptr(shared, dtype=Int32).load() != 0
    # The flag's place is reused.
    cute.arch.sync_threads()
    return result


@cute.jit
def sqrt_softplus(logit: Float32) -> Float32:
    """sqrt(log(1 + e^x)), as csrc/device/activation.cuh computes it, with the reasons. NaN stays NaN."""
    size = cute.math.abs(logit)
    if size > FLAT:
        size = Float32(FLAT)
    exponent = -size * HALF_LOG2E
    rest = cute.math.fma(-size, Float32(HALF_LOG2E), -exponent) - size * HALF_LOG2E_REST
    root = cute.math.exp2(exponent, fastmath=True)
    root = cute.math.fma(root * LN2, rest, root)
    u = root * root
    ratio = Float32(LOG1P_OVER_U[0])
    for coefficient in LOG1P_OVER_U[1:]:
        ratio = cute.math.fma(ratio, u, Float32(coefficient))
    softplus = cute.math.fma(ratio, u, cutlass.max(logit, Float32(0.0)))
    result = cute.math.sqrt(softplus, fastmath=True)
    if logit < LINEAR:
        result = root
    return result


@cute.jit
def selection_key(score: Float32) -> Uint32:
    """An unsigned integer that orders as the scores do, NaN lowest."""
    bits = score.bitcast(Uint32)
    key = bits | Uint32(SIGN_BIT)
    if bits >= Uint32(SIGN_BIT):
        key = ~bits
    if score != score:
        key = Uint32(KEY_NAN)
    return key


@cute.jit
def store_scores(
    logits: cute.Pointer,
    scores: cute.Pointer,
    first: Int32,
    count: Int32,
    split_stride: Int64,
    items: cutlass.Constexpr,
) -> None:
    """Writes `count` scores to shared memory, from the logits that begin `first` elements into each split's.

    count is at most items * THREADS; a thread loads all of its logits before it uses the first.
    """
    thread, _, _ = cute.arch.thread_idx()
    _, splits, _ = cute.arch.grid_dim()
    sums = make_registers((items,), Float32)
    sums.fill(0.0)
    for first_split in cutlass.range(0, splits, SPLITS_IN_FLIGHT, unroll=1):
        loaded = make_registers((SPLITS_IN_FLIGHT, items), Float32)
        for index in cutlass.range_constexpr(SPLITS_IN_FLIGHT):
            split = cutlass.min(first_split + index, splits - 1)
            for item in cutlass.range_constexpr(items):
                place = cutlass.min(thread + item * THREADS, count - 1)
                # Stored by other blocks: a relaxed load at device scope is not served from this processor's own cache.
                source = logits + (split * split_stride + (first + place))
                loaded[index, item] = cute.arch.load(source, Float32, sem="relaxed", scope="gpu")
        for index in cutlass.range_constexpr(SPLITS_IN_FLIGHT):
            for item in cutlass.range_constexpr(items):
                if first_split + index < splits:
                    sums[item] += loaded[index, item]
    for item in cutlass.range_constexpr(items):
        score = sqrt_softplus(sums[item])
        if thread + item * THREADS < count:
            (scores + (thread + item * THREADS)).store(score)


@cute.jit
def load_bias(bias: cute.Pointer, experts: Int32, slots: cutlass.Constexpr) -> cute.Tensor:
    """The bias of this lane's experts, lane + 32 * slot; zeros if there is none."""
    lane = cute.arch.lane_idx()
    values = make_registers((slots,), Float32)
    values.fill(0.0)
    if bias.toint() != 0:
        for slot in cutlass.range_constexpr(slots):
            expert = cutlass.min(slot * LANES + lane, experts - 1)
            values[slot] = (bias + expert).load()
    return values


@cute.jit
def selection_keys(
    scores: cute.Pointer, bias_values: cute.Tensor, experts: Int32, slots: cutlass.Constexpr
) -> cute.Tensor:
    """The keys of this lane's experts, lane + 32 * slot. Where there is no such expert, as if taken already."""
    lane = cute.arch.lane_idx()
    keys = make_registers((slots,), Uint32)
    for slot in cutlass.range_constexpr(slots):
        expert = slot * LANES + lane
        key = selection_key((scores + cutlass.min(expert, experts - 1)).load() + bias_values[slot])
        if expert >= experts:
            key = Uint32(KEY_TAKEN)
        keys[slot] = key
    return keys


@cute.jit
def larger_key(lower_expert: tuple[Uint32, Uint32], higher_expert: tuple[Uint32, Uint32]) -> tuple[Uint32, Uint32]:
    """Of two pairs (key, expert) the one with the larger key; of equal keys the lower expert."""
    key, expert = lower_expert
    other_key, other_expert = higher_expert
    if other_key > key:
        key = other_key
        expert = other_expert
    return key, expert


def best_of_lane(keys: cute.Tensor) -> tuple[Uint32, Uint32]:
    """The largest of this lane's keys and its expert, by a tree of comparisons: short chains, not one long one."""
    lane = Uint32(cute.arch.lane_idx())
    pairs = [(keys[slot], lane + slot * LANES) for slot in range(cute.size(keys))]
    while len(pairs) > 1:
        halved = [larger_key(pairs[index], pairs[index + 1]) for index in range(0, len(pairs) - 1, 2)]
        pairs = halved + pairs[2 * len(halved) :]
    return pairs[0]


@cute.jit
def take_best(keys: cute.Tensor) -> Uint32:
    """The warp's expert of the largest key, the lowest such expert; its key is marked as taken."""
    lane = Uint32(cute.arch.lane_idx())
    lane_key, lane_expert = best_of_lane(keys)
    best_key = cute.arch.warp_redux_sync(lane_key, "max")
    candidate = Uint32(NO_EXPERT)
    if lane_key == best_key:
        candidate = lane_expert
    best_expert = cute.arch.warp_redux_sync(candidate, "min")
    for slot in cutlass.range_constexpr(cute.size(keys)):
        if best_expert == lane + slot * LANES:
            keys[slot] = Uint32(KEY_TAKEN)
    return best_expert


@cute.jit
def select_experts(
    scores: cute.Pointer,
    bias_values: cute.Tensor,
    out_weights: cute.Pointer,
    out_ids: cute.Pointer,
    token: Int32,
    experts: Int32,
    top_k: Int32,
    renormalize: Int32,
    scale: Float32,
    epsilon: Float32,
    slots: cutlass.Constexpr,
) -> None:
    """Chooses the experts of one token and stores their ids and weights. Lane i keeps the i-th choice."""
    lane = cute.arch.lane_idx()
    keys = selection_keys(scores, bias_values, experts, slots)
    chosen = Uint32(0)
    for rank in cutlass.range(top_k, unroll=1):
        best_expert = take_best(keys)
        if lane == rank:
            chosen = best_expert

    weight = Float32(0.0)
    if lane < top_k:
        weight = (scores + chosen).load()
        if weight != weight:
            weight = Float32(0.0)
    if renormalize != 0:
        total = weight
        for power in cutlass.range_constexpr(5):
            total += cute.arch.shuffle_sync_bfly(total, 1 << power)
        if total == 0.0:
            total = Float32(1.0)
        weight = weight / (total + epsilon)
    if lane < top_k:
        output = Int64(token) * top_k + lane
        (out_weights + output).store(weight * scale)
        (out_ids + output).store(Int32(chosen))


@cute.kernel
def dense_router_decode(
    hidden: cute.Pointer,
    weight: cute.Pointer,
    bias: cute.Pointer,
    logits: cute.Pointer,
    arrivals: cute.Pointer,
    out_weights: cute.Pointer,
    out_ids: cute.Pointer,
    hidden_stride: Int64,
    weight_stride: Int64,
    tokens: Int32,
    hidden_size: Int32,
    experts: Int32,
    top_k: Int32,
    renormalize: Int32,
    scale: Float32,
    epsilon: Float32,
    max_experts: cutlass.Constexpr,
) -> None:
    # Used by the product for the warps' sums, then by the last block for its tokens' scores.
    shared = cute.arch.alloc_smem(Float32, max(WARPS * TILE, TILE_TOKENS * max_experts), CHUNK_BYTES)
    slots = cutlass.const_expr(max_experts // LANES)

    accumulator = multiply_slices_of_warp(hidden, weight, hidden_stride, weight_stride, tokens, hidden_size, experts)
    store_block_logits(accumulator, shared, logits, tokens, experts)
    # Asked for here, so that it arrives while the block waits to be counted.
    bias_values = load_bias(bias, experts, slots)
    if is_last_block(arrivals, shared):
        _, _, group = cute.arch.block_idx()
        first_token = group * TILE_TOKENS
        group_tokens = cutlass.min(tokens - first_token, TILE_TOKENS)
        first = first_token * experts
        split_stride = Int64(tokens) * experts
        if group_tokens == 1:
            store_scores(logits, shared, first, experts, split_stride, -(-max_experts // THREADS))
        else:
            store_scores(
                logits, shared, first, group_tokens * experts, split_stride, TILE_TOKENS * max_experts // THREADS
            )
        cute.arch.sync_threads()
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        if warp < group_tokens:
            select_experts(
                shared + warp * experts,
                bias_values,
                out_weights,
                out_ids,
                first_token + warp,
                experts,
                top_k,
                renormalize,
                scale,
                epsilon,
                slots,
            )


ARGUMENTS = {
    "hidden": "const bf16*",
    "weight": "const bf16*",
    "bias": "const float32*",
    "logits": "float32*",
    "arrivals": "uint32*",
    "out_weights": "float32*",
    "out_ids": "int32*",
    "hidden_stride": "int64",
    "weight_stride": "int64",
    "tokens": "int32",
    "hidden_size": "int32",
    "experts": "int32",
    "top_k": "int32",
    "renormalize": "int32",
    "scale": "float32",
    "epsilon": "float32",
}

KERNELS = [
    CuteKernel(
        function=dense_router_decode,
        name=f"dense_router_decode_experts{max_experts}",
        arguments=ARGUMENTS,
        constants={"max_experts": max_experts},
        threads=THREADS,
        dynamic_shared=0,
    )
    for max_experts in MAX_EXPERTS
]
