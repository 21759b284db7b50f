"""The layer as a part of a model: state dicts, casts, moves, copies, and weights that change under a captured graph."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from dsv4_kernels import InvalidArgumentError
from dsv4_kernels.checkpoint import CheckpointError
from dsv4_kernels.moe import Nvfp4MoE, nvfp4_moe
from safetensors.torch import load_file, save_file

from tests.moe.test_moe_grouped_gemm import by_hand
from tests.moe.test_nvfp4_moe import EXPERTS, HIDDEN, INNER, TOP_K, close, expected, module, random_layer, routed

# Whether weights are NVFP4, what the products read, and the order that the weights are in.
KINDS = [
    pytest.param(False, "bfloat16", id="MXFP4"),
    pytest.param(True, "bfloat16", id="NVFP4"),
    pytest.param(True, "nvfp4", id="W4A4"),
    pytest.param(False, "mxfp8", id="W4A8"),
]


def scaled(layer: Nvfp4MoE) -> Nvfp4MoE:
    """With static scales of its own, which a copy of the layer must have too."""
    layer.set_activation_global_scales(4.5 / 2688, 300 / 2688)
    return layer


def of_kind(nvfp4: bool, activations: str, seed: int = 0) -> Nvfp4MoE:
    layer = Nvfp4MoE(EXPERTS, HIDDEN, INNER, top_k=TOP_K, activations=activations)
    layer.prepare_weights_from_stacked(*random_layer(nvfp4, seed))  # type: ignore[arg-type]
    return scaled(layer)


def empty(activations: str, **options: object) -> Nvfp4MoE:
    return Nvfp4MoE(EXPERTS, HIDDEN, INNER, top_k=TOP_K, activations=activations, **options)  # type: ignore[arg-type]


def pickled(layer: Nvfp4MoE) -> Nvfp4MoE:
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    result: Nvfp4MoE = torch.load(file, weights_only=False)
    return result


def loaded(layer: Nvfp4MoE, state: dict[str, torch.Tensor], **options: bool) -> Nvfp4MoE:
    layer.load_state_dict(state, **options)
    return layer


def through_files(layer: Nvfp4MoE, folder: Path, how: str) -> dict[str, torch.Tensor]:
    path = folder / "state"
    if how == "safetensors":
        save_file({name: tensor.contiguous() for name, tensor in layer.state_dict().items()}, path)
        return load_file(path)
    torch.save(layer.state_dict(), path)
    state: dict[str, torch.Tensor] = torch.load(path)
    return state


WAYS: dict[str, Callable[[Nvfp4MoE, Path], Any]] = {
    "to bfloat16": lambda layer, _: layer.to(torch.bfloat16),
    "half": lambda layer, _: layer.half(),
    "double": lambda layer, _: layer.double(),
    "a model around it": lambda layer, _: torch.nn.Sequential(torch.nn.Linear(2, 2), layer).bfloat16()[1],
    "deepcopy": lambda layer, _: copy.deepcopy(layer).float(),
    "pickle": lambda layer, _: pickled(layer),
    "state dict": lambda layer, _: loaded(empty(layer.activations), layer.state_dict()),
    "state dict, assigned": lambda layer, _: loaded(empty(layer.activations), layer.state_dict(), assign=True),
    "onto meta, assigned": lambda layer, _: loaded(
        empty(layer.activations, device="meta"), layer.state_dict(), assign=True
    ),
    "over other weights": lambda layer, _: loaded(
        of_kind(layer.l1_alpha is not None, layer.activations, 1), layer.state_dict()
    ),
    "over weights of the other format": lambda layer, _: loaded(
        of_kind(layer.activations == "nvfp4" or (layer.l1_alpha is None and layer.activations != "mxfp8"),
                layer.activations, 1), layer.state_dict()
    ),
    "torch.save": lambda layer, folder: loaded(empty(layer.activations), through_files(layer, folder, "torch")),
    "safetensors": lambda layer, folder: loaded(empty(layer.activations), through_files(layer, folder, "safetensors")),
}  # fmt: skip


@pytest.mark.parametrize(("nvfp4", "activations"), KINDS)
@pytest.mark.parametrize("way", WAYS)
def test_a_copy_computes_what_the_layer_did(way: str, nvfp4: bool, activations: str, tmp_path: Path) -> None:
    layer = of_kind(nvfp4, activations)
    want = layer.run(*routed(5))
    copied = WAYS[way](layer, tmp_path)
    assert torch.equal(copied.run(*routed(5)), want)
    # The static scales and what is derived from them came along too: changing them again gives the same everywhere.
    copied.set_activation_global_scales(9 / 2688, 600 / 2688)
    again = of_kind(nvfp4, activations)
    again.set_activation_global_scales(9 / 2688, 600 / 2688)
    assert torch.equal(copied.run(*routed(5)), again.run(*routed(5)))


def test_a_whole_model_loads() -> None:
    """Under a prefix, beside other modules, strictly."""
    model = torch.nn.ModuleDict({"gate": torch.nn.Linear(2, 2), "experts": of_kind(True, "nvfp4")})
    fresh = torch.nn.ModuleDict({"gate": torch.nn.Linear(2, 2), "experts": empty("nvfp4")})
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh["experts"].run(*routed(3)), model["experts"].run(*routed(3)))
    names = {name for name in model.state_dict() if name.startswith("experts.")}
    parts = {"weight", "scale", "alpha", "activation_scale"}
    assert names == {f"experts.{p}_{part}" for p in ("l1", "l2") for part in parts} | {"experts._extra_state"}


def test_a_part_of_a_state_dict() -> None:
    """What is missing is torch's to report; what is loaded leaves nothing stale."""
    layer, other = of_kind(True, "nvfp4"), of_kind(True, "nvfp4")
    other.set_activation_global_scales(9 / 2688, 600 / 2688)
    part = {name: tensor for name, tensor in other.state_dict().items() if name.endswith("activation_scale")}
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: .*l1_weight"):
        of_kind(True, "nvfp4").load_state_dict(part)
    layer.load_state_dict(part, strict=False)
    assert torch.equal(layer.run(*routed(4)), other.run(*routed(4)))


