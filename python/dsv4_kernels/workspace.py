"""Workspace: memory that ops compute in, with an owner.

Some ops need zeroed memory besides their outputs, and leave it zeroed. Where none is given the library lends its own: a
piece for each stream, and for each stream of a captured graph (dsv4_workspace() in csrc/include/dsv4/dsv4.h).
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4_kernels import _native
from dsv4_kernels.errors import InvalidArgumentError

# What the largest dense_router_decode needs; quantize_nvfp4_gpu_fused does with 8 bytes more than 4 an expert.
_SIZE = _native.dense_router_decode_workspace_size(64, 512)


class Workspace:
    """Memory for any op that takes a `workspace`, one call after another, on one stream at a time.

        workspace = Workspace("cuda")
        weights, ids = dense_router_decode(hidden, weight, bias, k, workspace=workspace)

    For callers that want to own the memory that ops use: one for all layers of a model that run one after the other, or
    for all graphs that are replayed one after the other. Calls that may run at the same time (on two streams, or in a
    graph that is replayed beside others) need one each; that is the caller's to see to.

    Under torch.compile(mode="reduce-overhead") its address counts as fixed, as a parameter's does.

    Args:
        device: of the tensors of the calls.
        size: bytes. The default is enough for every call but quantize_nvfp4_gpu_fused with over half a million experts
            and hyper-connections, which need up to 8 MiB (hyper_connection_workspace_size); a call that needs more
            than there is makes it grow.

    Raises:
        InvalidArgumentError: while a CUDA graph is being captured, whose memory it would be.
    """

    def __init__(self, device: torch.device | str, size: int = _SIZE) -> None:
        if type(size) is not int or size < 1:
            raise InvalidArgumentError(f"Workspace: size: expected a number of bytes from 1, got {size!r}")
        self._outgrown: list[Tensor] = []
        self._tensor = _zeros(torch.device(device), size)

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self._tensor.device

    @property
    def tensor(self) -> Tensor:
        """The memory: [size] uint8, zero between calls."""
        return self._tensor

    def reserve(self, size: int) -> Tensor:
        """The memory, at least `size` bytes of it. Functions call this: a call that needs more gets more.

        Graphs that were captured with the memory from before keep it.

        Raises:
            InvalidArgumentError: more is needed while a CUDA graph is being captured.
        """
        if self._tensor.numel() < size:
            grown = _zeros(self.device, size)
            self._outgrown.append(self._tensor)
            self._tensor = grown
        return self._tensor

    def __repr__(self) -> str:
        return f"Workspace({str(self.device)!r}, size={self._tensor.numel()})"


def _zeros(device: torch.device, size: int) -> Tensor:
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise InvalidArgumentError(
            f"Workspace: size: expected memory allocated before the capture, got {size} bytes to allocate in it; "
            f"make Workspace({str(device)!r}, size={size}) before"
        )
    with torch.inference_mode(False):  # calls inside and outside of it take the memory
        tensor = torch.zeros(size, dtype=torch.uint8, device=device)
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()  # whichever stream uses it first finds zeros
    # What torch._dynamo.mark_static_address() does, without loading the compiler.
    tensor._dynamo_static_input_type = "unguarded"  # type: ignore[attr-defined]
    return tensor
