"""The gate's activation, with the constants and the result of csrc/device/activation.cuh."""

import cutlass
import cutlass.cute as cute
from cutlass import Float32

# Of sqrt_softplus: half of log2(e) and what float32 leaves of it; beyond FLAT, exp(-|x| / 2) is 0; below LINEAR,
# log(1 + e^x) is e^x to the last bit of float32; log(1 + u) is u times the polynomial of least relative error on
# [0, 1], coefficients from degree 9 down.
HALF_LOG2E = 0.72134752
HALF_LOG2E_REST = 9.6298149e-09
LN2 = 0.69314718
FLAT = 200.0
LINEAR = -17.0
LOG1P_OVER_U = (
    -0.0032440233,
    0.0198514536,
    -0.0569595173,
    0.106036536,
    -0.153055921,
    0.196759388,
    -0.249541342,
    0.333299637,
    -0.499999017,
    1.0,
)


@cute.jit
def sqrt_softplus(logit: Float32) -> Float32:
    """sqrt(log(1 + e^x)), as csrc/device/activation.cuh computes it, with the reasons. NaN stays NaN."""
    size = cute.math.abs(logit)
    if size > FLAT:
        size = Float32(FLAT)
    exponent = -size * HALF_LOG2E
    rest = cute.math.fma(-size, Float32(HALF_LOG2E), -exponent) - size * HALF_LOG2E_REST
    root = cute.math.exp2(exponent, fastmath=True)
    root = cute.math.fma(root * LN2, rest, root)
    u = root * root
    ratio = Float32(LOG1P_OVER_U[0])
    for coefficient in LOG1P_OVER_U[1:]:
        ratio = cute.math.fma(ratio, u, Float32(coefficient))
    softplus = cute.math.fma(ratio, u, cutlass.max(logit, Float32(0.0)))
    result = cute.math.sqrt(softplus, fastmath=True)
    if logit < LINEAR:
        result = root
    return result
