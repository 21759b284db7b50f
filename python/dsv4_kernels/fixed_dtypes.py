"""Modules whose tensors have the dtypes that kernels take."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class FixedDtypes(torch.nn.Module):
    """A module that casting moves, as .to(device, dtype) does, but whose tensors keep their dtypes."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> torch.nn.Module:
        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(keep_dtype, recurse)  # type: ignore[no-untyped-call]
        return self
