"""The ops of hyper-connections. Expected values: the mathematics in float64, written out in definitions.py or here."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from dsv4_kernels import InvalidArgumentError, Workspace
from dsv4_kernels.cases import is_poison, poison, same_bits
from dsv4_kernels.cases.mhc import definitions
from dsv4_kernels.cases.mhc.functions import random_projection, random_streams, random_update, random_weight
from dsv4_kernels.mhc import (
    hyper_connection_coefficients,
    hyper_connection_collapse,
    hyper_connection_head,
    hyper_connection_post,
    hyper_connection_post_pre,
    hyper_connection_pre,
    hyper_connection_workspace_size,
    mean_head,
)

from tests.emulated import emulated
from tests.launches import observed

COEFFICIENT_LIMIT = 1e-5


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def on(device: str, *tensors: torch.Tensor) -> list[torch.Tensor]:
    return [tensor.to(device) for tensor in tensors]


def seam_inputs(tokens: int, hidden: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """x, streams, post, comb, fn, base, scale."""
    g = generator(seed)
    return *random_update(g, tokens, hidden), *random_projection(g, hidden)


def test_transposed_comb_is_noticed(device: str) -> None:
    """The first index of comb is the old stream: here stream 0 goes to stream 3, half of stream 1 to stream 2."""
    streams = torch.arange(1.0, 5.0)[None, :, None].expand(1, 4, 8).to(torch.bfloat16).contiguous()
    comb, post = torch.zeros(1, 4, 4), torch.zeros(1, 4)
    comb[0, 0, 3], comb[0, 1, 2], post[0, 0] = 1.0, 0.5, 2.0
    x = torch.full((1, 8), 3.0, dtype=torch.bfloat16)
    new = hyper_connection_post(*on(device, x, streams, post, comb)).cpu()
    assert new[0, :, 0].tolist() == [6.0, 0.0, 1.0, 1.0]
    assert torch.equal(new, new[:, :, :1].expand_as(new))


def test_softmax_is_over_the_new_streams_and_columns_are_divided_last(device: str) -> None:
    """From base alone, as streams of zeros have products of zero: one value of the 16 stands out."""
    base = torch.zeros(24)
    base[8 + 1 * 4 + 2] = 3.0  # from stream 1 to stream 2
    streams, fn = torch.zeros(1, 4, 8, dtype=torch.bfloat16), torch.ones(24, 32)
    pre, post, comb = hyper_connection_coefficients(
        *on(device, streams, fn, base, torch.ones(3)), sinkhorn_iterations=1, hc_epsilon=1e-30
    )
    row = [math.exp(3.0 if k == 2 else 0.0) for k in range(4)]
    shares = [[value / sum(row) for value in row] if j == 1 else [0.25] * 4 for j in range(4)]
    columns = [sum(shares[j][k] for j in range(4)) for k in range(4)]
    expected = [[shares[j][k] / columns[k] for k in range(4)] for j in range(4)]
    torch.testing.assert_close(comb.cpu()[0], torch.tensor(expected), rtol=1e-6, atol=0)
    torch.testing.assert_close(pre.cpu(), torch.full((1, 4), 0.5), rtol=1e-6, atol=0)
    torch.testing.assert_close(post.cpu(), torch.full((1, 4), 1.0), rtol=1e-6, atol=0)


@pytest.mark.parametrize("factor", [1.0, 64.0])
def test_strong_logits(factor: float, device_of_each_kind: str) -> None:
    """Rows of comb are then far from summing to 1, which no test may require. Columns sum to 1 - hc_epsilon."""
    device = device_of_each_kind
    streams = random_streams(generator(1), 5, 64)
    fn, base, scale = random_projection(generator(2), 64)
    base, scale = base * factor, scale * factor
    results = hyper_connection_coefficients(*on(device, streams, fn, base, scale))
    exact = definitions.coefficients_of(streams, fn, base, scale, 1e-6, 1e-6, 2.0, 20)
    for got, expected in zip(results, exact, strict=True):
        # An error of a product is one of an exponent: as many times larger as the scale is.
        torch.testing.assert_close(got.cpu().double(), expected, rtol=COEFFICIENT_LIMIT * factor, atol=1e-30)
    torch.testing.assert_close(results[2].cpu().sum(1), torch.full((5, 4), 1.0), rtol=3e-6, atol=0)


@pytest.mark.parametrize("iterations", [1, 2, 50])
def test_iterations(iterations: int, device_of_each_kind: str) -> None:
    device = device_of_each_kind
    streams = random_streams(generator(3), 2, 8)
    fn, base, scale = random_projection(generator(4), 8)
    comb = hyper_connection_coefficients(
        *on(device, streams, fn, base, scale), hc_epsilon=1e-3, sinkhorn_iterations=iterations
    )[2]
    exact = definitions.coefficients_of(streams, fn, base, scale, 1e-6, 1e-3, 2.0, iterations)
    torch.testing.assert_close(comb.cpu().double(), exact.comb, rtol=COEFFICIENT_LIMIT, atol=0)


def test_projection_is_float32(device: str) -> None:
    """Weights of which two bfloat16 terms keep 1 of 1 + 2^-20: the products are what the third one makes of them."""
    hidden = 32
    streams = torch.ones(1, 4, hidden, dtype=torch.bfloat16)
    streams[0, 1:] = -1
    fn = torch.zeros(24, 4, hidden)
    fn[:, 0], fn[:, 1] = 1 + 2.0**-20, 1.0
    scale = torch.full((3,), 2.0**15)
    pre, _, _ = hyper_connection_coefficients(*on(device, streams, fn.flatten(1), torch.zeros(24), scale), epsilon=0.0)
    expected = 1 / (1 + math.exp(-hidden * 2.0**-20 * 2.0**15)) + 1e-6
    torch.testing.assert_close(pre.cpu(), torch.full((1, 4), expected), rtol=1e-6, atol=0)


@pytest.mark.parametrize("norm_unrounded", [False, True])
@pytest.mark.parametrize("weight_type", [torch.bfloat16, torch.float32])
def test_bits_of_collapse_and_norm(weight_type: torch.dtype, norm_unrounded: bool, device_of_each_kind: str) -> None:
    """With pre of few bits every product and sum is exact, so only the root may differ, in its last bits."""
    device = device_of_each_kind
    streams = random_streams(generator(5), 6, 520)
    weight = random_weight(generator(6), 520, weight_type)
    pre = torch.tensor([1.0, 0.5, -0.25, 2.0]).repeat(6, 1)
    exact = (pre.double()[:, :, None] * streams.double()).sum(1)
    u = exact.to(torch.bfloat16)
    assert same_bits(hyper_connection_collapse(*on(device, streams, pre)).cpu(), u)
    normed = hyper_connection_collapse(
        *on(device, streams, pre), norm_weight=weight.to(device), norm_unrounded=norm_unrounded
    ).cpu()
    squares = exact if norm_unrounded else u.double()
    root = (squares.square().mean(1, keepdim=True) + 1e-6).sqrt()
    expected = (weight.double() * (u.double() / root)).to(torch.bfloat16)
    assert (normed == expected).double().mean() > 0.995  # near a tie float32 may fall to the other side
    torch.testing.assert_close(normed.double(), expected.double(), rtol=2.0**-7, atol=0)


def test_norm_unrounded(device_of_each_kind: str) -> None:
    """Values of 1 + 0.9 * 2^-8 in all columns round to 1: the root of their own mean square makes them less than 1."""
    device = device_of_each_kind
    streams = torch.zeros(1, 4, 64, dtype=torch.bfloat16)
    streams[0, 0], streams[0, 1] = 1.0, 0.9 * 2.0**-8
    pre = torch.tensor([[1.0, 1.0, 0.0, 0.0]])
    weight = torch.full((64,), 1 + 2.0**-7)  # between 1 and the next bfloat16 of its result
    for unrounded, expected in ((False, 1 + 2.0**-7), (True, 1 + 2.0**-7 - 2.0**-8)):
        normed = hyper_connection_collapse(
            *on(device, streams, pre), norm_weight=weight.to(device), epsilon=0.0, norm_unrounded=unrounded
        )
        exact = torch.tensor((1 + 2.0**-7) / (1 + float(streams[0, 1, 0]) if unrounded else 1.0))
        assert normed.cpu()[0, 0] == exact.to(torch.bfloat16)
        assert abs(float(exact) - expected) < 2.0**-9


@pytest.mark.parametrize("tokens", [1, 5])
def test_fused_seam_has_the_bits_of_its_parts(tokens: int, device: str) -> None:
    x, streams, post, comb, fn, base, scale = on(device, *seam_inputs(tokens, 104))
    weight = random_weight(generator(7), 104).to(device)
    fused = hyper_connection_post_pre(x, streams, post, comb, fn, base, scale, norm_weight=weight)
    new = hyper_connection_post(x, streams, post, comb)
    parts = hyper_connection_pre(new, fn, base, scale, norm_weight=weight)
    assert all(same_bits(a, b) for a, b in zip(fused, (new, *parts), strict=True))
    coefficients = hyper_connection_coefficients(new, fn, base, scale)
    assert all(same_bits(a, b) for a, b in zip(fused[2:], coefficients, strict=True))


def test_delayed_form(device_of_each_kind: str) -> None:
    """The input comes from pre_in; pre is still an output; (1, 0, 0, 0) takes stream 0 as it is."""
    device = device_of_each_kind
    x, streams, post, comb, fn, base, scale = on(device, *seam_inputs(3, 72))
    first = torch.tensor([1.0, 0.0, 0.0, 0.0], device=device).repeat(3, 1)
    layer_input, *coefficients = hyper_connection_pre(streams, fn, base, scale, pre_in=first)
    assert same_bits(layer_input, streams[:, 0].contiguous())
    own = hyper_connection_pre(streams, fn, base, scale)
    assert all(same_bits(a, b) for a, b in zip(coefficients, own[1:], strict=True))
    new, later, *_ = hyper_connection_post_pre(x, streams, post, comb, fn, base, scale, pre_in=own[1])
    assert same_bits(later, hyper_connection_collapse(new, own[1]))


def test_mean_head(device_of_each_kind: str) -> None:
    device = device_of_each_kind
    streams = random_streams(generator(8), 4, 264)
    mean = mean_head(streams.to(device)).cpu()
    assert same_bits(mean, streams.double().mean(1).to(torch.bfloat16))
    weight = random_weight(generator(9), 264)
    normed = mean_head(streams.to(device), norm_weight=weight.to(device))
    expected = hyper_connection_collapse(
        streams.to(device), torch.full((4, 4), 0.25, device=device), norm_weight=weight.to(device), epsilon=1e-5
    )
    assert same_bits(normed, expected)


@pytest.mark.parametrize(
    ("where", "bad"),
    [
        ("x", math.nan),
        ("streams", math.nan),
        ("post", math.nan),
        ("comb", math.nan),
        ("streams", math.inf),
        ("x", 3e38),
    ],
)
def test_what_is_not_finite_stays_in_its_token(where: str, bad: float, device_of_each_kind: str) -> None:
    device = device_of_each_kind
    inputs = dict(zip(("x", "streams", "post", "comb", "fn", "base", "scale"), seam_inputs(9, 40), strict=True))
    weight = random_weight(generator(10), 40)
    good = hyper_connection_post_pre(*on(device, *inputs.values()), norm_weight=weight.to(device))
    inputs[where] = inputs[where].clone()
    inputs[where][4] = bad
    results = hyper_connection_post_pre(*on(device, *inputs.values()), norm_weight=weight.to(device))
    others = [token for token in range(9) if token != 4]
    for got, expected in zip(results, good, strict=True):
        assert same_bits(got[others].cpu(), expected[others].cpu())
    if math.isnan(bad):
        assert all(result[4].isnan().any() for result in results)


def test_streams_of_zero_with_the_smallest_epsilon(device_of_each_kind: str) -> None:
    """As in a padded token of V4.1: zero times 1e10 is zero, and the coefficients are those of base."""
    device = device_of_each_kind
    fn, base, scale = random_projection(generator(11), 64)
    streams = torch.zeros(2, 4, 64, dtype=torch.bfloat16)
    weight = random_weight(generator(12), 64)
    layer_input, pre, post, _ = hyper_connection_pre(
        *on(device, streams, fn, base, scale), norm_weight=weight.to(device), epsilon=1e-20
    )
    assert torch.equal(layer_input.cpu(), torch.zeros(2, 64, dtype=torch.bfloat16))
    torch.testing.assert_close(pre.cpu()[0], torch.sigmoid(base[:4]) + 1e-6, rtol=1e-6, atol=0)
    torch.testing.assert_close(post.cpu()[1], 2 * torch.sigmoid(base[4:8]), rtol=1e-6, atol=0)


def test_no_tokens(device_of_each_kind: str) -> None:
    device = device_of_each_kind
    inputs = on(device, *seam_inputs(0, 16))
    results = hyper_connection_post_pre(*inputs)
    assert [tuple(t.shape) for t in results] == [(0, 4, 16), (0, 16), (0, 4), (0, 4), (0, 4, 4)]
    assert hyper_connection_collapse(inputs[1]).shape == (0, 16)
    assert hyper_connection_head(inputs[1], inputs[4][:4].contiguous(), inputs[5][:4], inputs[6][:1]).shape == (0, 16)


@pytest.mark.parametrize(
    ("architecture", "tokens", "hidden"),
    [
        ("sm_90a", 3, 40),
        ("sm_90a", 29, 40),
        ("sm_90a", 2059, 8),  # two pairs of launches
        ("sm_90a", 139, 1064),  # slices of two units, of which the last has a quarter of one
        pytest.param("sm_100a", 139, 1064, marks=pytest.mark.thorough),
        pytest.param("sm_120a", 139, 1064, marks=pytest.mark.thorough),
        # Shared memory holds no more than a unit: 129 slices, up to five of which are a sum.
        pytest.param("sm_120a", 130, 4104, marks=pytest.mark.thorough),
    ],
)
def test_same_bits_in_every_batch(architecture: str, tokens: int, hidden: int) -> None:
    """The schedules for up to 128 tokens and for more, against a call with one token."""
    inputs = seam_inputs(tokens, hidden)
    weight = random_weight(generator(13), hidden)
    with emulated(architecture):
        batch = hyper_connection_post_pre(*inputs, norm_weight=weight)
        alone = hyper_connection_post_pre(*(t[-2:-1] for t in inputs[:4]), *inputs[4:], norm_weight=weight)
    assert all(same_bits(a[-2:-1], b) for a, b in zip(batch, alone, strict=True))


@pytest.mark.parametrize("tokens", [3, 130])
def test_workspace_is_zero_again(tokens: int, device_of_each_kind: str) -> None:
    """Also behind a token whose sums are NaN."""
    size = hyper_connection_workspace_size(tokens, 40)
    assert size == tokens * 2 * 128  # a row of 32 floats per token and 32 columns
    workspace = Workspace(device_of_each_kind, size)
    inputs = on(device_of_each_kind, *seam_inputs(tokens, 40))
    inputs[1][1] = math.nan
    streams, fn, base, scale = inputs[1], *inputs[4:]
    hyper_connection_post_pre(*inputs, workspace=workspace)
    hyper_connection_pre(streams, fn, base, scale, workspace=workspace)
    hyper_connection_coefficients(streams, fn, base, scale, workspace=workspace)
    hyper_connection_head(streams, fn[:4].contiguous(), base[:4], scale[:1], workspace=workspace)
    assert not workspace.tensor.any()


@pytest.mark.gpu
@pytest.mark.parametrize("hidden", [4096, 5120, 7168])
def test_same_bits_in_every_batch_of_a_device(hidden: int) -> None:
    x, streams, post, comb, *seam = on("cuda", *seam_inputs(1000, hidden))
    batch = hyper_connection_post_pre(x, streams, post, comb, *seam)
    for first, tokens in ((0, 1), (7, 1), (8, 5), (100, 64), (300, 130), (500, 400)):
        part = slice(first, first + tokens)
        alone = hyper_connection_post_pre(x[part], streams[part], post[part], comb[part], *seam)
        assert all(same_bits(a[part], b) for a, b in zip(batch, alone, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [16, 64, 512, 8192])
@pytest.mark.parametrize("hidden", [4096, 5120, 7168])
def test_batches_of_a_device(hidden: int, tokens: int) -> None:
    """Batches that the emulator has no time for: every 61st token of each against float64."""
    x, streams, post, comb, fn, base, scale = seam_inputs(tokens, hidden, seed=tokens)
    weight = random_weight(generator(14), hidden)
    given = on("cuda", x, streams, post, comb, fn, base, scale)
    new, layer_input, *coefficients = (
        t[::61].cpu() for t in hyper_connection_post_pre(*given, norm_weight=weight.to("cuda"))
    )
    part = (x[::61], streams[::61], post[::61], comb[::61])
    assert definitions.updated(*part).error_of(new) <= 1
    exact = definitions.coefficients_of(new, fn, base, scale, 1e-6, 1e-6, 2.0, 20)
    for got, expected in zip(coefficients, exact, strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=COEFFICIENT_LIMIT, atol=0)
    n = definitions.normed(definitions.collapsed(new, exact.pre), weight, 1e-6)
    assert n.error_of(layer_input, 2) <= 1
    head = hyper_connection_head(given[1], given[4][:4], given[5][:4], given[6][:1], norm_weight=weight.to("cuda"))
    pre = definitions.head_pre_of(part[1], fn[:4], base[:4], scale[:1], 1e-6, 1e-6)
    n = definitions.normed(definitions.collapsed(part[1], pre), weight, 1e-6)
    assert n.error_of(head[::61].cpu(), 2) <= 1
    alone = hyper_connection_post(*given[:4])
    assert same_bits(alone[::61].cpu(), new)


def test_strided_tokens_and_streams(device_of_each_kind: str) -> None:
    device = device_of_each_kind
    x, streams, post, comb, fn, base, scale = on(device, *seam_inputs(5, 64))
    expected = hyper_connection_post_pre(x, streams, post, comb, fn, base, scale)
    wide = torch.full((5, 6, 80), math.nan, dtype=torch.bfloat16, device=device)
    wide[:, 1:5, 8:72] = streams
    wide_x = torch.full((5, 96), math.nan, dtype=torch.bfloat16, device=device)
    wide_x[:, 16:80] = x
    out = poison(torch.empty(5, 5, 72, dtype=torch.bfloat16, device=device))
    results = hyper_connection_post_pre(
        wide_x[:, 16:80], wide[:, 1:5, 8:72], post, comb, fn, base, scale, out_streams=out[:, :4, :64]
    )
    assert all(same_bits(a.contiguous(), b) for a, b in zip(results, expected, strict=True))
    assert is_poison(out[:, 4].contiguous()).all()
    assert is_poison(out[:, :, 64:].contiguous()).all()


def test_in_place(device: str) -> None:
    """out_streams may be streams itself, in both ops that write streams, with more tokens than a cluster takes."""
    inputs = on(device, *seam_inputs(19, 24))
    expected = hyper_connection_post_pre(*inputs)
    streams = inputs[1].clone()
    results = hyper_connection_post_pre(inputs[0], streams, *inputs[2:], out_streams=streams)
    assert all(same_bits(a, b) for a, b in zip(results, expected, strict=True))
    streams = inputs[1].clone()
    hyper_connection_post(inputs[0], streams, *inputs[2:4], out_streams=streams)
    assert same_bits(streams, expected[0])


def test_outputs_may_not_share_memory_with_x(device_of_each_kind: str) -> None:
    device = device_of_each_kind
    x, streams, post, comb, fn, base, scale = on(device, *seam_inputs(4, 16))
    with pytest.raises(InvalidArgumentError, match="out_layer_input: expected memory that no other argument uses"):
        hyper_connection_post_pre(x, streams, post, comb, fn, base, scale, out_layer_input=x)
    with pytest.raises(InvalidArgumentError, match="out_streams: expected memory that no other argument uses"):
        hyper_connection_post(streams[:, 0], streams, post, comb, out_streams=streams)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"hidden": 12}, "hidden (columns of a stream): expected a multiple of 8, got 12"),
        ({"hidden": 8200}, "hidden (columns of a stream): expected 8 to 8192, got 8200"),
        ({"fn": (24, 60)}, "fn: expected shape [24, 64], got [24, 60]"),
        ({"fn": (4, 64)}, "fn: expected shape [24, 64], got [4, 64]"),
        ({"base": (25,)}, "base: expected shape [24], got [25]"),
        ({"scale": (1,)}, "scale: expected shape [3], got [1]"),
        ({"hc_epsilon": 0.0}, "hc_epsilon: expected a finite number of at least 1.17549e-38, got 0"),
        ({"epsilon": -1.0}, "epsilon: expected a finite number of at least 0, got -1"),
        ({"sinkhorn_iterations": 0}, "sinkhorn_iterations: expected 1 to 1000, got 0"),
        ({"pre_in": torch.zeros(3, 4)}, "pre_in: expected shape [2, 4], got [3, 4]"),
        ({"norm_weight": torch.zeros(8)}, "norm_weight: expected shape [16], got [8]"),
    ],
    ids=str,
)
def test_refuses_what_is_outside_its_range(change: dict[str, Any], text: str) -> None:
    """hidden is checked, never assumed: another library's kernel for 4096 columns took 7168 and corrupted memory."""
    options: dict[str, Any] = dict(change)
    hidden = options.pop("hidden", 16)
    shapes = {"fn": (24, 4 * hidden), "base": (24,), "scale": (3,)}
    tensors = [torch.zeros(options.pop(name, shape)) for name, shape in shapes.items()]
    with pytest.raises(InvalidArgumentError) as raised:
        hyper_connection_pre(torch.zeros(2, 4, hidden, dtype=torch.bfloat16), *tensors, **options)
    assert str(raised.value) == f"hyper_connection_pre: {text}"


