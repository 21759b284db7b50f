"""Times the experts of whole layers: moe_sort, both products and moe_finalize in one graph, other experts in each call.

    python tests/bench/moe_layers.py FILE

Bytes are those of the checkpoint's weights that a call touches; what the rows need beside them is not counted, nor is
it in the targets. Needs a GPU.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from dsv4_kernels.cli.machine import describe
from dsv4_kernels.cli.timing import ceilings, seconds_per_call
from dsv4_kernels.moe import Nvfp4MoE
from dsv4_kernels.presets import PRESETS, Preset

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


def random_layer(sizes: Preset, nvfp4: bool, activations: str) -> Nvfp4MoE:
    """Weights of every expert in memory of their own, every code, scales of a trained layer's size."""
    experts, hidden, inner = sizes.experts, sizes.hidden_size, sizes.expert_intermediate
    layer = Nvfp4MoE(experts, hidden, inner, top_k=sizes.top_k, activations=activations, device="cuda")

    def matrix(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
        codes = torch.randint(256, (experts, rows, columns // 2), dtype=torch.uint8, device="cuda")
        shape = (experts, rows, columns // (16 if nvfp4 else 32))
        scales = torch.randint(*((8, 32) if nvfp4 else (116, 120)), shape, dtype=torch.uint8, device="cuda")
        return codes, scales.view(torch.float8_e4m3fn) if nvfp4 else scales

    (l1, l1_scale), (l2, l2_scale) = matrix(2 * inner, hidden), matrix(hidden, inner)
    factor = torch.full((experts,), 0.01, device="cuda") if nvfp4 else None
    layer.prepare_weights_from_stacked(l1, l1_scale, factor, l2, l2_scale, factor)
    return layer


def routes(tokens: int, sizes: Preset, calls: int) -> list[torch.Tensor]:
    """Uniform routes; of few tokens without an expert that two calls in a row share."""
    slots = tokens * sizes.top_k
    if 2 * slots <= sizes.experts:
        order = torch.randperm(sizes.experts, device="cuda").to(torch.int32)
        steps = torch.arange(slots, device="cuda")
        return [order[(steps + call * slots) % sizes.experts].view(tokens, sizes.top_k) for call in range(calls)]
    scores = torch.rand(calls, tokens, sizes.experts, device="cuda")
    return list(scores.topk(sizes.top_k).indices.to(torch.int32))


def measure(layer: Nvfp4MoE, sizes: Preset, nvfp4: bool, tokens: int) -> dict[str, Any]:
    hidden = torch.randn(tokens, sizes.hidden_size, device="cuda").to(torch.bfloat16)
    weights = torch.rand(tokens, sizes.top_k, device="cuda")
    ids = routes(tokens, sizes, 16 if tokens < 16 else 2)
    seconds = seconds_per_call([lambda one=one: layer.run(hidden, weights, one) for one in ids], "cuda")
    an_expert = 3 * sizes.hidden_size * sizes.expert_intermediate * (1 / 2 + 1 / (16 if nvfp4 else 32))
    touched = sum(one.unique().numel() for one in ids) / len(ids)
    operations = 2 * 3 * sizes.hidden_size * sizes.expert_intermediate * tokens * sizes.top_k
    return {
        "tokens": tokens,
        "tile": layer.tile_size(tokens),
        "us": seconds * 1e6,
        "experts": touched,
        "tbs": touched * an_expert / seconds / 1e12,
        "tflops": operations / seconds / 1e12,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json", type=Path)
    options = parser.parse_args()
    torch.manual_seed(1)
    rows = []
    for name, nvfp4, activations, batches in LAYERS:
        sizes = PRESETS[name]
        layer = random_layer(sizes, nvfp4, activations)
        for tokens in batches:
            row = {"preset": name, "weights": "NVFP4" if nvfp4 else "MXFP4", "activations": activations}
            row |= measure(layer, sizes, nvfp4, tokens)
            rows.append({key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()})
            print(rows[-1], flush=True)
        del layer
        torch.cuda.empty_cache()
    report = {"machine": describe("cuda"), "copy_bandwidth": ceilings("cuda").copy_bandwidth, "rows": rows}
    options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
