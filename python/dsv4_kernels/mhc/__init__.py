"""Hyper-connections (mHC): the residual connection with four streams, and the norm ahead of each sublayer."""

from dsv4_kernels import torch_ops
from dsv4_kernels.mhc import functions
from dsv4_kernels.mhc.functions import *
from dsv4_kernels.mhc.hyper_connection import HyperConnection, SeamState, round_projection
from dsv4_kernels.mhc.presets import HYPER_CONNECTIONS, HyperConnectionPreset

torch_ops.register_family("mhc")

__all__ = ["HYPER_CONNECTIONS", "HyperConnection", "HyperConnectionPreset", "SeamState", "round_projection"]
__all__ += functions.__all__
