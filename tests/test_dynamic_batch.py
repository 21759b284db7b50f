"""One traced graph serves every number of tokens: every op, with its token dimension marked as dynamic."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dsv4_kernels import moe, router, torch_ops
from dsv4_kernels.cases import Case, all_cases
from dsv4_kernels.ops import OPS
from torch import Tensor
from torch._dynamo.testing import CompileCounter

torch_ops.register()
SIZES = (7, 5, 3, 2, 6)

# The arguments whose first extent is the number of tokens (requests, rows, slots), or a multiple of it.
TOKENS: dict[str, tuple[str, ...]] = {
    "hash_router": ("token_ids", "padding_mask"),
    "hash_router_scored": ("token_ids", "logits", "padding_mask", "bias_alt_mask"),
    "hash_router_fused": ("token_ids", "hidden", "padding_mask"),
    "dense_router_decode": ("hidden", "bias_alt_mask"),
    "activation_topk": ("logits", "padding_mask", "bias_alt_mask"),
    "topk_select": ("scores", "lengths"),
    "csa_compress_tail": ("request_slots",),
    "hca_compress_tail": ("request_slots",),
    "append": ("kv", "z", "request_slots", "positions", "indexer_kv", "indexer_z"),
    "flush_write_csa": ("entry", "indexer_key", "valid_mask", "request_slots", "block_table"),
    "flush_write_hca": ("entry", "valid_mask", "request_slots", "block_table"),
    "csa_rotate_state": ("valid_mask", "request_slots"),
    "hca_reset_state": ("valid_mask", "request_slots"),
    "compress_flush": ("kv", "score", "slot_mapping"),
    "unpack_entries": ("slots",),
    "padded_squared_relu": ("x", "permutation_map"),
    "padded_swiglu": ("x", "permutation_map"),
    "squared_relu_and_quantize_mxfp8": ("x", "permutation_map"),
    "swiglu_and_quantize_mxfp8": ("x", "permutation_map"),
    "moe_sort": ("topk_ids",),
    "moe_tiles_from_counts": ("counts",),
    "moe_dispatch_places": ("topk_ids",),
    "moe_dispatch_rows": ("topk_ids", "topk_weights", "x", "scale"),
    "moe_finalize": ("slot_to_row", "weights", "shared"),
    "moe_grouped_gemm": ("tile_to_expert", "row_to_slot"),
    "moe_grouped_gemm_quantized": ("tile_to_expert", "row_to_slot"),
    "blackwell_swizzle_32_4_4": ("scales",),
    "assemble_scales_2d_side": ("scales",),
    "quantize_nvfp4": ("x", "expert_ids"),
    "quantize_nvfp4_gpu_fused": ("x", "expert_ids"),
    "quantize_mx": ("x",),
    "quantize_fp8_per_token": ("x",),
    "dequantize_blocks": ("data", "scale", "expert_ids"),
    "paged_stash_copy": ("src",),
    "paged_stash_pop": ("dst",),
    "hyper_connection_pre": ("streams", "pre_in"),
    "hyper_connection_post": ("x", "streams", "post", "comb"),
    "hyper_connection_post_pre": ("x", "streams", "post", "comb", "pre_in"),
    "hyper_connection_coefficients": ("streams",),
    "hyper_connection_collapse": ("streams", "pre"),
    "hyper_connection_head": ("streams",),
}
WITHOUT = {"blackwell_unswizzle_32_4_4": "its rows are a number that the caller gives"}
# Their cases have few tiles, which may be repeated.
REPEATED = ("moe_grouped_gemm", "moe_grouped_gemm_quantized")
# Offsets on the device that count the tokens.
OFFSETS = ("query_starts", "expert_offsets")


def test_every_op_is_listed() -> None:
    assert TOKENS.keys() | WITHOUT.keys() == OPS.keys()


def tokens_of(op: str, arguments: tuple[Any, ...]) -> int:
    return int(arguments[[a.name for a in OPS[op].parameters].index(TOKENS[op][0])].shape[0])


def sizable(case: Case) -> bool:
    """Whether the case has tokens enough, in all of the arguments that are listed."""
    arguments = case.arguments("cpu")
    tokens = tokens_of(case.op, arguments)
    given = dict(zip([a.name for a in OPS[case.op].parameters], arguments, strict=True))
    listed = [given[name] for name in TOKENS[case.op] if given[name] is not None]
    enough = tokens >= (1 if case.op in REPEATED else max(SIZES))
    return enough and given.get("token_offsets") is None and all(a.shape[0] % tokens == 0 for a in listed)


def of_size(op: str, arguments: tuple[Any, ...], size: int) -> tuple[Any, ...]:
    """The first tokens of a case, marked as a dynamic number of them."""
    tokens, made = tokens_of(op, arguments), list[Any]()
    for parameter, value in zip(OPS[op].parameters, arguments, strict=True):
        if parameter.name in TOKENS[op] and value is not None:
            times = -(-size // tokens)
            value = torch.cat([value] * times)[: value.shape[0] // tokens * size].clone()
            torch._dynamo.mark_dynamic(value, 0)
        elif parameter.name in OFFSETS:
            value = value.clamp(max=size)
        made.append(value.clone() if isinstance(value, Tensor) and parameter.name not in TOKENS[op] else value)
    return tuple(made)


@pytest.mark.parametrize("op", TOKENS)
def test_one_graph_for_every_number_of_tokens(op: str) -> None:
    cases = [case for case in all_cases() if case.op == op and not case.large and sizable(case)]
    arguments = min(cases, key=lambda c: c.baseline.moved_bytes(*c.arguments("cpu"))).arguments("cpu")
    counter = CompileCounter()

    def call(*values: Any) -> tuple[Tensor, ...]:
        return OPS[op](values, (None,) * len(OPS[op].results))

    torch.compiler.reset()
    compiled = torch.compile(call, fullgraph=True, backend=counter)
    for size in SIZES:
        traced = compiled(*of_size(op, arguments, size))
        eager = call(*of_size(op, arguments, size))
        assert [(a.shape, a.dtype) for a in traced] == [(a.shape, a.dtype) for a in eager]
    assert counter.frame_count == 1


@pytest.mark.parametrize("op", TOKENS)
def test_export_with_a_dynamic_number_of_tokens(op: str) -> None:
    cases = [case for case in all_cases() if case.op == op and not case.large and sizable(case)]
    arguments = min(cases, key=lambda c: c.baseline.moved_bytes(*c.arguments("cpu"))).arguments("cpu")

    class Call(torch.nn.Module):
        def forward(self, *values: Any) -> tuple[Tensor, ...]:
            return OPS[op](values, (None,) * len(OPS[op].results))

    size = max(SIZES)
    given = of_size(op, arguments, size)
    dynamic = tuple(
        {0: torch.export.Dim.DYNAMIC} if parameter.name in TOKENS[op] and value is not None else None
        for parameter, value in zip(OPS[op].parameters, given, strict=True)
    )
    program = torch.export.export(Call(), given, dynamic_shapes=(dynamic,))
    for other in SIZES:
        results = program.module()(*of_size(op, arguments, other))
        eager = Call()(*of_size(op, arguments, other))
        assert [a.shape for a in results] == [a.shape for a in eager]


def bf16(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)


def test_modules_have_a_graph_for_each_branch() -> None:
    """Router picks another op for larger batches; Nvfp4MoE another size of tile, of three."""
    sizes = (3, 5, 7, 13, 29, 64, 70, 130, 500)
    dense = router.Router("dense", hidden_size=64, experts=16, top_k=4)
    layer = moe.Nvfp4MoE(4, 128, 128, top_k=2)
    weights = torch.randn(4, 256, 128, generator=torch.Generator().manual_seed(0)) / 11
    layer.prepare_weights_from_dequantized(weights, weights[:, :128] / 11, nvfp4=False)
    for module, make, branches in (
        (dense, lambda n: (bf16(n, 64),), 2),
        (layer, lambda n: (bf16(n, 128), torch.rand(n, 2), torch.randint(4, (n, 2), dtype=torch.int32)), 3),
    ):
        torch.compiler.reset()
        counter = CompileCounter()
        compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=counter)
        for size in sizes:
            compiled(*make(size))
        assert counter.frame_count == branches
