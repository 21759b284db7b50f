"""Paged stash of activations: rows whose number only the device knows, in pages that the device allocates."""

from dsv4_kernels import torch_ops
from dsv4_kernels._native import paged_stash_workspace_size
from dsv4_kernels.stash import functions
from dsv4_kernels.stash.functions import *
from dsv4_kernels.stash.paged_stash import PagedStash, PoolReport, PoolSize, StashHandle, StashReport, pages_for
from dsv4_kernels.stash.saved import SavedActivations

torch_ops.register_family("stash")

__all__ = [
    "PagedStash",
    "PoolReport",
    "PoolSize",
    "SavedActivations",
    "StashHandle",
    "StashReport",
    "paged_stash_workspace_size",
    "pages_for",
]
__all__ += functions.__all__
