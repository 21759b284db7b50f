"""What an engine without this package runs as a layer's experts: torch, on weights dequantised beforehand."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import silu


@dataclass(frozen=True)
class Bfloat16Experts:
    """l1: [experts, 2 * intermediate, hidden], gate rows before up rows; l2: [experts, hidden, intermediate]."""

    l1: Tensor
    l2: Tensor
    limit: float

    def _swiglu(self, both: Tensor) -> Tensor:
        gate, up = both.float().chunk(2, dim=-1)
        return (silu(gate.clamp(max=self.limit)) * up.clamp(-self.limit, self.limit)).to(torch.bfloat16)

    def loop(self, hidden: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        """Expert after expert, those that a token chose: the host waits for the list of them."""
        out = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
        for expert in ids.unique().tolist():
            token, slot = (ids == expert).nonzero(as_tuple=True)
            rows = self._swiglu(hidden[token] @ self.l1[expert].T) @ self.l2[expert].T
            out.index_add_(0, token, rows.float() * weights[token, slot, None])
        return out.to(torch.bfloat16)

    def grouped_mm(self, hidden: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        """Rows sorted by expert, and torch._grouped_mm: nothing waits for the host, so it captures in a graph."""
        order = ids.flatten().argsort(stable=True)
        token = order // ids.shape[1]
        experts = torch.arange(self.l1.shape[0], device=ids.device)
        ends = (ids.flatten()[:, None] <= experts).sum(dim=0, dtype=torch.int32)
        both = torch._grouped_mm(hidden[token], self.l1.transpose(1, 2), offs=ends)
        rows = torch._grouped_mm(self._swiglu(both), self.l2.transpose(1, 2), offs=ends)
        out = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
        out.index_add_(0, token, rows.float() * weights.flatten()[order, None])
        return out.to(torch.bfloat16)
