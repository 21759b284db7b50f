"""Rotary tables against the formula in numpy, and frequencies against transformers' own."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from dsv4_kernels import InvalidArgumentError
from dsv4_kernels.cache import Rope, rope_frequencies, rope_table
from transformers.models.deepseek_v4.configuration_deepseek_v4 import DeepseekV4Config
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4RotaryEmbedding

YARN = {"rope_type": "yarn", "factor": 16, "original_max_position_embeddings": 65536, "beta_fast": 32, "beta_slow": 1}


def exact_frequencies(theta: float, factor: float) -> list[float]:
    """In float64, one pair after another: pairs that turn more than 32 times within 65536 positions stay, pairs that
    turn less than once are divided; in between linearly in the pair's number, between whole numbers.
    """
    found = []
    bounds = [64 * math.log(65536 / (2 * math.pi * turns)) / (2 * math.log(theta)) for turns in (32, 1)]
    low, high = math.floor(bounds[0]), math.ceil(bounds[1])
    for pair in range(32):
        frequency = theta ** (-2 * pair / 64)
        ramp = min(max((pair - low) / (high - low), 0), 1) if factor != 1 else 0
        found.append(frequency * (1 - ramp) + frequency / factor * ramp)
    return found


@pytest.mark.parametrize("preset", ["v4-flash", "v4-pro", "v41-flash"])
@pytest.mark.parametrize("compressed", [False, True])
def test_frequencies(preset: str, compressed: bool) -> None:
    given = rope_frequencies(preset, compressed=compressed)
    exact = exact_frequencies(160000.0, 16.0) if compressed else exact_frequencies(10000.0, 1.0)
    assert given.dtype == torch.float32
    np.testing.assert_allclose(given.numpy(), exact, rtol=3e-7)
    own = DeepseekV4RotaryEmbedding(DeepseekV4Config(num_hidden_layers=1, rope_parameters=YARN))
    np.testing.assert_allclose(given.numpy(), own.compress_inv_freq if compressed else own.main_inv_freq, rtol=3e-7)


def test_ramp_lies_on_pairs_15_to_25() -> None:
    plain, ramped = rope_frequencies(Rope(160000.0)), rope_frequencies("v4-flash")
    ratio = (plain / ramped).tolist()
    assert ratio[:16] == [1.0] * 16
    assert 1 < ratio[16] < ratio[24] < 16
    assert ratio[25:] == pytest.approx([16.0] * 7, rel=1e-6)


@pytest.mark.parametrize("where", [[0, 1, 127], [65535, 999_999, 1_048_575]])
def test_angles_are_rounded_to_float32(where: list[int]) -> None:
    table = rope_table("v4-flash", torch.tensor(where))
    frequencies = rope_frequencies("v4-flash").numpy()
    for row, position in zip(table.numpy(), where, strict=True):
        angles = (np.float32(position) * frequencies).astype(np.float64)
        assert np.array_equal(row[:32], np.cos(angles).astype(np.float32))
        assert np.array_equal(row[32:], np.sin(angles).astype(np.float32))
    if where[0]:  # and that matters at long positions
        unrounded = np.cos(np.float64(where[-1]) * frequencies.astype(np.float64))
        assert np.abs(table[-1, :32].numpy() - unrounded).max() > 1e-3


def test_forms_hold_the_same_numbers() -> None:
    halves = rope_table("v4-pro", 100)
    assert torch.equal(rope_table(rope_frequencies("v4-pro"), torch.arange(100)), halves)
    assert torch.equal(rope_table("v4-pro", 100, form="interleaved")[:, 0::2], halves[:, :32])
    assert torch.equal(rope_table("v4-pro", 100, form="interleaved")[:, 1::2], halves[:, 32:])
    assert torch.equal(rope_table("v4-pro", 100, form="complex"), torch.complex(halves[:, :32], halves[:, 32:]))
    assert rope_table("v4-pro", 0).shape == (0, 64)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("v5", 4), "rope_frequencies: preset: expected one of v4-flash, v4-pro, v41-flash, got 'v5'"),
        (("v4-pro", -1), "rope_table: positions: expected an int, 0 or more, got -1"),
        (
            ("v4-pro", torch.zeros(2)),
            r"rope_table: positions: expected a number, or integers \[positions\], got float32",
        ),
    ],
)
def test_refusals(arguments: tuple[object, ...], text: str) -> None:
    with pytest.raises(InvalidArgumentError, match=text):
        rope_table(*arguments)


def test_an_unknown_form_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="form: expected one of halves, interleaved, complex, got 'packed'"):
        rope_table("v4-pro", 4, form="packed")