def test_an_unprepared_layer_stays_one() -> None:
    for activations in ("bfloat16", "nvfp4"):
        fresh = loaded(of_kind(True, activations), empty(activations).state_dict())
        for layer in (fresh, empty(activations)):
            with pytest.raises(InvalidArgumentError, match="Nvfp4MoE: weights: expected prepared weights, got none"):
                layer.run(*routed(2))


@pytest.mark.parametrize(
    ("layer", "state", "text"),
    [
        (("bfloat16", "mxfp4"), (True, "bfloat16"), "l1_scale: expected MXFP4 weights for activations 'bfloat16', got"),
        (("nvfp4", None), (False, "bfloat16"), "l1_scale: expected NVFP4 weights for activations 'nvfp4', got MXFP4"),
        (("nvfp4", None), (True, "bfloat16"), "l1_weight: expected weights in the checkpoints' order for activations"),
    ],
)
def test_a_state_of_another_kind_is_refused(layer: tuple[str, str | None], state: tuple[bool, str], text: str) -> None:
    fresh = empty(layer[0], weights=layer[1])
    with pytest.raises(CheckpointError, match=f"Nvfp4MoE: experts.{text}"):
        torch.nn.ModuleDict({"experts": fresh}).load_state_dict(
            torch.nn.ModuleDict({"experts": of_kind(*state)}).state_dict()
        )
    with pytest.raises(InvalidArgumentError, match="expected prepared weights"):
        fresh.run(*routed(2))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"l1_scale": torch.zeros(5, 1, 256, 4)}, "l1_scale: expected int32 .*, got float32"),
        ({"l1_alpha": torch.zeros(5, 2, dtype=torch.bfloat16)}, r"l1_alpha: expected float32 \[5, 2\], got bfloat16"),
        ({"l2_alpha": torch.zeros(4)}, r"l2_alpha: expected float32 \[5\], got float32 \[4\]"),
        ({"l2_weight": torch.zeros(4, 1, 128, 16, dtype=torch.int32)}, r"l2_weight: expected int32 \[5, 1, 128, 16\]"),
        ({"l2_activation_scale": torch.zeros(())}, r"l2_activation_scale: expected float32 \[1\], got float32 \[\]"),
        ({"_extra_state": torch.tensor([7, 1])}, r"_extra_state: expected weights in layout 1, got \[7, 1\]"),
    ],
)
def test_a_broken_state_is_refused_and_changes_nothing(changes: dict[str, torch.Tensor], text: str) -> None:
    layer = of_kind(True, "bfloat16")
    before = layer.run(*routed(3))
    with pytest.raises(CheckpointError, match=f"Nvfp4MoE: {text}"):
        layer.load_state_dict(of_kind(True, "bfloat16", 1).state_dict() | changes)
    assert torch.equal(layer.run(*routed(3)), before)


