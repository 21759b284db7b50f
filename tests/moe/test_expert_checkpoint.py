"""Experts by the names of each kind of checkpoint, whole and one tensor-parallel rank's part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from dsv4_kernels.checkpoint import CheckpointError
from dsv4_kernels.moe import Nvfp4MoE
from safetensors.torch import save_file

from tests.moe.test_nvfp4_moe import EXPERTS, HIDDEN, INNER, TOP_K, close, expected, random_layer, routed

Tensors = dict[str, torch.Tensor]
LAYER = 7
MATRICES = {"ffn": ("w1", "w3", "w2"), "mlp": ("gate_proj", "up_proj", "down_proj")}


def parts_of(nvfp4: bool) -> dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]:
    """Codes, scales and factor of each expert's gate, up and down."""
    l1, l1_scale, l1_factor, l2, l2_scale, l2_factor = random_layer(nvfp4)
    assert l1 is not None and l1_scale is not None  # noqa: PT018
    assert l2 is not None and l2_scale is not None  # noqa: PT018
    result: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]] = {}
    for e in range(EXPERTS):
        for half, rows in enumerate((slice(0, INNER), slice(INNER, 2 * INNER))):
            result[e, half] = l1[e, rows], l1_scale[e, rows], None if l1_factor is None else l1_factor[e, half]
        result[e, 2] = l2[e], l2_scale[e], None if l2_factor is None else l2_factor[e]
    return result


def input_scale(expert: int, matrix: int) -> float:
    """A static scale for each: the largest of the gates and ups is expert 3's up, of the downs expert 1's."""
    return (20.0 if (expert, matrix) in ((3, 1), (1, 2)) else 4.0 + expert + matrix) / 2688


def checkpoint(scheme: str, block: str = "ffn", prefix: str = f"layers.{LAYER}.", first: int = 0) -> Tensors:
    tensors: dict[str, torch.Tensor] = {}
    for (expert, matrix), (codes, scale, factor) in parts_of(scheme.startswith("nvfp4")).items():
        name = f"{prefix}{block}.experts.{first + expert}.{MATRICES[block][matrix]}"
        static = torch.tensor(input_scale(expert, matrix))
        if scheme == "models":
            tensors |= {f"{name}.weight": codes.view(torch.int8), f"{name}.scale": scale.view(torch.float8_e8m0fnu)}
        elif scheme == "models, torch's FP4":
            tensors |= {f"{name}.weight": codes.view(torch.float4_e2m1fn_x2), f"{name}.scale": scale}
        elif scheme == "nvfp4 of modelopt":
            assert factor is not None
            tensors |= {f"{name}.weight": codes, f"{name}.weight_scale": scale, f"{name}.weight_scale_2": factor}
            tensors[f"{name}.input_scale"] = static
        elif scheme == "nvfp4 of compressed-tensors":
            assert factor is not None
            tensors |= {f"{name}.weight_packed": codes, f"{name}.weight_scale": scale}
            # Of one element, and the reciprocals.
            tensors |= {f"{name}.weight_global_scale": 1 / factor[None], f"{name}.input_global_scale": 1 / static[None]}
        elif scheme == "mxfp4 of modelopt":
            tensors |= {f"{name}.weight": codes, f"{name}.weight_scale": scale}
        elif scheme == "mxfp4 of SGLang":
            tensors |= {f"{name}.weight": codes.view(torch.int8), f"{name}.weight_scale_inv": scale}
        else:
            assert scheme == "mxfp4 of compressed-tensors"
            tensors |= {f"{name}.weight_packed": codes, f"{name}.weight_scale": scale}
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


SCHEMES = (
    "models",
    "models, torch's FP4",
    "mxfp4 of modelopt",
    "mxfp4 of compressed-tensors",
    "mxfp4 of SGLang",
    "nvfp4 of modelopt",
    "nvfp4 of compressed-tensors",
)


