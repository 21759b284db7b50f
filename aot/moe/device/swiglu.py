"""SwiGLU in float32, with the bits of csrc/device/swiglu.cuh, which says how accurate it is and why."""

from __future__ import annotations

import triton
import triton.language as tl

SILU = tl.constexpr("""{
.reg .f32 t, u;
fma.rn.f32 t, $1, 0fBFB8AA3B, 0fC1000000;
ex2.approx.ftz.f32 t, t;
add.f32 t, t, 0f3B800000;
rcp.approx.ftz.f32 t, t;
mul.f32 u, $1, 0f3B800000;
mul.f32 $0, u, t;
}""")


@triton.jit
def swiglu(gate, up, limit):
    """silu(min(gate, limit)) * clamp(up, -limit, limit). Comparisons and not minimum(): NaN stays NaN."""
    gate = tl.where(gate > limit, limit, gate)
    up = tl.where(up > limit, limit, up)
    up = tl.where(up < -limit, -limit, up)
    return tl.inline_asm_elementwise(SILU, "=f,f", [gate], dtype=tl.float32, is_pure=True, pack=1) * up