@pytest.mark.parametrize(("nvfp4", "activations"), KINDS)
def test_everything_moves(nvfp4: bool, activations: str) -> None:
    moved = of_kind(nvfp4, activations).to("meta")
    tensors = dict(moved.named_buffers()) | {n: t for n, t in vars(moved).items() if isinstance(t, torch.Tensor)}
    assert {tensor.device.type for tensor in tensors.values()} == {"meta"}
    assert moved.device.type == "meta"


def addresses(layer: Nvfp4MoE) -> dict[str, int]:
    return {name: tensor.data_ptr() for name, tensor in layer.named_buffers()}


CHANGES: dict[str, Callable[[Nvfp4MoE, bool], object]] = {
    "prepared again": lambda layer, nvfp4: layer.prepare_weights_from_stacked(*random_layer(nvfp4, 1)),  # type: ignore[arg-type]
    "loaded": lambda layer, nvfp4: layer.load_state_dict(of_kind(nvfp4, layer.activations, 1).state_dict()),
    "quantised again": lambda layer, nvfp4: layer.prepare_weights_from_dequantized(
        torch.ones(EXPERTS, 2 * INNER, HIDDEN), torch.ones(EXPERTS, HIDDEN, INNER), nvfp4=nvfp4
    ),
    "activation scales": lambda layer, _: layer.set_activation_global_scales(9 / 2688, 600 / 2688),
    "computed scales": lambda layer, _: layer.compute_activation_global_scales(*routed(6)),
    "cast": lambda layer, _: layer.half(),
}


@pytest.mark.parametrize(("nvfp4", "activations"), KINDS)
@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_written_into_the_same_memory(change: str, nvfp4: bool, activations: str) -> None:
    if change == "computed scales" and activations != "nvfp4":
        activations, nvfp4 = "nvfp4", True
    layer = of_kind(nvfp4, activations)
    before = addresses(layer)
    CHANGES[change](layer, nvfp4)
    assert addresses(layer) == before


def test_memory_is_what_the_first_weights_will_need() -> None:
    """Preparing a fresh layer moves nothing either, so that the graph of a warm-up stays valid."""
    for nvfp4, activations in ((False, "bfloat16"), (True, "nvfp4"), (False, "mxfp8")):
        layer = empty(activations)
        before = addresses(layer)
        layer.prepare_weights_from_stacked(*random_layer(nvfp4))  # type: ignore[arg-type]
        assert addresses(layer) == before
    layer = empty("bfloat16", weights="nvfp4")
    before = addresses(layer)
    layer.prepare_weights_from_stacked(*random_layer(True))  # type: ignore[arg-type]
    assert addresses(layer) == before


