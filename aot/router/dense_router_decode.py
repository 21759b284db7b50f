"""dense_router_decode: gate product, activation and top-k of up to 64 tokens in one launch.

    logits[t, e] = sum over h of hidden[t, h] * weight[e, h]        bfloat16 operands, float32 products and sums
    s            = sqrt(softplus(logits))
    ids[t]       = the top_k largest of s[t] + bias, largest first; at a tie the lower expert first. Where
                   bias_alt_mask[t] is true, of s[t] + bias_alt
    weights[t]   = s[t, ids[t]], divided by their sum if `renormalize`, times `scale`; where float32 cannot tell them
                   apart, by the limit (device/selection.py)

The product is spread over the device (device/gate_product.py). The block with the number of a token then waits for the
token's sums from all blocks (device/sums.py), but only if all blocks have started (device/presence.py), and selects for
it (device/selection.py). Who selects changes no result: sums are added up in the order of their places.

Launch: grid (tiles of experts, hidden_splits), max_experts threads, a ring of stages in dynamic shared memory.

    hidden        [tokens, hidden_size] bfloat16, rows hidden_stride elements apart, each aligned to 16 bytes
    weight        [experts, hidden_size] bfloat16, rows weight_stride elements apart, each aligned to 16 bytes
    bias          [experts] float32, or null
    bias_alt      [experts] float32, or null together with bias_alt_mask
    bias_alt_mask [tokens] bool
    sums          [hidden_splits <= 16, tokens, experts] float32 workspace
    presence      [65] uint32 workspace: what STARTED, GAVE_UP and LOOKED count, then a mark for each block
    out_weights   [tokens, top_k] float32
    out_ids       [tokens, top_k] int32, or int64 if wide_ids

    tokens 1 to max_tokens, hidden_size a multiple of 64 and at least 64 * hidden_splits, experts 1 to max_experts,
    top_k 1 to min(32, experts). Both parts of the workspace are zero before the launch and after it; two launches that
    may overlap need their own.

A selection score that is NaN is below all others, -inf included; a logit that is NaN makes it so and gives weight 0.
Ids are valid and distinct in any case. Sums are taken in a fixed order: the same input and grid give the same bits.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, Uint32

from aot.declare import CuteKernel
from aot.router.device.activation import sqrt_softplus
from aot.router.device.arrays import CHUNK_BYTES, LANES, shared_array
from aot.router.device.gate_product import (
    UNIT,
    multiply_part,
    stage_bytes,
    stages_for,
    threads_for,
    tile_experts_for,
)
from aot.router.device.presence import (
    FIELD,
    LOOKED,
    MARKS,
    STARTED,
    add_presence,
    decide_to_wait,
    find_mark,
    load_presence,
)
from aot.router.device.selection import KEY_NONE, kept_score, select_experts, selection_key
from aot.router.device.sums import MAX_SPLITS, store_sums, take_logit

# The kernel is compiled for each of these. A thread for each expert.
MAX_EXPERTS = (256, 384, 512)
MAX_TOKENS = (16, 32, 64)

# What `presence` takes of the workspace: a mark per token's block, rounded up so that the sums behind stay aligned.
PRESENCE_BYTES = -(-(MARKS + max(MAX_TOKENS)) * 4 // 256) * 256


@cute.kernel
def dense_router_decode(
    hidden: cute.Pointer,
    weight: cute.Pointer,
    bias: cute.Pointer,
    bias_alt: cute.Pointer,
    bias_alt_mask: cute.Pointer,
    sums: cute.Pointer,
    presence: cute.Pointer,
    out_weights: cute.Pointer,
    out_ids: cute.Pointer,
    hidden_stride: Int64,
    weight_stride: Int64,
    tokens: Int32,
    units_per_split: Int32,
    extra_units: Int32,
    experts: Int32,
    top_k: Int32,
    renormalize: Int32,
    wide_ids: Int32,
    scale: Float32,
    epsilon: Float32,
    max_experts: cutlass.Constexpr,
    max_tokens: cutlass.Constexpr,
) -> None:
    # Programmatic dependent launch (csrc/core/launch.h): wait for the previous grid before anything else.
    cute.arch.griddepcontrol_wait()
    cute.arch.griddepcontrol_launch_dependents()

    thread, _, _ = cute.arch.thread_idx()
    expert_tile, split, _ = cute.arch.block_idx()
    tiles, splits, _ = cute.arch.grid_dim()
    block, blocks = split * tiles + expert_tile, tiles * splits
    # Blocks of this number and above have no token of their own.
    selecting = cutlass.min(tokens, blocks)
    ring = cute.arch.get_dyn_smem(Uint32, 128).toint()
    shared = cute.arch.alloc_smem(Int32, 4, CHUNK_BYTES)

    order = Uint32(0)
    if thread == 0:
        order = add_presence(presence, Uint32(STARTED))
    accumulators = multiply_part(
        hidden,
        weight,
        hidden_stride,
        weight_stride,
        tokens,
        units_per_split,
        extra_units,
        experts,
        ring,
        max_experts,
        max_tokens,
    )
    # Loaded here, so that the latency is hidden by the exchange of sums.
    seen = Uint32(0)
    if thread == 0 and block < selecting:
        seen = load_presence(presence, Int32(0))
    expert = cutlass.min(thread, experts - 1)
    expert_bias = Float32(0.0)
    if block < selecting and bias.toint() != 0:
        expert_bias = (bias + expert).load()
    store_sums(accumulators, sums, tokens, experts, tile_experts_for(max_experts))

    if thread == 0:
        shared.store(decide_to_wait(presence, order, seen, block, blocks, selecting))
        (shared + 1).store(Int32((order & FIELD) == blocks - 1))
    cute.arch.sync_threads()
    duties = shared.load()
    looks = (shared + 1).load() + Int32(block < selecting)

    scores = shared_array(ring, Float32, max_experts)
    keys = shared_array(ring + max_experts * 4, Uint32, max_experts)
    for duty in cutlass.range(duties, unroll=1):
        owner = block
        if duty > 0 or block >= selecting:
            cute.arch.sync_threads()
            if thread == 0:
                (shared + 2).store(find_mark(presence, selecting))
            cute.arch.sync_threads()
            owner = (shared + 2).load()
            if bias.toint() != 0:
                expert_bias = (bias + expert).load()
        for token in cutlass.range(owner, tokens, blocks, unroll=1):
            key = Uint32(KEY_NONE)
            if thread < experts:
                logit = take_logit(sums, token, tokens, thread, experts)
                score = sqrt_softplus(logit)
                scores[thread] = kept_score(logit, score)
                token_bias = expert_bias
                if bias_alt_mask.toint() != 0:  # noqa: SIM102 -- the DSL would load the mask in any case
                    if (bias_alt_mask + token).load() != 0:
                        token_bias = (bias_alt + thread).load()
                key = selection_key(score + token_bias)
            keys[thread] = key
            cute.arch.sync_threads()
            if thread < LANES:
                select_experts(
                    scores,
                    keys,
                    ring + max_experts * 8,
                    out_weights,
                    out_ids,
                    token,
                    top_k,
                    renormalize,
                    wide_ids,
                    scale,
                    epsilon,
                )
            if token + blocks < tokens:
                cute.arch.sync_threads()

    # The last to have looked at `presence` leaves it ready. By a thread that does not select.
    if thread == LANES and looks > 0:
        before = add_presence(presence, Uint32(looks * LOOKED))
        if before // LOOKED + looks == selecting + 1:
            cute.arch.store(presence, Uint32(0), sem="relaxed", scope="gpu")


ARGUMENTS = {
    "hidden": "const bf16*",
    "weight": "const bf16*",
    "bias": "const float32*",
    "bias_alt": "const float32*",
    "bias_alt_mask": "const bool*",
    "sums": "uint32*",
    "presence": "uint32*",
    "out_weights": "float32*",
    "out_ids": "int32*",
    "hidden_stride": "int64",
    "weight_stride": "int64",
    "tokens": "int32",
    "units_per_split": "int32",
    "extra_units": "int32",
    "experts": "int32",
    "top_k": "int32",
    "renormalize": "int32",
    "wide_ids": "int32",
    "scale": "float32",
    "epsilon": "float32",
}

KERNELS = [
    CuteKernel(
        function=dense_router_decode,
        name=f"dense_router_decode_experts{max_experts}_tokens{max_tokens}",
        arguments=ARGUMENTS,
        constants={"max_experts": max_experts, "max_tokens": max_tokens},
        threads=threads_for(max_experts),
        dynamic_shared=stages_for(max_experts, max_tokens) * stage_bytes(max_experts, max_tokens),
        exports={
            "tile_experts": tile_experts_for(max_experts),
            "unit": UNIT,
            "max_splits": MAX_SPLITS,
            "presence_bytes": PRESENCE_BYTES,
        },
    )
    for max_experts in MAX_EXPERTS
    for max_tokens in MAX_TOKENS
]
