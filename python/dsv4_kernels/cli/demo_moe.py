"""The demo's routed experts: the batch as a router has sent it, through MXFP4 experts and back into token order."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dsv4_kernels.cases import Verdict
from dsv4_kernels.cases.moe.definitions import swiglu, values_of
from dsv4_kernels.moe import Nvfp4MoE
from dsv4_kernels.presets import Preset

LIMIT = 10.0  # of the models' SwiGLU
CHECKED = 2  # tokens whose sums are computed in float64
CPU_EXPERTS = 1  # the CPU implementation dequantises an expert to float64 in every call
# Rows between the products and the sums are rounded to bfloat16, 2^-9 of each; values of a row are independent.
ERROR = 2.0**-7


@dataclass
class MoeStep:
    """A batch through the experts of one layer that live here, the first `layer.num_experts` from an offset."""

    layer: str
    experts: Nvfp4MoE
    weights: tuple[Tensor, Tensor, Tensor, Tensor]  # codes and scales of both products, as a checkpoint has them
    hidden: Tensor
    topk_weights: Tensor
    topk_ids: Tensor

    op = "Nvfp4MoE"
    kernels = "moe_grouped_gemm"  # the one that takes the time

    def run(self) -> Tensor:
        return self.experts.run(self.hidden, self.topk_weights, self.topk_ids)

    def verdict(self) -> Verdict:
        """The first tokens that have an expert here against float64, the inner values rounded to bfloat16 as in it."""
        got = self.run().to(torch.float64).cpu()
        first, count = self.experts.experts_start_idx, self.experts.num_experts
        here = ((self.topk_ids >= first) & (self.topk_ids < first + count)).cpu()
        worst = 0.0
        for token in here.any(dim=1).nonzero().flatten().tolist()[:CHECKED]:
            x = self.hidden[token].to(torch.float64).cpu()
            want = torch.zeros_like(x)
            for k in here[token].nonzero().flatten().tolist():
                l1, l1_scale, l2, l2_scale = (part[int(self.topk_ids[token, k]) - first].cpu() for part in self.weights)
                gate, up = (values_of(l1, l1_scale) @ x).chunk(2)
                inner = swiglu(gate, up, LIMIT).to(torch.bfloat16).to(torch.float64)
                want += float(self.topk_weights[token, k]) * (values_of(l2, l2_scale) @ inner)
            worst = max(worst, float((got[token] - want).norm() / want.norm()))
        if got[~here.any(dim=1)].any():
            return Verdict(float("inf"), ERROR, "a token without an expert here has a result")
        return Verdict(worst, ERROR, "a token's sum, of its size")

    def moved_bytes(self) -> int:
        """The weights of the experts that have a token, tokens in and out."""
        ids = self.topk_ids.unique() - self.experts.experts_start_idx
        touched = int(((ids >= 0) & (ids < self.experts.num_experts)).sum())
        of_expert = sum(part[0].nbytes for part in self.weights)
        return touched * of_expert + 2 * self.hidden.nbytes


def moe_step(
    layer: str,
    preset: Preset,
    hidden: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    generator: torch.Generator,
) -> MoeStep:
    """Random experts of the model's sizes for routed tokens: all of them on a GPU that has the memory, else as one
    rank of many would have them, those around the one with most tokens.
    """
    device = hidden.device
    size, inner = preset.hidden_size, preset.expert_intermediate
    of_expert = 3 * size * inner * 17 // 32
    fitting = torch.cuda.mem_get_info(device)[0] // (4 * of_expert) if device.type == "cuda" else CPU_EXPERTS
    experts = max(min(preset.experts, fitting), 1)
    most = int(topk_ids.flatten().mode().values)
    first = min(most, preset.experts - experts)
    on_device = torch.Generator(device).manual_seed(int(torch.randint(2**31, (1,), generator=generator, device="cpu")))

    def random(high: int, *shape: int, low: int = 0) -> Tensor:
        return torch.randint(low, high, shape, dtype=torch.uint8, device=device, generator=on_device)

    weights = (
        random(256, experts, 2 * inner, size // 2),
        random(122, experts, 2 * inner, size // 32, low=118),
        random(256, experts, size, inner // 2),
        random(122, experts, size, inner // 32, low=118),
    )
    module = Nvfp4MoE(
        experts,
        size,
        inner,
        top_k=preset.top_k,
        experts_start_idx=first,
        total_experts=preset.experts,
        swiglu_limit=LIMIT,
        device=device,
    )
    module.prepare_weights_from_stacked(weights[0], weights[1], None, weights[2], weights[3], None)
    label = f"{layer}, {experts} of {preset.experts} experts"
    return MoeStep(label, module, weights, hidden, topk_weights, topk_ids)
