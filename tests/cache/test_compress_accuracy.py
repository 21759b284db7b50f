"""How near entries are to the mathematics in float64, where the rotation cancels, beside float32 as an engine computes.

What an entry's rotary channels are made of is known to float32's accuracy, or to bfloat16's where the models round in
between. A rotation that cancels leaves that error and little else: many bfloat16 steps of the small result. So the
accuracy that compress_flush guarantees is relative to what was rotated.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from tests.cache import compress_oracle as oracle
from tests.cache.compress_engine import Engine
from tests.cache.compress_oracle import ROPE, Array

# Of what is rotated: float32's error of the sums over rows and of the norm, and two roundings to bfloat16 of half a
# step, 2^-8 at most, and what they change in the norm.
FLOAT32, EACH_STEP = 2.0**-20, 3 * 2.0**-8


@dataclass
class Rows:
    """The rows of some blocks: values and scores [entries, rows, channels], and the norm's weight."""

    values: Array
    scores: Array
    weight: Array

    def normed(self) -> Array:
        """In float64."""
        entries = oracle.compress(self.values, self.scores)
        return entries / np.sqrt((entries**2).mean(axis=1, keepdims=True) + 1e-6) * self.weight

    def signless(self) -> Array:
        """The same with rows that do not cancel: what float32's error is relative to."""
        entries = oracle.compress(self.values, self.scores)
        scale = self.weight / np.sqrt((entries**2).mean(axis=1, keepdims=True) + 1e-6)
        return oracle.compress(np.abs(self.values), self.scores) * np.abs(scale)

    def in_float32(self, cos_sin: Array, round_once: bool) -> Array:
        """As an engine computes it: every operation in float32, rounded to bfloat16 where the models round."""

        def step(values: torch.Tensor) -> torch.Tensor:
            return values if round_once else values.to(torch.bfloat16).to(torch.float32)

        weights = torch.from_numpy(self.scores).softmax(dim=1)
        entries = step((weights * torch.from_numpy(self.values)).sum(dim=1))
        normed = entries * (entries.square().mean(dim=1, keepdim=True) + 1e-6).rsqrt() * torch.from_numpy(self.weight)
        return oracle.bf16(oracle.rope(step(normed).numpy(), cos_sin))


def rotated(normed: Array, cos_sin: Array) -> tuple[Array, Array]:
    """The last 64 channels in float64, and the sum of the two products' magnitudes."""
    even, odd = normed[:, -ROPE::2], normed[:, -ROPE + 1 :: 2]
    cosine, sine = (part.astype(np.float64) for part in np.split(cos_sin, 2, axis=1))
    pairs = np.stack((even * cosine - odd * sine, odd * cosine + even * sine), axis=2)
    size = np.stack((np.abs(even * cosine) + np.abs(odd * sine), np.abs(odd * cosine) + np.abs(even * sine)), axis=2)
    return pairs.reshape(len(normed), ROPE), size.reshape(len(normed), ROPE)


def cancelling(normed: Array, random: np.random.Generator) -> Array:
    """Cosines and sines by which one of each pair's two results all but cancels, to 2^-3 to 2^-14 of the pair."""
    even, odd = normed[:, -ROPE::2], normed[:, -ROPE + 1 :: 2]
    first = random.random(even.shape) < 0.5
    angle = np.where(first, np.arctan2(even, odd), np.arctan2(-odd, even))
    angle += np.exp2(random.uniform(-14, -3, even.shape))
    return np.concatenate((np.cos(angle), np.sin(angle)), axis=1).astype(np.float32)


@pytest.mark.parametrize("round_once", [True, False])
@pytest.mark.parametrize(
    ("name", "layout", "ratio"), [("CSA", "bf16", 4), ("HCA", "bf16", 128), ("indexer", "indexer_bf16", 4)]
)
def test_rotations_that_cancel(name: str, layout: str, ratio: int, round_once: bool, device: str) -> None:
    overlap = ratio == 4
    entries = 1568 if device == "cuda" else {"CSA": 40, "HCA": 6, "indexer": 80}[name]
    one = Engine(
        layout,
        ratio,
        overlap,
        device,
        slots=1,
        state_rows=2 * ratio,
        page_count=entries // 4 + 1,
        positions=entries * ratio,
        options={"round_once": round_once},
    )
    tokens = entries * ratio
    kv, score = one.normal(tokens, one.width), 3 * one.normal(tokens, one.width)
    biased = score + np.tile(one.ape, (entries, 1))
    d = one.width // (2 if overlap else 1)
    values, scores = (rows[:, -d:].reshape(entries, ratio, d) for rows in (kv, biased))
    if overlap:
        before = [rows[:, :d].reshape(entries, ratio, d)[:-1] for rows in (kv, biased)]
        none = np.zeros((1, ratio, d), np.float32)
        values = np.concatenate((np.concatenate((none, before[0])), values), axis=1)
        scores = np.concatenate((np.concatenate((none - np.inf, before[1])), scores), axis=1)
    rows = Rows(values, scores, one.weight)
    normed = rows.normed()
    one.cos_sin[::ratio] = cos_sin = cancelling(normed, one.random)
    one.constants[2] = one.to_device(one.cos_sin)
    one._expect = lambda growth: None  # type: ignore[method-assign]
    request = one.request(0)
    one.step([(request, tokens)], rows=(kv, score), check=False)
    got = one.read_bf16([one.slot_of(request, block) for block in range(entries)])

    exact, products = rotated(normed, cos_sin)
    assert (np.abs(exact) < 2.0**-5 * products).mean() > 0.3  # the case is what it is meant to be
    _, signless = rotated(rows.signless(), cos_sin)
    allowed = 2.0**-8 * np.abs(exact) + FLOAT32 * signless + (0 if round_once else EACH_STEP) * products
    assert (np.abs(got[:, -ROPE:] - exact) <= allowed).all()

    # Against float64 with the models' roundings, and beside float32: as many values fall on the other side.
    defined = oracle.finish(
        oracle.compress(values, scores), one.weight, cos_sin, 1e-6, hadamard=False, round_once=round_once
    )
    float32 = rows.in_float32(cos_sin, round_once)
    ours, theirs = (np.abs(found - defined)[:, -ROPE:] for found in (got, float32))
    assert (ours > 0).sum() <= 2 * (theirs > 0).sum() + 4 + ours.size // 1000
    assert np.sqrt((ours**2).mean()) <= 2 * np.sqrt((theirs**2).mean()) + 2.0**-12
    error = [np.sqrt((((found[:, -ROPE:] - exact) / products) ** 2).mean()) for found in (got, float32)]
    assert error[0] <= 1.05 * error[1]
