"""What engines hand to the layer: maps of expert ids, rows by expert, workspaces, weights that change."""

from __future__ import annotations

import math
from contextlib import nullcontext

import pytest
import torch
from dsv4_kernels import InvalidArgumentError
from dsv4_kernels.cases import is_poison, poison
from dsv4_kernels.moe import Nvfp4MoE, moe_tiles_from_counts
from dsv4_kernels.presets import PRESETS
from torch.profiler import ProfilerActivity, profile

from tests.emulated import emulated
from tests.launches import observed
from tests.moe.test_nvfp4_moe import EXPERTS, HIDDEN, INNER, TOP_K, close, expected, module, random_layer, routed

pytestmark = pytest.mark.every_architecture

# NVFP4 weights or MXFP4, and what the products read.
KINDS = [
    pytest.param(False, "bfloat16", id="MXFP4"),
    pytest.param(True, "bfloat16", id="NVFP4"),
    pytest.param(True, "nvfp4", id="W4A4"),
    pytest.param(False, "mxfp8", id="W4A8"),
]
ERRORS = {"bfloat16": 4e-3, "nvfp4": 0.25, "mxfp8": 0.08}  # as in test_nvfp4_moe


def of_kind(nvfp4: bool, activations: str, device: str = "cpu", **options: object) -> Nvfp4MoE:
    layer = module(nvfp4, device, **{"activations": activations, "swiglu_limit": 2.0} | options)
    if activations == "nvfp4":
        layer.set_activation_global_scales(4.5 / 2688, 30 / 2688)
    return layer


def distance(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.cpu().double() - want).norm() / want.norm())


# Eight physical experts dealt out to two ranks by turns; the logical expert that each is a replica of.
REPLICAS = [0, 1, 2, 3, 4, 1, 1, 3]


def rank_of_replicas(rank: int, layer: tuple[torch.Tensor | None, ...], device: str) -> tuple[Nvfp4MoE, torch.Tensor]:
    """A rank's experts, and its map of physical ids."""
    here = [physical for physical in range(len(REPLICAS)) if physical % 2 == rank]
    logical = [REPLICAS[physical] for physical in here]
    made = Nvfp4MoE(len(here), HIDDEN, INNER, top_k=TOP_K, total_experts=len(REPLICAS), device=device)
    made.prepare_weights_from_stacked(*(None if value is None else value[logical] for value in layer))  # type: ignore[arg-type]
    places = [here.index(physical) if physical in here else -1 for physical in range(len(REPLICAS))]
    return made, torch.tensor(places, dtype=torch.int32, device=device)


def test_replicas_on_two_ranks_are_the_layer(device_of_each_kind: str) -> None:
    """Physical ids, an expert's tokens spread over its replicas; -1 and an id that no rank has contribute nothing."""
    layer = random_layer(True)
    hidden, weights, ids = routed(11)
    ids[4, 1], ids[7, 2] = -1, 100
    replicas = [[physical for physical, of in enumerate(REPLICAS) if of == e] for e in range(EXPERTS)]
    physical = torch.tensor(
        [
            [replicas[e][token % len(replicas[e])] if 0 <= e < EXPERTS else e for e in row]
            for token, row in enumerate(ids.tolist())
        ]
    )
    total = torch.zeros(hidden.shape)
    for rank in range(2):
        part, expert_map = rank_of_replicas(rank, layer, device_of_each_kind)
        given = (value.to(device_of_each_kind) for value in (hidden, weights, physical))
        total += part.run(*given, expert_map=expert_map).float().cpu()
    assert close(total, expected(layer, hidden, weights, ids, 10.0))


