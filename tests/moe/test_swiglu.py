"""SwiGLU as csrc/device/swiglu.cuh and aot/moe/device/swiglu.py have it: how accurate it is, and that both agree."""

from __future__ import annotations

import pytest
import torch
from dsv4_kernels.moe import padded_swiglu, quantize_mx, swiglu_and_quantize_mxfp8
from torch import Tensor

# Of silu where it is a normal float32: docs/decisions/0026-one-swiglu.md. Three roundings of the product come on top.
ERROR = 2.0**-17 + 3 * 2.0**-24


def everyone(rows: int, device: str) -> tuple[Tensor, Tensor]:
    """permutation_map and n_used where every row holds a token."""
    return (
        torch.arange(rows, dtype=torch.int32, device=device),
        torch.tensor(rows, dtype=torch.int32, device=device),
    )


def every_gate(below: float) -> Tensor:
    """[128, -1] bfloat16, columns a multiple of 32: every finite value from -92 up to `below`, and ones to fill up."""
    gates = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    gates = gates[gates.isfinite() & (gates >= -92) & (gates < below)]
    return torch.cat((gates, torch.ones(-gates.numel() % 4096, dtype=torch.bfloat16))).reshape(128, -1)


def nearest(value: Tensor) -> Tensor:
    """float64 to the nearest bfloat16, ties to even, in one rounding and for normal results."""
    mantissa, exponent = torch.frexp(value)
    return torch.ldexp((mantissa * 256).round(), exponent - 8)


def test_every_gate_is_within_the_bound(device: str) -> None:
    """Each result is what a value within ERROR of the exact one rounds to."""
    gates = every_gate(below=1e30)
    ups = 1 + torch.rand(gates.shape, generator=torch.Generator().manual_seed(5))
    x = torch.cat((gates, ups.to(torch.bfloat16)), dim=1)
    got = padded_swiglu(x.to(device), *everyone(128, device)).cpu().to(torch.float64)
    gate, up = x.to(torch.float64).chunk(2, dim=1)
    exact = gate / (1 + torch.exp(-gate)) * up
    normal = exact.abs() >= 2.0**-125
    assert int(normal.sum()) > 30000
    one, other = nearest(exact * (1 - ERROR)), nearest(exact * (1 + ERROR))
    outside = (got < torch.minimum(one, other)) | (got > torch.maximum(one, other))
    assert not outside[normal].any()


@pytest.mark.parametrize("limit", [None, 10.0])
def test_cuda_and_triton_have_the_same_bits(limit: float | None, device: str) -> None:
    """quantize_mx is CUDA C++, swiglu_and_quantize_mxfp8 Triton; with gates that are no numbers too."""
    gates = every_gate(below=1000.0)
    gates[5, 7], gates[6, 40], gates[7, 100] = torch.nan, torch.inf, -torch.inf
    ups = torch.randn(gates.shape, generator=torch.Generator().manual_seed(6)).to(torch.bfloat16)
    x = torch.cat((gates, ups), dim=1).to(device)
    cuda = quantize_mx(x, source="swiglu", limit=limit, swizzle=True)
    triton = swiglu_and_quantize_mxfp8(x, *everyone(128, device), limit)
    for one, other in zip(cuda, (triton.data, triton.scale), strict=True):
        assert torch.equal(one.view(torch.uint8).cpu(), other.view(torch.uint8).cpu())