@pytest.mark.parametrize(
    ("tokens", "hidden", "projection", "finish", "pairs"),
    [
        (1, 4096, ((128, 1), 128), (1, 544), 1),
        (64, 4096, ((128, 4), 64), (64, 544), 1),  # two sets of warps: more blocks
        (64, 7168, ((224, 2), 128), (64, 480), 1),
        (129, 4096, ((32, 4), 512), (33, 288), 1),
        (8192, 4096, ((32, 4), 512), (512, 288), 4),
        (8192, 7168, ((32, 4), 448), (512, 480), 4),
    ],
)
def test_schedule(
    tokens: int,
    hidden: int,
    projection: tuple[tuple[int, int], int],
    finish: tuple[int, int],
    pairs: int,
) -> None:
    """Grid and threads of both kernels: few tokens spread fn over the device, many share what a block holds of it."""
    streams = torch.empty(tokens, 4, hidden, dtype=torch.bfloat16)
    with observed("sm_90a", multiprocessors=132) as launches:
        hyper_connection_pre(streams, torch.zeros(24, 4 * hidden), torch.zeros(24), torch.zeros(3))
    (columns, ranges), project_threads = projection
    blocks, finish_threads = finish
    expected = [((columns, ranges, 1), project_threads), ((blocks, 1, 1), finish_threads)] * pairs
    assert [(launch.grid, launch.block[0]) for launch in launches] == expected
