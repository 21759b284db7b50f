"""Hyper-connections (mHC): the residual connection with four streams, and the norm ahead of each sublayer."""

from dsv4_kernels import torch_ops
from dsv4_kernels.mhc.functions import (
    hyper_connection_coefficients,
    hyper_connection_collapse,
    hyper_connection_head,
    hyper_connection_post,
    hyper_connection_post_pre,
    hyper_connection_pre,
    mean_head,
)
from dsv4_kernels.mhc.hyper_connection import HyperConnection, SeamState, round_projection
from dsv4_kernels.mhc.presets import HYPER_CONNECTIONS, HyperConnectionPreset

torch_ops.register_family("mhc")

__all__ = [
    "HYPER_CONNECTIONS",
    "HyperConnection",
    "HyperConnectionPreset",
    "SeamState",
    "hyper_connection_coefficients",
    "hyper_connection_collapse",
    "hyper_connection_head",
    "hyper_connection_post",
    "hyper_connection_post_pre",
    "hyper_connection_pre",
    "mean_head",
    "round_projection",
]
