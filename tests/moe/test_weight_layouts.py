"""Interleaving of gate and up, and K-major weights."""

from __future__ import annotations

import pytest
import torch
from dsv4_kernels.errors import InvalidArgumentError
from dsv4_kernels.moe import InterleavedWeights, deinterleave_l1_weights, interleave_l1_weights, make_b_k_major
from hypothesis import given, settings
from hypothesis import strategies as st

ONE_BYTE = [torch.uint8, torch.float8_e4m3fn, torch.float8_e8m0fnu, torch.float4_e2m1fn_x2]


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.uint8)


@pytest.mark.parametrize("granularity", [4, 8, 64])
def test_columns_of_gate_and_up_alternate(granularity: int) -> None:
    half = 3 * granularity
    names = torch.tensor([*range(half), *range(1000, 1000 + half)])  # gate columns, then up columns
    interleaved = interleave_l1_weights(names.expand(2, 5, -1), granularity=granularity)
    assert interleaved.granularity == granularity
    row = interleaved.data[1, 4].tolist()
    for block in range(3):
        start = 2 * granularity * block
        gate = list(range(granularity * block, granularity * (block + 1)))
        assert row[start : start + granularity] == gate
        assert row[start + granularity : start + 2 * granularity] == [1000 + column for column in gate]


@settings(deadline=None, max_examples=50)
@given(
    st.sampled_from([4, 8, 64]),
    st.integers(0, 4),
    st.integers(0, 3),
    st.integers(0, 5),
    st.sampled_from([*ONE_BYTE, torch.bfloat16, torch.float32]),
    st.sampled_from([-1, 0, 1, 2, -3]),
    st.integers(0, 2**31),
)
def test_deinterleave_inverts_interleave(
    granularity: int, blocks: int, experts: int, other: int, dtype: torch.dtype, dim: int, seed: int
) -> None:
    shape = [experts, other, other]
    shape[dim] = 2 * granularity * blocks
    weights = torch.randint(256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    weights = weights.view(dtype) if dtype in ONE_BYTE else weights.to(dtype)
    interleaved = interleave_l1_weights(weights, granularity=granularity, dim=dim)
    assert interleaved.data.dtype == dtype
    assert interleaved.data.shape == weights.shape
    for back in (
        deinterleave_l1_weights(interleaved),
        deinterleave_l1_weights(interleaved.data, granularity=granularity, dim=dim),
    ):
        assert back.dtype == dtype
        assert torch.equal(as_bytes(back.reshape(-1)), as_bytes(weights.reshape(-1)))


def test_packed_weights_and_scales_stay_together() -> None:
    """Interleaving the bytes of FP4 packed along K, and the scales along N, is interleaving the values."""
    generator = torch.Generator().manual_seed(3)
    experts, k, n = 2, 64, 32
    codes = torch.randint(16, (experts, k, n), generator=generator, dtype=torch.uint8)
    scales = torch.randint(120, 130, (experts, k // 32, n), generator=generator, dtype=torch.uint8)
    packed = codes[:, 0::2] | codes[:, 1::2] << 4

    def values(packed: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        unpacked = torch.stack((packed & 15, packed >> 4), dim=2).flatten(1, 2)
        return unpacked * torch.exp2(scales.to(torch.float64) - 127).repeat_interleave(32, dim=1)

    for granularity in (4, 8):
        weights, their_scales = (interleave_l1_weights(t, granularity=granularity).data for t in (packed, scales))
        expected = interleave_l1_weights(values(packed, scales), granularity=granularity).data
        assert torch.equal(values(weights, their_scales), expected)
        # In the checkpoint's order N comes before K.
        checkpoint = interleave_l1_weights(packed.transpose(1, 2), granularity=granularity, dim=1)
        assert torch.equal(checkpoint.data.transpose(1, 2), weights)


def test_granularity_is_not_forgotten() -> None:
    weights = torch.arange(128.0).expand(1, 2, -1)
    interleaved = interleave_l1_weights(weights, granularity=64)
    assert isinstance(interleaved, InterleavedWeights)
    with pytest.raises(InvalidArgumentError, match="granularity: expected 64, with which they were interleaved, got 4"):
        deinterleave_l1_weights(interleaved, granularity=4)
    # A tensor alone does not know: 4, as the described system has it.
    assert torch.equal(deinterleave_l1_weights(interleave_l1_weights(weights).data), weights)
    assert not torch.equal(deinterleave_l1_weights(interleaved.data), weights)


@pytest.mark.parametrize(
    ("columns", "granularity", "dim", "text"),
    [
        (24, 8, -1, "weights: expected an N that is a multiple of 16, twice the granularity, got 24"),
        (24, 0, -1, "granularity: expected at least 1, got 0"),
        (24, 4, 2, r"dim: expected a dimension of shape \[3, 24\], got 2"),
    ],
)
def test_refusals(columns: int, granularity: int, dim: int, text: str) -> None:
    weights = torch.zeros(3, columns)
    with pytest.raises(InvalidArgumentError, match=f"interleave_l1_weights: {text}"):
        interleave_l1_weights(weights, granularity=granularity, dim=dim)
    with pytest.raises(InvalidArgumentError, match=f"deinterleave_l1_weights: {text}"):
        deinterleave_l1_weights(weights, granularity=granularity, dim=dim)


@pytest.mark.parametrize("dtype", [*ONE_BYTE, torch.bfloat16])
def test_make_b_k_major(dtype: torch.dtype) -> None:
    raw = torch.randint(256, (2, 6, 10), dtype=torch.uint8)
    b = raw.view(dtype) if dtype in ONE_BYTE else raw.to(dtype)
    major = make_b_k_major(b)
    assert major.shape == b.shape
    assert major.dtype == dtype
    assert major.stride() == (60, 1, 6)
    as_plain = (lambda t: t.view(torch.uint8)) if dtype in ONE_BYTE else (lambda t: t)
    assert torch.equal(as_plain(major), as_plain(b))
    assert make_b_k_major(major).data_ptr() == major.data_ptr()
    with pytest.raises(InvalidArgumentError, match=r"b: expected \[experts, K, N\], got shape \[6, 10\]"):
        make_b_k_major(raw[0])