@pytest.mark.gpu
@pytest.mark.parametrize(("nvfp4", "activations"), KINDS)
def test_a_captured_graph_uses_new_weights(nvfp4: bool, activations: str) -> None:
    layer = of_kind(nvfp4, activations).cuda()
    given = [value.cuda() for value in routed(8)]
    layer.run(*given)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layer.run(*given)
    graph.replay()
    torch.cuda.synchronize()
    old = out.clone()
    for change in ("activation scales", "prepared again", "loaded", "quantised again"):
        CHANGES[change](layer, nvfp4)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, layer.run(*given)), change
        if change == "prepared again":
            assert not torch.equal(out, old)
            if activations == "bfloat16":
                assert close(out, expected(random_layer(nvfp4, 1), *routed(8), 10.0))


def test_weights_of_another_format_replace_the_old_ones() -> None:
    layer = of_kind(False, "bfloat16")
    for nvfp4 in (True, False, True):
        layer.prepare_weights_from_stacked(*random_layer(nvfp4))  # type: ignore[arg-type]
        assert close(layer.run(*routed(5)), expected(random_layer(nvfp4), *routed(5), 10.0))


def test_scales_that_cannot_be_interleaved() -> None:
    """The last expert has one above 2^9: that product keeps the checkpoint's order, and the result is right."""
    layer = list(random_layer(False))
    for number, product in ((1, "l1"), (4, "l2")):
        wide = list(layer)
        wide[number] = layer[number].clone()
        wide[number][-1, 0, 0] = 137
        made = Nvfp4MoE(EXPERTS, HIDDEN, INNER, top_k=TOP_K)
        made.prepare_weights_from_stacked(*wide)  # type: ignore[arg-type]
        assert made.l1_weight.dtype == (torch.uint8 if product == "l1" else torch.int32)
        assert made.l2_weight.dtype == (torch.uint8 if product == "l2" else torch.int32)
        assert close(made.run(*routed(5)), expected(tuple(wide), *routed(5), 10.0))
        copied = loaded(empty("bfloat16"), made.state_dict())
        assert torch.equal(copied.run(*routed(5)), made.run(*routed(5)))
        made.prepare_weights_from_stacked(*layer)  # type: ignore[arg-type]
        assert made.l1_weight.dtype == made.l2_weight.dtype == torch.int32
        assert close(made.run(*routed(5)), expected(tuple(layer), *routed(5), 10.0))


def test_refused_weights_leave_the_layer_as_it_was() -> None:
    layer = of_kind(True, "nvfp4")
    before = layer.run(*routed(3))
    weights = list(random_layer(True, 1))
    weights[5] = weights[5][:2]
    with pytest.raises(InvalidArgumentError, match=r"l2_global_scale: expected float32 \[5\], got float32 \[2\]"):
        layer.prepare_weights_from_stacked(*weights)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgumentError, match="expected NVFP4 weights for activations 'nvfp4', got MXFP4"):
        layer.prepare_weights_from_stacked(*random_layer(False, 1))  # type: ignore[arg-type]
    values = torch.ones(EXPERTS, 2 * INNER, HIDDEN), torch.ones(EXPERTS, HIDDEN, INNER)
    with pytest.raises(InvalidArgumentError, match=r"nvfp4: expected what makes NVFP4 weights .*, got False"):
        layer.prepare_weights_from_dequantized(*values, nvfp4=False)
    with pytest.raises(
        InvalidArgumentError, match=r"l1_weight: expected bfloat16 or .* \[5, 256, 128\], got .*\[5, 128"
    ):
        layer.prepare_weights_from_dequantized(values[0][:, :INNER], values[1])
    assert torch.equal(layer.run(*routed(3)), before)


@pytest.mark.parametrize("value", [0.0, -0.0, -1.0, math.nan, math.inf, -math.inf, 1e-50, 1e39, "1", None, [1.0, 2.0]])
def test_scales_that_cannot_be(value: object) -> None:
    layer = of_kind(True, "nvfp4")
    before = layer.run(*routed(3))
    for scales in ((value, 1.0), (1.0, value)):
        name = "l1" if scales[0] is value else "l2"
        with pytest.raises(InvalidArgumentError, match=f"{name}: expected a finite number above 0, got "):
            layer.set_activation_global_scales(*scales)  # type: ignore[arg-type]
    assert torch.equal(layer.run(*routed(3)), before)


