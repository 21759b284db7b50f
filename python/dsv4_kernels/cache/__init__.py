"""The compressed key-value cache: state, compression, quantised entries in pages."""

from dsv4_kernels import torch_ops
from dsv4_kernels.cache import functions
from dsv4_kernels.cache.compress_flush import compress_flush, unpack_entries
from dsv4_kernels.cache.flush import append_and_flush, maybe_flush_csa, maybe_flush_hca
from dsv4_kernels.cache.functions import *
from dsv4_kernels.cache.page_layouts import PAGE_LAYOUTS, PageLayout
from dsv4_kernels.cache.prepare import (
    BlockAllocator,
    BlockError,
    OutOfBlocksError,
    Request,
    prepare_forward,
    release,
)
from dsv4_kernels.cache.rope import Rope, rope_frequencies, rope_table
from dsv4_kernels.cache.schema import AttentionType, LayerCacheSchema
from dsv4_kernels.cache.state import CacheHandle, CacheState, PagedCache
from dsv4_kernels.cache.uniform import UniformCache

torch_ops.register_family("cache")

__all__ = [
    "PAGE_LAYOUTS",
    "AttentionType",
    "BlockAllocator",
    "BlockError",
    "CacheHandle",
    "CacheState",
    "LayerCacheSchema",
    "OutOfBlocksError",
    "PageLayout",
    "PagedCache",
    "Request",
    "Rope",
    "UniformCache",
    "append_and_flush",
    "compress_flush",
    "maybe_flush_csa",
    "maybe_flush_hca",
    "prepare_forward",
    "release",
    "rope_frequencies",
    "rope_table",
    "unpack_entries",
]
__all__ += functions.__all__
