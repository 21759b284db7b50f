"""The public models' hyper-connections."""

from __future__ import annotations

from dataclasses import dataclass

from dsv4_kernels.presets import PRESETS, find_sizes


@dataclass(frozen=True)
class HyperConnectionPreset:
    """One model.

    hidden_size: columns of a stream. layers: with two seams each. epsilon: of the streams' root mean square and of the
    norms. delayed: whether a sublayer's input is collapsed with the pre of the sublayer before. head: how the streams
    are collapsed behind the last layer: "projection" (hyper_connection_head), "last" (with the pre of the last
    sublayer), or "mean" (mean_head).
    """

    name: str
    hidden_size: int
    layers: int
    epsilon: float
    delayed: bool
    head: str
    hc_epsilon: float = 1e-6
    post_factor: float = 2.0
    sinkhorn_iterations: int = 20


def _of(name: str, epsilon: float, delayed: bool, head: str) -> HyperConnectionPreset:
    sizes = PRESETS[name]
    return HyperConnectionPreset(name, sizes.hidden_size, sizes.layers, epsilon, delayed, head)


HYPER_CONNECTIONS = {
    preset.name: preset
    for preset in (
        _of("v4-flash", 1e-6, False, "projection"),
        _of("v4-pro", 1e-6, False, "projection"),
        _of("v41-flash", 1e-20, True, "last"),
        HyperConnectionPreset("glm-5.3-flash", 4096, 45, 1e-5, False, "mean"),
    )
}


def find_hyper_connection(module: str, preset: str | HyperConnectionPreset) -> HyperConnectionPreset:
    """A model of HYPER_CONNECTIONS; see find_sizes."""
    return find_sizes(module, preset, HyperConnectionPreset, HYPER_CONNECTIONS)
