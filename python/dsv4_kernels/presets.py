"""The public DeepSeek-V4 models' sizes, as far as this package computes with them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Preset:
    """One model.

    hidden_size: width of the residual stream. experts: routed experts. top_k: experts a token.
    expert_intermediate: inner width of an expert. hash_layers: how many of the first layers route by table.
    routed_scaling: factor on the routing weights. compress_ratios: tokens an entry of the compressed cache, a layer; 0
    for layers that attend to a window alone. vocab_size: token ids.
    """

    name: str
    hidden_size: int
    layers: int
    experts: int
    top_k: int
    expert_intermediate: int
    hash_layers: int
    routed_scaling: float
    compress_ratios: tuple[int, ...]
    vocab_size: int = 129280


PRESETS = {
    preset.name: preset
    for preset in (
        Preset("v4-flash", 4096, 43, 256, 6, 2048, 3, 1.5, (0, 0, *(4, 128) * 20, 4)),
        Preset("v4-pro", 7168, 61, 384, 6, 3072, 3, 2.5, (128, 128, *(4, 128) * 29, 4)),
        Preset("v41-flash", 5120, 40, 384, 6, 2304, 0, 1.5, (0,) * 2 + (2,) * 18 + (1,) * 20),
    )
}
