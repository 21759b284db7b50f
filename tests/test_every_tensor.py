"""What holds for every tensor of every op: its extents, its alignment, and whether its rows may lie apart.

The lists here are what the C entries take today. A check that is lost, or one that is new, changes a list.
"""

from __future__ import annotations

import re

import pytest
import torch
from dsv4_kernels.cases import POISON_BYTE, is_poison, same_bits
from dsv4_kernels.ops import OPS

from tests.emulated import emulated
from tests.every_tensor import ARCHITECTURE, Call, calls_of, tensor_names

# A tensor may be shorter by one element in this dimension: (op, tensor, dimension), and why.
SHORTER = {
    ("hash_router", "hash_lut", 0): "tokens beyond the table have no expert",
    ("hash_router_scored", "hash_lut", 0): "tokens beyond the table have no expert",
    ("hash_router_scored", "logits", 1): "the number of experts; the table's ids beyond are none",
    ("hash_router_fused", "hash_lut", 0): "tokens beyond the table have no expert",
    ("hash_router_fused", "weight", 0): "the number of experts; the table's ids beyond are none",
    ("dense_router_decode", "weight", 0): "the number of experts, where there is no bias",
    ("topk_select", "scores", 1): "the number of columns; lengths beyond count as that",
    ("flush_write_csa", "slot_positions", 0): "the number of slots; requests beyond are padding",
    ("flush_write_csa", "block_table", 1): "entries beyond the table are not written",
    ("flush_write_hca", "slot_positions", 0): "the number of slots; requests beyond are padding",
    ("flush_write_hca", "block_table", 1): "entries beyond the table are not written",
    ("compress_flush", "state", 0): "pages beyond are neither read nor stored",
    ("compress_flush", "state", 1): "the rows of a state page",
    ("compress_flush", "cos_sin", 0): "entries of positions beyond are not written",
    ("compress_flush", "pages", 0): "entries of pages beyond are not written",
    ("compress_flush", "block_table", 1): "entries beyond the table are not written",
    ("unpack_entries", "pages", 0): "slots of pages beyond give NaN",
    ("moe_sort", "expert_map", 0): "ids beyond the map are elsewhere",
    ("moe_tiles_from_counts", "counts", 0): "the number of experts, where they have no rows",
    ("moe_dispatch_places", "rank_of_id", 0): "ids beyond the table go nowhere",
    ("moe_dispatch_rows", "rank_of_id", 0): "ids beyond the table go nowhere",
    ("moe_dispatch_rows", "scale", 1): "filled up to as many bytes",
    ("moe_finalize", "rows", 0): "slots of rows beyond add nothing",
    ("moe_grouped_gemm", "x", 0): "slots of rows beyond are padding",
    ("blackwell_swizzle_32_4_4", "scales", 0): "padded to as many tiles",
    ("blackwell_swizzle_32_4_4", "scales", 1): "padded to as many tiles",
    ("assemble_scales_2d_side", "scales", 0): "rows beyond are zero",
    ("quantize_nvfp4", "global_scale", 0): "the number of experts; ids beyond are none",
    ("dequantize_blocks", "global_scale", 0): "the number of experts; ids beyond are none",
    ("paged_stash_copy", "src", 0): "the most tokens; num_tokens beyond counts as that",
    ("paged_stash_copy", "cuda_dst", 1): "the page size, where there is no host pool",
    ("paged_stash_copy", "page_record", 0): "pages beyond what the tokens take",
    ("paged_stash_pop", "cuda_src", 1): "the page size, where there is no host pool",
    ("paged_stash_pop", "dst", 0): "the most tokens; num_tokens beyond counts as that",
    ("paged_stash_pop", "page_record", 0): "pages beyond what the tokens take",
}

# Tensors whose rows may lie apart, by op.
STRIDED_ROWS = {
    "hash_router_scored": {"logits"},
    "hash_router_fused": {"hidden", "weight"},
    "dense_router_decode": {"hidden", "weight"},
    "activation_topk": {"logits"},
    "topk_select": {"scores"},
    "append": {"kv", "z", "indexer_kv", "indexer_z"},
    "flush_write_csa": {"block_table"},
    "flush_write_hca": {"block_table"},
    "compress_flush": {"kv", "score", "pages"},
    "unpack_entries": {"pages"},
    "padded_squared_relu": {"x", "out"},
    "padded_swiglu": {"x", "out"},
    "squared_relu_and_quantize_mxfp8": {"x"},
    "swiglu_and_quantize_mxfp8": {"x"},
    "moe_dispatch_rows": {"x"},
    "moe_finalize": {"rows", "weights", "shared", "out"},
    "moe_sort": {"topk_ids"},
    "moe_grouped_gemm": {"x", "out"},
    "moe_grouped_gemm_quantized": {"x"},
    "blackwell_swizzle_32_4_4": {"scales"},
    "blackwell_unswizzle_32_4_4": {"out"},
    "assemble_scales_2d_side": {"scales"},
    "quantize_nvfp4": {"x"},
    "quantize_nvfp4_gpu_fused": {"x"},
    "quantize_mx": {"x"},
    "quantize_fp8_per_token": {"x"},
    "hyper_connection_pre": {"streams"},
    "hyper_connection_post": {"x", "streams", "out_streams"},
    "hyper_connection_post_pre": {"x", "streams", "out_streams"},
    "hyper_connection_coefficients": {"streams"},
    "hyper_connection_collapse": {"streams"},
    "hyper_connection_head": {"streams"},
}


