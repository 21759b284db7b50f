"""The kernel's half of a launch, for Triton kernels; csrc/core/launch.h says what it is for."""

from __future__ import annotations

import triton
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def await_previous_grid():
    """First in every kernel: waits until what came before is complete, then lets the next kernel start."""
    gdc_wait()
    gdc_launch_dependents()