def test_replicas_from_a_checkpoint() -> None:
    """Each place here gets the expert that it is a replica of."""
    l1, l1_scale, _, l2, l2_scale, _ = random_layer(False)
    tensors = {}
    for e in range(EXPERTS):
        for name, weight, scale in (
            ("w1", l1[e, :INNER], l1_scale[e, :INNER]),  # type: ignore[index]
            ("w3", l1[e, INNER:], l1_scale[e, INNER:]),  # type: ignore[index]
            ("w2", l2[e], l2_scale[e]),  # type: ignore[index]
        ):
            tensors[f"layers.7.ffn.experts.{e}.{name}.weight"] = weight.view(torch.int8)
            tensors[f"layers.7.ffn.experts.{e}.{name}.scale"] = scale.view(torch.float8_e8m0fnu)
    layer = Nvfp4MoE(4, HIDDEN, INNER, top_k=TOP_K, total_experts=len(REPLICAS))
    layer.prepare_weights_from_checkpoint(tensors, 7, experts=[3, 1, 4, 1])
    want, _ = rank_of_replicas(0, random_layer(False), "cpu")
    want.prepare_weights_from_stacked(*(None if v is None else v[[3, 1, 4, 1]] for v in random_layer(False)))  # type: ignore[arg-type]
    hidden, weights, ids = routed(5)
    assert torch.equal(layer.run(hidden, weights, ids % 4), want.run(hidden, weights, ids % 4))
    for wrong in ([3, 1, 4], [0, 1, 2, -1]):
        with pytest.raises(InvalidArgumentError, match="experts: expected 4 ids of at least 0, got "):
            layer.prepare_weights_from_checkpoint(tensors, 7, experts=wrong)


def test_a_map_takes_the_place_of_the_first_id() -> None:
    """The same routes by a range of ids and by a map: the same bytes. A map of no id: zeros."""
    layer = module(False, experts_start_idx=3)
    hidden, weights, ids = routed(9)
    expert_map = torch.tensor([-1, -1, -1, 0, 1, 2, 3, 4, -1], dtype=torch.int32)
    want = layer.run(hidden, weights, ids + 3)
    assert want.any()
    assert torch.equal(layer.run(hidden, weights, ids + 3, expert_map=expert_map), want)
    assert not layer.run(hidden, weights, ids, expert_map=expert_map[:0]).any()
    with pytest.raises(InvalidArgumentError, match="moe_sort: expert_map: expected dtype int32, got int64"):
        layer.run(hidden, weights, ids, expert_map=expert_map.long())


MAX_ROWS = 64
COUNTS = [17, 0, MAX_ROWS, 1, 30]


