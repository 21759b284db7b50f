"""The module, against a layer of two sublayers in float64, as the models' published code has it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from dsv4_kernels import InvalidArgumentError
from dsv4_kernels.cases import same_bits
from dsv4_kernels.checkpoint import CheckpointError
from dsv4_kernels.mhc import (
    HYPER_CONNECTIONS,
    HyperConnection,
    HyperConnectionPreset,
    hyper_connection_collapse,
    hyper_connection_head,
    mean_head,
    round_projection,
)
from safetensors.torch import save_file
from torch import Tensor

HIDDEN = 64
SMALL = HyperConnectionPreset("small", HIDDEN, 2, 1e-6, False, "projection")
SMALL_DELAYED = HyperConnectionPreset("small, delayed", HIDDEN, 2, 1e-20, True, "last")


def layer_tensors(seed: int, form: str = "official") -> dict[str, Tensor]:
    """A layer's tensors, by the models' names or by those that transformers saves."""
    g = torch.Generator().manual_seed(seed)
    tensors = {}
    for sublayer, norm in (("attn", "input_layernorm"), ("ffn", "post_attention_layernorm")):
        prefix = f"layers.0.hc_{sublayer}_" if form == "official" else f"model.layers.0.{sublayer}_hc."
        tensors[f"{prefix}fn"] = torch.randn(24, 4 * HIDDEN, generator=g) * (4 * HIDDEN) ** -0.5
        tensors[f"{prefix}base"] = torch.randn(24, generator=g)
        tensors[f"{prefix}scale"] = 0.5 + torch.rand(3, generator=g)
        name = f"layers.0.{sublayer}_norm.weight" if form == "official" else f"model.layers.0.{norm}.weight"
        tensors[name] = (1 + 0.2 * torch.randn(HIDDEN, generator=g)).to(torch.bfloat16)
    return tensors


def sublayers(seed: int) -> tuple[Tensor, Tensor]:
    """Two matrices in the place of attention and experts."""
    g = torch.Generator().manual_seed(seed)
    first, second = torch.randn(2, HIDDEN, HIDDEN, generator=g, dtype=torch.float64) * HIDDEN**-0.5
    return first, second


def random_streams(tokens: int, seed: int = 0) -> Tensor:
    return torch.randn(tokens, 4, HIDDEN, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)


class Oracle:
    """One sublayer's connection in float64 without roundings, from the formulas of the published code."""

    def __init__(self, tensors: dict[str, Tensor], sublayer: str, epsilon: float) -> None:
        of = {name: tensor.double() for name, tensor in tensors.items()}
        prefix = f"layers.0.hc_{sublayer}_"
        self.fn, self.base, self.scale = (of[prefix + name] for name in ("fn", "base", "scale"))
        self.weight, self.epsilon = of[f"layers.0.{sublayer}_norm.weight"], epsilon

    def coefficients(self, streams: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        flat = streams.reshape(len(streams), -1)
        mixes = torch.nn.functional.linear(flat, self.fn) / (flat.pow(2).mean(1, keepdim=True) + self.epsilon).sqrt()
        scale = self.scale.repeat_interleave(torch.tensor([4, 4, 16]))
        mixes = mixes * scale + self.base
        pre, post = mixes[:, :4].sigmoid() + 1e-6, 2 * mixes[:, 4:8].sigmoid()
        comb = mixes[:, 8:].reshape(-1, 4, 4).softmax(-1) + 1e-6
        comb = comb / (comb.sum(-2, keepdim=True) + 1e-6)
        for _ in range(19):
            comb = comb / (comb.sum(-1, keepdim=True) + 1e-6)
            comb = comb / (comb.sum(-2, keepdim=True) + 1e-6)
        return pre, post, comb

    def norm(self, streams: Tensor, pre: Tensor) -> Tensor:
        u = torch.einsum("tj,tjh->th", pre, streams)
        return self.weight * u / (u.pow(2).mean(1, keepdim=True) + self.epsilon).sqrt()


def oracle_layer(
    tensors: dict[str, Tensor], streams: Tensor, pre_in: Tensor | None, epsilon: float
) -> tuple[Tensor, Tensor]:
    """The streams behind a layer, and the pre of its last sublayer."""
    streams = streams.double()
    for sublayer, matrix in zip(("attn", "ffn"), sublayers(5), strict=True):
        oracle = Oracle(tensors, sublayer, epsilon)
        pre, post, comb = oracle.coefficients(streams)
        y = oracle.norm(streams, pre if pre_in is None else pre_in) @ matrix.T
        streams = post[:, :, None] * y[:, None] + torch.einsum("tjk,tjh->tkh", comb, streams)
        pre_in = None if pre_in is None else pre
    return streams, pre


def connections(tensors: dict[str, Tensor], preset: HyperConnectionPreset, device: str) -> list[HyperConnection]:
    return [
        HyperConnection.from_checkpoint(tensors, 0, sublayer, preset, device=device) for sublayer in ("attn", "ffn")
    ]


def as_sublayer(matrix: Tensor) -> Any:
    return lambda x: (x.double() @ matrix.T.to(x.device)).to(torch.bfloat16)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("preset", [SMALL, SMALL_DELAYED], ids=lambda preset: preset.name)
def test_a_layer(preset: HyperConnectionPreset, fused: bool, device_of_each_kind: str) -> None:
    device = device_of_each_kind
    tensors, streams = layer_tensors(1), random_streams(6)
    attention, experts = connections(tensors, preset, device)
    first, second = (as_sublayer(matrix) for matrix in sublayers(5))
    pre_in = attention.first_pre(6) if preset.delayed else None
    if fused:
        state, layer_input = attention.pre(streams.to(device), pre_in)
        state, layer_input = experts.post_pre(first(layer_input), state)
        results = experts.post(second(layer_input), state), state.pre
    else:
        between, pre = attention(streams.to(device), first, pre_in)
        results = experts(between, second, pre if preset.delayed else None)
    of_oracle = attention.first_pre(6).cpu().double() if preset.delayed else None
    exact = oracle_layer(tensors, streams, of_oracle, preset.epsilon)
    # Five roundings to bfloat16 on the way: of the streams twice, the inputs, the sublayers' outputs.
    error = (results[0].cpu().double() - exact[0]).norm() / exact[0].norm()
    assert error < 5 * 2.0**-9
    torch.testing.assert_close(results[1].cpu().double(), exact[1], rtol=2e-2, atol=0)


def test_coefficients_beside_the_sublayer(device_of_each_kind: str) -> None:
    """The delayed form in two ops, as an engine with two streams runs it, has the bits of the one."""
    device = device_of_each_kind
    attention, experts = connections(layer_tensors(2), SMALL_DELAYED, device)
    streams = random_streams(3).to(device)
    state, layer_input = attention.pre(streams, attention.first_pre(3))
    apart = attention.coefficients(streams)
    assert all(same_bits(a, b) for a, b in zip(state, apart, strict=True))
    assert attention.collapse(streams, attention.first_pre(3)).shape == layer_input.shape
    y = layer_input.clone()
    streams = attention.post(y, state)
    fused, _ = experts.post_pre(y, state)
    assert all(same_bits(a, b) for a, b in zip(fused, experts.coefficients(streams), strict=True))


def test_in_place(device_of_each_kind: str) -> None:
    device = device_of_each_kind
    attention, experts = connections(layer_tensors(3), SMALL, device)
    streams = random_streams(4).to(device)
    state, layer_input = attention.pre(streams)
    expected = attention.post(layer_input, state)
    kept, _ = experts.post_pre(layer_input, state)
    assert kept.streams.data_ptr() != streams.data_ptr()
    again, _ = experts.post_pre(layer_input, state._replace(streams=streams.clone()), in_place=True)
    assert same_bits(again.streams, kept.streams)
    assert attention.post(layer_input, state, in_place=True).data_ptr() == streams.data_ptr()
    assert same_bits(streams, expected)


def test_heads_of_the_models(device_of_each_kind: str) -> None:
    """What stands behind the last layer: a projection in V4, the last pre in V4.1, the mean in GLM."""
    device = device_of_each_kind
    heads = {name: preset.head for name, preset in HYPER_CONNECTIONS.items()}
    assert heads == {"v4-flash": "projection", "v4-pro": "projection", "v41-flash": "last", "glm-5.3-flash": "mean"}
    streams = random_streams(2).to(device)
    fn, base, scale = torch.zeros(4, 4 * HIDDEN), torch.zeros(4), torch.ones(1)
    half = hyper_connection_head(streams, *(t.to(device) for t in (fn, base, scale)))
    exact = (0.5 + 1e-6) * streams.cpu().double().sum(1)
    assert (half.cpu().double() - exact).abs().max() < 2.0**-8 * exact.abs().max()
    assert same_bits(hyper_connection_collapse(streams), mean_head(streams))


def test_sizes_of_the_models() -> None:
    """As their configurations have them."""
    sizes = {p.name: (p.hidden_size, p.layers, p.epsilon, p.delayed) for p in HYPER_CONNECTIONS.values()}
    assert sizes == {
        "v4-flash": (4096, 43, 1e-6, False),
        "v4-pro": (7168, 61, 1e-6, False),
        "v41-flash": (5120, 40, 1e-20, True),
        "glm-5.3-flash": (4096, 45, 1e-5, False),
    }
    constants = {(p.hc_epsilon, p.post_factor, p.sinkhorn_iterations) for p in HYPER_CONNECTIONS.values()}
    assert constants == {(1e-6, 2.0, 20)}


def test_names_of_both_kinds_of_checkpoints(tmp_path: Path) -> None:
    official, transformers = layer_tensors(4), layer_tensors(4, "transformers")
    save_file(transformers, tmp_path / "model.safetensors")
    for sublayer in ("attn", "ffn"):
        a = HyperConnection.from_checkpoint(official, 0, sublayer, SMALL)
        b = HyperConnection.from_checkpoint(tmp_path, 0, sublayer, SMALL)
        assert torch.equal(a.fn, official[f"layers.0.hc_{sublayer}_fn"])
        assert a.norm_weight is not None
        assert torch.equal(a.norm_weight, official[f"layers.0.{sublayer}_norm.weight"].float())
        assert a.state_dict().keys() == {"fn", "base", "scale", "norm_weight"}
        assert all(torch.equal(value, b.state_dict()[name]) for name, value in a.state_dict().items())
    # SGLang's modules have the models' names beside transformers' norms.
    sglang = {name.replace(".ffn_norm.", ".post_attention_layernorm."): tensor for name, tensor in official.items()}
    mixed = HyperConnection.from_checkpoint(sglang, 0, "ffn", SMALL)
    assert all(torch.equal(value, mixed.state_dict()[name]) for name, value in a.state_dict().items())
    without = HyperConnection.from_checkpoint(official, 0, "attn", SMALL, norm=False)
    assert without.norm_weight is None


def test_checkpoints_that_do_not_fit() -> None:
    tensors = layer_tensors(6)
    with pytest.raises(CheckpointError, match=r"hc_attn_fn: expected float32 \[24, 16384\], got float32 \[24, 256\]"):
        HyperConnection.from_checkpoint(tensors, 0, "attn", "v4-flash")
    with pytest.raises(CheckpointError, match=r"layers.1.hc_attn_fn: no such tensor"):
        HyperConnection.from_checkpoint(tensors, 1, "attn", SMALL)
    with pytest.raises(InvalidArgumentError, match="sublayer: expected 'attn' or 'ffn', got 'mlp'"):
        HyperConnection.from_checkpoint(tensors, 0, "mlp", SMALL)
    with pytest.raises(
        InvalidArgumentError, match=r"preset: expected one of v4-flash, v4-pro, v41-flash, glm-5\.3-flash"
    ):
        HyperConnection.from_preset("v5")
    with pytest.raises(CheckpointError, match=r"fn: expected float32 \[24, 256\], got bfloat16 \[24, 256\]"):
        HyperConnection.from_preset(SMALL).load_state_dict({"fn": torch.zeros(24, 256, dtype=torch.bfloat16)})


def test_casts_keep_dtypes() -> None:
    connection = HyperConnection.from_preset(SMALL).to(torch.bfloat16)
    assert {parameter.dtype for parameter in connection.parameters()} == {torch.float32}


def test_delayed_form_needs_a_pre() -> None:
    connection = HyperConnection.from_preset(SMALL_DELAYED)
    with pytest.raises(
        InvalidArgumentError, match="pre_in: expected the pre of the sublayer before in the delayed form"
    ):
        connection.pre(random_streams(1))


def test_rounded_projections() -> None:
    """TF32 has 10 bits of fraction, bfloat16 7."""
    fn = torch.tensor(
        [1 + 2.0**-10, 1 + 2.0**-11, 1 + 2.0**-11 + 2.0**-20, -1 - 2.0**-11, 1 + 2.0**-7, 1 + 2.0**-8 + 2.0**-20]
    )
    inexact = 1 + 2.0**-10
    assert torch.equal(round_projection(fn, "float32"), fn)
    assert round_projection(fn, "tf32").tolist() == [inexact, 1, 1, -1, 1 + 2.0**-7, 1 + 2.0**-8]
    assert round_projection(fn, "tf32_rounded").tolist() == [
        inexact,
        inexact,
        inexact,
        -inexact,
        1 + 2.0**-7,
        1 + 2.0**-8,
    ]
    assert round_projection(fn, "bfloat16").tolist() == [1, 1, 1, -1, 1 + 2.0**-7, 1 + 2.0**-7]
    with pytest.raises(InvalidArgumentError, match="projection: expected one of float32, tf32, tf32_rounded, bfloat16"):
        round_projection(fn, "fp8")