def test_a_scale_may_be_a_tensor() -> None:
    layer, other = of_kind(True, "nvfp4"), of_kind(True, "nvfp4")
    layer.set_activation_global_scales(torch.tensor(0.25), torch.tensor([0.5]))  # type: ignore[arg-type]
    other.set_activation_global_scales(0.25, 0.5)
    assert torch.equal(layer.run(*routed(3)), other.run(*routed(3)))


@pytest.mark.parametrize("limit", [-1.0, -0.5, math.nan, math.inf, -math.inf, "ten"])
def test_limits_that_cannot_be(limit: object) -> None:
    need = "swiglu_limit: expected a finite number of at least 0, or None, got "
    with pytest.raises(InvalidArgumentError, match=need):
        Nvfp4MoE(EXPERTS, HIDDEN, INNER, swiglu_limit=limit)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgumentError, match=need):
        of_kind(False, "bfloat16").set_swiglu_limit(limit)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("sample", "text"),
    [(math.nan, "hidden: expected finite values, got a largest one of nan"), (math.inf, "hidden: .* one of inf")],
)
def test_a_sample_that_says_nothing(sample: float, text: str) -> None:
    hidden, weights, ids = routed(3)
    hidden[1, 5] = sample
    with pytest.raises(InvalidArgumentError, match=f"compute_activation_global_scales: {text}"):
        of_kind(True, "nvfp4").compute_activation_global_scales(hidden, weights, ids)


def test_a_rank_takes_its_scales_from_its_own_experts() -> None:
    """Experts 3 and 4 of five: the second scale is the largest of their rows, by hand, and not of those of 0 and 1."""
    layer = random_layer(True)
    hidden, weights, ids = routed(9)
    rank = Nvfp4MoE(
        2,
        HIDDEN,
        INNER,
        top_k=TOP_K,
        experts_start_idx=3,
        total_experts=EXPERTS,
        activations="nvfp4",
        swiglu_limit=None,
    )
    rank.prepare_weights_from_stacked(*(None if value is None else value[3:] for value in layer))  # type: ignore[arg-type]

    def largest(experts: range) -> float:
        amax = 0.0
        for token, row in enumerate(ids.tolist()):
            for e in set(row) & set(experts):
                gate, up = (by_hand(layer[0][e], layer[1][e]) @ hidden[token].double()).chunk(2)  # type: ignore[index]
                gate, up = gate * layer[2][e, 0].double(), up * layer[2][e, 1].double()  # type: ignore[index]
                amax = max(amax, float((gate / (1 + torch.exp(-gate)) * up).abs().max()))
        return amax

    l1, l2 = rank.compute_activation_global_scales(hidden, weights, ids)
    assert l1 == pytest.approx(float(hidden.abs().max()) / 2688)
    assert l2 == pytest.approx(largest(range(3, 5)) / 2688, rel=2**-7)
    assert abs(largest(range(2)) / largest(range(3, 5)) - 1) > 0.05


