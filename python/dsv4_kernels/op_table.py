"""Every op of the package, one row each.

Torch registration, public functions, selftest and the tests' parametrisation read this table.
"""

from __future__ import annotations

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
        "moe",
        "padded_squared_relu",
        "Tensor x, Tensor permutation_map, Tensor n_used",
        ("out",),
        lambda x, *_: ((tuple(x.shape), torch.bfloat16),),
    )
)


def _sorted_routes(topk_ids: torch.Tensor, local_experts: int, tile_size: int, *_: object) -> tuple[OutputSpec, ...]:
    tokens, top_k = topk_ids.shape
    tiles = _native.moe_sort_max_tiles(tokens * top_k, local_experts, tile_size)
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
_add(
    Op(
        "stash",
        "paged_stash_copy",
        "Tensor src, Tensor(a!) cuda_dst, Tensor(b!)? host_dst, Tensor num_tokens, Tensor free_list_cuda, "
        "Tensor? free_list_host, Tensor(c!) free_list_head, Tensor free_list_tail, Tensor free_list_capacity, "
        "Tensor(d!) page_record, Tensor(e!) overflow, Tensor(f!) host_spill_global, Tensor(g!) spilled_to_host, "
        "Tensor(h!)? new_free_list_head=None",
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
