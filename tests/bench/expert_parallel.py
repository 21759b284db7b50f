"""Times a layer whose experts are spread over GPUs: tokens to every rank, or to the ranks of their experts.

    python -m tests.bench.expert_parallel FILE [--ranks N]

A process for each GPU of this machine, over NCCL. Each call is captured in a CUDA graph and replayed; a time is the
slowest rank's median. Messages have room for every row that could be sent, or a quarter more than the average. Bytes
are those that a rank sends to others in one call, dispatch and combine. With --device cpu, toy sizes over gloo: a check
of this script, not a figure.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from dsv4_kernels.cli.machine import describe
from dsv4_kernels.moe import ExpertParallelMoE, Nvfp4MoE, rows_per_rank
from dsv4_kernels.presets import PRESETS
from torch.multiprocessing.spawn import spawn

TOKENS = (1, 16, 128, 1024, 4096)  # of each rank
SLACK = 1.25
CALLS = 20

# Options of ExpertParallelMoE, and whether messages have room for the average alone.
WAYS: tuple[tuple[dict[str, str], bool], ...] = (
    ({"dispatch": "gather"}, False),
    ({"dispatch": "routed"}, False),
    ({"dispatch": "routed"}, True),
    ({"dispatch": "routed", "rows": "fp8"}, True),
    ({"dispatch": "routed", "combine": "routes"}, True),
)


def layer_of_rank(rank: int, ranks: int, device: str) -> Nvfp4MoE:
    """This rank's part of a layer of v4-flash in MXFP4, or of a toy on the CPU."""
    sizes = PRESETS["v4-flash"]
    experts, hidden, inner, top_k = sizes.experts, sizes.hidden_size, sizes.expert_intermediate, sizes.top_k
    if device == "cpu":
        experts, hidden, inner, top_k = 8, 128, 128, 3
    here = experts // ranks
    layer = Nvfp4MoE(
        here, hidden, inner, top_k=top_k, experts_start_idx=rank * here, total_experts=here * ranks, device=device
    )

    def matrix(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
        codes = torch.randint(256, (here, rows, columns // 2), dtype=torch.uint8, device=device)
        return codes, torch.randint(116, 120, (here, rows, columns // 32), dtype=torch.uint8, device=device)

    layer.prepare_weights_from_stacked(*matrix(2 * inner, hidden), None, *matrix(hidden, inner), None)
    return layer


def median_seconds(call: Callable[[], object], device: str) -> float:
    """Of replays of the captured call, each between barriers; on the CPU of calls."""
    call()
    if device == "cpu":
        times = []
        for _ in range(2):
            begin = time.perf_counter()
            call()
            times.append(time.perf_counter() - begin)
        return statistics.median(times)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    times = []
    for _ in range(CALLS):
        dist.barrier()
        torch.cuda.synchronize()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def sent_bytes(layer: ExpertParallelMoE, tokens: int) -> int:
    """To other ranks in one call, dispatch and combine."""
    hidden, routes = layer.experts.hidden_size, layer.experts.top_k
    if layer.dispatch == "gather":
        return (layer.ranks - 1) * tokens * (4 * hidden + 8 * routes)
    return (layer.ranks - 1) * layer.capacity * (layer.message_bytes + 2 * hidden)


def measure(experts: Nvfp4MoE, ranks: int, device: str, tokens: int) -> list[dict[str, Any]]:
    """A row for each way."""
    hidden = torch.randn(tokens, experts.hidden_size, device=device).to(torch.bfloat16)
    weights = torch.rand(tokens, experts.top_k, device=device)
    ids = torch.rand(tokens, experts.total_experts, device=device).topk(experts.top_k).indices.to(torch.int32)
    rows = []
    for options, average in WAYS:
        combine = options.get("combine", "sums")
        room = math.ceil(SLACK * rows_per_rank(tokens, ranks, experts.top_k, combine)) if average else None
        layer = ExpertParallelMoE(experts, max_tokens=tokens, capacity=room, **options)  # type: ignore[arg-type]
        seconds = torch.tensor(median_seconds(lambda layer=layer: layer(hidden, weights, ids), device), device=device)
        calls = torch.tensor(float(layer.dropped), device=device)
        dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
        dist.all_reduce(calls)
        rows.append(
            {"dispatch": "gather", "rows": "bf16", "combine": "sums"}
            | options
            | {
                "tokens": tokens,
                "capacity": layer.capacity,
                "us": round(float(seconds) * 1e6, 2),
                "sent_bytes": sent_bytes(layer, tokens),
                "dropped_rows_of_all_calls": int(calls),
            }
        )
    return rows


def run_rank(rank: int, ranks: int, folder: str, device: str) -> None:
    """One process; the first leaves the report in the folder."""
    torch.manual_seed(rank)
    if device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=120),
    )
    experts = layer_of_rank(rank, ranks, device if device == "cpu" else f"cuda:{rank}")
    rows = []
    for tokens in TOKENS if device == "cuda" else (1, 5):
        rows += measure(experts, ranks, experts.device.type, tokens)
        if rank == 0:
            print(*rows[-len(WAYS) :], sep="\n", flush=True)
    if rank == 0:
        report = {"machine": describe(device), "ranks": ranks, "preset": "v4-flash", "weights": "MXFP4", "rows": rows}
        Path(folder, "report.json").write_text(json.dumps(report, indent=1) + "\n")
    dist.destroy_process_group()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json", type=Path)
    parser.add_argument("--ranks", type=int, help="processes (default: as many as GPUs)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options = parser.parse_args(arguments)
    ranks = options.ranks or torch.cuda.device_count()
    with tempfile.TemporaryDirectory() as folder:
        spawn(run_rank, args=(ranks, folder, options.device), nprocs=ranks)
        options.json.write_text(Path(folder, "report.json").read_text())


if __name__ == "__main__":
    main()
