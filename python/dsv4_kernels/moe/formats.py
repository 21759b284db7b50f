"""Numbers of the C interface that say what is quantised and to which format: the enums of csrc/include/dsv4/moe.h."""

from __future__ import annotations

PLAIN, DEINTERLEAVE, SWIGLU = range(3)  # dsv4_quantize_source
E4M3, E2M1 = range(2)  # dsv4_element_format
SCALE_E4M3, SCALE_E8M0, SCALE_FLOAT32 = range(3)  # dsv4_scale_format
