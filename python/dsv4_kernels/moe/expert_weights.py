"""The weights of a layer's experts as buffers of a module: where they come from, and what keeps them together."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from dsv4_kernels.checkpoint import Checkpoint, CheckpointError, Source, check_tensor
from dsv4_kernels.errors import InvalidArgumentError
from dsv4_kernels.fixed_dtypes import FixedDtypes
from dsv4_kernels.moe.expert_checkpoint import ExpertReader
from dsv4_kernels.moe.expert_layout import (
    CODES,
    GROUPS,
    MXFP4_SCALES,
    NVFP4_SCALES,
    ExpertTensors,
    WeightLayout,
    can_be_interleaved,
)
from dsv4_kernels.moe.quantize import quantize_mxfp4, quantize_nvfp4_gpu_fused

# What the products read, and the weights that it needs: the first format is the one that a layer starts with.
ACTIVATIONS = {"bfloat16": ("mxfp4", "nvfp4"), "nvfp4": ("nvfp4",), "mxfp8": ("mxfp4",)}
LARGEST_NVFP4 = 6.0 * 448.0  # over the per-tensor scale: the largest code times the largest block scale

LAYOUT_VERSION = 1  # of state dicts: changes when the order of interleaved weights does

_PRODUCTS = ("l1", "l2")


class ExpertWeights(FixedDtypes):
    """The buffers of Nvfp4MoE, whose documentation describes them; it is the class to use.

    For each product, l1 (gate and up) and l2 (down):

    - `_weight`, `_scale`: in a WeightLayout, which follows from their dtypes and shapes.
    - `_alpha`: what each expert's products are multiplied by, [experts, 2] (gate, up) or [experts] float32; None for
      MXFP4 weights that came without.
    - `_activation_scale`: [1] float32, the static scale of NVFP4 activations.
    - `_factor`: with NVFP4 activations alpha times that scale, what the kernels read. Derived, so no part of state
      dicts; None otherwise.
    """

    l1_weight: Tensor
    l1_scale: Tensor
    l1_alpha: Tensor | None
    l1_factor: Tensor | None
    l1_activation_scale: Tensor
    l2_weight: Tensor
    l2_scale: Tensor
    l2_alpha: Tensor | None
    l2_factor: Tensor | None
    l2_activation_scale: Tensor

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        *,
        experts_start_idx: int,
        activations: str,
        weights: str | None,
        tensor_parallel_rank: int,
        tensor_parallel_size: int,
        device: torch.device | str,
    ) -> None:
        """Buffers for weights that are still to come."""
        super().__init__()
        if activations not in ACTIVATIONS:
            refuse("activations", f"one of {', '.join(ACTIVATIONS)}", repr(activations))
        if weights not in (None, *ACTIVATIONS[activations]):
            need = " or ".join(map(repr, ACTIVATIONS[activations]))
            refuse("weights", f"{need} or None with activations {activations!r}", repr(weights))
        for name, value, least in (
            ("num_experts", num_experts, 1),
            ("hidden_size", hidden_size, 1),
            ("intermediate_size", intermediate_size, 1),
            ("experts_start_idx", experts_start_idx, 0),
            ("tensor_parallel_size", tensor_parallel_size, 1),
            ("tensor_parallel_rank", tensor_parallel_rank, 0),
        ):
            check_int(name, value, least)
        if tensor_parallel_rank >= tensor_parallel_size:
            refuse(
                "tensor_parallel_rank", f"less than tensor_parallel_size, {tensor_parallel_size}", tensor_parallel_rank
            )
        self._formats = ACTIVATIONS[activations] if weights is None else (weights,)
        group = GROUPS[self._formats[0]]
        for name, value in (("hidden_size", hidden_size), ("intermediate_size", intermediate_size)):
            if value % group:
                need = f"a multiple of {group}, the codes that share a scale in {self._formats[0].upper()} weights"
                refuse(name, need, value)
        self.num_experts = num_experts
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.experts_start_idx = experts_start_idx
        self.activations = activations
        self.tensor_parallel_rank, self.tensor_parallel_size = tensor_parallel_rank, tensor_parallel_size
        # Whether weights have been prepared or loaded: until then the buffers hold anything.
        self._prepared = False
        for product in _PRODUCTS:
            for name in ("weight", "scale"):
                self.register_buffer(f"{product}_{name}", None)
            # amax 1, until they are set.
            scale = torch.full((1,), 1 / LARGEST_NVFP4, dtype=torch.float32, device=device)
            self.register_buffer(f"{product}_activation_scale", scale)
        # Those that may stay None come last, in this order: torch.export counts buffers up to the first None.
        for product in _PRODUCTS:
            self.register_buffer(f"{product}_alpha", None)
        for product in _PRODUCTS:
            self.register_buffer(f"{product}_factor", None, persistent=False)
        for product in _PRODUCTS:
            self._hold(product, WeightLayout(self._formats[0], self._can_interleave(product, self._formats[0])))
        self._put_alphas(None, None)
        self._update_factors()

    @property
    def device(self) -> torch.device:
        """Where the layer's tensors are."""
        return self.l1_activation_scale.device

    @torch.no_grad()
    def prepare_weights_from_stacked(
        self,
        l1_weight: Tensor,
        l1_scale: Tensor,
        l1_global_scale: Tensor | None,
        l2_weight: Tensor,
        l2_scale: Tensor,
        l2_global_scale: Tensor | None,
    ) -> None:
        """Copies weights in the checkpoints' layout, expert by expert.

        With bfloat16 activations they are interleaved (see interleave_weights), on every architecture the same. Where
        that cannot be (MXFP4 scales above 2^9), and for quantised activations, they keep the checkpoints'
        order. Without interleaving, the products of bfloat16 take about twice as long.

        Args:
            l1_weight: [experts, 2 * intermediate, hidden / 2] packed E2M1 codes, the gate's rows (w1) before up's (w3).
            l1_scale: [experts, 2 * intermediate, hidden / 16] float8_e4m3fn (NVFP4), or [.., hidden / 32] uint8 or
                float8_e8m0fnu (MXFP4).
            l1_global_scale: the factor of each expert, [experts] or [experts, 2] (gate, up) float32: a checkpoint's
                weight_scale_2, without any activation scale. None: 1.
            l2_weight: [experts, hidden, intermediate / 2].
            l2_scale: [experts, hidden, intermediate / 16 or / 32], as l1_scale.
            l2_global_scale: [experts] float32 or None.

        Raises:
            InvalidArgumentError: what does not fit; the layer is as it was.
        """
        hidden, inner, experts = self.hidden_size, self.intermediate_size, self.num_experts
        weights = _format_of(l1_scale)
        group = GROUPS[weights]
        l1_scales = MXFP4_SCALES if weights == "mxfp4" else (l1_scale.dtype,)
        _check("l1_weight", l1_weight, (experts, 2 * inner, hidden // 2), CODES)
        _check("l1_scale", l1_scale, (experts, 2 * inner, hidden // group), l1_scales)
        _check("l2_weight", l2_weight, (experts, hidden, inner // 2), CODES)
        _check("l2_scale", l2_scale, (experts, hidden, inner // group), l1_scales)
        for name, factor in (("l1_global_scale", l1_global_scale), ("l2_global_scale", l2_global_scale)):
            if factor is not None:
                pair = name == "l1_global_scale" and factor.dim() == 2
                _check(name, factor, (experts, 2) if pair else (experts,), (torch.float32,))
        if weights not in self._formats:
            refuse("l1_scale", self._needed_weights(), weights.upper())
        l1_factor = None if l1_global_scale is None else l1_global_scale.reshape(experts, -1).expand(experts, 2)
        l2_factor = None if l2_global_scale is None else l2_global_scale[:, None]

        def expert_tensors(expert: int) -> ExpertTensors:
            return ExpertTensors(
                l1_weight[expert],
                l1_scale[expert],
                None if l1_factor is None else l1_factor[expert],
                l2_weight[expert],
                l2_scale[expert],
                None if l2_factor is None else l2_factor[expert],
            )

        self._fill(weights, expert_tensors)

    @torch.no_grad()
    def prepare_weights_from_checkpoint(
        self,
        checkpoint: Source,
        layer: int | str,
        *,
        activation_scales: bool = True,
        experts: Sequence[int] | None = None,
    ) -> None:
        """Reads a layer's experts, or this rank's part of them, one expert after another.

        Names are the models' (`layers.N.ffn.experts.E.w1.weight`, `.scale`: MXFP4), modelopt's (`.weight`,
        `.weight_scale`, `.weight_scale_2`, `.input_scale`: NVFP4) or compressed-tensors' (`.weight_packed`,
        `.weight_scale`, `.weight_global_scale`, `.input_global_scale`); `mlp` with `gate_proj`, `up_proj` and
        `down_proj` may stand for `ffn` with `w1`, `w3` and `w2`. A model of transformers gives its experts in its state
        dict, all in one tensor (`mlp.experts.gate_up_proj`, `.gate_up_proj_scale_inv`, `.down_proj`,
        `.down_proj_scale_inv`: MXFP4). dsv4_kernels.checkpoint lists all names. Memory beyond the layer's is a few
        experts'.

        Args:
            checkpoint: a .safetensors file, a folder with one or with an index of shards, or the tensors by name.
            layer: N, for `layers.N` or `model.layers.N`; or the name of the block, such as "mtp.0".
            activation_scales: with NVFP4 activations, take over the checkpoint's static scales too, the largest over
                these experts, if it has any.
            experts: the checkpoint's expert for each one here, where they are no range from experts_start_idx on:
                replicas of busy experts, for one, of which an id comes more than once.

        Raises:
            InvalidArgumentError: experts that are not as many as live here, or below 0.
            CheckpointError: naming file and tensor, what was expected and what there is. Names, shapes, dtypes and
                scales of all tensors are checked before the layer changes.
        """
        if experts is None:
            experts = range(self.experts_start_idx, self.experts_start_idx + self.num_experts)
        if len(experts) != self.num_experts or min(experts) < 0:
            refuse("experts", f"{self.num_experts} ids of at least 0", list(experts))
        with Checkpoint(checkpoint) as tensors:
            reader = ExpertReader(
                tensors,
                layer,
                experts,
                self.hidden_size,
                self.intermediate_size,
                self.tensor_parallel_rank,
                self.tensor_parallel_size,
            )
            if reader.format not in self._formats:
                need, got = self._needed_weights(), reader.format.upper()
                raise CheckpointError(f"{tensors.where}: {reader.prefix}: expected {need}, got {got}")
            scales = reader.activation_scales() if activation_scales and self.activations == "nvfp4" else None
            self._fill(reader.format, reader)
        if scales is not None:
            self.set_activation_global_scales(*scales)

    @torch.no_grad()
    def prepare_weights_from_dequantized(self, l1_weight: Tensor, l2_weight: Tensor, *, nvfp4: bool = True) -> None:
        """Quantises weights, one expert after another.

        Args:
            l1_weight: [experts, 2 * intermediate, hidden] bfloat16, float16 or float32, gate rows before up rows.
            l2_weight: [experts, hidden, intermediate], likewise.
            nvfp4: NVFP4 with a factor per expert, amax / 2688; else MXFP4.
        """
        values = torch.bfloat16, torch.float16, torch.float32
        _check("l1_weight", l1_weight, (self.num_experts, 2 * self.intermediate_size, self.hidden_size), values)
        _check("l2_weight", l2_weight, (self.num_experts, self.hidden_size, self.intermediate_size), values)
        weights = "nvfp4" if nvfp4 else "mxfp4"
        if weights not in self._formats:
            refuse("nvfp4", f"what makes {self._needed_weights()}", repr(nvfp4))

        def quantised(weight: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
            weight = weight.to(self.device).contiguous()
            return quantize_nvfp4_gpu_fused(weight) if nvfp4 else (*quantize_mxfp4(weight), None)

        def expert_tensors(expert: int) -> ExpertTensors:
            l1_codes, l1_scale, l1_factor = quantised(l1_weight[expert])
            both = None if l1_factor is None else l1_factor.expand(2)
            return ExpertTensors(l1_codes, l1_scale, both, *quantised(l2_weight[expert]))

        self._fill(weights, expert_tensors)

    @torch.no_grad()
    def replace_expert(
        self,
        expert: int,
        l1_weight: Tensor,
        l1_scale: Tensor,
        l1_global_scale: Tensor | None,
        l2_weight: Tensor,
        l2_scale: Tensor,
        l2_global_scale: Tensor | None,
    ) -> None:
        """Writes one expert's weights into the memory of the old ones, which captured graphs read.

        For weights that arrive expert by expert, or an expert that moves here. The layer's format and order stay.

        Args:
            expert: which of the experts here, counted from 0.
            l1_weight: [2 * intermediate, hidden / 2], and the others as in prepare_weights_from_stacked, without the
                first dimension.
            l1_scale: [2 * intermediate, hidden / 16 or / 32].
            l1_global_scale: [], [1] or [2] (gate, up) float32 or None.
            l2_weight: [hidden, intermediate / 2].
            l2_scale: [hidden, intermediate / 16 or / 32].
            l2_global_scale: [] or [1] float32 or None.

        Raises:
            InvalidArgumentError: what does not fit, or weights that this layout cannot hold; the layer is as it was.
        """
        if not self._prepared:
            refuse("weights", "prepared weights", "none; call prepare_weights_* or load a state dict")
        if not isinstance(expert, int) or not 0 <= expert < self.num_experts:
            refuse("expert", f"0 to {self.num_experts - 1}", repr(expert))
        weights = self._layout("l1").format
        scales = NVFP4_SCALES if weights == "nvfp4" else MXFP4_SCALES
        made = []
        for product, codes, scale, factor in (
            ("l1", l1_weight, l1_scale, l1_global_scale),
            ("l2", l2_weight, l2_scale, l2_global_scale),
        ):
            rows, inner = self._sizes(product)
            _check(f"{product}_weight", codes, (rows, inner // 2), CODES)
            _check(f"{product}_scale", scale, (rows, inner // GROUPS[weights]), scales)
            places = [getattr(self, f"{product}_{name}")[expert] for name in ("weight", "scale")]
            alpha: Tensor | None = getattr(self, f"{product}_alpha")
            if factor is not None:
                if alpha is None:
                    refuse(f"{product}_global_scale", "None, as the other experts have none", "one")
                if factor.numel() not in (1, alpha[expert].numel()) or factor.dtype != torch.float32:
                    got = f"{str(factor.dtype).removeprefix('torch.')} {list(factor.shape)}"
                    refuse(f"{product}_global_scale", f"float32 [{alpha[expert].numel()}]", got)
            new = [torch.empty_like(place) for place in places]
            if not self._layout(product).store(codes, scale, new[0], new[1], gate_and_up=product == "l1"):
                refuse(
                    f"{product}_scale", "scales of at most 2^9, as the other experts' are interleaved", "a larger one"
                )
            made.append((new, places, factor, alpha))
        for new, places, factor, alpha in made:
            for place, value in zip(places, new, strict=True):
                place.copy_(value)
            if alpha is not None:
                alpha[expert] = 1.0 if factor is None else factor.reshape(-1 if factor.numel() > 1 else ())
        self._update_factors()

    def expert_buffers(self) -> dict[str, Tensor]:
        """The buffers that have a part for each expert, by name: [num_experts, ...], contiguous.

        An expert is these parts and nothing else: engines that move experts between ranks, or copy one to a replica,
        send and overwrite them. All layers of the same sizes, format and order have the same parts.
        """
        names = [f"{product}_{name}" for name in ("weight", "scale", "alpha", "factor") for product in _PRODUCTS]
        return {name: buffer for name in names if (buffer := self._buffers[name]) is not None}

    def set_activation_global_scales(self, l1: float, l2: float) -> None:
        """The static scales of NVFP4 activations, amax / 2688, of the hidden states and of the rows between.

        Raises:
            InvalidArgumentError: a scale that is not finite and above 0 in float32; the layer is as it was.
        """
        scales = []
        for name, value in (("l1", l1), ("l2", l2)):
            # As the kernels see it: what float32 rounds to 0 or infinity is refused too.
            scale = torch.tensor(as_number(value), dtype=torch.float64, device="cpu").to(torch.float32)
            if not 0 < scale < math.inf:
                raise InvalidArgumentError(
                    f"set_activation_global_scales: {name}: expected a finite number above 0, got {value!r}"
                )
            scales.append(scale)
        with torch.no_grad():
            self._put("l1_activation_scale", scales[0].reshape(1))
            self._put("l2_activation_scale", scales[1].reshape(1))
            self._update_factors()

    def get_extra_state(self) -> Tensor:
        """What a state dict says beside the buffers: the layout's version, and whether weights are prepared."""
        return torch.tensor([LAYOUT_VERSION, self._prepared], dtype=torch.int32, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        """Takes over what get_extra_state returned."""
        self._prepared = bool(state[1])

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], strict: bool, *lists: list[str]
    ) -> None:
        # What is missing is torch's to report: only there is it known whether the caller allows it.
        given = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
        self._take_layouts(given, prefix, assign=bool(local_metadata.get("assign_to_params_buffers")))
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *lists)
        with torch.no_grad():
            self._update_factors()

    def _take_layouts(self, given: dict[str, Any], prefix: str, *, assign: bool) -> None:
        """Checks a state dict's tensors, then makes room for weights of another layout than those that are there."""
        extra = given.get("_extra_state")
        if extra is not None and (extra.shape != (2,) or int(extra[0]) != LAYOUT_VERSION):
            raise CheckpointError(
                f"Nvfp4MoE: {prefix}_extra_state: expected weights in layout {LAYOUT_VERSION}, got {extra.tolist()}; "
                "prepare them again from the model's checkpoint"
            )
        layouts = {}
        for product in _PRODUCTS:
            weight, scale = (given.get(f"{product}_{name}") for name in ("weight", "scale"))
            there = self._layout(product)
            layout = there if weight is None or scale is None else WeightLayout.of(weight, scale)
            layouts[product] = layout
            if layout.format not in self._formats:
                got = layout.format.upper()
                raise CheckpointError(
                    f"Nvfp4MoE: {prefix}{product}_scale: expected {self._needed_weights()}, got {got}"
                )
            if layout.interleaved and self.activations != "bfloat16":
                raise CheckpointError(
                    f"Nvfp4MoE: {prefix}{product}_weight: expected weights in the checkpoints' order for activations "
                    f"{self.activations!r}, got interleaved ones"
                )
            shapes, dtypes = layout.shapes(self.num_experts, *self._sizes(product)), layout.dtypes()
            for name, shape, dtype in (
                ("weight", shapes[0], dtypes[0]),
                ("scale", shapes[1], dtypes[1]),
                ("alpha", self._alpha_shape(product), torch.float32),
                ("activation_scale", (1,), torch.float32),
            ):
                if f"{product}_{name}" in given:
                    name = f"{product}_{name}"
                    check_tensor("Nvfp4MoE", prefix + name, given[name], shape, (dtype,))
        if layouts["l1"].format != layouts["l2"].format:
            need, got = (layouts[product].format.upper() for product in _PRODUCTS)
            raise CheckpointError(f"Nvfp4MoE: {prefix}l2_scale: expected {need} weights as in l1_scale, got {got}")
        for product, layout in layouts.items():
            self._hold(product, layout, device="meta" if assign else None)
            if f"{product}_alpha" in given and getattr(self, f"{product}_alpha") is None:
                shape, device = self._alpha_shape(product), "meta" if assign else self.device
                setattr(self, f"{product}_alpha", torch.empty(shape, dtype=torch.float32, device=device))
            elif f"{product}_weight" in given and f"{product}_alpha" not in given and layout.format == "mxfp4":
                setattr(self, f"{product}_alpha", None)
        if all(f"{product}_{name}" in given for product in _PRODUCTS for name in ("weight", "scale")):
            self._prepared = True

    def _fill(self, weights: str, expert_tensors: Callable[[int], ExpertTensors]) -> None:
        """Writes all experts' weights into the layer's buffers. Until that is done, the layer counts as unprepared."""
        self._prepared = False
        in_order: set[str] = set()  # products that cannot be interleaved
        factors = None
        while factors is None:
            factors = self._stored(weights, expert_tensors, in_order)
        l1, l2 = (torch.stack(factor) if factor else None for factor in factors.values())
        self._put_alphas(l1, l2)
        self._update_factors()
        self._prepared = True

    def _stored(
        self, weights: str, expert_tensors: Callable[[int], ExpertTensors], in_order: set[str]
    ) -> dict[str, list[Tensor]] | None:
        """Writes all experts' weights and returns their factors. None: a product cannot be interleaved after all."""
        for product in _PRODUCTS:
            interleaved = product not in in_order and self._can_interleave(product, weights)
            self._hold(product, WeightLayout(weights, interleaved))
        factors: dict[str, list[Tensor]] = {product: [] for product in _PRODUCTS}
        for expert in range(self.num_experts):
            given = expert_tensors(expert)
            for product, (codes, scale, factor) in zip(_PRODUCTS, (given[:3], given[3:]), strict=True):
                weight_out, scale_out = (getattr(self, f"{product}_{name}")[expert] for name in ("weight", "scale"))
                layout = self._layout(product)
                if not layout.store(codes, scale, weight_out, scale_out, gate_and_up=product == "l1"):
                    in_order.add(product)
                    return None
                if factor is not None:
                    factors[product].append(factor)
        return factors

    def _sizes(self, product: str) -> tuple[int, int]:
        """Rows and inner width of an expert's weights."""
        if product == "l1":
            return 2 * self.intermediate_size, self.hidden_size
        return self.hidden_size, self.intermediate_size

    def _can_interleave(self, product: str, weights: str) -> bool:
        return self.activations == "bfloat16" and can_be_interleaved(*self._sizes(product), weights)

    def _layout(self, product: str) -> WeightLayout:
        return WeightLayout.of(getattr(self, f"{product}_weight"), getattr(self, f"{product}_scale"))

    def _hold(self, product: str, layout: WeightLayout, device: torch.device | str | None = None) -> None:
        """Buffers of that layout: those there are, or new ones, by default where the layer is."""
        names = f"{product}_weight", f"{product}_scale"
        if self._buffers[names[0]] is not None:
            if self._layout(product) == layout:
                return
            for name in names:  # before the new ones are allocated
                setattr(self, name, None)
        self._prepared = False
        made = layout.empty(self.num_experts, *self._sizes(product), self.device if device is None else device)
        for name, tensor in zip(names, made, strict=True):
            setattr(self, name, tensor)

    def _alpha_shape(self, product: str) -> tuple[int, ...]:
        return (self.num_experts, 2) if product == "l1" else (self.num_experts,)

    def _put_alphas(self, l1: Tensor | None, l2: Tensor | None) -> None:
        """The weights' factors, both or none. NVFP4 weights always have them, by default 1."""
        some = l1 is not None or l2 is not None or self._layout("l1").format == "nvfp4"
        for product, factors in (("l1", l1), ("l2", l2)):
            shape = self._alpha_shape(product)
            if factors is not None:
                factors = factors.reshape(shape)
            elif some:
                factors = torch.ones(shape, dtype=torch.float32, device=self.device)
            self._put(f"{product}_alpha", factors)

    def _update_factors(self) -> None:
        """What the products are multiplied by, after alpha or the activations' scale have changed."""
        if self.activations == "nvfp4":
            self._put("l1_factor", self.l1_alpha * self.l1_activation_scale)  # type: ignore[operator]
            self._put("l2_factor", self.l2_alpha * self.l2_activation_scale)  # type: ignore[operator]

    def _put(self, name: str, value: Tensor | None) -> None:
        """Writes a buffer, into its own memory where there is some of this shape: captured graphs read that."""
        place: Tensor | None = getattr(self, name)
        if value is not None and place is not None and place.shape == value.shape and place.device == self.device:
            place.copy_(value)
        else:
            setattr(self, name, None if value is None else value.to(self.device))

    def _needed_weights(self) -> str:
        names = " or ".join(name.upper() for name in self._formats)
        return f"{names} weights for activations {self.activations!r}"


def refuse(name: str, need: str, got: object) -> NoReturn:
    """Raises InvalidArgumentError in the package's words."""
    raise InvalidArgumentError(f"Nvfp4MoE: {name}: expected {need}, got {got}")


def check_int(name: str, value: object, least: int) -> None:
    """InvalidArgumentError unless the value is an int of at least `least`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        refuse(name, f"an int of at least {least}", repr(value))


def as_number(value: object) -> float:
    """The value as a float, NaN if it is no number."""
    if isinstance(value, (str, bytes, bool)):
        return math.nan
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError):  # RuntimeError: a tensor of several elements
        return math.nan


def _format_of(scale: Tensor) -> str:
    if scale.dtype == torch.float8_e4m3fn:
        return "nvfp4"
    if scale.dtype in MXFP4_SCALES:
        return "mxfp4"
    need = "dtype float8_e4m3fn (NVFP4), or uint8 or float8_e8m0fnu (MXFP4)"
    return refuse("l1_scale", need, str(scale.dtype).removeprefix("torch."))


def _check(name: str, tensor: Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> None:
    if tuple(tensor.shape) != shape or tensor.dtype not in dtypes:
        need = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        refuse(name, f"{need} {list(shape)}", f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}")
