from __future__ import annotations

import pytest
import torch
from dsv4_kernels import InvalidArgumentError
from dsv4_kernels.router import activation_topk, append_shared_experts


@pytest.mark.parametrize("id_type", [torch.int32, torch.int64])
def test_routes_to_shared_experts(id_type: torch.dtype, real_device: str) -> None:
    """Behind the chosen ones, which stay as they are; none for padding, one for a token that lacks an expert."""
    logits = torch.randn(5, 16, generator=torch.Generator().manual_seed(0)).to(real_device)
    padding = torch.tensor([False, True, False, False, False], device=real_device)
    weights, ids = activation_topk(logits, None, 3, padding_mask=padding, scale=2.5)
    ids = ids.to(id_type)
    ids[3, 1], weights[3, 1] = -1, 0.0
    both, all_ids = append_shared_experts(weights, ids, 16, count=2, weight=0.4)
    assert (both.dtype, all_ids.dtype) == (torch.float32, id_type)
    for token, row in enumerate(all_ids.tolist()):
        assert row == [*ids[token].tolist(), *([-1, -1] if token == 1 else [16, 17])]
        shared = [0.0, 0.0] if token == 1 else [0.4, 0.4]
        assert both[token].tolist() == pytest.approx([*weights[token].tolist(), *shared])
    compiled = torch.compile(append_shared_experts, fullgraph=True, backend="aot_eager")
    assert all(
        torch.equal(a, b)
        for a, b in zip(compiled(weights, ids, 16), append_shared_experts(weights, ids, 16), strict=True)
    )
    assert append_shared_experts(weights[:0], ids[:0], 16)[1].shape == (0, 4)


def test_refusals() -> None:
    weights, ids = torch.zeros(4, 3), torch.zeros(4, 2, dtype=torch.int32)
    with pytest.raises(InvalidArgumentError, match=r"append_shared_experts: ids: expected .* \[4, 3\], got \[4, 2\]"):
        append_shared_experts(weights, ids, 8)
    with pytest.raises(InvalidArgumentError, match="append_shared_experts: count: expected at least 1, got 0"):
        append_shared_experts(weights[:, :2], ids, 8, count=0)
