"""A layer's routed experts with FP4 weights, from routed tokens to their sums."""

from __future__ import annotations

import math
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.compiler import is_exporting

from dsv4_kernels import _native
from dsv4_kernels.errors import InvalidArgumentError
from dsv4_kernels.moe.expert_weights import LARGEST_NVFP4, ExpertWeights, as_number, check_int, refuse
from dsv4_kernels.moe.grouped_gemm import (
    moe_grouped_gemm,
    moe_grouped_gemm_quantized,
    run_fused_swiglu_grouped_gemm,
    run_nvfp4_grouped_gemm,
)
from dsv4_kernels.moe.quantize import (
    quantize_activation_nvfp4,
    quantize_mxfp8,
)
from dsv4_kernels.moe.routing import SortedRoutes, max_tiles, moe_finalize, moe_sort
from dsv4_kernels.moe.weight_layouts import gate_and_up
from dsv4_kernels.presets import Preset, find_preset

# Rows per expert up to which tiles of 16 and of 64 rows are the fastest: numbers, as a trace can branch on those alone.
ROWS_FOR_TILES_OF_16 = _native.moe_tile_max_slots_per_expert(16)
ROWS_FOR_TILES_OF_64 = _native.moe_tile_max_slots_per_expert(64)


class Nvfp4MoE(ExpertWeights):
    """The routed experts of one layer: y[t] = sum_k weight[t, k] * expert[id[t, k]](x[t]), with FP4 weights.

    An expert is w2 . (silu(min(w1 . x, limit)) * clamp(w3 . x, -limit, limit)), sums in float32, as the DeepSeek-V4
    models have it. Weights are NVFP4 or MXFP4. A forward is four launches (moe_sort, two grouped products,
    moe_finalize), or five where activations are quantised: each token once, before; the rows between the products by
    the first one itself. Nothing is synchronised or copied to the host, so it captures in a CUDA graph
    whose replays follow new routes, and traces under torch.compile(fullgraph=True).

    Intermediate results are torch tensors: the allocator reuses their memory from layer to layer on one stream, and
    keeps streams apart. workspace_bytes() says how much a call needs.

    The layer owns its buffers from construction on. Preparing weights again, loading a state dict and the setters of
    scales write into the same memory wherever format and layout stay the same, so that a captured graph uses the new
    values at its next replay. What a graph keeps from its capture: the SwiGLU limit and the other plain numbers and
    options, which are arguments of the launches. Other weights (NVFP4 for MXFP4, or MXFP4 with scales above 2^9) take
    new memory: capture again. Write to buffers through these methods only: with NVFP4 activations l1_factor and
    l2_factor are derived from them.

    A state dict holds the weights as they lie in memory and loads into a layer of the same sizes and activations,
    whatever it held before. `.to(device)` moves everything; casts (`.to(dtype)`, `.half()`) leave all dtypes alone.

    A token's result does not depend on its place in the batch or on other tokens, for batches that use tiles of one
    size (see tile_size and batch_invariant) and, where that is 16, one kernel: few tiles of some sizes have another
    (see moe_grouped_gemm; of the presets, up to 2 tokens of v4-pro). Else float32 sums round differently.

    Args:
        num_experts: experts that live here.
        hidden_size: an expert's outer width. Which widths there are kernels for, moe_grouped_gemm says.
        intermediate_size: an expert's inner width, or this rank's part of it (see tensor_parallel_size).
        top_k: experts per token.
        experts_start_idx: id of the first expert here; ids outside [start, start + num_experts) contribute nothing.
        total_experts: experts over all ranks, from which the tile size is chosen; default num_experts.
        swiglu_limit: clamp of gate and up; None or 0 for none.
        weight_before_second: multiply by the routing weight before w2, rounding to bfloat16 in between, as the models'
            own code does; else after it, in float32, which is more precise.
        activations: what the products read: "bfloat16" (W4A16, any weights), "nvfp4" (W4A4, NVFP4 weights) or "mxfp8"
            (W4A8, MXFP4 weights). NVFP4 needs a static scale for each product: set_activation_global_scales,
            compute_activation_global_scales or a checkpoint's.
        weights: "mxfp4" or "nvfp4"; others are then refused. None: what activations need, or with bfloat16 whatever is
            prepared or loaded; buffers for MXFP4 are allocated first.
        batch_invariant: tiles of one size for all batches: a token's bits are then the same in every batch, and
            torch.compile with dynamic shapes makes one graph instead of one for each tile size. Small batches take
            longer.
        tensor_parallel_rank: which part of each expert's inner width lives here, for prepare_weights_from_checkpoint.
            The sum over ranks is the layer.
        tensor_parallel_size: how many ranks share the inner width.
        device: of the weights.
    """

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
        weights: str | None = None,
        batch_invariant: bool = False,
        tensor_parallel_rank: int = 0,
        tensor_parallel_size: int = 1,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(
            num_experts,
            hidden_size,
            intermediate_size,
            experts_start_idx=experts_start_idx,
            activations=activations,
            weights=weights,
            tensor_parallel_rank=tensor_parallel_rank,
            tensor_parallel_size=tensor_parallel_size,
            device=device,
        )
        self.top_k = top_k
        self.total_experts = num_experts if total_experts is None else total_experts
        check_int("top_k", top_k, 1)
        check_int("total_experts", self.total_experts, 1)
        self.weight_before_second = weight_before_second
        self.batch_invariant = batch_invariant
        # The buffers that the products are multiplied by.
        self._factor_of = {p: f"{p}_factor" if activations == "nvfp4" else f"{p}_alpha" for p in ("l1", "l2")}
        self._fused = True
        self._limit = 0.0
        self.set_swiglu_limit(swiglu_limit)

    @staticmethod
    def from_preset(preset: str | Preset, **options: Any) -> Nvfp4MoE:
        """All experts of a layer of that model; weights are still to be prepared. options: those of the class."""
        sizes = find_preset("Nvfp4MoE", preset)
        options = {"top_k": sizes.top_k, **options}
        return Nvfp4MoE(sizes.experts, sizes.hidden_size, sizes.expert_intermediate, **options)

    def set_swiglu_limit(self, limit: float | None) -> None:
        """The clamp of gate and up; None or 0 for none. A captured graph keeps the limit it was captured with."""
        if limit is not None and not 0 <= as_number(limit) < math.inf:
            refuse("swiglu_limit", "a finite number of at least 0, or None", repr(limit))
        self._limit = float(limit or 0.0)

    def set_fused_swiglu(self, enabled: bool) -> None:
        """Whether SwiGLU, and quantising its results for the second product, is part of the first product (the
        default), or follows it: SwiGLU in torch, from bfloat16.
        """
        self._fused = enabled

    def tile_size(self, tokens: int) -> int:
        """Rows of a tile for a batch, from its size and the numbers of experts alone.

        One size for all batches if the layer is batch-invariant, and in exported programs, which serve all sizes.
        """
        if self.batch_invariant or is_exporting():
            return 128 if self.activations == "mxfp8" else 64
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

    def compute_activation_global_scales(
        self, hidden: Tensor, topk_weights: Tensor, topk_ids: Tensor
    ) -> tuple[float, float]:
        """Sets both scales from a sample, by running the first product in bfloat16. Synchronises: for warm-up only.

        Arguments are run()'s; returns the scales.
        """
        tokens = self.check_batch("compute_activation_global_scales", hidden, topk_weights, topk_ids, None)
        routes = moe_sort(topk_ids, self.num_experts, self.tile_size(tokens), self.experts_start_idx)
        weights = topk_weights if self.weight_before_second else None
        rows = self._first(hidden, None, routes, weights, self.l1_alpha)
        used = routes.slot_to_row[routes.slot_to_row >= 0].to(torch.int64)
        scales = []
        for name, value in (("hidden", hidden), ("the first product", rows[used])):
            amax = float(value.abs().amax()) if value.numel() else 0.0
            if not math.isfinite(amax):
                raise InvalidArgumentError(
                    f"compute_activation_global_scales: {name}: expected finite values, got a largest one of {amax}"
                )
            scales.append((amax or 1.0) / LARGEST_NVFP4)
        self.set_activation_global_scales(*scales)
        return scales[0], scales[1]

    def run(self, hidden: Tensor, topk_weights: Tensor, topk_ids: Tensor, *, shared: Tensor | None = None) -> Tensor:
        """The experts' sums.

        Args:
            hidden: [tokens, hidden_size] bfloat16.
            topk_weights: [tokens, top_k] float32.
            topk_ids: [tokens, top_k] int32 or int64, ids over all ranks; -1 and ids of other ranks contribute nothing.
            shared: [tokens, hidden_size] bfloat16 to add, such as the shared expert's output.

        Returns:
            [tokens, hidden_size] bfloat16.

        Raises:
            InvalidArgumentError: extents that do not agree, or no weights yet; nothing has been launched.
        """
        tokens = self.check_batch("Nvfp4MoE", hidden, topk_weights, topk_ids, shared)
        routes = moe_sort(topk_ids, self.num_experts, self.tile_size(tokens), self.experts_start_idx)
        # In the dictionary itself: as attributes, modules look buffers up slowly.
        buffers: dict[str, Any] = self._buffers
        inner_weights = topk_weights if self.weight_before_second else None
        x, x_scale = self._quantized(hidden, buffers["l1_activation_scale"])
        inner, inner_scale = self._between(x, x_scale, routes, inner_weights)
        rows = run_nvfp4_grouped_gemm(
            inner,
            buffers["l2_weight"],
            buffers["l2_scale"],
            routes.tile_to_expert,
            routes.row_to_slot,
            x_scale=inner_scale,
            alpha=buffers[self._factor_of["l2"]],
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
        self, x: Tensor, x_scale: Tensor | None, routes: SortedRoutes, weights: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The rows between the products as the second one reads them, and their scales."""
        buffers: dict[str, Any] = self._buffers
        alpha = buffers[self._factor_of["l1"]]
        if x_scale is None or not self._fused:
            rows = self._first(x, x_scale, routes, weights, alpha)
            return self._quantized(rows, buffers["l2_activation_scale"])
        codes, scales = moe_grouped_gemm_quantized(
            x,
            buffers["l1_weight"],
            buffers["l1_scale"],
            routes.tile_to_expert,
            routes.row_to_slot,
            x_scale,
            buffers["l2_activation_scale"] if self.activations == "nvfp4" else None,
            alpha,
            weights,
            self.top_k,
            self._limit,
        )
        return (codes.view(torch.uint8) if self.activations == "nvfp4" else codes), scales

    def _first(
        self,
        x: Tensor,
        x_scale: Tensor | None,
        routes: SortedRoutes,
        weights: Tensor | None,
        alpha: Tensor | None,
    ) -> Tensor:
        """The rows between the products, bfloat16, routing weights in them if given."""
        if not self._fused:
            return self._first_unfused(x, x_scale, routes, weights, alpha)
        buffers: dict[str, Any] = self._buffers
        return run_fused_swiglu_grouped_gemm(
            x,
            buffers["l1_weight"],
            buffers["l1_scale"],
            routes.tile_to_expert,
            routes.row_to_slot,
            x_scale=x_scale,
            alpha=alpha,
            slot_weights=weights,
            top_k=self.top_k,
            limit=self._limit,
        )

    forward = run

    def _first_unfused(
        self,
        x: Tensor,
        x_scale: Tensor | None,
        routes: SortedRoutes,
        weights: Tensor | None,
        alpha: Tensor | None,
    ) -> Tensor:
        """The first product into bfloat16, then SwiGLU. Rows without a slot hold anything."""
        maps = routes.tile_to_expert, routes.row_to_slot
        rows = routes.row_to_slot.shape[0]
        both = moe_grouped_gemm(x, self.l1_weight, self.l1_scale, *maps, x_scale, None, None, self.top_k).to(
            torch.float32
        )
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

    def extra_repr(self) -> str:
        """Sizes, formats, and which part of the layer this is."""
        last = self.experts_start_idx + self.num_experts - 1
        return (
            f"experts={self.experts_start_idx}..{last} of {self.total_experts}, hidden_size={self.hidden_size}, "
            f"intermediate_size={self.intermediate_size}, top_k={self.top_k}, activations={self.activations!r}, "
            f"weights={self._layout('l1').format!r}"
        )

    def check_batch(
        self, function: str, hidden: Tensor, topk_weights: Tensor, topk_ids: Tensor, shared: Tensor | None
    ) -> int:
        """Checks run()'s extents, which only the whole layer knows, and returns the number of tokens.

        Raises:
            InvalidArgumentError: extents that do not agree, or no weights yet. function: whom the text names.
        """
        routed = topk_ids.shape
        if (
            self._prepared
            and len(routed) == 2
            and routed[1] == self.top_k
            and topk_weights.shape == routed
            and hidden.shape == (routed[0], self.hidden_size)
            and (shared is None or shared.shape == hidden.shape)
        ):
            tokens: int = routed[0]
            return tokens
        return self._refuse_batch(function, hidden, topk_weights, topk_ids, shared)

    def _refuse_batch(
        self, function: str, hidden: Tensor, topk_weights: Tensor, topk_ids: Tensor, shared: Tensor | None
    ) -> NoReturn:
        """Says which of the extents is wrong, hidden's number of tokens being taken for right."""
        if not self._prepared:
            refuse("weights", "prepared weights", "none; call prepare_weights_* or load a state dict")
        tokens = hidden.shape[0] if hidden.dim() else 0
        wrong = [
            (name, need, list(tensor.shape))
            for name, tensor, need in (
                ("hidden", hidden, [tokens, self.hidden_size]),
                ("topk_ids", topk_ids, [tokens, self.top_k]),
                ("topk_weights", topk_weights, [tokens, self.top_k]),
                ("shared", shared, [tokens, self.hidden_size]),
            )
            if tensor is not None and list(tensor.shape) != need
        ]
        name, expected, got = wrong[0]
        raise InvalidArgumentError(f"{function}: {name}: expected shape {expected}, got {got}")