def wrong_batches() -> dict[str, tuple[tuple[torch.Tensor, ...], torch.Tensor | None, str]]:
    hidden, weights, ids = routed(4)
    return {
        "fewer hidden rows": ((hidden[:3], weights, ids), None, r"topk_ids: expected shape \[3, 3\], got \[4, 3\]"),
        "more hidden rows": ((routed(5)[0], weights, ids), None, r"topk_ids: expected shape \[5, 3\], got \[4, 3\]"),
        "no hidden rows": ((hidden[:0], weights, ids), None, r"topk_ids: expected shape \[0, 3\], got \[4, 3\]"),
        "no routes": ((hidden, weights[:0], ids[:0]), None, r"topk_ids: expected shape \[4, 3\], got \[0, 3\]"),
        "fewer weights": ((hidden, weights[:3], ids), None, r"topk_weights: expected shape \[4, 3\], got \[3, 3\]"),
        "narrow weights": ((hidden, weights[:, :2], ids), None, r"topk_weights: expected shape \[4, 3\], got \[4, 2\]"),
        "narrow hidden": ((hidden[:, :64], weights, ids), None, r"hidden: expected shape \[4, 128\], got \[4, 64\]"),
        "another top_k": (
            (hidden, weights[:, :2], ids[:, :2]),
            None,
            r"topk_ids: expected shape \[4, 3\], got \[4, 2\]",
        ),
        "a row alone": ((hidden[0], weights[0], ids[0]), None, r"hidden: expected shape \[128, 128\], got \[128\]"),
        "fewer shared rows": ((hidden, weights, ids), hidden[:3], r"shared: expected shape \[4, 128\], got \[3, 128\]"),
        "narrow shared": ((hidden, weights, ids), hidden[:, :64], r"shared: expected shape \[4, 128\], got \[4, 64\]"),
    }


@pytest.mark.parametrize("case", wrong_batches())
def test_extents_that_do_not_agree(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused before anything runs, on every path through the layer."""

    def ran(*_: object) -> None:
        raise AssertionError("something was launched")

    given, shared, text = wrong_batches()[case]
    layers = [of_kind(False, "bfloat16"), of_kind(True, "nvfp4"), of_kind(False, "mxfp8")]
    monkeypatch.setattr(nvfp4_moe, "moe_sort", ran)
    monkeypatch.setattr(nvfp4_moe, "quantize_nvfp4", ran)
    for layer in layers:
        for fused in (True, False):
            layer.set_fused_swiglu(fused)
            with pytest.raises(InvalidArgumentError, match=f"Nvfp4MoE: {text}"):
                layer.run(*given, shared=shared)  # type: ignore[arg-type]
    if shared is None:
        with pytest.raises(InvalidArgumentError, match=f"compute_activation_global_scales: {text}"):
            layers[1].compute_activation_global_scales(*given)  # type: ignore[arg-type]


def test_construction() -> None:
    with pytest.raises(InvalidArgumentError, match="preset: expected one of v4-flash, v4-pro, v41-flash, got 'v5'"):
        Nvfp4MoE.from_preset("v5")
    whole = Nvfp4MoE.from_preset("v4-pro", activations="mxfp8", device="meta")
    assert (whole.num_experts, whole.hidden_size, whole.intermediate_size, whole.top_k) == (384, 7168, 3072, 6)
    assert whole.l1_weight.shape == (384, 6144, 3584)
    with pytest.raises(
        InvalidArgumentError, match="weights: expected 'nvfp4' or None with activations 'nvfp4', got 'm"
    ):
        empty("nvfp4", weights="mxfp4")
    for sizes, text in (
        ((0, 128, 128), "num_experts: expected an int of at least 1, got 0"),
        ((4, 128.0, 128), "hidden_size: expected an int of at least 1, got 128.0"),
        ((4, 128, -128), "intermediate_size: expected an int of at least 1, got -128"),
        ((4, 128, 100), "intermediate_size: expected a multiple of 32, the codes that share a scale in MXFP4 weights"),
    ):
        with pytest.raises(InvalidArgumentError, match=text):
            Nvfp4MoE(*sizes)  # type: ignore[arg-type]
    for options, text in (
        ({"top_k": 0}, "top_k: expected an int of at least 1, got 0"),
        ({"experts_start_idx": -1}, "experts_start_idx: expected an int of at least 0, got -1"),
        (
            {"tensor_parallel_rank": 2, "tensor_parallel_size": 2},
            "tensor_parallel_rank: expected less than .*, 2, got 2",
        ),
    ):
        with pytest.raises(InvalidArgumentError, match=text):
            Nvfp4MoE(4, 128, 128, **options)  # type: ignore[arg-type]
    assert "experts=0..4 of 5" in repr(module(True))
