"""The hyper-connection of one sublayer as a module: holds its tensors, and runs what is ahead of it and behind it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from dsv4_kernels.checkpoint import HYPER_CONNECTIONS, SUBLAYER_NORMS, Checkpoint, Source, check_tensor, find_block
from dsv4_kernels.errors import InvalidArgumentError
from dsv4_kernels.fixed_dtypes import FixedDtypes
from dsv4_kernels.mhc.functions import (
    hyper_connection_coefficients,
    hyper_connection_collapse,
    hyper_connection_post,
    hyper_connection_post_pre,
    hyper_connection_pre,
)
from dsv4_kernels.mhc.presets import HyperConnectionPreset, find_hyper_connection

_ROWS, _SCALES = 24, 3

_PROJECTIONS = ("float32", "tf32", "tf32_rounded", "bfloat16")


class SeamState(NamedTuple):
    """What a sublayer's two halves share: streams [tokens, 4, hidden] bfloat16 as they are ahead of it, and the
    coefficients pre [tokens, 4], post [tokens, 4] and comb [tokens, 4, 4] float32 that belong to it.
    """

    streams: Tensor
    pre: Tensor
    post: Tensor
    comb: Tensor


def round_projection(fn: Tensor, projection: str) -> Tensor:
    """fn as engines that multiply it in another precision see it. bfloat16 streams are exact in each of them, so the
    products are those engines' once fn is rounded.

    Args:
        fn: float32.
        projection: "float32": as it is, which the models do. "tf32": the upper 19 bits, as tensor cores read float32
            (DeepGEMM, vLLM). "tf32_rounded": the nearest TF32 value, ties away from zero (TileKernels). "bfloat16": the
            nearest bfloat16 value.

    Returns:
        float32 of the same shape.
    """
    if projection not in _PROJECTIONS:
        names = ", ".join(_PROJECTIONS)
        raise InvalidArgumentError(f"round_projection: projection: expected one of {names}, got {projection!r}")
    if projection == "float32":
        return fn
    if projection == "bfloat16":
        return fn.to(torch.bfloat16).to(torch.float32)
    bits = fn.to(torch.float32).view(torch.int32)
    half = 0x1000 if projection == "tf32_rounded" else 0
    return torch.where(fn.isfinite(), ((bits + half) & -0x2000).view(torch.float32), fn)


class HyperConnection(FixedDtypes):
    """The hyper-connection around one sublayer of a model, with the sublayer's RMSNorm.

        state, layer_input = connection.pre(streams)
        streams = connection.post(attention(layer_input), state)

    and, with the update of one sublayer and the start of the next in one call:

        state, layer_input = attention_connection.pre(streams)
        state, layer_input = ffn_connection.post_pre(attention(layer_input), state)
        state, layer_input = next_attention_connection.post_pre(experts(layer_input), state)

    In the delayed form of DeepSeek-V4.1 a sublayer's input is collapsed with the pre of the one before: pre() takes
    pre_in, `first_pre` ahead of the first layer, and post_pre() finds it in the state.

    Parameters carry the models' dtypes: `fn` [24, 4 * hidden_size], `base` [24] and `scale` [3] float32, and
    `norm_weight` [hidden_size] float32, which a checkpoint may hold in bfloat16. Casting the module moves them and
    leaves their dtypes alone. For inference: none of them takes a gradient.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        epsilon: float,
        hc_epsilon: float = 1e-6,
        post_factor: float = 2.0,
        sinkhorn_iterations: int = 20,
        delayed: bool = False,
        norm: bool = True,
        device: torch.device | str | None = None,
    ) -> None:
        """A connection whose tensors are zero, the norm's ones, until a state dict is loaded.

        Args:
            hidden_size: columns of a stream, a multiple of 8 up to 8192.
            epsilon: of the root mean squares, the norm's too.
            hc_epsilon: in pre and in the Sinkhorn iterations.
            post_factor: of post.
            sinkhorn_iterations: 1 to 1000.
            delayed: whether the input is collapsed with the pre of the sublayer before.
            norm: whether the sublayer's norm is part of it.
            device: where the tensors live.
        """
        super().__init__()
        self.hidden_size, self.delayed = hidden_size, delayed
        self.epsilon, self.hc_epsilon, self.post_factor = float(epsilon), float(hc_epsilon), float(post_factor)
        self.sinkhorn_iterations = sinkhorn_iterations

        def parameter(*shape: int) -> Parameter:
            return Parameter(torch.zeros(shape, dtype=torch.float32, device=device), requires_grad=False)

        self.fn, self.base, self.scale = parameter(_ROWS, 4 * hidden_size), parameter(_ROWS), parameter(_SCALES)
        self.norm_weight: Parameter | None = None
        if norm:
            ones = torch.ones(hidden_size, dtype=torch.float32, device=device)
            self.norm_weight = Parameter(ones, requires_grad=False)

    @classmethod
    def from_preset(cls, preset: str | HyperConnectionPreset, **options: Any) -> HyperConnection:
        """A connection of a public model's sizes; tensors are zero.

        options: norm, device, and whatever differs from the preset.
        """
        sizes = find_hyper_connection("HyperConnection", preset)
        return cls(
            sizes.hidden_size,
            **{
                "epsilon": sizes.epsilon,
                "hc_epsilon": sizes.hc_epsilon,
                "post_factor": sizes.post_factor,
                "sinkhorn_iterations": sizes.sinkhorn_iterations,
                "delayed": sizes.delayed,
                **options,
            },
        )

    @classmethod
    def from_checkpoint(
        cls,
        path: Source,
        layer: int | str,
        sublayer: str,
        preset: str | HyperConnectionPreset,
        *,
        projection: str = "float32",
        **options: Any,
    ) -> HyperConnection:
        """The connection around a sublayer of a safetensors checkpoint, with its norm.

        Args:
            path: a .safetensors file, a folder with one or with shards and their index, or the tensors by name.
            layer: N, for `layers.N` or `model.layers.N`; or the name of the block, such as "mtp.0".
            sublayer: "attn" or "ffn".
            preset: the model, by name or by its sizes.
            projection: the precision that another engine multiplies fn in; see round_projection.
            options: norm, device, and whatever differs from the preset.

        Raises:
            CheckpointError: naming file and tensor, what was expected and what there is.
        """
        if sublayer not in HYPER_CONNECTIONS:
            raise InvalidArgumentError(f"HyperConnection: sublayer: expected 'attn' or 'ffn', got {sublayer!r}")
        connection = cls.from_preset(preset, **options)
        float32 = (torch.float32,)
        with Checkpoint(path) as tensors:
            prefix, ending = find_block(tensors, layer, tuple(f"{name}fn" for name in HYPER_CONNECTIONS[sublayer]))
            name = prefix + ending.removesuffix("fn")
            read: dict[str, Tensor] = {
                key: tensors.read(name + key, tuple(getattr(connection, key).shape), float32)
                for key in ("fn", "base", "scale")
            }
            if connection.norm_weight is not None:
                shape, dtypes = (connection.hidden_size,), (torch.bfloat16, torch.float32)
                norm = tensors.find(prefix, SUBLAYER_NORMS[sublayer]) or prefix + SUBLAYER_NORMS[sublayer][0]
                read["norm_weight"] = tensors.read(norm, shape, dtypes).to(torch.float32)
        read["fn"] = round_projection(read["fn"], projection)
        connection.load_state_dict(read)
        return connection

    def pre(self, streams: Tensor, pre_in: Tensor | None = None) -> tuple[SeamState, Tensor]:
        """Ahead of the sublayer.

        Args:
            streams: [tokens, 4, hidden_size] bfloat16.
            pre_in: [tokens, 4] float32: the pre of the sublayer before, in the delayed form.

        Returns:
            what post() or the next connection's post_pre() needs; the sublayer's input [tokens, hidden_size] bfloat16.
        """
        if self.delayed and pre_in is None:
            raise InvalidArgumentError(
                "HyperConnection: pre_in: expected the pre of the sublayer before in the delayed form, got None; "
                "first_pre() gives the first layer's"
            )
        layer_input, *coefficients = hyper_connection_pre(
            streams, self.fn, self.base, self.scale, pre_in=pre_in, norm_weight=self.norm_weight, **self._constants()
        )
        return SeamState(streams, *coefficients), layer_input

    def post(self, x: Tensor, state: SeamState, *, in_place: bool = False) -> Tensor:
        """Behind the sublayer.

        Args:
            x: [tokens, hidden_size] bfloat16: what the sublayer returned.
            state: of pre() or post_pre() ahead of the sublayer.
            in_place: write the new streams where the old ones are.

        Returns:
            streams [tokens, 4, hidden_size] bfloat16.
        """
        out = state.streams if in_place else None
        return hyper_connection_post(x, state.streams, state.post, state.comb, out_streams=out)

    def post_pre(self, x: Tensor, state: SeamState, *, in_place: bool = False) -> tuple[SeamState, Tensor]:
        """Behind the sublayer before, and ahead of this one: that one's post() and this one's pre() in one call.

        Args:
            x: [tokens, hidden_size] bfloat16: what the sublayer before returned.
            state: of that sublayer.
            in_place: write the new streams where the old ones are.

        Returns:
            this sublayer's state and input, as pre().
        """
        streams, layer_input, *coefficients = hyper_connection_post_pre(
            x,
            state.streams,
            state.post,
            state.comb,
            self.fn,
            self.base,
            self.scale,
            pre_in=state.pre if self.delayed else None,
            norm_weight=self.norm_weight,
            out_streams=state.streams if in_place else None,
            **self._constants(),
        )
        return SeamState(streams, *coefficients), layer_input

    def coefficients(self, streams: Tensor) -> SeamState:
        """The coefficients alone, for the delayed form: they may be computed on a stream beside the sublayer, whose
        input collapse() has made.
        """
        return SeamState(
            streams,
            *hyper_connection_coefficients(streams, self.fn, self.base, self.scale, **self._constants()),
        )

    def collapse(self, streams: Tensor, pre: Tensor) -> Tensor:
        """The sublayer's input [tokens, hidden_size] bfloat16 with a pre [tokens, 4] that is known."""
        return hyper_connection_collapse(streams, pre, norm_weight=self.norm_weight, epsilon=self.epsilon)

    def forward(
        self, streams: Tensor, sublayer: Callable[[Tensor], Tensor], pre_in: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Runs a sublayer in its two halves.

        Args:
            streams: [tokens, 4, hidden_size] bfloat16.
            sublayer: from its input to its output, both [tokens, hidden_size] bfloat16.
            pre_in: as in pre().

        Returns:
            the new streams, and pre [tokens, 4], which the delayed form's next sublayer needs.
        """
        state, layer_input = self.pre(streams, pre_in)
        return self.post(sublayer(layer_input), state), state.pre

    def first_pre(self, tokens: int) -> Tensor:
        """[tokens, 4] float32: the pre_in of the first layer in the delayed form, which takes stream 0 as it is."""
        return torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=torch.float32, device=self.fn.device).repeat(tokens, 1)

    def _constants(self) -> dict[str, Any]:
        return {
            "epsilon": self.epsilon,
            "hc_epsilon": self.hc_epsilon,
            "post_factor": self.post_factor,
            "sinkhorn_iterations": self.sinkhorn_iterations,
        }

    def extra_repr(self) -> str:
        """Sizes."""
        return f"hidden_size={self.hidden_size}, epsilon={self.epsilon}, delayed={self.delayed}"

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool, *lists: list[str]
    ) -> None:
        # What is missing is torch's to report: only there is it known whether the caller allows it.
        for name, parameter in self._parameters.items():
            tensor = state_dict.get(prefix + name)
            if tensor is None or parameter is None:
                continue
            dtypes = (torch.float32, torch.bfloat16) if name == "norm_weight" else (torch.float32,)
            check_tensor("HyperConnection", prefix + name, tensor, tuple(parameter.shape), dtypes)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *lists)
