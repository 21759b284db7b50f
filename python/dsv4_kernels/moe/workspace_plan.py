"""A workspace cut into the tensors of one call."""

from __future__ import annotations

import math
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.compiler import is_compiling

from dsv4_kernels.errors import InvalidArgumentError

ALIGNMENT = 256  # of each piece, from the start of the workspace
BASE_ALIGNMENT = 16  # of the workspace itself: what the products need

# Shapes and dtypes of the pieces that a call writes, by their names in Memory.
Plan: TypeAlias = dict[str, tuple[tuple[int, ...], torch.dtype]]


class Memory(NamedTuple):
    """Where the launches of a layer write what they hand on. None: the op allocates it, or the call has no such thing.

    weighted: hidden times the routing weights. x, inner: what the products read, if not hidden itself; with scales
    where it is quantised. both: gate and up, where SwiGLU follows the product. rows: the second product's results.
    """

    tile_to_expert: Tensor | None = None
    tile_rows: Tensor | None = None
    row_to_slot: Tensor | None = None
    slot_to_row: Tensor | None = None
    counts: Tensor | None = None
    weighted: Tensor | None = None
    x: Tensor | None = None
    x_scale: Tensor | None = None
    both: Tensor | None = None
    inner: Tensor | None = None
    inner_scale: Tensor | None = None
    rows: Tensor | None = None


NO_MEMORY = Memory()


def _piece_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return math.prod(shape) * dtype.itemsize


def plan_bytes(plan: Plan) -> int:
    """Bytes of a workspace that holds the pieces, each from a multiple of ALIGNMENT on."""
    return sum(-(-_piece_bytes(*piece) // ALIGNMENT) * ALIGNMENT for piece in plan.values())


def carve(workspace: Tensor, plan: Plan) -> Memory:
    """The pieces as views of the workspace.

    Raises:
        InvalidArgumentError: one that is too small, no plain uint8 vector, or not aligned.
    """
    needed = plan_bytes(plan)
    if workspace.dtype != torch.uint8 or workspace.dim() != 1 or not workspace.is_contiguous():
        got = f"{str(workspace.dtype).removeprefix('torch.')} {list(workspace.shape)}"
        raise InvalidArgumentError(
            f"Nvfp4MoE: workspace: expected contiguous uint8 [bytes], got {got}; .view(-1).view(torch.uint8) makes one"
        )
    if workspace.shape[0] < needed:
        raise InvalidArgumentError(
            f"Nvfp4MoE: workspace: expected at least {needed} bytes, got {workspace.shape[0]}; workspace_bytes() and "
            "batched_workspace_bytes() say how many"
        )
    if not is_compiling() and workspace.storage_offset() % BASE_ALIGNMENT:  # a trace does not know it
        raise InvalidArgumentError(
            f"Nvfp4MoE: workspace: expected memory on a multiple of {BASE_ALIGNMENT} bytes, got offset "
            f"{workspace.storage_offset()} in its storage"
        )
    pieces, begin = {}, 0
    for name, (shape, dtype) in plan.items():
        size = _piece_bytes(shape, dtype)
        pieces[name] = workspace[begin : begin + size].view(dtype).view(shape)
        begin += -(-size // ALIGNMENT) * ALIGNMENT
    return Memory(**pieces)
