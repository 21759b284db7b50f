"""Two processes against one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from dsv4_kernels import InvalidArgumentError
from dsv4_kernels.moe import ExpertParallelMoE, Nvfp4MoE

from tests.moe.test_nvfp4_moe import EXPERTS, HIDDEN, INNER, TOP_K, expected, module, random_layer, routed

TOKENS = 6
SPLIT = (0, 2, EXPERTS)  # the first expert of each rank, and the end


def run_rank(rank: int, folder: str) -> None:
    """One process: its experts and its tokens; leaves its result in the folder."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    start, stop = SPLIT[rank], SPLIT[rank + 1]
    experts = Nvfp4MoE(
        stop - start, HIDDEN, INNER, top_k=TOP_K, experts_start_idx=start, total_experts=EXPERTS, swiglu_limit=2.0
    )
    experts.prepare_weights_from_stacked(*(None if v is None else v[start:stop] for v in random_layer(True)))  # type: ignore[arg-type]
    layer = ExpertParallelMoE(experts)
    given = routed(TOKENS, seed=rank)
    shared = torch.full((TOKENS, HIDDEN), float(rank), dtype=torch.bfloat16)
    results = layer(*given), layer(*given), layer(*given, shared=shared)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_are_one_layer(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(run_rank, args=(str(tmp_path),), nprocs=2)
    whole = module(True, swiglu_limit=2.0)
    for rank in range(2):
        first, again, with_shared = torch.load(tmp_path / f"{rank}.pt")
        given = routed(TOKENS, seed=rank)
        want = expected(random_layer(True), *given, 2.0)
        assert float((first.double() - want).norm() / want.norm()) < 6e-3
        assert float((first.double() - whole.run(*given).double()).norm() / want.norm()) < 6e-3
        assert torch.equal(first, again)
        assert torch.allclose(with_shared.float(), first.float() + rank, rtol=2**-7, atol=1e-2)


def test_needs_a_process_group() -> None:
    with pytest.raises(InvalidArgumentError, match="expected an initialised process group, got none"):
        ExpertParallelMoE(module(True))
