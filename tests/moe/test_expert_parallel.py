"""Two processes against one."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from dsv4_kernels import InvalidArgumentError
from dsv4_kernels.moe import ExpertParallelMoE, Nvfp4MoE

from tests.moe.test_nvfp4_moe import EXPERTS, HIDDEN, INNER, TOP_K, expected, module, random_layer, routed

TOKENS = 6
SPLIT = (0, 2, EXPERTS)  # the first expert of each rank, and the end


def run_rank(rank: int, folder: str, backend: str) -> None:
    """One process: its experts and its tokens; leaves its results in the folder."""
    torch.set_num_threads(1)
    device = f"cuda:{rank}" if backend == "nccl" else "cpu"
    if backend == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        backend, init_method=f"file://{folder}/meeting", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    start, stop = SPLIT[rank], SPLIT[rank + 1]
    experts = Nvfp4MoE(
        stop - start,
        HIDDEN,
        INNER,
        top_k=TOP_K,
        experts_start_idx=start,
        total_experts=EXPERTS,
        swiglu_limit=2.0,
        device=device,
    )
    experts.prepare_weights_from_stacked(*(None if v is None else v[start:stop] for v in random_layer(True)))  # type: ignore[arg-type]
    layer = ExpertParallelMoE(experts)
    given = [value.to(device) for value in routed(TOKENS, seed=rank)]
    shared = torch.full((TOKENS, HIDDEN), float(rank), dtype=torch.bfloat16, device=device)
    results = {"first": layer(*given), "again": layer(*given), "shared": layer(*given, shared=shared)}
    if backend == "nccl":
        results["replayed"] = replayed(layer, rank)
    torch.save({name: value.cpu() for name, value in results.items()}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def replayed(layer: ExpertParallelMoE, rank: int) -> torch.Tensor:
    """The rank's result from a graph that was captured with other tokens and routes."""
    given = [value.cuda() for value in routed(TOKENS, seed=rank + 5)]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layer(*given)
    for place, value in zip(given, routed(TOKENS, seed=rank), strict=True):
        place.copy_(value)
    graph.replay()
    torch.cuda.synchronize()
    return out


@pytest.mark.parametrize("backend", ["gloo", pytest.param("nccl", marks=pytest.mark.gpu)])
def test_two_ranks_are_one_layer(backend: str, tmp_path: Path) -> None:
    if backend == "nccl" and torch.cuda.device_count() < 2:
        pytest.skip(f"needs 2 GPUs, one a process: torch sees {torch.cuda.device_count()}")
    torch.multiprocessing.spawn(run_rank, args=(str(tmp_path), backend), nprocs=2)
    whole = module(True, "cuda" if backend == "nccl" else "cpu", swiglu_limit=2.0)
    for rank in range(2):
        results = torch.load(tmp_path / f"{rank}.pt")
        first = results["first"]
        given = routed(TOKENS, seed=rank)
        want = expected(random_layer(True), *given, 2.0)
        alone = whole.run(*(value.to(whole.l1_weight.device) for value in given)).cpu()
        assert float((first.double() - want).norm() / want.norm()) < 6e-3
        assert float((first.double() - alone.double()).norm() / want.norm()) < 6e-3
        assert torch.equal(first, results["again"])
        assert torch.equal(first, results.get("replayed", first))
        assert torch.allclose(results["shared"].float(), first.float() + rank, rtol=2**-7, atol=1e-2)


def test_needs_a_process_group() -> None:
    with pytest.raises(InvalidArgumentError, match="expected an initialised process group, got none"):
        ExpertParallelMoE(module(True))
