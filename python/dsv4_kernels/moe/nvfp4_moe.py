"""A layer's routed experts with FP4 weights, from routed tokens to their sums."""

from __future__ import annotations

import math
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from dsv4_kernels import _native
from dsv4_kernels.errors import InvalidArgumentError
from dsv4_kernels.moe.expert_weights import LARGEST_NVFP4, ExpertWeights, as_number, check_int, refuse
from dsv4_kernels.moe.grouped_gemm import (
    moe_grouped_gemm,
    moe_grouped_gemm_quantized,
    run_fused_swiglu_grouped_gemm,
    run_nvfp4_grouped_gemm,
)
from dsv4_kernels.moe.quantize import quantize_mx, quantize_nvfp4
from dsv4_kernels.moe.routing import max_tiles, moe_finalize, moe_sort, moe_tiles_from_counts
from dsv4_kernels.moe.weight_layouts import gate_and_up
from dsv4_kernels.moe.workspace_plan import NO_MEMORY, Memory, Plan, carve, plan_bytes
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
    keeps streams apart. Or an engine gives the memory: a workspace of workspace_bytes(), known without a call, and out.
    A call that is given both allocates nothing.

    Rows that another library has dispatched, by expert and with counts, are run_batched()'s.

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
            Where the experts here are no range of ids, run() takes an expert_map.
        total_experts: experts over all ranks, from which the tile size is chosen; default num_experts.
        num_fused_shared_experts: how many of these experts are shared ones, to which every token has a route of its
            own (see router.append_shared_experts): top_k and total_experts count them too.
        swiglu_limit: clamp of gate and up; None or 0 for none.
        weight_before_second: multiply by the routing weight before w2, rounding to bfloat16 in between, as the models'
            own code does; else after it, in float32, which is more precise.
        apply_router_weight_on_input: multiply hidden by the routing weight before w1, rounding to bfloat16, and apply
            it nowhere else, as models with top-1 routing do. With top_k above 1 each route has its own row of hidden.
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
        num_fused_shared_experts: int = 0,
        swiglu_limit: float | None = 10.0,
        weight_before_second: bool = False,
        apply_router_weight_on_input: bool = False,
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
        self.num_fused_shared_experts = num_fused_shared_experts
        check_int("num_fused_shared_experts", num_fused_shared_experts, 0)
        if num_fused_shared_experts >= min(top_k, self.total_experts):
            need = f"less than top_k ({top_k}) and total_experts ({self.total_experts}), which count them"
            refuse("num_fused_shared_experts", need, num_fused_shared_experts)
        if weight_before_second and apply_router_weight_on_input:
            refuse("apply_router_weight_on_input", "False with weight_before_second", True)
        self.weight_before_second = weight_before_second
        self.apply_router_weight_on_input = apply_router_weight_on_input
        self.batch_invariant = batch_invariant
        # The buffers that the products are multiplied by.
        self._factor_of = {p: f"{p}_factor" if activations == "nvfp4" else f"{p}_alpha" for p in ("l1", "l2")}
        self._fused = True
        self._limit = 0.0
        self.set_swiglu_limit(swiglu_limit)

    @staticmethod
    def from_preset(preset: str | Preset, **options: Any) -> Nvfp4MoE:
        """All experts of a layer of that model, with num_fused_shared_experts its shared ones too; weights are still to
        be prepared. options: those of the class.
        """
        sizes = find_preset("Nvfp4MoE", preset)
        fused = options.get("num_fused_shared_experts", 0)
        options = {"top_k": sizes.top_k + fused, **options}
        return Nvfp4MoE(sizes.experts + fused, sizes.hidden_size, sizes.expert_intermediate, **options)

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
        # torch.compiler.is_exporting() itself is true in every trace of torch before 2.12.
        if self.batch_invariant or torch.compiler._is_exporting_flag:
            return 128 if self.activations == "mxfp8" else 64
        shared = self.num_fused_shared_experts
        rows = tokens * (self.top_k - shared) / (self.total_experts - shared)
        if rows <= ROWS_FOR_TILES_OF_16:
            return 16
        return 64 if rows <= ROWS_FOR_TILES_OF_64 and self.activations != "mxfp8" else 128

    def workspace_bytes(self, tokens: int) -> int:
        """Bytes of workspace with which run() takes every batch of up to so many tokens.

        What its launches hand on: routes, quantised tokens, the products' rows.
        """
        shared = self.num_fused_shared_experts
        batches = [tokens]
        for rows in (ROWS_FOR_TILES_OF_16, ROWS_FOR_TILES_OF_64):  # up to which tiles are smaller
            batches.append(rows * (self.total_experts - shared) // (self.top_k - shared))
        return max(plan_bytes(self._plan(batch)) for batch in batches if batch <= tokens)

    def batched_workspace_bytes(self, max_rows: int) -> int:
        """Bytes of workspace with which run_batched() takes max_rows rows for each expert."""
        return plan_bytes(self._batched_plan(max_rows))

    def _plan(self, tokens: int) -> Plan:
        """What a call of run() writes before its result."""
        slots, tile_size = tokens * self.top_k, self.tile_size(tokens)
        tiles = max_tiles(slots, self.num_experts, tile_size)
        plan: Plan = {
            "tile_to_expert": ((tiles,), torch.int32),
            "tile_rows": ((tiles,), torch.int32),
            "row_to_slot": ((tiles * tile_size,), torch.int32),
            "slot_to_row": ((tokens, self.top_k), torch.int32),
            "counts": ((2,), torch.int32),
        }
        if self.apply_router_weight_on_input:
            plan["weighted"] = (tokens, self.top_k, self.hidden_size), torch.bfloat16
        plan |= self._products_plan(slots if self.apply_router_weight_on_input else tokens, tiles * tile_size)
        plan["rows"] = (tiles * tile_size, self.hidden_size), torch.bfloat16
        return plan

    def _batched_plan(self, max_rows: int) -> Plan:
        """What a call of run_batched() writes before its result."""
        rows = self.num_experts * max_rows
        plan: Plan = {
            "tile_to_expert": ((rows // self.batched_tile_size(max_rows),), torch.int32),
            "row_to_slot": ((rows,), torch.int32),
        }
        return plan | self._products_plan(rows, rows)

    def _products_plan(self, x_rows: int, rows: int) -> Plan:
        """What is quantised for the products, and the rows between them."""
        plan = self._quantised_plan("x", x_rows, self.hidden_size)
        if not self._fused:
            plan["both"] = (rows, 2 * self.intermediate_size), torch.bfloat16
        if self.activations != "bfloat16":
            plan |= self._quantised_plan("inner", rows, self.intermediate_size)
        elif self._fused:
            plan["inner"] = (rows, self.intermediate_size), torch.bfloat16
        return plan

    def _quantised_plan(self, name: str, rows: int, columns: int) -> Plan:
        if self.activations == "nvfp4":
            return {
                name: ((rows, columns // 2), torch.uint8),
                f"{name}_scale": ((rows, columns // 16), torch.float8_e4m3fn),
            }
        if self.activations == "mxfp8":
            scales = (rows, columns // 32), torch.float8_e8m0fnu
            return {name: ((rows, columns), torch.float8_e4m3fn), f"{name}_scale": scales}
        return {}

    def compute_activation_global_scales(
        self, hidden: Tensor, topk_weights: Tensor, topk_ids: Tensor, *, expert_map: Tensor | None = None
    ) -> tuple[float, float]:
        """Sets both scales from a sample, by running the first product in bfloat16. Synchronises: for warm-up only.

        Arguments are run()'s; returns the scales.
        """
        tokens = self.check_batch("compute_activation_global_scales", hidden, topk_weights, topk_ids, None)
        start = self.experts_start_idx if expert_map is None else 0
        routes = moe_sort(topk_ids, self.num_experts, self.tile_size(tokens), start, expert_map)
        weights = topk_weights if self.weight_before_second else None
        x, slots = self._product_input(hidden, topk_weights, None)
        rows = self._first(x, None, routes[0], routes[2], weights, slots, self.l1_alpha, NO_MEMORY)
        used = routes.slot_to_row[routes.slot_to_row >= 0].to(torch.int64)
        scales = []
        for name, value in (("hidden", x), ("the first product", rows[used])):
            amax = float(value.abs().amax()) if value.numel() else 0.0
            if not math.isfinite(amax):
                raise InvalidArgumentError(
                    f"compute_activation_global_scales: {name}: expected finite values, got a largest one of {amax}"
                )
            scales.append((amax or 1.0) / LARGEST_NVFP4)
        self.set_activation_global_scales(*scales)
        return scales[0], scales[1]

    def run(
        self,
        hidden: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        *,
        shared: Tensor | None = None,
        expert_map: Tensor | None = None,
        workspace: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """The experts' sums.

        Args:
            hidden: [tokens, hidden_size] bfloat16.
            topk_weights: [tokens, top_k] float32.
            topk_ids: [tokens, top_k] int32 or int64, ids over all ranks; -1 and ids of other ranks contribute nothing.
            shared: [tokens, hidden_size] bfloat16 to add, such as the shared expert's output.
            expert_map: [ids] int32, the local expert of each id, -1 for those that are elsewhere; then
                experts_start_idx does not count. For ids, logical or physical, of which those here are no range:
                replicas of busy experts, experts dealt out to ranks by turns.
            workspace: [workspace_bytes(tokens) or more] uint8 on a multiple of 16 bytes, for what lies between the
                launches. Holds anything before and after; calls that may run at the same time need one each. Without
                fused SwiGLU (see set_fused_swiglu), torch allocates more.
            out: [tokens, hidden_size] bfloat16 to write to; hidden or shared itself is allowed.

        Returns:
            [tokens, hidden_size] bfloat16.

        Raises:
            InvalidArgumentError: extents that do not agree, or no weights yet; nothing has been launched.
        """
        tokens = self.check_batch("Nvfp4MoE", hidden, topk_weights, topk_ids, shared)
        memory = NO_MEMORY if workspace is None else carve(workspace, self._plan(tokens))
        late = not (self.weight_before_second or self.apply_router_weight_on_input)
        return self.sums(
            hidden,
            None,
            topk_weights,
            topk_ids,
            self.tile_size(tokens),
            weigh=late,
            shared=shared,
            expert_map=expert_map,
            memory=memory,
            out=out,
        )

    def sums(
        self,
        hidden: Tensor,
        scale: Tensor | None,
        topk_weights: Tensor,
        topk_ids: Tensor,
        tile_size: int,
        *,
        weigh: bool,
        shared: Tensor | None = None,
        expert_map: Tensor | None = None,
        memory: Memory = NO_MEMORY,
        out: Tensor | None = None,
    ) -> Tensor:
        """run() for callers inside the package, with arguments that fit: any number of routes per token.

        Args:
            hidden: as in run(), or with activations "mxfp8" float8_e4m3fn with a scale.
            scale: [tokens, hidden_size / 32] float8_e8m0fnu or None.
            topk_weights: as in run(), [tokens, routes].
            topk_ids: as in run(), [tokens, routes].
            tile_size: rows of a tile.
            weigh: whether the sum is weighted.
            shared: as in run().
            expert_map: as in run().
            memory: pieces of a workspace.
            out: as in run().
        """
        routes = moe_sort(
            topk_ids,
            self.num_experts,
            tile_size,
            self.experts_start_idx if expert_map is None else 0,
            expert_map,
            out_tile_to_expert=memory.tile_to_expert,
            out_tile_rows=memory.tile_rows,
            out_row_to_slot=memory.row_to_slot,
            out_slot_to_row=memory.slot_to_row,
            out_counts=memory.counts,
        )
        x, slots = self._product_input(hidden, topk_weights, memory.weighted)
        rows = self._products(
            x,
            scale,
            routes.tile_to_expert,
            routes.row_to_slot,
            topk_weights if self.weight_before_second else None,
            slots,
            memory,
            memory.rows,
        )
        return moe_finalize(rows, routes.slot_to_row, topk_weights if weigh else None, shared, out=out)

    forward = run

    def run_batched(
        self,
        rows: Tensor,
        counts: Tensor,
        *,
        scale: Tensor | None = None,
        workspace: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """The experts on rows that lie by expert: the form of DeepEP's low-latency mode and of vLLM's batched experts.

        Routing weights are the combine's to apply. Three launches, or four where activations are quantised. A row's
        result does not depend on the others'; with tiles of one size (see batch_invariant) it has the bits that run()
        computes for the route.

        Args:
            rows: [num_experts, max_rows, hidden_size] bfloat16, contiguous; or, with activations "mxfp8",
                float8_e4m3fn with a scale. max_rows is a multiple of 16, better of 128 where experts get many rows.
            counts: [num_experts] int32 or int64: how many of each expert's rows are used, the first ones. Below 0 acts
                as 0, above max_rows as max_rows. Other rows have no part in any result; bfloat16 ones are not read by
                products of bfloat16.
            scale: [num_experts, max_rows, hidden_size / 32] float8_e8m0fnu or uint8, with rows of float8_e4m3fn. Scales
                for more columns each are repeated.
            workspace: [batched_workspace_bytes(max_rows) or more] uint8, as in run().
            out: [num_experts, max_rows, hidden_size] bfloat16 to write to.

        Returns:
            out. Rows that are not used are not written: undefined in an allocated out.

        Raises:
            InvalidArgumentError: extents that do not agree, or no weights yet; nothing has been launched.
        """
        max_rows = self._check_rows(rows, counts, scale, out)
        tile_size = self.batched_tile_size(max_rows)
        memory = NO_MEMORY if workspace is None else carve(workspace, self._batched_plan(max_rows))
        tile_to_expert, row_to_slot = moe_tiles_from_counts(
            counts, max_rows, tile_size, out_tile_to_expert=memory.tile_to_expert, out_row_to_slot=memory.row_to_slot
        )
        x, x_scale, flat_out = (
            None if tensor is None else tensor.view(self.num_experts * max_rows, tensor.shape[2])
            for tensor in (rows, scale, out)
        )
        result = self._products(x, x_scale, tile_to_expert, row_to_slot, None, 0, memory, flat_out)  # type: ignore[arg-type]
        return result.view(self.num_experts, max_rows, self.hidden_size) if out is None else out

    def batched_tile_size(self, max_rows: int) -> int:
        """Rows of a tile for max_rows rows per expert, as many as there would be if all tokens went to one expert.

        The tile size of a batch of so many tokens, or the next smaller one that divides max_rows.
        """
        wanted = self.tile_size(max_rows)
        sizes = (16, 128) if self.activations == "mxfp8" else (16, 64, 128)
        fitting = [
            size
            for size in sizes
            if max_rows % size == 0 and (size == wanted or (size < wanted and not self.batch_invariant))
        ]
        if not fitting:
            need = f"a multiple of {wanted if self.batch_invariant else 16}"
            refuse("rows", f"{need} as the number of rows per expert", max_rows)
        return fitting[-1]

    def _product_input(self, hidden: Tensor, topk_weights: Tensor, out: Tensor | None) -> tuple[Tensor, int]:
        """The rows that the first product reads, and how many slots share one. out: room for weighted ones."""
        if not self.apply_router_weight_on_input:
            return hidden, topk_weights.shape[1]
        if out is None:
            out = hidden.new_empty((*topk_weights.shape, self.hidden_size))
        torch.mul(hidden[:, None], topk_weights[..., None], out=out)  # in float32, rounded once
        return out.view(-1, self.hidden_size), 1

    def _products(
        self,
        x: Tensor,
        x_scale: Tensor | None,
        tile_to_expert: Tensor,
        row_to_slot: Tensor,
        weights: Tensor | None,
        slots: int,
        memory: Memory,
        out: Tensor | None,
    ) -> Tensor:
        """Both products. weights: to multiply rows by in between. slots: that share a row of x; 0: row r reads x[r]."""
        # In the dictionary itself: as attributes, modules look buffers up slowly.
        buffers: dict[str, Any] = self._buffers
        if x_scale is None:
            x, x_scale = self._quantized(x, buffers["l1_activation_scale"], memory.x, memory.x_scale)
        inner, inner_scale = self._between(x, x_scale, tile_to_expert, row_to_slot, weights, slots, memory)
        return run_nvfp4_grouped_gemm(
            inner,
            buffers["l2_weight"],
            buffers["l2_scale"],
            tile_to_expert,
            row_to_slot,
            x_scale=inner_scale,
            alpha=buffers[self._factor_of["l2"]],
            out=out,
        )

    def _quantized(
        self, x: Tensor, scale: Tensor, out: Tensor | None, out_scale: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        if self.activations == "nvfp4":
            codes, scales = quantize_nvfp4(x, scale, out=out, out_scale=out_scale)
            return codes.view(torch.uint8), scales
        if self.activations == "mxfp8":
            return quantize_mx(x, out=out, out_scale=out_scale)
        return x, None

    def _between(
        self,
        x: Tensor,
        x_scale: Tensor | None,
        tile_to_expert: Tensor,
        row_to_slot: Tensor,
        weights: Tensor | None,
        slots: int,
        memory: Memory,
    ) -> tuple[Tensor, Tensor | None]:
        """The rows between the products as the second one reads them, and their scales."""
        buffers: dict[str, Any] = self._buffers
        alpha = buffers[self._factor_of["l1"]]
        if x_scale is None or not self._fused:
            rows = self._first(x, x_scale, tile_to_expert, row_to_slot, weights, slots, alpha, memory)
            return self._quantized(rows, buffers["l2_activation_scale"], memory.inner, memory.inner_scale)
        codes, scales = moe_grouped_gemm_quantized(
            x,
            buffers["l1_weight"],
            buffers["l1_scale"],
            tile_to_expert,
            row_to_slot,
            x_scale,
            buffers["l2_activation_scale"] if self.activations == "nvfp4" else None,
            alpha,
            weights,
            slots,
            self._limit,
            out=memory.inner,
            out_scale=memory.inner_scale,
        )
        return (codes.view(torch.uint8) if self.activations == "nvfp4" else codes), scales

    def _first(
        self,
        x: Tensor,
        x_scale: Tensor | None,
        tile_to_expert: Tensor,
        row_to_slot: Tensor,
        weights: Tensor | None,
        slots: int,
        alpha: Tensor | None,
        memory: Memory,
    ) -> Tensor:
        """The rows between the products, bfloat16, routing weights in them if given."""
        if not self._fused:
            return self._first_unfused(x, x_scale, tile_to_expert, row_to_slot, weights, slots, alpha, memory.both)
        buffers: dict[str, Any] = self._buffers
        return run_fused_swiglu_grouped_gemm(
            x,
            buffers["l1_weight"],
            buffers["l1_scale"],
            tile_to_expert,
            row_to_slot,
            x_scale=x_scale,
            alpha=alpha,
            slot_weights=weights,
            top_k=slots,
            limit=self._limit,
            out=memory.inner,
        )

    def _first_unfused(
        self,
        x: Tensor,
        x_scale: Tensor | None,
        tile_to_expert: Tensor,
        row_to_slot: Tensor,
        weights: Tensor | None,
        slots: int,
        alpha: Tensor | None,
        out: Tensor | None,
    ) -> Tensor:
        """The first product into bfloat16, then SwiGLU. Rows without a slot hold anything."""
        maps = tile_to_expert, row_to_slot
        rows = row_to_slot.shape[0]
        both = moe_grouped_gemm(x, self.l1_weight, self.l1_scale, *maps, x_scale, None, None, slots, out=out).to(
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
            of_row = row_to_slot.clamp(0, weights.numel() - 1).to(torch.int64)
            inner = inner * weights.reshape(-1)[of_row, None]
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

    def _check_rows(self, rows: Tensor, counts: Tensor, scale: Tensor | None, out: Tensor | None) -> int:
        """Checks run_batched()'s extents and returns max_rows."""
        if not self._prepared:
            refuse("weights", "prepared weights", "none; call prepare_weights_* or load a state dict")
        max_rows: int = rows.shape[1] if rows.dim() == 3 else 0
        for name, tensor, shape in (
            ("rows", rows, (self.num_experts, max_rows, self.hidden_size)),
            ("counts", counts, (self.num_experts,)),
            ("scale", scale, (self.num_experts, max_rows, self.hidden_size // 32)),
            ("out", out, (self.num_experts, max_rows, self.hidden_size)),
        ):
            if tensor is None:
                continue
            if tensor.shape != shape:
                refuse(name, f"shape {list(shape)}", list(tensor.shape))
            if not tensor.is_contiguous():
                refuse(name, "a contiguous tensor", f"strides {list(tensor.stride())}")
        quantised = rows.dtype == torch.float8_e4m3fn and self.activations == "mxfp8"
        if quantised != (scale is not None):
            need = "one with rows of float8_e4m3fn and activations 'mxfp8', else None"
            got = f"rows of {str(rows.dtype).removeprefix('torch.')}, activations {self.activations!r} and"
            refuse("scale", need, f"{got} {'none' if scale is None else 'one'}")
        return max_rows
