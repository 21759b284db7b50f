"""Cases of the mixture-of-experts ops."""

from __future__ import annotations

from dsv4_kernels.moe import activation_cases, grouped_gemm_cases, layout_cases, quantize_cases, routing_cases

CASES = (
    *activation_cases.CASES,
    *routing_cases.CASES,
    *grouped_gemm_cases.CASES,
    *layout_cases.CASES,
    *quantize_cases.CASES,
)
