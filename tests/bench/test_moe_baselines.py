"""What whole layers are compared with computes the same."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from dsv4_kernels.presets import PRESETS

from tests.bench.moe_layers import random_weights


@pytest.mark.parametrize("nvfp4", [False, True])
@pytest.mark.parametrize("baseline", ["loop", "grouped_mm"])
def test_baseline_computes_the_layer(baseline: str, nvfp4: bool) -> None:
    torch.manual_seed(3)
    sizes = dataclasses.replace(PRESETS["v4-flash"], experts=6, hidden_size=128, expert_intermediate=64, top_k=2)
    weights = random_weights(sizes, nvfp4, "cpu")
    hidden = torch.randn(9, 128).to(torch.bfloat16)
    routing = torch.rand(9, 2)
    ids = torch.rand(9, 6).topk(2).indices.to(torch.int32)
    expected = weights.layer("bfloat16", 2).run(hidden, routing, ids).double()
    got = getattr(weights.in_bfloat16(), baseline)(hidden, routing, ids).double()
    assert float(expected.norm()) > 0
    assert float((got - expected).norm() / expected.norm()) < 1e-2
