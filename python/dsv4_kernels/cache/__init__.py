"""The compressed key-value cache: state, compression, quantised entries in pages."""

from dsv4_kernels import torch_ops
from dsv4_kernels.cache.functions import csa_compress_tail
from dsv4_kernels.cache.schema import AttentionType, LayerCacheSchema

torch_ops.register()

__all__ = [
    "AttentionType",
    "LayerCacheSchema",
    "csa_compress_tail",
]
