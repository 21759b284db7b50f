"""Two processes against one."""

from __future__ import annotations

import re
from datetime import timedelta
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from dsv4_kernels import InvalidArgumentError
from dsv4_kernels.moe import ExpertParallelMoE, Nvfp4MoE, rows_per_rank
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
    results |= routed_results(rank, device)
    if backend == "nccl":
        results["replayed, routed"] = replayed(
            ExpertParallelMoE(experts, max_tokens=TOKENS, dispatch="routed", combine="routes"), rank
        )
        results["replayed"] = replayed(ExpertParallelMoE(experts, max_tokens=TOKENS), rank)
    torch.save({"refusals": refusals} | {name: value.cpu() for name, value in results.items()}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


# Layers of tiles of one size, by whether weights are NVFP4 and what the products read.
INVARIANT = {"NVFP4": (True, "bfloat16"), "MXFP4": (False, "bfloat16"), "W4A8": (False, "mxfp8")}
CAPACITY = 4


def invariant(kind: str, start: int, stop: int, device: str, **options: object) -> Nvfp4MoE:
    nvfp4, activations = INVARIANT[kind]
    experts = Nvfp4MoE(
        stop - start, HIDDEN, INNER, top_k=TOP_K, experts_start_idx=start, total_experts=EXPERTS, swiglu_limit=2.0,
        activations=activations, batch_invariant=True, device=device, **options,  # type: ignore[arg-type]
    )  # fmt: skip
    experts.prepare_weights_from_stacked(*(None if v is None else v[start:stop] for v in random_layer(nvfp4)))  # type: ignore[arg-type]
    return experts


def routed_results(rank: int, device: str) -> dict[str, torch.Tensor]:
    """What a rank gets where tokens go to the ranks of their experts alone, by what is dispatched and combined."""
    start, stop = SPLIT[rank], SPLIT[rank + 1]
    hidden, weights, ids = (value.to(device) for value in routed(TOKENS, seed=rank))
    ids[0, 1], ids[1, 0], ids[2, 2] = -1, EXPERTS, 2**30
    shared = shared_part(rank).to(device)
    results = {}
    for kind in INVARIANT:
        experts = invariant(kind, start, stop, device)
        gathering = ExpertParallelMoE(experts, max_tokens=TOKENS)
        results[f"{kind}, gather"] = gathering(hidden, weights, ids, shared=shared)
        for rows in ("bf16", "fp8"):
            for combine in ("sums", "routes"):
                layer = ExpertParallelMoE(experts, max_tokens=TOKENS, dispatch="routed", rows=rows, combine=combine)
                name = f"{kind}, {rows}, {combine}"
                results[name] = layer(hidden, weights, ids.long(), shared=shared)
                results[f"{name}, fewer"] = layer(hidden[:rank], weights[:rank], ids[:rank])
                results[f"{name}, dropped"] = layer.dropped
    for option in ("weight_before_second", "apply_router_weight_on_input"):
        experts = invariant("MXFP4", start, stop, device, **{option: True})
        layer = ExpertParallelMoE(experts, max_tokens=TOKENS, dispatch="routed", combine="routes")
        results[option] = layer(hidden, weights, ids)
    for combine in ("sums", "routes"):
        layer = ExpertParallelMoE(
            invariant("MXFP4", start, stop, device), max_tokens=TOKENS, dispatch="routed", combine=combine,
            capacity=CAPACITY,
        )  # fmt: skip
        layer(hidden, weights, ids)
        results[f"full, {combine}"] = layer(hidden, weights, ids)
        results[f"full, {combine}, dropped"] = layer.dropped
    return results


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
        if "replayed, routed" in results:
            assert float((results["replayed, routed"].double() - alone.double()).norm() / want.norm()) < 6e-3
        assert torch.equal(first, results["after the refusals"])
        assert results["none anywhere"].shape == (0, HIDDEN)
        for name, counts in UNEQUAL.items():
            # The most tokens of a rank decide the tile size, and that is 16 for all of these.
            assert torch.equal(results[f"{name}, padded"], first[: counts[rank]]), name
            assert torch.equal(results[name], results["shared"][: counts[rank]]), name
    for rank in range(2):
        routed_ranks_are_one_layer(torch.load(tmp_path / f"{rank}.pt"), rank, "cuda" if backend == "nccl" else "cpu")
    if backend == "gloo":
        sums_are_rounded_once(tmp_path)
        every_rank_refuses(tmp_path)


def mxfp8_values(hidden: torch.Tensor) -> torch.Tensor:
    """Each 32 columns over the least power of two that brings them to 448 or less, in E4M3, and back."""
    groups = hidden.double().unflatten(1, (-1, 32))
    scale = torch.exp2(torch.ceil(torch.log2(groups.abs().amax(2, keepdim=True) / 448)))
    return ((groups / scale).float().to(torch.float8_e4m3fn).double() * scale).flatten(1).to(torch.bfloat16)


def routed_ranks_are_one_layer(results: dict[str, torch.Tensor], rank: int, device: str) -> None:
    """Combined by routes, to the bit what one rank computes; by sums, what gathering gives; FP8 rows near that."""
    hidden, weights, ids = (value.to(device) for value in routed(TOKENS, seed=rank))
    ids[0, 1], ids[1, 0], ids[2, 2] = -1, -1, -1
    shared = shared_part(rank).to(device)
    for kind in INVARIANT:
        whole = invariant(kind, 0, EXPERTS, device)
        # FP8 rows are what products of W4A8 read anyway; others get them rounded to it.
        rounded = hidden if kind == "W4A8" else mxfp8_values(hidden)
        assert kind == "W4A8" or not torch.equal(rounded, hidden)
        for rows, x in (("bf16", hidden), ("fp8", rounded)):
            want = whole.run(x, weights, ids, shared=shared).cpu()
            assert torch.equal(results[f"{kind}, {rows}, routes"], want), (kind, rows)
            sums = results[f"{kind}, {rows}, sums"]
            assert float((sums.double() - want.double()).norm() / want.double().norm()) < 6e-3, (kind, rows)
            if x is hidden:
                assert torch.equal(sums, results[f"{kind}, gather"]), (kind, rows)
            for name in (f"{kind}, {rows}, sums", f"{kind}, {rows}, routes"):
                assert results[f"{name}, fewer"].shape == (rank, HIDDEN)
                assert int(results[f"{name}, dropped"]) == 0
        alone = whole.run(hidden[:rank], weights[:rank], ids[:rank]).cpu()
        assert torch.equal(results[f"{kind}, bf16, routes, fewer"], alone)
    for option in ("weight_before_second", "apply_router_weight_on_input"):
        whole = invariant("MXFP4", 0, EXPERTS, device, **{option: True})
        assert torch.equal(results[option], whole.run(hidden, weights, ids).cpu()), option
    # A message of four rows: the later routes, or tokens, to a rank contribute nothing.
    for combine in ("sums", "routes"):
        kept, dropped, sent = ids.clone(), 0, [[], []]  # type: ignore[var-annotated]
        for token, row in enumerate(ids.tolist()):
            for k, expert in enumerate(row):
                if expert < 0:
                    continue
                to = int(expert >= SPLIT[1])
                unit = token if combine == "sums" else (token, k)
                if unit not in sent[to]:
                    sent[to].append(unit)
                    dropped += len(sent[to]) > CAPACITY
                if unit not in sent[to][:CAPACITY]:
                    kept[token, k] = -1
        assert dropped > 0
        assert int(results[f"full, {combine}, dropped"]) == 2 * dropped
        want = invariant("MXFP4", 0, EXPERTS, device).run(hidden, weights, kept).cpu()
        error = (results[f"full, {combine}"].double() - want.double()).norm() / want.double().norm()
        assert float(error) <= (6e-3 if combine == "sums" else 0.0)


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


def test_rows_per_rank() -> None:
    """The average over routes that are spread evenly, counted."""
    ids = torch.rand(20_000, 256, generator=torch.Generator().manual_seed(0)).topk(6).indices
    for ranks in (2, 8, 64):
        goes = ids // (256 // ranks)
        on_first = (goes == 0).any(dim=1).double().mean()
        assert rows_per_rank(1000, ranks, 6) == pytest.approx(1000 * float(on_first), rel=0.05)
        assert rows_per_rank(1000, ranks, 6, "routes") == pytest.approx(
            1000 * float((goes == 0).double().sum(1).mean()), rel=0.05
        )


def test_the_documented_bytes() -> None:
    """The table of docs/families/moe.md: KiB per token that a rank sends to others."""
    text = (Path(__file__).resolve().parents[2] / "docs" / "families" / "moe.md").read_text()
    rows = re.findall(r"^\| (\d+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", text, re.MULTILINE)
    assert [int(row[0]) for row in rows] == [2, 4, 8, 16, 32, 64]
    hidden, top_k = 4096, 6
    for ranks, gather, *others in rows:
        others_ranks = int(ranks) - 1
        assert float(gather) == pytest.approx(others_ranks * (4 * hidden + 8 * top_k) / 1024, abs=0.05)
        ways = [(combine, fp8) for combine in ("sums", "routes") for fp8 in (False, True)]
        for (combine, fp8), got in zip(ways, others, strict=True):
            routes = 16 if combine == "routes" else 32  # bytes of ids and of weights, padded
            there = (hidden + hidden // 32 if fp8 else 2 * hidden) + 2 * routes
            share = 1 - (1 - 1 / int(ranks)) ** 6 if combine == "sums" else 6 / int(ranks)
            assert float(got) == pytest.approx(others_ranks * share * (there + 2 * hidden) / 1024, abs=0.05)


def test_refused_dispatches(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        experts = module(False)
        for options, text in (
            ({"dispatch": "routed"}, "max_tokens: expected a number with dispatch 'routed', got None"),
            ({"dispatch": "all"}, "dispatch: expected 'gather' or 'routed', got 'all'"),
            ({"rows": "fp8"}, "rows: expected 'bf16' with dispatch 'gather', got 'fp8'"),
            ({"combine": "routes"}, "combine: expected 'sums' with dispatch 'gather', got 'routes'"),
            ({"capacity": 3}, "capacity: expected None with dispatch 'gather', got 3"),
            ({"dispatch": "routed", "max_tokens": 3, "rows": "fp4"}, "rows: expected 'bf16' or 'fp8' with"),
            ({"dispatch": "routed", "max_tokens": 3, "capacity": 0}, "capacity: expected at least 1 or None, got 0"),
        ):
            with pytest.raises(InvalidArgumentError, match=f"ExpertParallelMoE: {text}"):
                ExpertParallelMoE(experts, **options)  # type: ignore[arg-type]
        layer = ExpertParallelMoE(experts, max_tokens=3, dispatch="routed", combine="routes")
        assert torch.equal(layer(*routed(3)), experts.run(*routed(3)))
        with pytest.raises(InvalidArgumentError, match="hidden: expected at most max_tokens 3 tokens, got 4"):
            layer(*routed(4))
    finally:
        dist.destroy_process_group()


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
