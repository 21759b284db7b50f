"""The public DeepSeek-V4 models' sizes, as far as this package computes with them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from dsv4_kernels.errors import InvalidArgumentError

T = TypeVar("T")


@dataclass(frozen=True)
class Preset:
    """One model.

    hidden_size: width of the residual stream. experts: routed experts. top_k: experts per token.
    expert_intermediate: inner width of an expert. hash_layers: how many of the first layers route by table.
    routed_scaling: factor on the routing weights. compress_ratios: tokens per entry of the compressed cache, for each
    layer and behind them for each block of multi-token prediction; 0 for a window alone. vocab_size: token ids.
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


# Blocks of multi-token prediction: one in the first releases of V4, three in V4-Flash-0731 and in V4.1. All of them
# attend to a window alone.
PRESETS = {
    preset.name: preset
    for preset in (
        Preset("v4-flash", 4096, 43, 256, 6, 2048, 3, 1.5, (0, 0, *(4, 128) * 20, 4, *(0,) * 3)),
        Preset("v4-pro", 7168, 61, 384, 6, 3072, 3, 2.5, (128, 128, *(4, 128) * 29, 4, 0)),
        Preset("v41-flash", 5120, 40, 384, 6, 2304, 0, 1.5, (0,) * 2 + (2,) * 18 + (1,) * 20 + (0,) * 3),
    )
}


def find_sizes(module: str, preset: str | T, kind: type[T], by_name: Mapping[str, T]) -> T:
    """A public model's sizes of one kind by its name; sizes of one's own are passed through.

    Args:
        module: whose argument it is, for the error's text.
        preset: name or sizes.
        kind: of the sizes.
        by_name: the public models'.

    Raises:
        InvalidArgumentError: naming the presets there are.
    """
    if isinstance(preset, kind):
        return preset
    if not isinstance(preset, str) or preset not in by_name:
        raise InvalidArgumentError(f"{module}: preset: expected one of {', '.join(by_name)}, got {preset!r}")
    return by_name[preset]


def find_preset(module: str, preset: str | Preset) -> Preset:
    """A model of PRESETS; see find_sizes."""
    return find_sizes(module, preset, Preset, PRESETS)
