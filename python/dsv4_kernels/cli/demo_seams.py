"""The demo's seams: where the streams of a layer meet attention and experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dsv4_kernels.cases import Verdict
from dsv4_kernels.cases.mhc.functions import BASELINES, random_projection, random_update, random_weight
from dsv4_kernels.mhc import HYPER_CONNECTIONS, HyperConnection, SeamState


@dataclass
class SeamStep:
    """The update with what one sublayer returned, and the input of the next."""

    layer: str
    connection: HyperConnection
    x: Tensor
    state: SeamState

    op = "hyper_connection_post_pre"
    kernels = op

    def run(self) -> tuple[SeamState, Tensor]:
        return self.connection.post_pre(self.x, self.state)

    def problem(self) -> tuple[Any, ...]:
        """The op's arguments."""
        of, state = self.connection, self.state
        pre_in = state.pre if of.delayed else None
        constants = of.epsilon, of.hc_epsilon, of.post_factor, of.sinkhorn_iterations, False
        update = self.x, state.streams, state.post, state.comb
        return *update, of.fn, of.base, of.scale, pre_in, of.norm_weight, *constants

    def verdict(self) -> Verdict:
        state, layer_input = self.run()
        results = state.streams, layer_input, state.pre, state.post, state.comb
        return BASELINES[self.op].verdict(self.problem(), results)

    def moved_bytes(self) -> int:
        return BASELINES[self.op].moved_bytes(*self.problem())


def random_connection(preset: str, device: str, generator: torch.Generator) -> HyperConnection:
    """A sublayer's, of the model's sizes."""
    connection = HyperConnection.from_preset(preset, device=device)
    fn, base, scale = random_projection(generator, connection.hidden_size)
    weight = random_weight(generator, connection.hidden_size)
    connection.load_state_dict({"fn": fn, "base": base, "scale": scale, "norm_weight": weight})
    return connection


def seam_behind_attention(preset: str, tokens: int, device: str, generator: torch.Generator) -> SeamStep:
    """Between attention, in whose place there is noise, and the experts."""
    x, streams, post, comb = random_update(generator, tokens, HYPER_CONNECTIONS[preset].hidden_size)
    pre = torch.rand(tokens, 4, generator=generator, dtype=torch.float32, device="cpu")
    state = SeamState(*(tensor.to(device) for tensor in (streams, pre, post, comb)))
    return SeamStep("attention to experts", random_connection(preset, device, generator), x.to(device), state)


def seam_behind_experts(preset: str, x: Tensor, state: SeamState, generator: torch.Generator) -> SeamStep:
    """Between the experts and the attention of the next layer."""
    return SeamStep("experts to attention", random_connection(preset, str(x.device), generator), x, state)