def batched(max_rows: int = MAX_ROWS, counts: list[int] = COUNTS) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of every expert, NaN where they are not used."""
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(EXPERTS, max_rows, HIDDEN, generator=generator).to(torch.bfloat16)
    for e, count in enumerate(counts):
        rows[e, max(count, 0) :] = math.nan
    return rows, torch.tensor(counts, dtype=torch.int32)


def batched_by_hand(layer: tuple[torch.Tensor | None, ...], rows: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """Each used row through its expert in float64, one expert below the other."""
    of = [e for e, count in enumerate(counts) for _ in range(count)]
    used = torch.cat([rows[e, :count] for e, count in enumerate(counts)])
    return expected(layer, used, torch.ones(len(of), 1), torch.tensor(of)[:, None], 2.0)


@pytest.mark.parametrize(("nvfp4", "activations"), KINDS)
def test_rows_by_expert(nvfp4: bool, activations: str, real_device: str) -> None:
    """Against float64; rows that are not used keep what they held."""
    rows, counts = batched()
    layer = of_kind(nvfp4, activations, real_device)
    out = poison(torch.empty_like(rows, device=real_device))
    got = layer.run_batched(rows.to(real_device), counts.to(real_device), out=out)
    assert got is out
    used = torch.cat([got[e, :count] for e, count in enumerate(COUNTS)])
    assert distance(used, batched_by_hand(random_layer(nvfp4), rows, COUNTS)) < ERRORS[activations]
    for e, count in enumerate(COUNTS):
        assert is_poison(out[e, count:]).all()


def test_rows_by_expert_in_every_kernel(device: str) -> None:
    """Tiles of 16 rows, most of them empty and between the others; counts of 64 bits."""
    rows, counts = batched(32, [5, 0, 32, 1, 0])
    layer = of_kind(False, "bfloat16", device)
    assert layer.batched_tile_size(32) == 16
    out = poison(torch.empty_like(rows, device=device))
    layer.run_batched(rows.to(device), counts.to(torch.int64).to(device), out=out)
    used = torch.cat([out[e, :count].cpu() for e, count in enumerate(counts.tolist())])
    assert distance(used, batched_by_hand(random_layer(False), rows, counts.tolist())) < 4e-3
    assert is_poison(out[0, 5:]).all()
    assert is_poison(out[1]).all()


def test_counts_out_of_range(real_device: str) -> None:
    rows, _ = batched(32, [32, 32, 0, 0, 32])
    layer = of_kind(False, "bfloat16", real_device)
    out = poison(torch.empty_like(rows, device=real_device))
    counts = torch.tensor([33, 2**31 - 1, -1, -(2**31), 32], dtype=torch.int32, device=real_device)
    layer.run_batched(rows.to(real_device), counts, out=out)
    assert is_poison(out[2:4]).all()
    want = batched_by_hand(random_layer(False), rows, [32, 32, 0, 0, 32])
    assert distance(out[[0, 1, 4]].flatten(0, 1), want) < 4e-3


def test_fp8_rows_by_expert(real_device: str) -> None:
    """Rows that arrive as FP8 with a power of two for each 128 columns, which is repeated for each 32."""
    rows, counts = batched(128)
    rows = rows.nan_to_num()
    amax = rows.float().unflatten(2, (-1, 128)).abs().amax(-1)
    exponent = torch.ceil(torch.log2(amax.clamp(min=1e-9) / 448))
    codes = (rows.float().unflatten(2, (-1, 128)) / torch.exp2(exponent)[..., None]).to(torch.float8_e4m3fn).flatten(2)
    scale = (exponent + 127).to(torch.uint8).repeat_interleave(4, dim=2)
    values = codes.float() * torch.exp2(scale.float() - 127).repeat_interleave(32, dim=2)
    layer = of_kind(False, "mxfp8", real_device)
    got = layer.run_batched(codes.to(real_device), counts.to(real_device), scale=scale.to(real_device))
    used = torch.cat([got[e, :count] for e, count in enumerate(COUNTS)])
    want = batched_by_hand(random_layer(False), values.to(torch.bfloat16), COUNTS)
    assert distance(used, want) < 0.05


def test_refused_rows() -> None:
    rows, counts = batched(32, [1] * EXPERTS)
    layer = of_kind(False, "bfloat16")
    for wrong, text in (
        (
            (rows[:, :24].contiguous(), counts),
            "rows: expected a multiple of 16 as the number of rows per expert, got 24",
        ),
        ((rows[:3], counts), r"rows: expected shape \[5, 32, 128\], got \[3, 32, 128\]"),
        ((rows.flatten(), counts), r"rows: expected shape \[5, 0, 128\], got \[20480\]"),
        ((rows[:, ::2], counts), r"rows: expected a contiguous tensor, got strides \[4096, 256, 1\]"),
        ((rows, counts[:4]), r"counts: expected shape \[5\], got \[4\]"),
        ((rows.to(torch.float8_e4m3fn), counts), "x: expected dtype"),
    ):
        with pytest.raises(InvalidArgumentError, match=text):
            layer.run_batched(*wrong)
    with pytest.raises(InvalidArgumentError, match="scale: expected one with rows of float8_e4m3fn and activations"):
        layer.run_batched(rows, counts, scale=torch.zeros(EXPERTS, 32, HIDDEN // 32, dtype=torch.uint8))
    with pytest.raises(InvalidArgumentError, match="a multiple of 64 as the number of rows per expert, got 32"):
        of_kind(False, "bfloat16", batch_invariant=True).run_batched(rows, counts)
    with pytest.raises(
        InvalidArgumentError, match="moe_tiles_from_counts: max_rows: expected a multiple of 64, got 32"
    ):
        moe_tiles_from_counts(counts, 32, 64)
    with pytest.raises(InvalidArgumentError, match="weights: expected prepared weights, got none"):
        Nvfp4MoE(EXPERTS, HIDDEN, INNER).run_batched(rows, counts)


@pytest.mark.parametrize(("nvfp4", "activations"), KINDS)
@pytest.mark.parametrize("top_k", [1, TOP_K])
def test_weights_on_the_input(nvfp4: bool, activations: str, top_k: int, real_device: str) -> None:
    """Each route's own row of hidden times its weight, rounded; SwiGLU is not linear, so the order shows."""
    hidden, weights, ids = (value[:, :top_k] if value.dtype != torch.bfloat16 else value for value in routed(7))
    weights, ids = weights.contiguous(), ids.contiguous()
    layer = of_kind(nvfp4, activations, real_device, top_k=top_k, apply_router_weight_on_input=True)
    rows = (hidden.double()[:, None] * weights.double()[..., None]).to(torch.bfloat16).flatten(0, 1)
    each = expected(random_layer(nvfp4), rows, torch.ones(len(rows), 1), ids.reshape(-1, 1), 2.0)
    want = each.unflatten(0, (7, top_k)).sum(1)
    got = layer.run(*(value.to(real_device) for value in (hidden, weights, ids)))
    assert distance(got, want) < ERRORS[activations]
    late = expected(random_layer(nvfp4), hidden, weights, ids, 2.0)
    assert distance(got, want) < distance(got, late)


