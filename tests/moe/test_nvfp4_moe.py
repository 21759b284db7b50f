"""The whole layer against its mathematics in float64, and what an engine does with it."""

from __future__ import annotations

import math
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from dsv4_kernels import InvalidArgumentError
from dsv4_kernels.checkpoint import CheckpointError
from dsv4_kernels.moe import (
    Nvfp4MoE,
    moe_finalize,
    moe_sort,
    quantize_mxfp8,
    quantize_nvfp4,
    run_fused_swiglu_grouped_gemm,
    run_nvfp4_grouped_gemm,
)
from safetensors.torch import save_file
from torch._dynamo.testing import CompileCounter

from tests.emulated import emulated
from tests.launches import observed
from tests.moe.test_moe_grouped_gemm import by_hand

pytestmark = pytest.mark.every_architecture

EXPERTS, HIDDEN, INNER, TOP_K = 5, 128, 128, 3


def random_layer(nvfp4: bool, seed: int = 0) -> tuple[torch.Tensor | None, ...]:
    generator = torch.Generator().manual_seed(seed)

    def matrix(rows: int, inner: int) -> tuple[torch.Tensor, torch.Tensor]:
        codes = torch.randint(256, (EXPERTS, rows, inner // 2), generator=generator, dtype=torch.uint8)
        if nvfp4:
            scale = torch.randint(8, 0x28, (EXPERTS, rows, inner // 16), generator=generator, dtype=torch.uint8)
            return codes, scale.view(torch.float8_e4m3fn)
        return codes, torch.randint(119, 124, (EXPERTS, rows, inner // 32), generator=generator, dtype=torch.uint8)

    l1, l2 = matrix(2 * INNER, HIDDEN), matrix(HIDDEN, INNER)
    if not nvfp4:
        return *l1, None, *l2, None
    factors = torch.rand(EXPERTS, 2, generator=generator) + 0.5, torch.rand(EXPERTS, generator=generator) + 0.5
    return *l1, factors[0], *l2, factors[1]


def routed(tokens: int, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, HIDDEN, generator=generator).to(torch.bfloat16)
    ids = torch.rand(tokens, EXPERTS, generator=generator).topk(TOP_K).indices.to(torch.int32)
    return hidden, torch.rand(tokens, TOP_K, generator=generator), ids


def expected(
    layer: tuple[torch.Tensor | None, ...],
    hidden: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    limit: float,
    first_expert: int = 0,
) -> torch.Tensor:
    """Token after token, expert after expert, in float64; the inner values rounded to bfloat16 as between kernels."""
    l1, l1_scale, l1_factor, l2, l2_scale, l2_factor = layer
    first = [by_hand(l1[e], l1_scale[e]) for e in range(EXPERTS)]
    second = [by_hand(l2[e], l2_scale[e]) for e in range(EXPERTS)]
    result = torch.zeros(hidden.shape, dtype=torch.float64)
    for token, row in enumerate(ids.tolist()):
        for k, identity in enumerate(row):
            e = identity - first_expert
            if not 0 <= e < EXPERTS:
                continue
            both = first[e] @ hidden[token].double()
            gate, up = both[:INNER], both[INNER:]
            if l1_factor is not None:
                gate, up = gate * l1_factor[e, 0].double(), up * l1_factor[e, 1].double()
            if limit:
                gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
            inner = (gate / (1 + torch.exp(-gate)) * up).to(torch.bfloat16).double()
            value = second[e] @ inner
            result[token] += weights[token, k].double() * value * (1 if l2_factor is None else l2_factor[e].double())
    return result


def module(nvfp4: bool, device: str = "cpu", **options: object) -> Nvfp4MoE:
    layer = Nvfp4MoE(EXPERTS, HIDDEN, INNER, **{"top_k": TOP_K, "device": device} | options)  # type: ignore[arg-type]
    layer.prepare_weights_from_stacked(*random_layer(nvfp4))  # type: ignore[arg-type]
    return layer


def close(got: torch.Tensor, want: torch.Tensor) -> bool:
    return float((got.cpu().double() - want).norm() / want.norm()) < 4e-3


@pytest.mark.parametrize("nvfp4", [False, True])
@pytest.mark.parametrize("limit", [None, 2.0])
def test_layer(nvfp4: bool, limit: float | None, device: str) -> None:
    hidden, weights, ids = routed(7)
    ids[3, 1], ids[5] = -1, EXPERTS
    layer = module(nvfp4, device, swiglu_limit=limit)
    got = layer.run(hidden.to(device), weights.to(device), ids.to(device))
    assert close(got, expected(random_layer(nvfp4), hidden, weights, ids, limit or 0.0))
    assert (got[5] == 0).all()


@pytest.mark.parametrize(("activations", "error"), [("nvfp4", 0.25), ("mxfp8", 0.08)])
@pytest.mark.parametrize("tokens", [3, 100])
def test_quantised_activations(activations: str, error: float, tokens: int, real_device: str) -> None:
    """Near the layer of unquantised activations, by what 4 and 8 bits lose; scales from the sample itself."""
    nvfp4 = activations == "nvfp4"
    layer = module(nvfp4, real_device, activations=activations, swiglu_limit=2.0)
    given = [value.to(real_device) for value in routed(tokens)]
    if nvfp4:
        l1, l2 = layer.compute_activation_global_scales(*given)
        assert l1 == pytest.approx(float(given[0].abs().max()) / 2688)
        assert l2 > 0
    want = expected(random_layer(nvfp4), *routed(tokens), 2.0)
    got = layer.run(*given)
    assert float((got.cpu().double() - want).norm() / want.norm()) < error


def test_the_static_scale_does_not_change_the_size_of_the_result(real_device: str) -> None:
    """A scale is divided out and multiplied back once: a power of two more gives the same codes and the same sums."""
    given = [value.to(real_device) for value in routed(4)]
    layer = module(True, real_device, activations="nvfp4")
    l1, l2 = layer.compute_activation_global_scales(*given)
    layer.set_activation_global_scales(2 * l1, 2 * l2)
    first = layer.run(*given).double()
    layer.set_activation_global_scales(4 * l1, 4 * l2)
    second = layer.run(*given).double()
    assert float((first - second).norm() / first.norm()) < 0.05


@pytest.mark.parametrize("tokens", [1, 30, 100])
def test_every_tile_size(tokens: int, real_device: str) -> None:
    hidden, weights, ids = routed(tokens)
    layer = module(False, real_device)
    got = layer.run(hidden.to(real_device), weights.to(real_device), ids.to(real_device))
    assert layer.tile_size(tokens) == {1: 16, 30: 64, 100: 128}[tokens]
    assert close(got, expected(random_layer(False), hidden, weights, ids, 10.0))


@pytest.mark.parametrize("nvfp4", [False, True])
def test_unfused_and_early_weights_are_the_same_layer(nvfp4: bool, real_device: str) -> None:
    given = [value.to(real_device) for value in routed(9)]
    want = expected(random_layer(nvfp4), *routed(9), 2.0)
    for before in (False, True):
        layer = module(nvfp4, real_device, swiglu_limit=2.0, weight_before_second=before)
        assert close(layer.run(*given), want)
        layer.set_fused_swiglu(False)
        assert float((layer.run(*given).cpu().double() - want).norm() / want.norm()) < 1e-2


def test_shared_output_is_added(real_device: str) -> None:
    given = [value.to(real_device) for value in routed(4)]
    shared = torch.randn(4, HIDDEN, device=real_device).to(torch.bfloat16)
    layer = module(False, real_device)
    alone = layer.run(*given).float()
    assert torch.allclose(layer.run(*given, shared=shared).float(), alone + shared.float(), rtol=2**-7, atol=1e-2)


def test_ranks_add_up_to_the_whole(real_device: str) -> None:
    """Experts 0-1 and 2-4 on two ranks: each drops the other's slots; their sums are the layer."""
    layer = random_layer(True)
    hidden, weights, ids = (value.to(real_device) for value in routed(11))
    total = torch.zeros(hidden.shape, device=real_device)
    for start, stop in ((0, 2), (2, 5)):
        rank = Nvfp4MoE(
            stop - start, HIDDEN, INNER, top_k=TOP_K, experts_start_idx=start, total_experts=EXPERTS, device=real_device
        )
        rank.prepare_weights_from_stacked(*(None if value is None else value[start:stop] for value in layer))  # type: ignore[arg-type]
        total += rank.run(hidden, weights, ids).float()
    assert close(total, expected(layer, *routed(11), 10.0))


def test_a_token_does_not_depend_on_its_batch(real_device: str) -> None:
    layer = module(True, real_device)
    hidden, weights, ids = (value.to(real_device) for value in routed(14))
    order = torch.randperm(14)
    whole = layer.run(hidden, weights, ids)
    assert torch.equal(layer.run(hidden[order], weights[order], ids[order]), whole[order])
    assert torch.equal(layer.run(hidden[5:12], weights[5:12], ids[5:12]), whole[5:12])
    alone = layer.run(hidden[5:6], weights[5:6], ids[5:6])  # so few slots have a kernel of their own
    assert torch.equal(layer.run(hidden[4:6], weights[4:6], ids[4:6])[1:], alone)


@pytest.mark.parametrize("architecture", ["sm_90a", "sm_100a"])
def test_four_launches(architecture: str) -> None:
    layer = module(False)
    with observed(architecture) as launches:
        layer.run(*routed(3))
    assert len(launches) == 4


@pytest.mark.parametrize(("activations", "nvfp4"), [("nvfp4", True), ("mxfp8", False)])
def test_five_launches_with_quantised_activations(activations: str, nvfp4: bool) -> None:
    layer = module(nvfp4, activations=activations)
    with observed("sm_100a") as launches:
        layer.run(*routed(3))
    assert len(launches) == 5


@pytest.mark.parametrize("activations", ["nvfp4", "mxfp8"])
@pytest.mark.parametrize("tokens", [3, 20, 100])
@pytest.mark.parametrize("weight_before_second", [False, True])
def test_quantising_within_the_first_product_changes_no_bit(
    activations: str, tokens: int, weight_before_second: bool, real_device: str
) -> None:
    """The layer against its steps, the rows between the products in bfloat16 and quantised by an op of their own."""
    nvfp4 = activations == "nvfp4"
    layer = module(
        nvfp4, real_device, activations=activations, swiglu_limit=2.0, weight_before_second=weight_before_second
    )
    hidden, weights, ids = (value.to(real_device) for value in routed(tokens))
    if nvfp4:
        layer.compute_activation_global_scales(hidden, weights, ids)

    def quantised(x: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        codes, scales = quantize_nvfp4(x, scale) if nvfp4 else quantize_mxfp8(x)
        return codes.view(torch.uint8) if nvfp4 else codes, scales

    routes = moe_sort(ids, EXPERTS, layer.tile_size(tokens))
    maps = routes.tile_to_expert, routes.row_to_slot
    x, x_scale = quantised(hidden, layer.l1_activation_scale)
    factor = layer.l1_alpha * layer.l1_activation_scale if nvfp4 else None
    early, late = (weights, None) if weight_before_second else (None, weights)
    inner = run_fused_swiglu_grouped_gemm(
        x, layer.l1_weight, layer.l1_scale, *maps, x_scale=x_scale, alpha=factor, slot_weights=early, top_k=TOP_K,
        limit=2.0,
    )  # fmt: skip
    inner, inner_scale = quantised(inner, layer.l2_activation_scale)
    factor = layer.l2_alpha * layer.l2_activation_scale if nvfp4 else None
    rows = run_nvfp4_grouped_gemm(inner, layer.l2_weight, layer.l2_scale, *maps, x_scale=inner_scale, alpha=factor)
    assert torch.equal(layer.run(hidden, weights, ids), moe_finalize(rows, routes.slot_to_row, late))


@pytest.mark.parametrize(("activations", "nvfp4"), [("bfloat16", False), ("nvfp4", True), ("mxfp8", False)])
@pytest.mark.parametrize("fused", [False, True])
def test_workspace_is_what_a_call_allocates(activations: str, nvfp4: bool, fused: bool) -> None:
    """Routes, codes and rows between the launches, each from a multiple of 256 bytes on; the unfused path's own work in
    torch comes on top.
    """
    layer = module(nvfp4, activations=activations)
    layer.set_fused_swiglu(fused)
    tokens = 30
    ids = routed(tokens)[2]
    routes = moe_sort(ids, EXPERTS, layer.tile_size(tokens))
    rows = routes.row_to_slot.shape[0]
    # Codes and scales of a row.
    row_of = {"bfloat16": lambda width: [2 * width], "nvfp4": lambda width: [width // 2, width // 16],
              "mxfp8": lambda width: [width, width // 32]}[activations]  # fmt: skip
    pieces = [value.nbytes for value in routes] + [rows * 2 * HIDDEN]
    if activations != "bfloat16":
        pieces += [tokens * size for size in row_of(HIDDEN)]
    if not fused:
        pieces.append(rows * 4 * INNER)
    if fused or activations != "bfloat16":
        pieces += [rows * size for size in row_of(INNER)]
    expected_bytes = sum(math.ceil(size / 256) * 256 for size in pieces)
    assert layer.workspace_bytes(tokens) == expected_bytes


def test_traces_whole(real_device: str) -> None:
    layer = module(True, real_device)
    given = [value.to(real_device) for value in routed(6)]
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*given), layer(*given))


@pytest.mark.thorough
def test_one_program_serves_every_batch() -> None:
    """Exported with a dynamic number of tokens; and compiled: without batch_invariant a graph for each tile size."""
    layer = module(False)
    tokens = torch.export.Dim("tokens", min=2, max=2000)
    exported = torch.export.export(layer, routed(5), dynamic_shapes=({0: tokens}, {0: tokens}, {0: tokens})).module()
    for batch in (2, 40, 130):
        want = expected(random_layer(False), *routed(batch), 10.0)
        assert close(exported(*routed(batch)), want)
    for invariant, graphs in ((False, 3), (True, 1)):
        layer = module(False, batch_invariant=invariant)
        torch._dynamo.reset()
        counter = CompileCounter()
        compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
        for batch in (5, 7, 30, 31, 100, 150):
            assert close(compiled(*routed(batch)), expected(random_layer(False), *routed(batch), 10.0))
        assert counter.frame_count == graphs


@pytest.mark.parametrize("where", ["sm_90a", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_batch_invariance(where: str) -> None:
    """Two tokens alone and among 30 others: other tile sizes by default, the same bits by request."""
    layer = module(True, "cuda" if where == "cuda" else "cpu", batch_invariant=True)
    assert {layer.tile_size(tokens) for tokens in (1, 30, 1000)} == {64}
    given = [value.to(layer.device) for value in routed(30)]
    with emulated(where) if where != "cuda" else nullcontext():
        assert torch.equal(layer.run(*(value[4:6] for value in given)), layer.run(*given)[4:6])


def test_checkpoint_names(tmp_path: Path, real_device: str) -> None:
    l1, l1_scale, _, l2, l2_scale, _ = random_layer(False)
    tensors = {}
    for e in range(EXPERTS):
        for name, weight, scale in (
            ("w1", l1[e, :INNER], l1_scale[e, :INNER]),
            ("w3", l1[e, INNER:], l1_scale[e, INNER:]),
            ("w2", l2[e], l2_scale[e]),
        ):
            tensors[f"layers.7.ffn.experts.{e}.{name}.weight"] = weight.view(torch.int8).contiguous()
            tensors[f"layers.7.ffn.experts.{e}.{name}.scale"] = scale.view(torch.float8_e8m0fnu).contiguous()
    save_file(tensors, tmp_path / "model.safetensors")
    want = module(False, real_device)
    for source in (tensors, tmp_path, tmp_path / "model.safetensors"):
        layer = Nvfp4MoE(EXPERTS, HIDDEN, INNER, top_k=TOP_K, device=real_device)
        layer.prepare_weights_from_checkpoint(source, 7)
        given = [value.to(real_device) for value in routed(6)]
        assert torch.equal(layer.run(*given), want.run(*given))
    with pytest.raises(CheckpointError, match=r"layers\.8\.ffn\.experts\.0\.w1\.weight: no such tensor"):
        layer.prepare_weights_from_checkpoint(tensors, 8)
    tensors["layers.7.ffn.experts.2.w2.scale"] = torch.zeros(HIDDEN, 1, dtype=torch.uint8)
    with pytest.raises(CheckpointError, match=r"experts\.2\.w2\.scale: expected uint8 or float8_e8m0fnu \[128, 4\]"):
        layer.prepare_weights_from_checkpoint(tensors, 7)


@pytest.mark.parametrize("nvfp4", [False, True])
def test_dequantised_weights_come_back(nvfp4: bool) -> None:
    """What FP4 holds exactly survives: values of the format in, the same layer out."""
    layer = random_layer(nvfp4)
    l1 = torch.stack([by_hand(c, s) for c, s in zip(layer[0], layer[1], strict=True)]).float()
    l2 = torch.stack([by_hand(c, s) for c, s in zip(layer[3], layer[4], strict=True)]).float()
    quantised = Nvfp4MoE(EXPERTS, HIDDEN, INNER, top_k=TOP_K)
    quantised.prepare_weights_from_dequantized(l1, l2, nvfp4=nvfp4)
    exact = expected((*layer[:2], None, *layer[3:5], None), *routed(5), 10.0)
    error = float((quantised.run(*routed(5)).double() - exact).norm() / exact.norm())
    assert error < (0.1 if nvfp4 else 4e-3)


@pytest.mark.gpu
def test_graph_follows_new_routes() -> None:
    layer = module(True, "cuda")
    for tokens in (1, 8, 64, 300):
        given = [value.cuda() for value in routed(tokens)]
        graph = torch.cuda.CUDAGraph()
        layer.run(*given)
        with torch.cuda.graph(graph):
            out = layer.run(*given)
        for seed in (5, 6):
            fresh = routed(tokens, seed)
            for place, value in zip(given, fresh, strict=True):
                place.copy_(value)
            graph.replay()
            torch.cuda.synchronize()
            assert torch.equal(out, layer.run(*given))
            assert close(out, expected(random_layer(True), *fresh, 10.0))


@pytest.mark.gpu
@pytest.mark.parametrize("activations", ["bfloat16", "nvfp4"])
def test_graphs_of_every_budget(activations: str) -> None:
    """Captured at 1, 2, 4 ... 8192 tokens without a call before, replayed with other routes, hostile ones too."""
    layer = module(True, "cuda", activations=activations)
    graphs, places = [], []
    for power in range(14):
        given = [value.cuda() for value in routed(2**power)]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = layer.run(*given)
        graphs.append(graph)
        places.append((given, out))
    for seed, change in enumerate(("other", "one expert", "fewer tokens", "none")):
        for power, (graph, (given, out)) in enumerate(zip(graphs, places, strict=True)):
            fresh = routed(2**power, seed + 10)
            if change == "one expert":
                fresh[2][:] = 3
            elif change == "fewer tokens":
                fresh[2][2**power // 2 :] = -1
            elif change == "none":
                fresh[2][:] = EXPERTS
            for place, value in zip(given, fresh, strict=True):
                place.copy_(value)
            graph.replay()
            want = layer.run(*given)
            torch.cuda.synchronize()
            assert torch.equal(out, want), (power, change)
            assert (out == 0).all() == (change == "none" or (change == "fewer tokens" and power == 0))


@pytest.mark.gpu
def test_two_layers_on_two_streams() -> None:
    layers = [module(False, "cuda"), module(True, "cuda")]
    given = [[value.cuda() for value in routed(40, seed)] for seed in (1, 2)]
    alone = [layer.run(*values) for layer, values in zip(layers, given, strict=True)]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    results: list[list[torch.Tensor]] = [[], []]
    for _ in range(20):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                results[i].append(layers[i].run(*given[i]))
    torch.cuda.synchronize()
    for want, got in zip(alone, results, strict=True):
        assert all(torch.equal(want, value) for value in got)


def test_refusals() -> None:
    layer = Nvfp4MoE(EXPERTS, HIDDEN, INNER, top_k=TOP_K)
    with pytest.raises(InvalidArgumentError, match="Nvfp4MoE: weights: expected prepared weights, got none"):
        layer.run(*routed(2))
    weights = list(random_layer(False))
    weights[3] = weights[3][:, :64]
    with pytest.raises(InvalidArgumentError, match=r"l2_weight: expected .* \[5, 128, 64\], got uint8 \[5, 64, 64\]"):
        layer.prepare_weights_from_stacked(*weights)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgumentError, match="expected NVFP4 weights for activations 'nvfp4', got MXFP4"):
        module(False, activations="nvfp4")
    with pytest.raises(InvalidArgumentError, match="activations: expected one of bfloat16, nvfp4, mxfp8, got 'fp8'"):
        Nvfp4MoE(EXPERTS, HIDDEN, INNER, activations="fp8")
    weights[1] = weights[1].float()
    with pytest.raises(InvalidArgumentError, match=r"l1_scale: expected dtype float8_e4m3fn .* got float32"):
        layer.prepare_weights_from_stacked(*weights)  # type: ignore[arg-type]
