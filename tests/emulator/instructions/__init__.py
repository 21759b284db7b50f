"""The instructions, one module per group. Importing this package fills the tables in `registry`."""

from . import (
    async_copy,
    atomics,
    barriers,
    bits,
    comparison,
    control_flow,
    conversion,
    floating,
    integer,
    load_store,
    matrix,
    mbarrier,
    move,
    tcgen05,
    warp,
    wgmma,
)

__all__ = [
    "async_copy",
    "atomics",
    "barriers",
    "bits",
    "comparison",
    "control_flow",
    "conversion",
    "floating",
    "integer",
    "load_store",
    "matrix",
    "mbarrier",
    "move",
    "tcgen05",
    "warp",
    "wgmma",
]
