"""Paged stash of activations: rows whose number only the device knows, in pages that the device allocates."""

from dsv4_kernels import torch_ops
from dsv4_kernels._native import paged_stash_workspace_size
from dsv4_kernels.stash.functions import paged_stash_copy, paged_stash_pop

torch_ops.register()

__all__ = ["paged_stash_copy", "paged_stash_pop", "paged_stash_workspace_size"]
