"""Programmatic dependent launch in Triton kernels: what await_previous_grid() of csrc/core/launch.h is in CUDA C++."""

from __future__ import annotations

import triton
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def await_previous_grid():
    """First in every kernel: waits until what came before is complete, then lets the next kernel start."""
    gdc_wait()
    gdc_launch_dependents()
