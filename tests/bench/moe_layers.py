"""Times the experts of whole layers: moe_sort, both products and moe_finalize in one graph, other experts in each call.

    python -m tests.bench.moe_layers FILE

Bytes are those of the checkpoint's weights that a call touches; what the rows need beside them is not counted, nor is
it in the targets. Baselines do the same in torch, in the same run, on weights that were dequantised to bfloat16
beforehand and are four times as many bytes. Needs a GPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from dsv4_kernels.cases.moe.grouped_gemm import bfloat16_values
from dsv4_kernels.cli.machine import describe
from dsv4_kernels.cli.timing import ceilings, seconds_per_call
from dsv4_kernels.moe import Nvfp4MoE
from dsv4_kernels.presets import PRESETS, Preset
from torch import Tensor

from tests.bench.moe_baselines import Bfloat16Experts

DECODE, ALL = (1, 2, 4, 16, 128), (1, 2, 4, 16, 128, 1024, 8192)

# Preset, whether weights are NVFP4, what the products read, tokens.
LAYERS = (
    ("v4-flash", False, "bfloat16", ALL),
    ("v4-flash", True, "bfloat16", (1, 128, 8192)),
    ("v4-flash", True, "nvfp4", (128, 8192)),
    ("v4-flash", False, "mxfp8", (128, 8192)),
    ("v4-pro", False, "bfloat16", (*DECODE, 8192)),
    ("v41-flash", False, "bfloat16", DECODE),
)


# Of the baselines' bfloat16 weights: beside ours and a copy of them, what a device of 80 GB has room for.
MOST_BASELINE_BYTES = 30e9


@dataclass(frozen=True)
class Weights:
    """As a checkpoint has them. factor: of NVFP4 weights, an expert's."""

    l1: tuple[Tensor, Tensor]
    l2: tuple[Tensor, Tensor]
    factor: Tensor | None

    def layer(self, activations: str, top_k: int) -> Nvfp4MoE:
        codes = self.l2[0]
        experts, hidden, inner = codes.shape[0], codes.shape[1], 2 * codes.shape[2]
        layer = Nvfp4MoE(experts, hidden, inner, top_k=top_k, activations=activations, device=codes.device)
        layer.prepare_weights_from_stacked(*self.l1, self.factor, *self.l2, self.factor)
        return layer

    def in_bfloat16(self) -> Bfloat16Experts:
        def dequantized(codes: Tensor, scales: Tensor) -> Tensor:
            out = torch.empty((*codes.shape[:2], 2 * codes.shape[2]), dtype=torch.bfloat16, device=codes.device)
            for expert, place in enumerate(out):
                factor = 1.0 if self.factor is None else self.factor[expert]
                place.copy_(bfloat16_values(codes[expert], scales[expert]) * factor)
            return out

        return Bfloat16Experts(dequantized(*self.l1), dequantized(*self.l2), limit=10.0)


def random_weights(sizes: Preset, nvfp4: bool, device: str = "cuda") -> Weights:
    """Every expert's in memory of its own, every code, scales of a trained layer's size."""
    experts, hidden, inner = sizes.experts, sizes.hidden_size, sizes.expert_intermediate

    def matrix(rows: int, columns: int) -> tuple[Tensor, Tensor]:
        codes = torch.randint(256, (experts, rows, columns // 2), dtype=torch.uint8, device=device)
        shape = (experts, rows, columns // (16 if nvfp4 else 32))
        scales = torch.randint(*((8, 32) if nvfp4 else (116, 120)), shape, dtype=torch.uint8, device=device)
        return codes, scales.view(torch.float8_e4m3fn) if nvfp4 else scales

    factor = torch.full((experts,), 0.01, device=device) if nvfp4 else None
    return Weights(matrix(2 * inner, hidden), matrix(hidden, inner), factor)


def routes(tokens: int, sizes: Preset, calls: int) -> list[Tensor]:
    """Uniform routes; of few tokens without an expert that two calls in a row share."""
    slots = tokens * sizes.top_k
    if 2 * slots <= sizes.experts:
        order = torch.randperm(sizes.experts, device="cuda").to(torch.int32)
        steps = torch.arange(slots, device="cuda")
        return [order[(steps + call * slots) % sizes.experts].view(tokens, sizes.top_k) for call in range(calls)]
    scores = torch.rand(calls, tokens, sizes.experts, device="cuda")
    return list(scores.topk(sizes.top_k).indices.to(torch.int32))


def measure(
    layer: Nvfp4MoE, baselines: Bfloat16Experts | None, sizes: Preset, nvfp4: bool, tokens: int
) -> dict[str, Any]:
    hidden = torch.randn(tokens, sizes.hidden_size, device="cuda").to(torch.bfloat16)
    weights = torch.rand(tokens, sizes.top_k, device="cuda")
    ids = routes(tokens, sizes, 16 if tokens < 16 else 2)

    def seconds_of(run: Callable[..., Tensor]) -> float:
        return seconds_per_call([lambda one=one: run(hidden, weights, one) for one in ids], "cuda")

    seconds = seconds_of(layer.run)
    an_expert = 3 * sizes.hidden_size * sizes.expert_intermediate * (1 / 2 + 1 / (16 if nvfp4 else 32))
    touched = sum(one.unique().numel() for one in ids) / len(ids)
    operations = 2 * 3 * sizes.hidden_size * sizes.expert_intermediate * tokens * sizes.top_k
    row = {
        "tokens": tokens,
        "tile": layer.tile_size(tokens),
        "us": seconds * 1e6,
        "experts": touched,
        "tbs": touched * an_expert / seconds / 1e12,
        "tflops": operations / seconds / 1e12,
    }
    if baselines:
        row["torch_loop_us"] = seconds_without_graph(lambda: baselines.loop(hidden, weights, ids[0])) * 1e6
    if baselines and hasattr(torch, "_grouped_mm"):
        row["torch_grouped_mm_us"] = seconds_of(baselines.grouped_mm) * 1e6
        row["torch_compile_grouped_mm_us"] = seconds_of(torch.compile(baselines.grouped_mm)) * 1e6
    return row


def seconds_without_graph(function: Callable[[], object], calls: int = 5) -> float:
    """The median of calls one after another, of what waits for the host and cannot be captured."""
    function()
    times = []
    for _ in range(calls):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json", type=Path)
    options = parser.parse_args()
    torch.manual_seed(1)
    rows = []
    for name, nvfp4, activations, batches in LAYERS:
        sizes = PRESETS[name]
        given = random_weights(sizes, nvfp4)
        layer = given.layer(activations, sizes.top_k)
        in_bfloat16 = 2 * (given.l1[0].numel() + given.l2[0].numel()) * 2 <= MOST_BASELINE_BYTES
        baselines = given.in_bfloat16() if activations == "bfloat16" and in_bfloat16 else None
        for tokens in batches:
            row = {"preset": name, "weights": "NVFP4" if nvfp4 else "MXFP4", "activations": activations}
            row |= measure(layer, baselines, sizes, nvfp4, tokens)
            rows.append({key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()})
            print(rows[-1], flush=True)
        del given, layer, baselines
        torch.cuda.empty_cache()
    report = {"machine": describe("cuda"), "copy_bandwidth": ceilings("cuda").copy_bandwidth, "rows": rows}
    options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
