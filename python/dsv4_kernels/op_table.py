"""Every op of the package, one row each.

Torch registration, public functions, selftest and the tests' parametrisation read this table.
"""

from __future__ import annotations

from typing import Any

import torch

from dsv4_kernels import _native
from dsv4_kernels.op import Op, OutputSpec

OPS: dict[str, Op] = {}


def _weights_and_ids(tokens: int, top_k: int, id_type: torch.dtype = torch.int32) -> tuple[OutputSpec, ...]:
    return ((tokens, top_k), torch.float32), ((tokens, top_k), id_type)


def _swizzled(rows: int, columns: int) -> tuple[int, int]:
    """The extents of a matrix in the 32_4_4 layout."""
    return -(-rows // 128) * 128, -(-columns // 4) * 4


def _add(op: Op) -> None:
    OPS[op.name] = op


_add(
    Op(
        "router",
        "hash_router",
        "Tensor token_ids, Tensor hash_lut, Tensor? padding_mask=None",
        ("out_weights", "out_ids"),
        lambda token_ids, hash_lut, padding_mask=None: _weights_and_ids(token_ids.shape[0], hash_lut.shape[1]),
    )
)
_add(
    Op(
        "router",
        "hash_router_scored",
        "Tensor token_ids, Tensor hash_lut, Tensor logits, Tensor? padding_mask=None, bool renormalize=True, "
        "float scale=1.0, float epsilon=0.0",
        ("out_weights", "out_ids"),
        lambda token_ids, hash_lut, *_: _weights_and_ids(token_ids.shape[0], hash_lut.shape[1]),
    )
)
_add(
    Op(
        "router",
        "hash_router_fused",
        "Tensor token_ids, Tensor hash_lut, Tensor hidden, Tensor weight, Tensor? padding_mask=None, "
        "bool renormalize=True, float scale=1.0, float epsilon=0.0",
        ("out_weights", "out_ids"),
        lambda token_ids, hash_lut, *_: _weights_and_ids(token_ids.shape[0], hash_lut.shape[1]),
    )
)
_add(
    Op(
        "router",
        "dense_router_decode",
        "Tensor hidden, Tensor weight, Tensor? bias, int k, bool renormalize=True, float scale=1.0, float epsilon=0.0",
        ("out_weights", "out_ids"),
        lambda hidden, weight, bias, k, *_: _weights_and_ids(hidden.shape[0], k),
        lambda hidden, weight, *_: _native.dense_router_decode_workspace_size(hidden.shape[0], weight.shape[0]),
    )
)
_add(
    Op(
        "router",
        "activation_topk",
        "Tensor logits, Tensor? bias, int k, int score_function=0, bool renormalize=True, float scale=1.0, "
        "float epsilon=0.0, Tensor? padding_mask=None, Tensor? bias_alt=None, Tensor? bias_alt_mask=None, "
        "bool int64_ids=False",
        ("out_weights", "out_ids"),
        lambda logits, bias, k, *rest: _weights_and_ids(
            logits.shape[0], k, torch.int64 if rest[-1:] == (True,) else torch.int32
        ),
    )
)
_add(
    Op(
        "router",
        "topk_select",
        "Tensor scores, int k, Tensor? lengths=None, bool sorted=True, bool with_values=True",
        ("out_values", "out_ids"),
        lambda scores, k, *rest: (
            ((scores.shape[0], 0 if rest[2:] == (False,) else k), torch.float32),
            ((scores.shape[0], k), torch.int32),
        ),
    )
)
_add(
    Op(
        "cache",
        "csa_compress_tail",
        "Tensor tail_ka, Tensor tail_za, Tensor tail_kb, Tensor tail_zb, Tensor tail_len, Tensor request_slots, int m, "
        "int indexer_head_dim=128",
        ("out_entry", "out_indexer_key", "out_valid_mask"),
        lambda tail_ka, za, kb, zb, tail_len, request_slots, m, indexer_head_dim=128: (
            ((request_slots.shape[0], tail_ka.shape[2] - indexer_head_dim), torch.bfloat16),
            ((request_slots.shape[0], indexer_head_dim), torch.bfloat16),
            ((request_slots.shape[0],), torch.bool),
        ),
    )
)
_add(
    Op(
        "cache",
        "hca_compress_tail",
        "Tensor tail_ka, Tensor tail_za, Tensor tail_len, Tensor request_slots, int m",
        ("out_entry", "out_valid_mask"),
        lambda tail_ka, tail_za, tail_len, request_slots, m: (
            ((request_slots.shape[0], tail_ka.shape[2]), torch.bfloat16),
            ((request_slots.shape[0],), torch.bool),
        ),
    )
)
_add(
    Op(
        "cache",
        "append",
        "Tensor kv, Tensor z, Tensor request_slots, Tensor positions, Tensor(a!) tail_ka, Tensor(b!) tail_za, "
        "Tensor(c!) tail_len, Tensor(d!) slot_positions, int m, Tensor(e!)? next_kb=None, Tensor(f!)? next_zb=None, "
        "Tensor? token_offsets=None, Tensor? indexer_kv=None, Tensor? indexer_z=None, Tensor? ape=None, "
        "Tensor? indexer_ape=None, int round=0",
    )
)
_add(
    Op(
        "cache",
        "flush_write_csa",
        "Tensor entry, Tensor indexer_key, Tensor valid_mask, Tensor request_slots, Tensor slot_positions, "
        "Tensor block_table, Tensor(a!) entries_fp8, Tensor(b!) entries_rope, Tensor(c!) inv_scale, "
        "Tensor(d!) indexer_keys_fp4, Tensor(e!) indexer_scale, int m",
    )
)
_add(
    Op(
        "cache",
        "flush_write_hca",
        "Tensor entry, Tensor valid_mask, Tensor request_slots, Tensor slot_positions, Tensor block_table, "
        "Tensor(a!) entries_fp8, Tensor(b!) entries_rope, Tensor(c!) inv_scale, int m",
    )
)
_add(
    Op(
        "cache",
        "csa_rotate_state",
        "Tensor valid_mask, Tensor request_slots, Tensor(a!) tail_ka, Tensor(b!) tail_za, Tensor(c!) tail_kb, "
        "Tensor(d!) tail_zb, Tensor(e!) tail_len, Tensor(f!)? next_kb=None, Tensor(g!)? next_zb=None, "
        "bool clear_rows=True",
    )
)
_add(
    Op(
        "cache",
        "hca_reset_state",
        "Tensor valid_mask, Tensor request_slots, Tensor(a!) tail_ka, Tensor(b!) tail_za, Tensor(c!) tail_len, "
        "bool clear_rows=True",
    )
)
_add(
    Op(
        "cache",
        "compress_flush",
        "Tensor kv, Tensor? score, Tensor? ape, Tensor query_starts, Tensor start_positions, Tensor(a!) state, "
        "Tensor state_table, Tensor norm_weight, Tensor cos_sin, Tensor(b!) pages, Tensor? block_table, "
        "Tensor? slot_mapping, int ratio, bool overlap, int layout, int entries_per_page, "
        "Tensor(c!)? scales=None, Tensor(d!)? rope=None, bool hadamard=False, bool round_once=False, "
        "float epsilon=1e-06, float amax_floor=0.0, float scale_floor=0.0, bool fp4_ties_toward_zero=False, "
        "bool exact_scale=False",
    )
)
_add(
    Op(
        "cache",
        "unpack_entries",
        "Tensor pages, Tensor slots, int layout, int entries_per_page, Tensor? scales=None, Tensor? rope=None",
        ("out",),
        lambda pages, slots, layout, *_: (((slots.shape[0], _native.page_layouts()[layout][1]), torch.float32),),
    )
)
_add(
    Op(
        "moe",
        "padded_squared_relu",
        "Tensor x, Tensor permutation_map, Tensor n_used",
        ("out",),
        lambda x, *_: ((tuple(x.shape), torch.bfloat16),),
    )
)
_add(
    Op(
        "moe",
        "padded_swiglu",
        "Tensor x, Tensor permutation_map, Tensor n_used, float limit=0.0",
        ("out",),
        lambda x, *_: (((x.shape[0], x.shape[1] // 2), torch.bfloat16),),
    )
)


def _mxfp8(rows: int, columns: int) -> tuple[OutputSpec, ...]:
    # Bytes: torch's tools for ops know no FP8. The public functions show them as what they are.
    return ((rows, columns), torch.uint8), (_swizzled(rows, columns // 32), torch.uint8)


_add(
    Op(
        "moe",
        "squared_relu_and_quantize_mxfp8",
        "Tensor x, Tensor permutation_map, Tensor n_used",
        ("out_data", "out_scale"),
        lambda x, *_: _mxfp8(x.shape[0], x.shape[1]),
    )
)
_add(
    Op(
        "moe",
        "swiglu_and_quantize_mxfp8",
        "Tensor x, Tensor permutation_map, Tensor n_used, float limit=0.0",
        ("out_data", "out_scale"),
        lambda x, *_: _mxfp8(x.shape[0], x.shape[1] // 2),
    )
)


def max_tiles(slots: int, local_experts: int, tile_size: int) -> int:
    """What dsv4_moe_sort_max_tiles computes, without a branch on the number of slots, which a trace may not know."""
    if local_experts <= 0 or tile_size <= 0:
        return 0  # the op's checks say what is wrong with them
    least = min if isinstance(slots, int) else torch.sym_min
    tiles: int = least(slots, (slots + (tile_size - 1) * local_experts) // tile_size)
    return tiles


def _sorted_routes(topk_ids: torch.Tensor, local_experts: int, tile_size: int, *_: object) -> tuple[OutputSpec, ...]:
    tokens, top_k = topk_ids.shape
    tiles = max_tiles(tokens * top_k, local_experts, tile_size)
    i32 = torch.int32
    return ((tiles,), i32), ((tiles,), i32), ((tiles * tile_size,), i32), ((tokens, top_k), i32), ((2,), i32)


_add(
    Op(
        "moe",
        "moe_sort",
        "Tensor topk_ids, int local_experts, int tile_size, int experts_start_idx=0",
        ("out_tile_to_expert", "out_tile_rows", "out_row_to_slot", "out_slot_to_row", "out_counts"),
        _sorted_routes,
    )
)
_add(
    Op(
        "moe",
        "moe_finalize",
        "Tensor rows, Tensor slot_to_row, Tensor? weights=None, Tensor? shared=None",
        ("out",),
        lambda rows, slot_to_row, *_: (((slot_to_row.shape[0], rows.shape[1]), torch.bfloat16),),
    )
)


def _blocks(shape: tuple[int, int], group: int, codes_per_byte: int, swizzle: bool) -> tuple[OutputSpec, ...]:
    """Codes and the scales of blocks of them, both as bytes."""
    rows, columns = shape
    scales = _swizzled(rows, columns // group) if swizzle else (rows, columns // group)
    return ((rows, columns // codes_per_byte), torch.uint8), (scales, torch.uint8)


def _expert_rows(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    tile_to_expert: torch.Tensor,
    row_to_slot: torch.Tensor,
    x_scale: torch.Tensor | None = None,
    alpha: torch.Tensor | None = None,
    slot_weights: torch.Tensor | None = None,
    top_k: int = 0,
    swiglu: bool = False,
    *_: object,
) -> tuple[OutputSpec, ...]:
    columns = weight.shape[-2]  # of the checkpoints' layout and of the interleaved one
    return (((row_to_slot.shape[0], columns // 2 if swiglu else columns), torch.bfloat16),)


_add(
    Op(
        "moe",
        "moe_grouped_gemm",
        "Tensor x, Tensor weight, Tensor weight_scale, Tensor tile_to_expert, Tensor row_to_slot, "
        "Tensor? x_scale=None, Tensor? alpha=None, Tensor? slot_weights=None, int top_k=0, bool swiglu=False, "
        "float limit=0.0",
        ("out",),
        _expert_rows,
    )
)


def _quantized_expert_rows(
    x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, tile_to_expert: torch.Tensor, *rest: Any
) -> tuple[OutputSpec, ...]:
    shape = rest[0].shape[0], weight.shape[-2] // 2
    swizzle = rest[-1] is True  # the last argument, and the only bool
    return _blocks(shape, 32, 1, swizzle) if x.dtype == torch.float8_e4m3fn else _blocks(shape, 16, 2, swizzle)


_add(
    Op(
        "moe",
        "moe_grouped_gemm_quantized",
        "Tensor x, Tensor weight, Tensor weight_scale, Tensor tile_to_expert, Tensor row_to_slot, Tensor x_scale, "
        "Tensor? global_scale=None, Tensor? alpha=None, Tensor? slot_weights=None, int top_k=0, float limit=0.0, "
        "bool swizzle=False",
        ("out", "out_scale"),
        _quantized_expert_rows,
    )
)
_add(
    Op(
        "moe",
        "blackwell_swizzle_32_4_4",
        "Tensor scales",
        ("out",),
        lambda scales: (((*scales.shape[:-2], *_swizzled(*scales.shape[-2:])), scales.dtype),),
    )
)
_add(
    Op(
        "moe",
        "blackwell_unswizzle_32_4_4",
        "Tensor swizzled, int rows, int columns",
        ("out",),
        lambda swizzled, rows, columns: (((*swizzled.shape[:-2], rows, columns), swizzled.dtype),),
    )
)
_add(
    Op(
        "moe",
        "assemble_scales_2d_side",
        "Tensor scales, Tensor expert_offsets, Tensor padded_offsets, int padded_rows",
        ("out",),
        lambda scales, expert_offsets, padded_offsets, padded_rows: (
            (_swizzled(padded_rows, scales.shape[-1]), scales.dtype),
        ),
    )
)


def _values_shape(x: torch.Tensor, source: int) -> tuple[int, int]:
    """Rows and columns of the values that an op quantises."""
    rows, columns = x.shape
    return rows, columns if source == 0 else columns // 2


# The least amax that a global scale is made for, 448 * 6 * 2^-110: neither the scale nor its reciprocal, nor their
# products with block scales, leave the normal range of float32 then.
NVFP4_AMAX_FLOOR = 448 * 6 * 2.0**-110

# Which values are quantised: of three ops.
_SOURCE = "int source=0, int granularity=0, float limit=0.0, bool round_to_bfloat16=True"

_add(
    Op(
        "moe",
        "quantize_nvfp4",
        "Tensor x, Tensor global_scale, Tensor? expert_ids=None, bool reciprocal_global_scale=False, "
        f"{_SOURCE}, bool ties_to_even=True, float scale_floor=0.0, bool swizzle=False, Tensor? n_used=None",
        ("out", "out_scale"),
        lambda x, global_scale, expert_ids, reciprocal, source, *rest: _blocks(
            _values_shape(x, source), 16, 2, rest[-2]
        ),
    )
)
_add(
    Op(
        "moe",
        "quantize_nvfp4_gpu_fused",
        "Tensor x, Tensor? expert_ids=None, int experts=0, bool per_token=False, bool reciprocal_global_scale=False, "
        f"{_SOURCE}, float amax_floor={NVFP4_AMAX_FLOOR!r}, bool ties_to_even=True, float scale_floor=0.0, "
        "bool swizzle=False, Tensor? n_used=None",
        ("out", "out_scale", "out_global_scale"),
        lambda x, expert_ids, experts, per_token, reciprocal, source, *rest: (
            *_blocks(_values_shape(x, source), 16, 2, rest[-2]),
            ((x.shape[0] if per_token else max(experts, 1),), torch.float32),
        ),
        lambda x, expert_ids, experts, *_: _native.quantize_nvfp4_gpu_fused_workspace_size(experts),
    )
)
_add(
    Op(
        "moe",
        "quantize_mx",
        f"Tensor x, int element_format=0, {_SOURCE}, bool round_scale_up=True, float amax_floor=0.0, "
        "bool ties_to_even=True, bool swizzle=False, Tensor? n_used=None",
        ("out", "out_scale"),
        lambda x, element_format, source, *rest: _blocks(_values_shape(x, source), 32, 1 + element_format, rest[-2]),
    )
)
_add(
    Op(
        "moe",
        "quantize_fp8_per_token",
        "Tensor x, float scale_floor=0.0, bool divide=False",
        ("out", "out_scale"),
        lambda x, *_: ((tuple(x.shape), torch.uint8), ((x.shape[0],), torch.float32)),
    )
)
_FLOATS = (torch.bfloat16, torch.float16, torch.float32)
_add(
    Op(
        "moe",
        "dequantize_blocks",
        "Tensor data, Tensor scale, Tensor? global_scale=None, Tensor? expert_ids=None, "
        "bool reciprocal_global_scale=False, int element_format=1, int scale_format=0, bool swizzle=False, int dtype=0",
        ("out",),
        lambda data, scale, global_scale, expert_ids, reciprocal, element_format, scale_format, swizzle, dtype: (
            ((data.shape[0], data.shape[1] * (1 + element_format)), _FLOATS[dtype]),
        ),
    )
)
_add(
    Op(
        "stash",
        "paged_stash_copy",
        "Tensor src, Tensor(a!) cuda_dst, Tensor(b!)? host_dst, Tensor num_tokens, Tensor free_list_cuda, "
        "Tensor? free_list_host, Tensor(c!) free_list_head, Tensor free_list_tail, Tensor free_list_capacity, "
        "Tensor(d!) page_record, Tensor(e!) overflow, Tensor(f!) host_spill_global, Tensor(g!) spilled_to_host, "
        "Tensor(h!)? new_free_list_head=None, Tensor(i!)? high_water=None",
        workspace_size=lambda *_: _native.paged_stash_workspace_size(),
    )
)
_add(
    Op(
        "stash",
        "paged_stash_pop",
        "Tensor cuda_src, Tensor? host_src, Tensor(a!) dst, Tensor num_tokens, Tensor page_record, "
        "Tensor spilled_to_host, Tensor overflow, Tensor(b!) free_list_cuda, Tensor(c!)? free_list_host, "
        "Tensor(d!) free_list_tail, Tensor free_list_capacity, Tensor(e!)? new_free_list_tail=None, "
        "bool zero_rest=False",
        workspace_size=lambda *_: _native.paged_stash_workspace_size(),
    )
)


def _hyper_connection_coefficients(tokens: int) -> tuple[OutputSpec, ...]:
    f32 = torch.float32
    return ((tokens, 4), f32), ((tokens, 4), f32), ((tokens, 4, 4), f32)


def _stream_row(streams: torch.Tensor) -> OutputSpec:
    return (streams.shape[0], streams.shape[2]), torch.bfloat16


_SEAM = (
    "Tensor fn, Tensor base, Tensor scale, Tensor? pre_in=None, Tensor? norm_weight=None, float epsilon=1e-06, "
    "float hc_epsilon=1e-06, float post_factor=2.0, int sinkhorn_iterations=20, bool norm_unrounded=False"
)
_COEFFICIENTS = ("out_pre", "out_post", "out_comb")
_add(
    Op(
        "mhc",
        "hyper_connection_pre",
        f"Tensor streams, {_SEAM}",
        ("out_layer_input", *_COEFFICIENTS),
        lambda streams, *_: (_stream_row(streams), *_hyper_connection_coefficients(streams.shape[0])),
    )
)
_add(
    Op(
        "mhc",
        "hyper_connection_post",
        "Tensor x, Tensor streams, Tensor post, Tensor comb",
        ("out_streams",),
        lambda x, streams, *_: ((tuple(streams.shape), torch.bfloat16),),
    )
)
_add(
    Op(
        "mhc",
        "hyper_connection_post_pre",
        f"Tensor x, Tensor streams, Tensor post, Tensor comb, {_SEAM}",
        ("out_streams", "out_layer_input", *_COEFFICIENTS),
        lambda x, streams, *_: (
            (tuple(streams.shape), torch.bfloat16),
            _stream_row(streams),
            *_hyper_connection_coefficients(streams.shape[0]),
        ),
    )
)
_add(
    Op(
        "mhc",
        "hyper_connection_coefficients",
        "Tensor streams, Tensor fn, Tensor base, Tensor scale, float epsilon=1e-06, float hc_epsilon=1e-06, "
        "float post_factor=2.0, int sinkhorn_iterations=20",
        _COEFFICIENTS,
        lambda streams, *_: _hyper_connection_coefficients(streams.shape[0]),
    )
)
_add(
    Op(
        "mhc",
        "hyper_connection_collapse",
        "Tensor streams, Tensor? pre=None, Tensor? norm_weight=None, float epsilon=1e-06, bool norm_unrounded=False",
        ("out_hidden",),
        lambda streams, *_: (_stream_row(streams),),
    )
)
_add(
    Op(
        "mhc",
        "hyper_connection_head",
        "Tensor streams, Tensor fn, Tensor base, Tensor scale, Tensor? norm_weight=None, float epsilon=1e-06, "
        "float hc_epsilon=1e-06, bool norm_unrounded=False",
        ("out_hidden",),
        lambda streams, *_: (_stream_row(streams),),
    )
)