def test_weights_are_applied_in_one_place() -> None:
    with pytest.raises(InvalidArgumentError, match="on_input: expected False with weight_before_second, got True"):
        Nvfp4MoE(EXPERTS, HIDDEN, INNER, weight_before_second=True, apply_router_weight_on_input=True)


# How a layer is called: its options, and the call.
FORMS = {
    "run": {},
    "weight before second": {"weight_before_second": True},
    "weight on input": {"apply_router_weight_on_input": True},
    "by a map": {},
    "with shared": {},
    "batched": {},
}


def call(form: str, layer: Nvfp4MoE, tokens: int, own_memory: bool) -> torch.Tensor:
    """The result, in memory of the layer's own or in a workspace and an output that held NaN."""
    memory: dict[str, torch.Tensor] = {}
    device = layer.device
    if form == "batched":
        rows, counts = (value.to(device) for value in batched(64, COUNTS))
        if own_memory:
            memory["workspace"] = poisoned(layer.batched_workspace_bytes(64), layer)
            memory["out"] = torch.zeros_like(rows)
        got = layer.run_batched(rows, counts, **memory)
        return torch.cat([got[e, :count] for e, count in enumerate(COUNTS)])
    given = [value.to(device) for value in routed(tokens)]
    options: dict[str, torch.Tensor] = {}
    if form == "by a map":
        options["expert_map"] = torch.tensor([4, -1, 2, 1, 0], dtype=torch.int32, device=device)
    if form == "with shared":
        options["shared"] = given[0].flip(0)
    if own_memory:
        memory["workspace"] = poisoned(layer.workspace_bytes(tokens), layer)
        memory["out"] = torch.full_like(given[0], math.nan)
    return layer.run(*given, **options, **memory)


def poisoned(size: int, layer: Nvfp4MoE) -> torch.Tensor:
    return torch.full((size,), 0xFF, dtype=torch.uint8, device=layer.device)


@pytest.mark.parametrize(("nvfp4", "activations"), KINDS)
@pytest.mark.parametrize("form", FORMS)
def test_a_workspace_changes_no_bit(form: str, nvfp4: bool, activations: str, real_device: str) -> None:
    layer = of_kind(nvfp4, activations, real_device, **FORMS[form])
    for fused in (True, False) if form in ("run", "batched") else (True,):
        layer.set_fused_swiglu(fused)
        for tokens in (3, 40):
            want = call(form, layer, tokens, own_memory=False)
            assert want.isfinite().all()
            assert torch.equal(call(form, layer, tokens, own_memory=True), want)


def allocations(form: str, layer: Nvfp4MoE, own_memory: bool) -> int:
    """Bytes that torch allocates in the host's memory during a call, whose launches are observed instead of made."""
    tokens = 40
    given = [*batched(64, COUNTS)] if form == "batched" else [*routed(tokens)]
    run, size = (
        (layer.run_batched, layer.batched_workspace_bytes(64))
        if form == "batched"
        else (layer.run, layer.workspace_bytes(tokens))
    )
    memory = {"workspace": poisoned(size, layer), "out": torch.empty_like(given[0])} if own_memory else {}
    if form == "by a map":
        memory["expert_map"] = torch.zeros(EXPERTS, dtype=torch.int32)
    if form == "with shared":
        memory["shared"] = given[0].flip(0)
    with observed("sm_90a"), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run(*given, **memory)
    return sum(max(event.self_cpu_memory_usage, 0) for event in profiled.events() or ())


