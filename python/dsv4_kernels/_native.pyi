from typing import Any, TypeAlias

Tensor: TypeAlias = Any  # of torch, or whatever has __dlpack__

def version() -> str: ...
def preload(device: int) -> None: ...
def device_error(device: int) -> str | None: ...
def workspace_usage(device: int) -> tuple[int, int, int, int]: ...
def mark_written(tensors: tuple[Any, ...]) -> None: ...
def use_torch_functions(use: bool) -> bool: ...
def dense_router_decode_workspace_size(tokens: int, experts: int) -> int: ...
def hyper_connection_workspace_size(tokens: int, hidden: int) -> int: ...
def quantize_nvfp4_gpu_fused_workspace_size(experts: int) -> int: ...
def hash_router_fused_max_bytes() -> int: ...
def moe_tile_max_slots_per_expert(tile_size: int) -> int: ...
def moe_sort_max_tiles(slots: int, local_experts: int, tile_size: int) -> int: ...
def page_bytes(layout: int, entries: int) -> int: ...
def page_layouts() -> list[tuple[Any, ...]]: ...
def paged_stash_workspace_size() -> int: ...

# The ops, written by python -m tests.package.stub. False: valid arguments, but in host memory.
def hash_router(
    token_ids: Tensor,
    hash_lut: Tensor,
    padding_mask: Tensor | None,
    int64_ids: bool,
    out_weights: Tensor,
    out_ids: Tensor,
) -> bool: ...
def hash_router_scored(
    token_ids: Tensor,
    hash_lut: Tensor,
    logits: Tensor,
    padding_mask: Tensor | None,
    renormalize: bool,
    scale: float,
    epsilon: float,
    bias_alt: Tensor | None,
    bias_alt_mask: Tensor | None,
    int64_ids: bool,
    out_weights: Tensor,
    out_ids: Tensor,
) -> bool: ...
def hash_router_fused(
    token_ids: Tensor,
    hash_lut: Tensor,
    hidden: Tensor,
    weight: Tensor,
    padding_mask: Tensor | None,
    renormalize: bool,
    scale: float,
    epsilon: float,
    int64_ids: bool,
    out_weights: Tensor,
    out_ids: Tensor,
) -> bool: ...
def dense_router_decode(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    k: int,
    renormalize: bool,
    scale: float,
    epsilon: float,
    bias_alt: Tensor | None,
    bias_alt_mask: Tensor | None,
    int64_ids: bool,
    workspace: Tensor | None,
    out_weights: Tensor,
    out_ids: Tensor,
) -> bool: ...
def activation_topk(
    logits: Tensor,
    bias: Tensor | None,
    k: int,
    score_function: int,
    renormalize: bool,
    scale: float,
    epsilon: float,
    padding_mask: Tensor | None,
    bias_alt: Tensor | None,
    bias_alt_mask: Tensor | None,
    int64_ids: bool,
    out_weights: Tensor,
    out_ids: Tensor,
) -> bool: ...
def topk_select(
    scores: Tensor, k: int, lengths: Tensor | None, sorted: bool, with_values: bool, out_values: Tensor, out_ids: Tensor
) -> bool: ...
def append(
    kv: Tensor,
    z: Tensor,
    request_slots: Tensor,
    positions: Tensor,
    tail_ka: Tensor,
    tail_za: Tensor,
    tail_len: Tensor,
    slot_positions: Tensor,
    m: int,
    next_kb: Tensor | None,
    next_zb: Tensor | None,
    token_offsets: Tensor | None,
    indexer_kv: Tensor | None,
    indexer_z: Tensor | None,
    ape: Tensor | None,
    indexer_ape: Tensor | None,
    round: int,
) -> bool: ...
def csa_compress_tail(
    tail_ka: Tensor,
    tail_za: Tensor,
    tail_kb: Tensor,
    tail_zb: Tensor,
    tail_len: Tensor,
    request_slots: Tensor,
    m: int,
    indexer_head_dim: int,
    out_entry: Tensor,
    out_indexer_key: Tensor,
    out_valid_mask: Tensor,
) -> bool: ...
def hca_compress_tail(
    tail_ka: Tensor,
    tail_za: Tensor,
    tail_len: Tensor,
    request_slots: Tensor,
    m: int,
    out_entry: Tensor,
    out_valid_mask: Tensor,
) -> bool: ...
def flush_write_csa(
    entry: Tensor,
    indexer_key: Tensor,
    valid_mask: Tensor,
    request_slots: Tensor,
    slot_positions: Tensor,
    block_table: Tensor,
    entries_fp8: Tensor,
    entries_rope: Tensor,
    inv_scale: Tensor,
    indexer_keys_fp4: Tensor,
    indexer_scale: Tensor,
    m: int,
) -> bool: ...
def flush_write_hca(
    entry: Tensor,
    valid_mask: Tensor,
    request_slots: Tensor,
    slot_positions: Tensor,
    block_table: Tensor,
    entries_fp8: Tensor,
    entries_rope: Tensor,
    inv_scale: Tensor,
    m: int,
) -> bool: ...
def csa_rotate_state(
    valid_mask: Tensor,
    request_slots: Tensor,
    tail_ka: Tensor,
    tail_za: Tensor,
    tail_kb: Tensor,
    tail_zb: Tensor,
    tail_len: Tensor,
    next_kb: Tensor | None,
    next_zb: Tensor | None,
    clear_rows: bool,
) -> bool: ...
def hca_reset_state(
    valid_mask: Tensor, request_slots: Tensor, tail_ka: Tensor, tail_za: Tensor, tail_len: Tensor, clear_rows: bool
) -> bool: ...
def compress_flush(
    kv: Tensor,
    score: Tensor | None,
    ape: Tensor | None,
    query_starts: Tensor,
    start_positions: Tensor,
    state: Tensor,
    state_table: Tensor,
    norm_weight: Tensor,
    cos_sin: Tensor,
    pages: Tensor,
    block_table: Tensor | None,
    slot_mapping: Tensor | None,
    ratio: int,
    overlap: bool,
    layout: int,
    entries_per_page: int,
    scales: Tensor | None,
    rope: Tensor | None,
    hadamard: bool,
    round_once: bool,
    epsilon: float,
    amax_floor: float,
    scale_floor: float,
    fp4_ties_toward_zero: bool,
    exact_scale: bool,
) -> bool: ...
def unpack_entries(
    pages: Tensor,
    slots: Tensor,
    layout: int,
    entries_per_page: int,
    scales: Tensor | None,
    rope: Tensor | None,
    out: Tensor,
) -> bool: ...
def blackwell_swizzle_32_4_4(scales: Tensor, out: Tensor) -> bool: ...
def blackwell_unswizzle_32_4_4(swizzled: Tensor, rows: int, columns: int, out: Tensor) -> bool: ...
def assemble_scales_2d_side(
    scales: Tensor, expert_offsets: Tensor, padded_offsets: Tensor, padded_rows: int, out: Tensor
) -> bool: ...
def padded_squared_relu(x: Tensor, permutation_map: Tensor, n_used: Tensor, out: Tensor) -> bool: ...
def padded_swiglu(x: Tensor, permutation_map: Tensor, n_used: Tensor, limit: float, out: Tensor) -> bool: ...
def squared_relu_and_quantize_mxfp8(
    x: Tensor, permutation_map: Tensor, n_used: Tensor, out_data: Tensor, out_scale: Tensor
) -> bool: ...
def swiglu_and_quantize_mxfp8(
    x: Tensor, permutation_map: Tensor, n_used: Tensor, limit: float, out_data: Tensor, out_scale: Tensor
) -> bool: ...
def quantize_nvfp4(
    x: Tensor,
    global_scale: Tensor,
    expert_ids: Tensor | None,
    reciprocal_global_scale: bool,
    source: int,
    granularity: int,
    limit: float,
    round_to_bfloat16: bool,
    ties_to_even: bool,
    scale_floor: float,
    swizzle: bool,
    n_used: Tensor | None,
    out: Tensor,
    out_scale: Tensor,
) -> bool: ...
def quantize_nvfp4_gpu_fused(
    x: Tensor,
    expert_ids: Tensor | None,
    experts: int,
    per_token: bool,
    reciprocal_global_scale: bool,
    source: int,
    granularity: int,
    limit: float,
    round_to_bfloat16: bool,
    amax_floor: float,
    ties_to_even: bool,
    scale_floor: float,
    swizzle: bool,
    n_used: Tensor | None,
    workspace: Tensor | None,
    out: Tensor,
    out_scale: Tensor,
    out_global_scale: Tensor,
) -> bool: ...
def quantize_mx(
    x: Tensor,
    element_format: int,
    source: int,
    granularity: int,
    limit: float,
    round_to_bfloat16: bool,
    round_scale_up: bool,
    amax_floor: float,
    ties_to_even: bool,
    swizzle: bool,
    n_used: Tensor | None,
    out: Tensor,
    out_scale: Tensor,
) -> bool: ...
def quantize_fp8_per_token(x: Tensor, scale_floor: float, divide: bool, out: Tensor, out_scale: Tensor) -> bool: ...
def dequantize_blocks(
    data: Tensor,
    scale: Tensor,
    global_scale: Tensor | None,
    expert_ids: Tensor | None,
    reciprocal_global_scale: bool,
    element_format: int,
    scale_format: int,
    swizzle: bool,
    dtype: int,
    out: Tensor,
) -> bool: ...
def moe_dispatch_places(
    topk_ids: Tensor,
    rank_of_id: Tensor,
    dropped: Tensor,
    ranks: int,
    capacity: int,
    one_per_rank: bool,
    out_slot_to_place: Tensor,
    out_place_to_slot: Tensor,
) -> bool: ...
def moe_dispatch_rows(
    x: Tensor,
    scale: Tensor | None,
    topk_weights: Tensor,
    topk_ids: Tensor,
    rank_of_id: Tensor,
    place_to_slot: Tensor,
    capacity: int,
    routes: int,
    out: Tensor,
) -> bool: ...
def moe_grouped_gemm(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    tile_to_expert: Tensor,
    row_to_slot: Tensor,
    x_scale: Tensor | None,
    alpha: Tensor | None,
    slot_weights: Tensor | None,
    top_k: int,
    swiglu: bool,
    limit: float,
    out: Tensor,
) -> bool: ...
def moe_grouped_gemm_quantized(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    tile_to_expert: Tensor,
    row_to_slot: Tensor,
    x_scale: Tensor,
    global_scale: Tensor | None,
    alpha: Tensor | None,
    slot_weights: Tensor | None,
    top_k: int,
    limit: float,
    swizzle: bool,
    out: Tensor,
    out_scale: Tensor,
) -> bool: ...
def moe_sort(
    topk_ids: Tensor,
    local_experts: int,
    tile_size: int,
    experts_start_idx: int,
    expert_map: Tensor | None,
    out_tile_to_expert: Tensor,
    out_tile_rows: Tensor,
    out_row_to_slot: Tensor,
    out_slot_to_row: Tensor,
    out_counts: Tensor,
) -> bool: ...
def moe_tiles_from_counts(
    counts: Tensor, max_rows: int, tile_size: int, out_tile_to_expert: Tensor, out_row_to_slot: Tensor
) -> bool: ...
def moe_finalize(
    rows: Tensor, slot_to_row: Tensor, weights: Tensor | None, shared: Tensor | None, out: Tensor
) -> bool: ...
def paged_stash_copy(
    src: Tensor,
    cuda_dst: Tensor,
    host_dst: Tensor | None,
    num_tokens: Tensor,
    free_list_cuda: Tensor,
    free_list_host: Tensor | None,
    free_list_head: Tensor,
    free_list_tail: Tensor,
    free_list_capacity: Tensor,
    page_record: Tensor,
    overflow: Tensor,
    host_spill_global: Tensor,
    spilled_to_host: Tensor,
    new_free_list_head: Tensor | None,
    high_water: Tensor | None,
    workspace: Tensor | None,
) -> bool: ...
def paged_stash_pop(
    cuda_src: Tensor,
    host_src: Tensor | None,
    dst: Tensor,
    num_tokens: Tensor,
    page_record: Tensor,
    spilled_to_host: Tensor,
    overflow: Tensor,
    free_list_cuda: Tensor,
    free_list_host: Tensor | None,
    free_list_tail: Tensor,
    free_list_capacity: Tensor,
    new_free_list_tail: Tensor | None,
    zero_rest: bool,
    workspace: Tensor | None,
) -> bool: ...
def hyper_connection_pre(
    streams: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    pre_in: Tensor | None,
    norm_weight: Tensor | None,
    epsilon: float,
    hc_epsilon: float,
    post_factor: float,
    sinkhorn_iterations: int,
    norm_unrounded: bool,
    workspace: Tensor | None,
    out_layer_input: Tensor,
    out_pre: Tensor,
    out_post: Tensor,
    out_comb: Tensor,
) -> bool: ...
def hyper_connection_post(x: Tensor, streams: Tensor, post: Tensor, comb: Tensor, out_streams: Tensor) -> bool: ...
def hyper_connection_post_pre(
    x: Tensor,
    streams: Tensor,
    post: Tensor,
    comb: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    pre_in: Tensor | None,
    norm_weight: Tensor | None,
    epsilon: float,
    hc_epsilon: float,
    post_factor: float,
    sinkhorn_iterations: int,
    norm_unrounded: bool,
    workspace: Tensor | None,
    out_streams: Tensor,
    out_layer_input: Tensor,
    out_pre: Tensor,
    out_post: Tensor,
    out_comb: Tensor,
) -> bool: ...
def hyper_connection_coefficients(
    streams: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    epsilon: float,
    hc_epsilon: float,
    post_factor: float,
    sinkhorn_iterations: int,
    workspace: Tensor | None,
    out_pre: Tensor,
    out_post: Tensor,
    out_comb: Tensor,
) -> bool: ...
def hyper_connection_collapse(
    streams: Tensor,
    pre: Tensor | None,
    norm_weight: Tensor | None,
    epsilon: float,
    norm_unrounded: bool,
    out_hidden: Tensor,
) -> bool: ...
def hyper_connection_head(
    streams: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    norm_weight: Tensor | None,
    epsilon: float,
    hc_epsilon: float,
    norm_unrounded: bool,
    workspace: Tensor | None,
    out_hidden: Tensor,
) -> bool: ...
