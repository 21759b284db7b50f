"""Two processes against one."""

from __future__ import annotations

from datetime import timedelta
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from dsv4_kernels import InvalidArgumentError
from dsv4_kernels.moe import ExpertParallelMoE, Nvfp4MoE
from torch.multiprocessing.spawn import spawn

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
    shared = shared_part(rank).to(device)
    results = {
        "first": layer(*given),
        "again": layer(*given),
        "shared": layer(*given, shared=shared),
        "none anywhere": layer(*(value[:0] for value in given), shared=shared[:0]),
    }
    for name, counts in UNEQUAL.items():
        mine = [value[: counts[rank]] for value in given]
        results[name] = layer(*mine, shared=shared[: counts[rank]])
        results[f"{name}, padded"] = ExpertParallelMoE(experts, max_tokens=TOKENS + 1)(*mine)
    refusals = {
        name: refusal(layer, spoiled(given) if rank == of else given) for name, (of, spoiled) in SPOILED.items()
    }
    results["after the refusals"] = layer(*given)
    if backend == "nccl":
        results["replayed"] = replayed(ExpertParallelMoE(experts, max_tokens=TOKENS), rank)
    torch.save({"refusals": refusals} | {name: value.cpu() for name, value in results.items()}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def shared_part(rank: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 + rank)
    return torch.randn(TOKENS, HIDDEN, generator=generator).to(torch.bfloat16)


# Tokens of each rank.
UNEQUAL = {"fewer on one": (TOKENS, 2), "fewer on the other": (1, TOKENS), "none on one": (0, 3), "none on two": (3, 0)}

# Arguments that one rank alone gets wrong, and which rank.
SPOILED = {
    "hidden of another size": (0, lambda given: [given[0][:, :64], *given[1:]]),
    "fewer weights": (1, lambda given: [given[0], given[1][:3], given[2]]),
    "dtype": (1, lambda given: [given[0].float(), *given[1:]]),
    "no ids": (0, lambda given: [*given[:2], None]),
    "ids of 64 bits": (1, lambda given: [*given[:2], given[2].long()]),
}


def refusal(layer: ExpertParallelMoE, given: list[torch.Tensor]) -> str:
    try:
        layer(*given)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "none"


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
    spawn(run_rank, args=(str(tmp_path), backend), nprocs=2)
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
        assert torch.equal(first, results["after the refusals"])
        assert results["none anywhere"].shape == (0, HIDDEN)
        for name, counts in UNEQUAL.items():
            # The most tokens of a rank decide the tile size, and that is 16 for all of these.
            assert torch.equal(results[f"{name}, padded"], first[: counts[rank]]), name
            assert torch.equal(results[name], results["shared"][: counts[rank]]), name
    if backend == "gloo":
        sums_are_rounded_once(tmp_path)
        every_rank_refuses(tmp_path)


def sums_are_rounded_once(folder: Path) -> None:
    """With shared: each rank's part in bfloat16, their sum and shared in float32, then rounded. To the bit."""
    layer = random_layer(True)
    ranks = []
    for start, stop in pairwise(SPLIT):
        part = Nvfp4MoE(
            stop - start, HIDDEN, INNER, top_k=TOP_K, experts_start_idx=start, total_experts=EXPERTS, swiglu_limit=2.0
        )
        part.prepare_weights_from_stacked(*(None if v is None else v[start:stop] for v in layer))  # type: ignore[arg-type]
        ranks.append(part)
    early_rounding_shows = False
    for rank in range(2):
        parts = [part.run(*routed(TOKENS, seed=rank)).float().numpy() for part in ranks]
        shared = shared_part(rank).float().numpy()
        want = torch.from_numpy(parts[0] + parts[1] + shared).to(torch.bfloat16)
        assert torch.equal(torch.load(folder / f"{rank}.pt")["shared"], want)
        early = torch.from_numpy(parts[0] + parts[1]).to(torch.bfloat16).float() + torch.from_numpy(shared)
        early_rounding_shows |= not torch.equal(early.to(torch.bfloat16), want)
    assert early_rounding_shows


def every_rank_refuses(folder: Path) -> None:
    """Nobody is left waiting: the rank at fault says what is wrong, the others which rank it is."""
    told = [torch.load(folder / f"{rank}.pt")["refusals"] for rank in range(2)]
    for name, (at_fault, _) in SPOILED.items():
        if name == "ids of 64 bits":
            for rank in range(2):
                assert "ids_of_64_bits: expected one on all ranks, got [0, 1]" in told[rank][name]
            continue
        assert f"got others on rank {at_fault}; its own error" in told[1 - at_fault][name], name
    assert "hidden: expected shape [6, 128], got [6, 64]" in told[0]["hidden of another size"]
    assert "topk_weights: expected shape [6, 3], got [3, 3]" in told[1]["fewer weights"]
    assert "hidden: expected dtype bfloat16, got float32" in told[1]["dtype"]
    assert told[0]["no ids"] != "none"


def test_needs_a_process_group() -> None:
    with pytest.raises(InvalidArgumentError, match="expected an initialised process group, got none"):
        ExpertParallelMoE(module(True))


def test_max_tokens(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        layer = ExpertParallelMoE(module(True), max_tokens=3)
        want = module(True).run(*routed(2))
        assert torch.equal(layer(*routed(2)), want)
        with pytest.raises(InvalidArgumentError, match="hidden: expected at most max_tokens 3 tokens, got 4"):
            layer(*routed(4))
        for wrong in (0, -1, 2.5):
            with pytest.raises(InvalidArgumentError, match=f"max_tokens: expected at least 1 or None, got {wrong}"):
                ExpertParallelMoE(module(True), max_tokens=wrong)  # type: ignore[arg-type]
        agreeing = ExpertParallelMoE(module(True))
        assert torch.equal(agreeing(*routed(2)), want)
        with pytest.raises(Exception, match=r"max_tokens: expected a number in CUDA graphs and under torch\.compile"):
            torch.compile(agreeing, fullgraph=True, backend="eager")(*routed(2))
    finally:
        dist.destroy_process_group()