@pytest.mark.filterwarnings("ignore:Warning. Profiler clears events:UserWarning")  # torch before 2.12
@pytest.mark.parametrize(("nvfp4", "activations"), KINDS)
@pytest.mark.parametrize("form", [form for form in FORMS if form != "weight on input"])
def test_with_memory_of_the_callers_nothing_is_allocated(form: str, nvfp4: bool, activations: str) -> None:
    """Weights on the input are torch's product, which on the host allocates float32: see the test on the GPU."""
    layer = of_kind(nvfp4, activations, **FORMS[form])
    assert allocations(form, layer, own_memory=False) > 10_000
    assert allocations(form, layer, own_memory=True) == 0


@pytest.mark.gpu
@pytest.mark.parametrize(("nvfp4", "activations"), KINDS)
@pytest.mark.parametrize("form", FORMS)
def test_with_memory_of_the_callers_nothing_is_allocated_on_the_gpu(form: str, nvfp4: bool, activations: str) -> None:
    layer = of_kind(nvfp4, activations, "cuda", **FORMS[form])
    if form == "batched":
        given = [value.cuda() for value in batched(64, COUNTS)]
        size = layer.batched_workspace_bytes(64)
    else:
        given = [value.cuda() for value in routed(40)]
        size = layer.workspace_bytes(40)
    run = layer.run_batched if form == "batched" else layer.run
    memory = {"workspace": poisoned(size, layer), "out": torch.empty_like(given[0])}
    if form == "by a map":
        memory["expert_map"] = torch.zeros(EXPERTS, dtype=torch.int32, device="cuda")
    run(*given, **memory)
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    run(*given, **memory)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    graph = torch.cuda.CUDAGraph()
    want = memory["out"].clone()
    with torch.cuda.graph(graph):
        run(*given, **memory)
    memory["out"].zero_()
    graph.replay()
    torch.cuda.synchronize()
    used = slice(None) if form != "batched" else slice(2, 3)  # all of this expert's rows are used
    assert torch.equal(memory["out"][used], want[used])


@pytest.mark.parametrize("preset", ["v4-flash", "v4-pro"])
@pytest.mark.parametrize("activations", ["bfloat16", "nvfp4", "mxfp8"])
def test_a_workspace_fits_every_smaller_batch(preset: str, activations: str) -> None:
    """Of the presets, where larger batches have larger tiles, and of one expert, where larger tiles can be less."""
    sizes = PRESETS[preset]
    layers = [
        Nvfp4MoE.from_preset(preset, activations=activations, device="meta"),
        Nvfp4MoE(1, sizes.hidden_size, 64, top_k=1, activations=activations, device="meta"),
    ]
    for layer in layers:
        steps = [*range(400), *range(400, 20_000, 371)]
        largest = 0
        for tokens in steps:
            size = layer.workspace_bytes(tokens)
            assert size >= largest, tokens
            largest = size


def test_refused_workspaces() -> None:
    layer, given = module(True), routed(3)
    size = layer.workspace_bytes(3)
    for wrong, text in (
        (torch.empty(size - 1, dtype=torch.uint8), f"at least {size} bytes, got {size - 1}; workspace_bytes"),
        (torch.empty(size, dtype=torch.int8), rf"contiguous uint8 \[bytes\], got int8 \[{size}\]"),
        (torch.empty(1, size, dtype=torch.uint8), rf"contiguous uint8 \[bytes\], got uint8 \[1, {size}\]"),
        (torch.empty(2 * size, dtype=torch.uint8)[::2], r"contiguous uint8 \[bytes\], got uint8"),
        (torch.empty(size + 4, dtype=torch.uint8)[4:], "memory on a multiple of 16 bytes, got offset 4"),
    ):
        with pytest.raises(InvalidArgumentError, match=f"Nvfp4MoE: workspace: expected {text}"):
            layer.run(*given, workspace=wrong)
    with pytest.raises(InvalidArgumentError, match=r"moe_finalize: out: expected shape \[3, 128\], got \[4, 128\]"):
        layer.run(*given, out=torch.empty(4, HIDDEN, dtype=torch.bfloat16))


def test_results_may_take_the_place_of_their_inputs(device_of_each_kind: str) -> None:
    layer = module(False, device_of_each_kind)
    given = [value.to(device_of_each_kind) for value in routed(5)]
    want = layer.run(*given)
    shared = given[0].flip(0)
    with_shared = layer.run(*given, shared=shared)
    assert torch.equal(layer.run(*given, shared=shared, out=shared), with_shared)
    assert torch.equal(layer.run(*given, out=given[0]), want)
    assert torch.equal(given[0], want)