def refused(call: Call, changed: dict[str, torch.Tensor]) -> bool:
    """Whether the library's checks refuse these tensors; they must name one of the op's arguments then."""
    text = call.refusal(changed)
    if text:
        assert re.match(rf"{call.op.name}: (\w+)[^:]*: (expected .+, got .+|must be (given|omitted) .+)", text), text
    return text is not None


@pytest.mark.parametrize("op", OPS)
def test_every_tensor_has_a_call(op: str) -> None:
    assert {name for call in calls_of(op) for name in call.chosen} == set(tensor_names(OPS[op]))


@pytest.mark.parametrize("op", OPS)
def test_an_element_less_is_refused(op: str) -> None:
    """Every tensor, one shorter in every dimension: refused, or in the list of what may be shorter, and nothing beyond
    is touched then.
    """
    accepted = set()
    for call in calls_of(op):
        for name, tensor in call.tensors.items():
            for dimension, extent in enumerate(tensor.shape):
                if not extent:
                    continue
                shorter = tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor
                shorter = shorter.narrow(dimension, 0, extent - 1).contiguous().view(tensor.dtype)
                if refused(call, {name: shorter}) or (op, name, dimension) in accepted:
                    continue
                accepted.add((op, name, dimension))
                with emulated(ARCHITECTURE):  # which reports an access outside of what it was given
                    call.run(call.copies() | {name: shorter})
    assert accepted == {row for row in SHORTER if row[0] == op}


def moved(tensor: torch.Tensor) -> torch.Tensor:
    """The same values one element further on in memory."""
    as_bytes = tensor.reshape(-1).view(torch.uint8)
    memory = torch.full((as_bytes.numel() + 64,), POISON_BYTE, dtype=torch.uint8)
    memory[tensor.element_size() :][: as_bytes.numel()] = as_bytes
    return memory[tensor.element_size() :][: as_bytes.numel()].view(tensor.dtype).view(tensor.shape)


@pytest.mark.parametrize("op", OPS)
def test_an_element_further_on_in_memory(op: str) -> None:
    """Every tensor that starts where only its own elements are aligned: refused, or the same bits."""
    for call in calls_of(op):
        changed = {}
        for name in call.chosen:
            tensor = moved(call.copies()[name])
            if not refused(call, {name: tensor}):
                changed[name] = tensor
        if not changed:
            continue
        with emulated(ARCHITECTURE):
            expected = call.run(call.copies())
            got = call.run(call.copies() | changed)
        for name, value in expected.items():
            assert same_bits(value, got[name].contiguous()), f"{name}, with {sorted(changed)} moved"


def apart(tensor: torch.Tensor, gap: int) -> torch.Tensor:
    """The same values in rows with `gap` bytes of poison behind each."""
    rows = tensor.reshape(-1, tensor.shape[-1]).view(torch.uint8)
    memory = torch.full((rows.shape[0], rows.shape[1] + gap), POISON_BYTE, dtype=torch.uint8)
    memory[:, : rows.shape[1]] = rows
    wide = memory.view(tensor.dtype).view(*tensor.shape[:-1], -1)
    return wide[..., : tensor.shape[-1]]


@pytest.mark.parametrize("op", OPS)
def test_rows_apart(op: str) -> None:
    """Every tensor that takes them as a slice of a wider one, each with a row stride of its own: the same bits, and
    nothing between the rows is written.
    """
    accepted = set()
    for call in calls_of(op):
        changed: dict[str, torch.Tensor] = {}
        for name in call.chosen:
            tensor = call.copies()[name]
            if tensor.dim() < 2 or not tensor.numel():
                continue
            strided = apart(tensor, 64 * (len(changed) + 1))
            if tensor.shape[:-1].numel() > 1 and not refused(call, {name: strided}):
                changed[name] = strided
        accepted |= set(changed)
        if not changed:
            continue
        with emulated(ARCHITECTURE):
            expected = call.run(call.copies())
            got = call.run(call.copies() | changed)
        for name, value in expected.items():
            assert same_bits(value, got[name].contiguous()), f"{name}, with rows of {sorted(changed)} apart"
        for name, tensor in changed.items():
            gap = tensor.as_strided((tensor.shape[:-1].numel() - 1, tensor.stride(-2)), (tensor.stride(-2), 1))
            assert is_poison(gap[:, tensor.shape[-1] :].contiguous()).all(), f"{name}: written between rows"
    assert accepted == STRIDED_ROWS.get(op, set())
