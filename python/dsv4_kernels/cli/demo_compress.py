"""The demo's fused way into the compressed cache: compress_flush for a CSA and an HCA layer, in decode and in prefill.

Decode brings the last token of a block for every request, so that all of them flush; prefill brings a prompt.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from dsv4_kernels.cache import AttentionType, LayerCacheSchema
from dsv4_kernels.cases import Case, Verdict
from dsv4_kernels.cases.cache.compress_flush import CSA, HCA, INDEXER, Layer, compress_flush_case
from dsv4_kernels.ops import OPS
from dsv4_kernels.presets import Preset


@dataclass(frozen=True)
class CompressStep:
    """One call of compress_flush for a layer."""

    layer: str
    case: Case
    arguments: tuple[Any, ...]

    op = kernels = "compress_flush"

    def run(self) -> None:
        """The call, again and again from the same positions."""
        OPS[self.op](self.arguments, ())

    def verdict(self) -> Verdict:
        """State, codes and scales of a call on copies, against float64."""
        return self.case.baseline.verdict(self.arguments, self.case.run(self.arguments))

    def moved_bytes(self) -> int:
        """Rows in, rows of the state that an entry needs, entries out."""
        return self.case.baseline.moved_bytes(*self.arguments)


def compress_steps(preset: Preset, requests: int, device: str, generator: torch.Generator) -> list[CompressStep]:
    """For the model's first layer of each kind, and for the indexer of the sparse one."""
    salt = int(torch.randint(2**31, (1,), generator=generator, device="cpu"))
    layers: dict[AttentionType, int] = {}
    for number in range(preset.layers):
        layers.setdefault(LayerCacheSchema.of_layer(preset, number).attention, number)
    steps = []
    for kind, number in sorted(layers.items(), key=lambda item: item[1]):
        for layer in _compressors(kind, preset.compress_ratios[number]):
            ratio = layer.ratio
            shapes = (("decode", (2 * ratio - 1,) * requests, (1,) * requests), ("prefill", (0,), (2 * ratio + 1,)))
            for name, starts, counts in shapes:
                case = compress_flush_case(name, layer, starts, counts)
                steps.append(CompressStep(f"{number} {layer.name} {name}", case, case.arguments(device, salt)))
    return steps


def _compressors(kind: AttentionType, ratio: int) -> tuple[Layer, ...]:
    """Of a layer; some models' layers have ratios of their own, and then no overlap."""
    if kind is AttentionType.SWA:
        return ()
    if kind is AttentionType.CSA:
        return CSA, INDEXER
    return (HCA if ratio == HCA.ratio else Layer("HCA", HCA.layout, ratio, False),)