@pytest.mark.parametrize("where", ["sm_90a", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("form", ["weight on input", "by a map"])
def test_batch_invariance(form: str, where: str) -> None:
    """Two tokens alone and among 30 others, the same bits."""
    layer = module(True, "cuda" if where == "cuda" else "cpu", batch_invariant=True, **FORMS[form])
    given = [value.to(layer.device) for value in routed(30)]
    options = {}
    if form == "by a map":
        options["expert_map"] = torch.tensor([4, -1, 2, 1, 0], dtype=torch.int32, device=layer.device)
    with emulated(where) if where != "cuda" else nullcontext():
        alone = layer.run(*(value[4:6] for value in given), **options)
        assert torch.equal(alone, layer.run(*given, **options)[4:6])


@pytest.mark.parametrize("where", ["sm_90a", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_rows_by_expert_have_the_bits_of_routes(where: str) -> None:
    """With batch_invariant: tokens with one expert each, routed, and as rows of that expert among others."""
    device = "cuda" if where == "cuda" else "cpu"
    layer = module(False, device, batch_invariant=True, top_k=1)
    rows, counts = (value.to(device) for value in batched(64, [3, 0, 20, 1, 2]))
    used = [(e, i) for e, count in enumerate(counts.tolist()) for i in range(count)]
    hidden = torch.stack([rows[e, i] for e, i in used])
    ids = torch.tensor([[e] for e, _ in used], device=device)
    with emulated(where) if where != "cuda" else nullcontext():
        want = layer.run(hidden, torch.ones(len(used), 1, device=device), ids)
        got = layer.run_batched(rows, counts)
    assert torch.equal(torch.stack([got[e, i] for e, i in used]), want)


@pytest.mark.parametrize("form", ["run", "by a map", "batched"])
def test_traces_whole_with_memory_of_the_callers(form: str, real_device: str) -> None:
    layer = of_kind(True, "bfloat16", real_device)
    compiled = torch.compile(layer.run_batched if form == "batched" else layer.run, fullgraph=True, backend="aot_eager")
    if form == "batched":
        given = [value.to(real_device) for value in batched(64, [64] * EXPERTS)]
        size, want = layer.batched_workspace_bytes(64), layer.run_batched(*given)
    else:
        given = [value.to(real_device) for value in routed(6)]
        size, want = layer.workspace_bytes(6), layer.run(*given)
    out = torch.empty_like(given[0])
    options = {"workspace": poisoned(size, layer), "out": out}
    if form == "by a map":
        options["expert_map"] = torch.arange(EXPERTS, dtype=torch.int32, device=real_device)
    assert torch.equal(compiled(*given, **options), want)
    assert torch.equal(out, want)


def test_one_expert_is_replaced_in_its_memory(real_device: str) -> None:
    for nvfp4, activations in ((False, "bfloat16"), (True, "bfloat16"), (True, "nvfp4"), (False, "mxfp8")):
        layer = of_kind(nvfp4, activations, real_device)
        addresses = {name: buffer.data_ptr() for name, buffer in layer.named_buffers()}
        old, new = random_layer(nvfp4), random_layer(nvfp4, 1)
        layer.replace_expert(2, *(None if value is None else value[2] for value in new))  # type: ignore[arg-type]
        assert {name: buffer.data_ptr() for name, buffer in layer.named_buffers()} == addresses
        mixed = [None if value is None else value.clone() for value in old]
        for into, value in zip(mixed, new, strict=True):
            if into is not None:
                into[2] = value[2]  # type: ignore[index]
        want = of_kind(nvfp4, activations, real_device)
        want.prepare_weights_from_stacked(*mixed)  # type: ignore[arg-type]
        given = [value.to(real_device) for value in routed(9)]
        assert torch.equal(layer.run(*given), want.run(*given))
        if activations == "bfloat16":
            assert close(layer.run(*given), expected(tuple(mixed), *routed(9), 2.0))


def test_an_expert_that_does_not_fit_changes_nothing() -> None:
    layer = module(False)
    before = layer.run(*routed(4))
    one = [None if value is None else value[0] for value in random_layer(False, 1)]
    wide = one[4].clone()  # type: ignore[union-attr]
    wide[0, 0] = 137
    for arguments, text in (
        ((5, *one), "expert: expected 0 to 4, got 5"),
        ((0, one[0][:64], *one[1:]), r"l1_weight: expected uint8 or .* \[256, 64\], got uint8 \[64, 64\]"),  # type: ignore[index]
        ((0, *one[:4], wide, None), r"l2_scale: expected scales of at most 2\^9"),
        ((0, *one[:2], torch.ones(2), *one[3:]), "l1_global_scale: expected None, as the other experts have none"),
        ((0, *(None if v is None else v[0] for v in random_layer(True))), "l1_scale: expected uint8 or float8_e8m0fnu"),
    ):
        with pytest.raises(InvalidArgumentError, match=f"Nvfp4MoE: {text}"):
            layer.replace_expert(*arguments)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgumentError, match=r"l2_global_scale: expected float32 \[1\], got float32 \[3\]"):
        module(True).replace_expert(0, *(v[0] for v in random_layer(True)[:5]), torch.ones(3))  # type: ignore[index, arg-type]
    assert torch.equal(layer.run(*routed(4)), before)
    with pytest.raises(InvalidArgumentError, match="weights: expected prepared weights, got none"):
        Nvfp4MoE(EXPERTS, HIDDEN, INNER).replace_expert(0, *one)  # type: ignore[arg-type]


@pytest.mark.parametrize(("nvfp4", "activations"), KINDS)
def test_an_expert_is_its_parts_of_the_buffers(nvfp4: bool, activations: str) -> None:
    """Moved from slot to slot, as an engine does that balances load: the same results under the new ids."""
    layer = of_kind(nvfp4, activations)
    hidden, weights, ids = routed(9)
    want = layer.run(hidden, weights, ids)
    order = [3, 0, 4, 1, 2]
    for buffer in layer.expert_buffers().values():
        assert buffer.shape[0] == EXPERTS
        assert buffer.is_contiguous()
        buffer.copy_(buffer[order].clone())
    place = torch.tensor([order.index(e) for e in range(EXPERTS)], dtype=torch.int32)
    assert torch.equal(layer.run(hidden, weights, ids, expert_map=place), want)


@pytest.mark.gpu
def test_a_captured_graph_uses_a_replaced_expert() -> None:
    layer = module(True, "cuda")
    given = [value.cuda() for value in routed(8)]
    expert_map = torch.arange(EXPERTS, dtype=torch.int32, device="cuda")
    layer.run(*given, expert_map=expert_map)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layer.run(*given, expert_map=expert_map)
    layer.replace_expert(1, *(v[1] for v in random_layer(True, 1)))  # type: ignore[index, arg-type]
    expert_map.copy_(torch.tensor([1, 0, 2, -1, 4], dtype=torch.int32))
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, layer.run(*given, expert_map=expert_map))
    layer.prepare_weights_from_stacked(*random_layer(True))  # type: ignore[arg-type]
    expert_map.copy_(torch.arange(EXPERTS, dtype=torch.int32))
    graph.replay()
    torch.cuda.synchronize()
    assert close(out, expected(random_layer(True), *routed(8), 10.0))


def test_fused_shared_experts() -> None:
    """The last expert is shared: every token has a route to it, with weight 1. Tiles are as large as without it."""
    layer = module(False, num_fused_shared_experts=1)
    hidden, weights, ids = routed(9)
    ids[:, :2], ids[:, 2], weights[:, 2] = ids[:, :2] % 4, EXPERTS - 1, 1.0
    assert close(layer.run(hidden, weights, ids), expected(random_layer(False), hidden, weights, ids, 10.0))
    fused, plain = (
        Nvfp4MoE.from_preset("v4-flash", num_fused_shared_experts=shared, device="meta") for shared in (1, 0)
    )
    assert (fused.num_experts, fused.top_k) == (257, 7)
    assert [fused.tile_size(2**n) for n in range(14)] == [plain.tile_size(2**n) for n in range(14)]
    with pytest.raises(InvalidArgumentError, match="num_fused_shared_experts: expected less than top_k"):
        Nvfp4MoE(EXPERTS, HIDDEN, INNER, top_k=TOP_K, num_fused_shared_experts=TOP_K)