@pytest.mark.parametrize("block", MATRICES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_naming(scheme: str, block: str, tmp_path: Path) -> None:
    """Against the layer's mathematics, from a file and from a mapping; one of the two under transformers' prefix."""
    nvfp4 = scheme.startswith("nvfp4")
    save_file(checkpoint(scheme, block), tmp_path / "model.safetensors")
    for source in (tmp_path, checkpoint(scheme, block, f"model.layers.{LAYER}.")):
        layer = Nvfp4MoE(EXPERTS, HIDDEN, INNER, top_k=TOP_K)
        layer.prepare_weights_from_checkpoint(source, LAYER)
        assert close(layer.run(*routed(6)), expected(random_layer(nvfp4), *routed(6), 10.0))


def stacked(first: int = 0) -> Tensors:
    """FP4 experts as in the state dict of a transformers model: all in one tensor each, gate's rows before up's.
    Experts below `first` are of other ranks.
    """
    l1, l1_scale, _, l2, l2_scale, _ = random_layer(False)
    tensors = {
        "gate_up_proj": l1.view(torch.int8),
        "gate_up_proj_scale_inv": l1_scale.view(torch.float8_e8m0fnu),
        "down_proj": l2.view(torch.int8),
        "down_proj_scale_inv": l2_scale.view(torch.float8_e8m0fnu),
    }
    return {
        f"model.layers.{LAYER}.mlp.experts.{name}": torch.cat(
            (torch.full((first, *tensor.shape[1:]), 0x7F, dtype=torch.uint8), tensor.view(torch.uint8))
        ).view(tensor.dtype)
        for name, tensor in tensors.items()
    }


@pytest.mark.parametrize("first", [0, 3])
def test_experts_in_one_tensor(first: int, tmp_path: Path) -> None:
    """Whole and halves of the inner width, of a state dict and of a file."""
    save_file(stacked(first), tmp_path / "model.safetensors")
    want = expected(random_layer(False), *routed(6), 10.0)
    options: dict[str, int] = {"top_k": TOP_K, "experts_start_idx": first, "total_experts": first + EXPERTS}
    hidden, weights, ids = routed(6)
    for source in (tmp_path, stacked(first)):
        layer = Nvfp4MoE(EXPERTS, HIDDEN, INNER, **options)
        layer.prepare_weights_from_checkpoint(source, LAYER)
        assert close(layer.run(hidden, weights, ids + first), want)
    total = torch.zeros(6, HIDDEN)
    for rank in range(2):
        layer = Nvfp4MoE(
            EXPERTS, HIDDEN, INNER // 2, **options, tensor_parallel_rank=rank, tensor_parallel_size=2
        )  # fmt: skip
        layer.prepare_weights_from_checkpoint(tmp_path, LAYER)
        total += layer.run(hidden, weights, ids + first).float()
    assert close(total, want)


@pytest.mark.parametrize(
    ("name", "change", "text"),
    [
        ("gate_up_proj", lambda t: t[:, 1:], r"expected .* \[5, 256, 64\], got int8 \[5, 255, 64\]"),
        ("down_proj", lambda t: t[:3], r"expected .* \[5, 128, 64\], got int8 \[3, 128, 64\]"),
        ("down_proj_scale_inv", lambda t: t.float(), r"expected uint8 or float8_e8m0fnu .*, got float32"),
        ("gate_up_proj_scale_inv", None, "no such tensor"),
        ("gate_up_proj", lambda t: t.bfloat16(), r"got bfloat16 \[5, 256, 64\]"),
    ],
)
def test_experts_in_one_tensor_that_do_not_fit(name: str, change: Any, text: str) -> None:
    name = f"model.layers.{LAYER}.mlp.experts.{name}"
    tensors = stacked()
    tensor = tensors.pop(name)
    if change is not None:
        tensors[name] = change(tensor)
    layer = Nvfp4MoE(EXPERTS, HIDDEN, INNER, top_k=TOP_K)
    with pytest.raises(CheckpointError, match=f"state dict: {name}: .*{text}"):
        layer.prepare_weights_from_checkpoint(tensors, LAYER)


@pytest.mark.parametrize("scheme", ["nvfp4 of modelopt", "nvfp4 of compressed-tensors"])
def test_static_scales_of_activations(scheme: str) -> None:
    """The largest of the experts that live here; kept as they were if there are none, or by request."""
    whole = Nvfp4MoE(EXPERTS, HIDDEN, INNER, top_k=TOP_K, activations="nvfp4")
    whole.prepare_weights_from_checkpoint(checkpoint(scheme), LAYER)
    assert float(whole.l1_activation_scale) == pytest.approx(20 / 2688, rel=1e-6)
    assert float(whole.l2_activation_scale) == pytest.approx(20 / 2688, rel=1e-6)
    same = Nvfp4MoE(EXPERTS, HIDDEN, INNER, top_k=TOP_K, activations="nvfp4")
    same.prepare_weights_from_stacked(*random_layer(True))  # type: ignore[arg-type]
    same.set_activation_global_scales(20 / 2688, 20 / 2688)
    difference = whole.run(*routed(6)).double() - same.run(*routed(6)).double()
    # A reciprocal's last bit may turn a code at a midpoint.
    assert float(difference.norm() / same.run(*routed(6)).double().norm()) < 0.1

    rank = Nvfp4MoE(1, HIDDEN, INNER, top_k=TOP_K, experts_start_idx=2, total_experts=EXPERTS, activations="nvfp4")
    rank.prepare_weights_from_checkpoint(checkpoint(scheme), LAYER)
    assert float(rank.l1_activation_scale) == pytest.approx(input_scale(2, 1), rel=1e-6)
    assert float(rank.l2_activation_scale) == pytest.approx(input_scale(2, 2), rel=1e-6)

    without = {name: tensor for name, tensor in checkpoint(scheme).items() if "input" not in name}
    for source, options in ((without, {}), (checkpoint(scheme), {"activation_scales": False})):
        same.set_activation_global_scales(0.5, 0.25)
        same.prepare_weights_from_checkpoint(source, LAYER, **options)
        assert (float(same.l1_activation_scale), float(same.l2_activation_scale)) == (0.5, 0.25)


@pytest.mark.parametrize(
    ("scheme", "part", "value", "text"),
    [
        ("nvfp4 of modelopt", "weight_scale_2", torch.tensor(float("nan")), "finite number of at least 0, got nan"),
        ("nvfp4 of modelopt", "weight_scale_2", torch.tensor(float("inf")), "finite number of at least 0, got inf"),
        ("nvfp4 of modelopt", "weight_scale_2", torch.tensor(-1.0), r"finite number of at least 0, got -1\.0"),
        ("nvfp4 of modelopt", "weight_scale_2", torch.ones(2), r"expected float32 \[1\], got float32 \[2\]"),
        (
            "nvfp4 of modelopt",
            "weight_scale_2",
            torch.ones((), dtype=torch.float64),
            r"expected float32 \[\], got float64",
        ),
        ("nvfp4 of modelopt", "weight_scale_2", None, "no such tensor"),
        ("nvfp4 of modelopt", "input_scale", torch.tensor(0.0), "above 0 .*activation_scales=False.*, got 0.0"),
        ("nvfp4 of modelopt", "input_scale", None, "no such tensor"),
        ("nvfp4 of compressed-tensors", "weight_global_scale", torch.zeros(1), "finite number above 0, got 0.0"),
        ("nvfp4 of compressed-tensors", "input_global_scale", torch.tensor([float("inf")]), "above 0 .*, got inf"),
    ],
)
def test_numbers_that_cannot_be(scheme: str, part: str, value: torch.Tensor | None, text: str) -> None:
    name = f"layers.{LAYER}.ffn.experts.3.w3.{part}"
    tensors = checkpoint(scheme)
    del tensors[name]
    layer = Nvfp4MoE(EXPERTS, HIDDEN, INNER, top_k=TOP_K, activations="nvfp4")
    layer.prepare_weights_from_stacked(*random_layer(True, 3))  # type: ignore[arg-type]
    before = layer.run(*routed(3))
    with pytest.raises(CheckpointError, match=f"state dict: {name.replace('.', '[.]')}: .*{text}"):
        layer.prepare_weights_from_checkpoint(tensors if value is None else tensors | {name: value}, LAYER)
    assert torch.equal(layer.run(*routed(3)), before)


@pytest.mark.parametrize(
    ("scheme", "activations", "text"),
    [
        ("models", "nvfp4", "expected NVFP4 weights for activations 'nvfp4', got MXFP4"),
        ("nvfp4 of modelopt", "mxfp8", "expected MXFP4 weights for activations 'mxfp8', got NVFP4"),
    ],
)
def test_another_format_than_activations_need(scheme: str, activations: str, text: str) -> None:
    layer = Nvfp4MoE(EXPERTS, HIDDEN, INNER, top_k=TOP_K, activations=activations)
    with pytest.raises(CheckpointError, match=text):
        layer.prepare_weights_from_checkpoint(checkpoint(scheme), LAYER)


def test_weights_that_are_not_fp4() -> None:
    tensors = {name: tensor for name, tensor in checkpoint("models").items() if name.endswith("weight")}
    layer = Nvfp4MoE(EXPERTS, HIDDEN, INNER, top_k=TOP_K)
    with pytest.raises(CheckpointError, match=r"experts\.0\.w1\.scale: no such tensor, nor any of .*no FP4 weights"):
        layer.prepare_weights_from_checkpoint(tensors, LAYER)
    tensors = checkpoint("models")
    name = f"layers.{LAYER}.ffn.experts.0.w1.weight"
    tensors[name] = tensors[name].repeat(1, 2).view(torch.float8_e4m3fn)
    with pytest.raises(
        CheckpointError, match=r"expected uint8 or int8 or .* \[128, 64\], got float8_e4m3fn \[128, 128\]"
    ):
        layer.prepare_weights_from_checkpoint(tensors, LAYER)


@pytest.mark.parametrize("scheme", ["models", "nvfp4 of modelopt"])
@pytest.mark.parametrize("from_file", [False, True])
def test_one_ranks_part_of_the_inner_width(scheme: str, from_file: bool, tmp_path: Path) -> None:
    """Each rank reads its rows of the gate and of up and its columns of down; the ranks' sum is the layer."""
    nvfp4 = scheme.startswith("nvfp4")
    save_file(checkpoint(scheme), tmp_path / "model.safetensors")
    source = tmp_path if from_file else checkpoint(scheme)
    total = torch.zeros(6, HIDDEN)
    for rank in range(2):
        layer = Nvfp4MoE(EXPERTS, HIDDEN, INNER // 2, top_k=TOP_K, tensor_parallel_rank=rank, tensor_parallel_size=2)
        layer.prepare_weights_from_checkpoint(source, LAYER)
        total += layer.run(*routed(6)).float()
    assert close(total, expected(random_layer(nvfp4), *routed(6), 10.0))


def test_a_part_is_read_where_it_lies() -> None:
    """Quarters, whose bytes are compared with the whole's: gate rows, up rows and down columns of each rank."""
    parts = parts_of(False)
    for rank in range(4):
        layer = Nvfp4MoE(
            EXPERTS, HIDDEN, 32, top_k=TOP_K, activations="mxfp8", tensor_parallel_rank=rank, tensor_parallel_size=4
        )
        layer.prepare_weights_from_checkpoint(checkpoint("models, torch's FP4"), LAYER)
        rows = slice(32 * rank, 32 * rank + 32)
        for e in range(EXPERTS):
            for half in range(2):
                place = slice(32 * half, 32 * half + 32)
                assert torch.equal(layer.l1_weight[e, place], parts[e, half][0][rows])
                assert torch.equal(layer.l1_scale[e, place], parts[e, half][1][rows])
            assert torch.equal(layer.l2_weight[e], parts[e, 2][0][:, 16 * rank : 16 * rank + 16])
            assert torch.equal(layer.l2_scale[e], parts[e, 2][1][:, rank : rank + 1])


def test_a_part_without_being_asked_for_one() -> None:
    layer = Nvfp4MoE(EXPERTS, HIDDEN, INNER // 2, top_k=TOP_K)
    with pytest.raises(
        CheckpointError, match=r"got int8 \[128, 64\]; .* tensor_parallel_rank and tensor_parallel_size"
    ):
        layer.prepare_weights_from_checkpoint(checkpoint("models"), LAYER)
    layer = Nvfp4MoE(EXPERTS, HIDDEN, INNER, top_k=TOP_K, tensor_parallel_size=2)
    with pytest.raises(CheckpointError, match=r"expected .* \[256, 64\], got int8 \[128, 64\]"):
        layer.prepare_weights_from_checkpoint(checkpoint("models"), LAYER)


def test_experts_of_a_rank() -> None:
    """Ids in the checkpoint count over all ranks."""
    layer = Nvfp4MoE(EXPERTS, HIDDEN, INNER, top_k=TOP_K, experts_start_idx=10, total_experts=20)
    layer.prepare_weights_from_checkpoint(checkpoint("models", first=10), LAYER)
    hidden, weights, ids = routed(6)
    assert close(layer.run(hidden, weights, ids + 10), expected(random_layer(False), hidden, weights, ids, 10.0))
