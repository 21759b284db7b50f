"""Activations over expert rows of which some are padding."""

from __future__ import annotations

from torch import Tensor

from dsv4_kernels.op_table import OPS

_padded_squared_relu = OPS["padded_squared_relu"]


def padded_squared_relu(x: Tensor, permutation_map: Tensor, n_used: Tensor, *, out: Tensor | None = None) -> Tensor:
    """max(x, 0)^2 in float32, stored as bfloat16, for the rows that hold a token.

    A row r is processed if r < n_used and permutation_map[r] >= 0; other rows of out are not written. The launch does
    not depend on n_used, so a captured CUDA graph follows its value.

    Args:
        x: [rows, columns] bfloat16, the output of the experts' first product; rows may be strided.
        permutation_map: [rows] int32, the token of each row, negative for padding.
        n_used: one int32 on the device, of rank 0 or 1; values outside [0, rows] act as the nearest end.
        out: [rows, columns] bfloat16 to write to; x itself is allowed.

    Returns:
        out. Rows that were not processed keep what they held; in an allocated out that is undefined. NaN stays NaN.
    """
    (result,) = _padded_squared_relu((x, permutation_map, n_used), (out,))
    return result
