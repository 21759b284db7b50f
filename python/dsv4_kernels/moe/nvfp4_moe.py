"""A layer's routed experts with FP4 weights, from routed tokens to their sums."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from dsv4_kernels.checkpoint import CheckpointError, check_tensor, read_tensor
from dsv4_kernels.errors import InvalidArgumentError
from dsv4_kernels.moe.grouped_gemm import (
    moe_grouped_gemm,
    moe_grouped_gemm_quantized,
    run_fused_swiglu_grouped_gemm,
    run_nvfp4_grouped_gemm,
)
from dsv4_kernels.moe.grouped_gemm_reference import gate_and_up
from dsv4_kernels.moe.interleaved_weights import can_interleave, interleave_weights
from dsv4_kernels.moe.quantize import (
    quantize_activation_nvfp4,
    quantize_mxfp4,
    quantize_mxfp8,
    quantize_nvfp4_gpu_fused,
)
from dsv4_kernels.moe.routing import SortedRoutes, max_tiles, moe_finalize, moe_sort
from dsv4_kernels.presets import PRESETS

# Rows an expert up to which tiles of 16 and of 64 rows are the fastest on an H100; see docs/decisions/0017.
ROWS_FOR_TILES_OF_16 = 12
ROWS_FOR_TILES_OF_64 = 56

ACTIVATIONS = ("bfloat16", "nvfp4", "mxfp8")
LARGEST_NVFP4 = 6.0 * 448.0  # over the per-tensor scale: the largest code times the largest block scale

# What a checkpoint may store packed FP4 codes as.
_CODES = (torch.uint8, torch.int8, torch.float4_e2m1fn_x2)
_MXFP4_SCALES = (torch.uint8, torch.float8_e8m0fnu)


class Nvfp4MoE(nn.Module):
    """The routed experts of one layer: y[t] = sum_k weight[t, k] * expert[id[t, k]](x[t]), with FP4 weights.

    An expert is w2 . (silu(min(w1 . x, limit)) * clamp(w3 . x, -limit, limit)), sums in float32, as the DeepSeek-V4
    models have it. Weights are NVFP4 or MXFP4, whichever is prepared. A forward is four launches (moe_sort, two grouped
    products, moe_finalize), or five where activations are quantised: each token once, before; the rows between the
    products by the first one itself. Nothing is synchronised or copied to the host, so it captures in a CUDA graph
    whose replays follow new routes, and traces under torch.compile(fullgraph=True).

    Intermediate results are torch tensors: the allocator reuses their memory from layer to layer on one stream, and
    keeps streams apart. workspace_bytes() says how much a call needs.

    A token's result does not depend on its place in the batch or on other tokens, for batches that use tiles of one
    size (see tile_size) and, where that is 16, one kernel: few tiles of some sizes have another (see moe_grouped_gemm;
    of the presets, up to 2 tokens of v4-pro). Else float32 sums round differently.

    Args:
        num_experts: experts that live here.
        hidden_size, intermediate_size: an expert's outer and inner width, multiples of 64.
        top_k: experts of a token.
        experts_start_idx: id of the first expert here; ids outside [start, start + num_experts) contribute nothing.
        total_experts: experts over all ranks, from which the tile size is chosen; default num_experts.
        swiglu_limit: clamp of gate and up; None or 0 for none.
        weight_before_second: multiply by the routing weight before w2, rounding to bfloat16 in between, as the models'
            own code does; else after it, in float32, which is more precise.
        activations: what the products read: "bfloat16" (W4A16, any weights), "nvfp4" (W4A4, NVFP4 weights) or "mxfp8"
            (W4A8, MXFP4 weights). NVFP4 needs a static scale for each product: set_activation_global_scales or
            compute_activation_global_scales.
        device: of the weights.
    """

    l1_weight: Tensor
    l1_scale: Tensor
    l1_alpha: Tensor | None
    l2_weight: Tensor
    l2_scale: Tensor
    l2_alpha: Tensor | None
    l1_activation_scale: Tensor
    l2_activation_scale: Tensor

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        *,
        top_k: int = 6,
        experts_start_idx: int = 0,
        total_experts: int | None = None,
        swiglu_limit: float | None = 10.0,
        weight_before_second: bool = False,
        activations: str = "bfloat16",
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        if activations not in ACTIVATIONS:
            raise InvalidArgumentError(
                f"Nvfp4MoE: activations: expected one of {', '.join(ACTIVATIONS)}, got {activations!r}"
            )
        self.activations = activations
        self.num_experts = num_experts
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.top_k = top_k
        self.experts_start_idx = experts_start_idx
        self.total_experts = total_experts or num_experts
        self.weight_before_second = weight_before_second
        self._fused = True
        self._limit = 0.0
        self.set_swiglu_limit(swiglu_limit)
        self._device = torch.device(device)
        for name in ("l1_weight", "l1_scale", "l1_alpha", "l2_weight", "l2_scale", "l2_alpha"):
            self.register_buffer(name, None)
        # amax 1, until they are set.
        for name in ("l1_activation_scale", "l2_activation_scale"):
            self.register_buffer(name, torch.full((1,), 1 / LARGEST_NVFP4, device=self._device))
        # The factors of the products: with NVFP4 activations their scale too, each counted once.
        self._l1_factor: Tensor | None = None
        self._l2_factor: Tensor | None = None

    @staticmethod
    def from_preset(preset: str, *, device: torch.device | str = "cpu") -> Nvfp4MoE:
        """All experts of a layer of that model; weights are still to be prepared."""
        sizes = PRESETS[preset]
        return Nvfp4MoE(sizes.experts, sizes.hidden_size, sizes.expert_intermediate, top_k=sizes.top_k, device=device)

    def set_swiglu_limit(self, limit: float | None) -> None:
        """The clamp of gate and up; None or 0 for none."""
        self._limit = float(limit or 0.0)

    def set_fused_swiglu(self, enabled: bool) -> None:
        """Whether SwiGLU, and quantising its results for the second product, is part of the first product (the
        default), or follows it: SwiGLU in torch, from bfloat16.
        """
        self._fused = enabled

    def tile_size(self, tokens: int) -> int:
        """Rows of a tile for a batch, from its size and the numbers of experts alone."""
        rows = tokens * self.top_k / self.total_experts
        if rows <= ROWS_FOR_TILES_OF_16:
            return 16
        return 64 if rows <= ROWS_FOR_TILES_OF_64 and self.activations != "mxfp8" else 128

    def workspace_bytes(self, tokens: int) -> int:
        """Bytes of intermediate results of a call with so many tokens: routes, quantised tokens, products' rows."""
        tile_size = self.tile_size(tokens)
        tiles = max_tiles(tokens * self.top_k, self.num_experts, tile_size)
        quantised = {"nvfp4": (8 + 1) / 16, "mxfp8": (32 + 1) / 32}.get(self.activations, 0.0)  # codes and their scale
        if not self._fused:
            inner = (4 + quantised) * self.intermediate_size
        else:
            inner = (quantised or 2) * self.intermediate_size
        token = quantised * self.hidden_size + 4 * self.top_k
        return int(tiles * (8 + tile_size * (4 + inner + 2 * self.hidden_size)) + tokens * token) + 8

    def prepare_weights_from_stacked(
        self,
        l1_weight: Tensor,
        l1_scale: Tensor,
        l1_global_scale: Tensor | None,
        l2_weight: Tensor,
        l2_scale: Tensor,
        l2_global_scale: Tensor | None,
    ) -> None:
        """Takes weights in the checkpoints' layout.

        With bfloat16 activations they are interleaved (see interleave_weights): a copy, made expert by expert, on every
        architecture the same. Where that cannot be (sizes that are no multiples of 128, MXFP4 scales above 2^9), and
        for quantised activations, they are kept as they are, without a copy where they are contiguous and on the
        device; the products then take about twice as long.

        Args:
            l1_weight: [experts, 2 * intermediate, hidden / 2] packed E2M1 codes, the gate's rows (w1) before up's (w3).
            l1_scale: [experts, 2 * intermediate, hidden / 16] float8_e4m3fn (NVFP4), or [.., hidden / 32] uint8 or
                float8_e8m0fnu (MXFP4).
            l1_global_scale: the factor of each expert, [experts] or [experts, 2] (gate, up) float32: a checkpoint's
                weight_scale_2, without any activation scale. None: 1.
            l2_weight: [experts, hidden, intermediate / 2].
            l2_scale: [experts, hidden, intermediate / 16 or / 32], as l1_scale.
            l2_global_scale: [experts] float32 or None.
        """
        hidden, inner = self.hidden_size, self.intermediate_size
        group = self._group_of(l1_scale)
        self._check("l1_weight", l1_weight, (self.num_experts, 2 * inner, hidden // 2), _CODES)
        self._check("l1_scale", l1_scale, (self.num_experts, 2 * inner, hidden // group), (l1_scale.dtype,))
        self._check("l2_weight", l2_weight, (self.num_experts, hidden, inner // 2), _CODES)
        self._check("l2_scale", l2_scale, (self.num_experts, hidden, inner // group), (l1_scale.dtype,))
        for name, factor in (("l1_global_scale", l1_global_scale), ("l2_global_scale", l2_global_scale)):
            if factor is not None:
                pair = name == "l1_global_scale" and factor.dim() == 2
                self._check(name, factor, (self.num_experts, 2) if pair else (self.num_experts,), (torch.float32,))
        self.l1_weight, self.l1_scale = self._prepared(l1_weight, l1_scale, gate_and_up=True)
        self.l2_weight, self.l2_scale = self._prepared(l2_weight, l2_scale)
        self.l1_alpha = None if l1_global_scale is None else self._moved(l1_global_scale)
        self.l2_alpha = None if l2_global_scale is None else self._moved(l2_global_scale)
        needs = {"nvfp4": 16, "mxfp8": 32}.get(self.activations, group)
        if group != needs:
            weights = {16: "NVFP4", 32: "MXFP4"}
            raise InvalidArgumentError(
                f"Nvfp4MoE: l1_scale: expected {weights[needs]} weights for activations {self.activations!r}, got "
                f"{weights[group]}"
            )
        self._update_factors()

    def _prepared(self, weight: Tensor, scale: Tensor, *, gate_and_up: bool = False) -> tuple[Tensor, Tensor]:
        """Weights and scales on the device, interleaved where the products can use that."""
        codes, scale = self._moved(weight.view(torch.uint8)), self._moved(scale)
        if self.activations != "bfloat16" or not can_interleave(codes.shape[1], 2 * codes.shape[2], scale):
            return codes, scale
        return interleave_weights(codes, scale, gate_and_up=gate_and_up)

    def set_activation_global_scales(self, l1: float, l2: float) -> None:
        """The static scales of NVFP4 activations, amax / 2688, of the hidden states and of the rows between."""
        self.l1_activation_scale.fill_(l1)
        self.l2_activation_scale.fill_(l2)
        self._update_factors()

    def compute_activation_global_scales(
        self, hidden: Tensor, topk_weights: Tensor, topk_ids: Tensor
    ) -> tuple[float, float]:
        """Sets both scales from a sample, by running the first product in bfloat16. Synchronises: for warm-up only.

        Arguments are run()'s; returns the scales.
        """
        routes = moe_sort(topk_ids, self.num_experts, self.tile_size(hidden.shape[0]), self.experts_start_idx)
        weights = topk_weights if self.weight_before_second else None
        rows = self._first(hidden, None, routes, topk_ids.shape[1], weights, self.l1_alpha)
        used = routes.slot_to_row[routes.slot_to_row >= 0].to(torch.int64)
        amax = [float(value.abs().amax()) if value.numel() else 0.0 for value in (hidden, rows[used])]
        l1, l2 = (value / LARGEST_NVFP4 if value > 0 else 1 / LARGEST_NVFP4 for value in amax)
        self.set_activation_global_scales(l1, l2)
        return l1, l2

    def _update_factors(self) -> None:
        if self.activations != "nvfp4":
            self._l1_factor, self._l2_factor = self.l1_alpha, self.l2_alpha
            return
        one = torch.ones(self.num_experts, device=self._device)
        self._l1_factor = (one if self.l1_alpha is None else self.l1_alpha) * self.l1_activation_scale
        self._l2_factor = (one if self.l2_alpha is None else self.l2_alpha) * self.l2_activation_scale

    def prepare_weights_from_checkpoint(self, checkpoint: Path | str | Mapping[str, Tensor], layer: int) -> None:
        """Reads a layer's experts by the models' names, `layers.N.ffn.experts.E.{w1,w2,w3}.{weight,scale}` (MXFP4).

        One expert after another goes into its place, so memory beyond the layer's is one tensor's.

        Args:
            checkpoint: a .safetensors file, a folder with an index of shards, or the tensors by name.
            layer: N.

        Raises:
            CheckpointError: naming the tensor, what was expected and what there is.
        """
        if isinstance(checkpoint, Mapping):
            tensors = checkpoint

            def read(name: str, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> Tensor | None:
                tensor = tensors.get(name)
                if tensor is not None:
                    check_tensor("state dict", name, tensor, shape, dtypes)
                return tensor

            self._read_experts(read, "state dict", layer)
        else:
            path = Path(checkpoint)
            self._read_experts(lambda *expected: read_tensor(path, *expected), str(path), layer)

    def _read_experts(self, read: Callable[..., Tensor | None], where: str, layer: int) -> None:
        hidden, inner, experts = self.hidden_size, self.intermediate_size, self.num_experts

        def codes_and_scales(rows: int, columns: int) -> tuple[Tensor, Tensor]:
            codes = torch.empty((experts, rows, columns // 2), dtype=torch.uint8, device=self._device)
            return codes, codes.new_empty((experts, rows, columns // 32))

        l1, l2 = codes_and_scales(2 * inner, hidden), codes_and_scales(hidden, inner)
        places = {"w1": (l1, slice(0, inner)), "w3": (l1, slice(inner, 2 * inner)), "w2": (l2, slice(0, hidden))}
        for expert in range(experts):
            for matrix, (buffers, rows) in places.items():
                for buffer, part, dtypes in zip(buffers, ("weight", "scale"), (_CODES, _MXFP4_SCALES), strict=True):
                    name = f"layers.{layer}.ffn.experts.{self.experts_start_idx + expert}.{matrix}.{part}"
                    place = buffer[expert, rows]
                    tensor = read(name, tuple(place.shape), dtypes)
                    if tensor is None:
                        raise CheckpointError(
                            f"{where}: {name}: no such tensor; is {layer} a layer of this checkpoint?"
                        )
                    place.copy_(tensor.view(torch.uint8))
        self.prepare_weights_from_stacked(l1[0], l1[1], None, l2[0], l2[1], None)

    def prepare_weights_from_dequantized(self, l1_weight: Tensor, l2_weight: Tensor, *, nvfp4: bool = True) -> None:
        """Quantises bfloat16 or float32 weights, one expert after another.

        Args:
            l1_weight: [experts, 2 * intermediate, hidden], gate rows before up rows.
            l2_weight: [experts, hidden, intermediate].
            nvfp4: NVFP4 with a factor an expert, amax / 2688; else MXFP4.
        """
        prepared: list[Tensor | None] = []
        for weight in (l1_weight, l2_weight):
            codes, scales, factors = [], [], []
            for expert in weight.to(self._device):
                if nvfp4:
                    code, scale, factor = quantize_nvfp4_gpu_fused(expert.contiguous())
                    factors.append(factor)
                else:
                    code, scale = quantize_mxfp4(expert.contiguous())
                codes.append(code.view(torch.uint8))
                scales.append(scale.view(torch.uint8))
            stacked = torch.stack(scales)
            prepared += [
                torch.stack(codes),
                stacked.view(torch.float8_e4m3fn) if nvfp4 else stacked,
                torch.cat(factors) if nvfp4 else None,
            ]
        self.prepare_weights_from_stacked(*prepared)  # type: ignore[arg-type]

    def run(self, hidden: Tensor, topk_weights: Tensor, topk_ids: Tensor, *, shared: Tensor | None = None) -> Tensor:
        """The experts' sums.

        Args:
            hidden: [tokens, hidden_size] bfloat16.
            topk_weights: [tokens, top_k] float32.
            topk_ids: [tokens, top_k] int32 or int64, ids over all ranks; -1 and ids of other ranks contribute nothing.
            shared: [tokens, hidden_size] bfloat16 to add, such as the shared expert's output.

        Returns:
            [tokens, hidden_size] bfloat16.
        """
        if self.l1_weight is None:
            raise InvalidArgumentError("Nvfp4MoE: weights: expected prepared weights, got none; call prepare_weights_*")
        routes = moe_sort(topk_ids, self.num_experts, self.tile_size(hidden.shape[0]), self.experts_start_idx)
        inner_weights = topk_weights if self.weight_before_second else None
        x, x_scale = self._quantized(hidden, self.l1_activation_scale)
        inner, inner_scale = self._between(x, x_scale, routes, topk_ids.shape[1], inner_weights)
        rows = run_nvfp4_grouped_gemm(
            inner,
            self.l2_weight,
            self.l2_scale,
            routes.tile_to_expert,
            routes.row_to_slot,
            x_scale=inner_scale,
            alpha=self._l2_factor,
        )
        return moe_finalize(rows, routes.slot_to_row, None if self.weight_before_second else topk_weights, shared)

    def _quantized(self, x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.activations == "nvfp4":
            codes, scales = quantize_activation_nvfp4(x, scale)
            return codes.view(torch.uint8), scales
        if self.activations == "mxfp8":
            return quantize_mxfp8(x)
        return x, None

    def _between(
        self, x: Tensor, x_scale: Tensor | None, routes: SortedRoutes, top_k: int, weights: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The rows between the products as the second one reads them, and their scales."""
        if x_scale is None or not self._fused:
            rows = self._first(x, x_scale, routes, top_k, weights, self._l1_factor)
            return self._quantized(rows, self.l2_activation_scale)
        codes, scales = moe_grouped_gemm_quantized(
            x,
            self.l1_weight,
            self.l1_scale,
            routes.tile_to_expert,
            routes.row_to_slot,
            x_scale,
            self.l2_activation_scale if self.activations == "nvfp4" else None,
            self._l1_factor,
            weights,
            top_k,
            self._limit,
        )
        return (codes.view(torch.uint8) if self.activations == "nvfp4" else codes), scales

    def _first(
        self,
        x: Tensor,
        x_scale: Tensor | None,
        routes: SortedRoutes,
        top_k: int,
        weights: Tensor | None,
        alpha: Tensor | None,
    ) -> Tensor:
        """The rows between the products, bfloat16, routing weights in them if given."""
        if not self._fused:
            return self._first_unfused(x, x_scale, routes, top_k, weights, alpha)
        return run_fused_swiglu_grouped_gemm(
            x,
            self.l1_weight,
            self.l1_scale,
            routes.tile_to_expert,
            routes.row_to_slot,
            x_scale=x_scale,
            alpha=alpha,
            slot_weights=weights,
            top_k=top_k,
            limit=self._limit,
        )

    forward = run

    def _first_unfused(
        self,
        x: Tensor,
        x_scale: Tensor | None,
        routes: SortedRoutes,
        top_k: int,
        weights: Tensor | None,
        alpha: Tensor | None,
    ) -> Tensor:
        """The first product into bfloat16, then SwiGLU. Rows without a slot hold anything."""
        maps = routes.tile_to_expert, routes.row_to_slot
        rows = routes.row_to_slot.shape[0]
        both = moe_grouped_gemm(x, self.l1_weight, self.l1_scale, *maps, x_scale, None, None, top_k).to(torch.float32)
        gate, up = gate_and_up(both, self.l1_weight.dtype == torch.int32)
        if alpha is not None:
            tile_size = rows // max(maps[0].shape[0], 1)
            of_tile = alpha.reshape(self.num_experts, -1)[maps[0].clamp(0).to(torch.int64)]
            factor = of_tile.repeat_interleave(tile_size, dim=0, output_size=rows)
            gate, up = gate * factor[:, :1], up * factor[:, -1:]
        if self._limit > 0:
            gate, up = gate.clamp(max=self._limit), up.clamp(-self._limit, self._limit)
        inner = nn.functional.silu(gate) * up
        if weights is not None:
            slots = routes.row_to_slot.clamp(0, weights.numel() - 1).to(torch.int64)
            inner = inner * weights.reshape(-1)[slots, None]
        return inner.to(torch.bfloat16)

    def _group_of(self, scale: Tensor) -> int:
        if scale.dtype == torch.float8_e4m3fn:
            return 16
        if scale.dtype in _MXFP4_SCALES:
            return 32
        raise InvalidArgumentError(
            f"Nvfp4MoE: l1_scale: expected dtype float8_e4m3fn (NVFP4), or uint8 or float8_e8m0fnu (MXFP4), "
            f"got {str(scale.dtype).removeprefix('torch.')}"
        )

    def _check(self, name: str, tensor: Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> None:
        if tuple(tensor.shape) != shape or tensor.dtype not in dtypes:
            need = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            got = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
            raise InvalidArgumentError(f"Nvfp4MoE: {name}: expected {need} {list(shape)}, got {got}")

    def _moved(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._device).contiguous()
