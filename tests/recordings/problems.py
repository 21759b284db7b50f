"""Small problems whose results an H100 has recorded, for comparison with the emulator.

    python -m tests.recordings.problems FILE      on a machine with an H100: writes inputs and results to FILE

Run it again when a kernel's arithmetic changes on purpose.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from dsv4_kernels import torch_ops
from dsv4_kernels.ops import OPS
from safetensors.torch import save_file
from torch import Tensor

RECORDING = Path(__file__).parent / "h100.safetensors"


def problems() -> dict[str, tuple[str, tuple[Any, ...]]]:
    """Name to op and arguments."""
    generator = torch.Generator().manual_seed(2026)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(*shape, generator=generator)

    def integers(high: int, *shape: int, dtype: torch.dtype = torch.int32, low: int = 0) -> Tensor:
        return torch.randint(low, high, shape, generator=generator, dtype=dtype)

    token_ids, table = integers(54, 37, low=-2), integers(64, 50, 6, dtype=torch.int64)
    logits = normal(37, 64, scale=8.0)
    logits[3, ::7], logits[5], logits[6] = float("nan"), -float("inf"), -60.0
    hidden, gate = normal(9, 256).to(torch.bfloat16), normal(40, 256, scale=0.1).to(torch.bfloat16)
    mask = integers(2, 37).to(torch.bool)
    weighing = (True, 1.5, 0.0)
    found: dict[str, tuple[str, tuple[Any, ...]]] = {
        "hash_router": ("hash_router", (token_ids, table, mask, False)),
        "hash_router_scored": ("hash_router_scored", (token_ids, table, logits, mask, *weighing, None, None, False)),
        "hash_router_fused": ("hash_router_fused", (token_ids[:9], table % 42, hidden, gate, None, *weighing, False)),
        "dense_router_decode": (
            "dense_router_decode",
            (hidden, gate, normal(40, scale=0.2), 6, *weighing, None, None, False),
        ),
        "padded_squared_relu": (
            "padded_squared_relu",
            (normal(9, 48).to(torch.bfloat16), integers(9, 9, low=-2), torch.tensor(7, dtype=torch.int32)),
        ),
    }
    for function in range(3):
        arguments = (logits, normal(64, scale=0.3), 6, function, *weighing, mask, None, None, False)
        found[f"activation_topk_{function}"] = ("activation_topk", arguments)
    return found


def poisoned_outputs(op: str, arguments: tuple[Any, ...], device: str) -> tuple[Tensor, ...]:
    out = OPS[op].allocate(arguments)
    for tensor in out:
        tensor.view(torch.uint8).fill_(0xA5)
    return out


def main(file: Path) -> None:
    torch_ops.register()
    tensors: dict[str, Tensor] = {}
    for name, (op, arguments) in problems().items():
        on_device = tuple(a.cuda() if isinstance(a, Tensor) else a for a in arguments)
        results = OPS[op](on_device, poisoned_outputs(op, on_device, "cuda"))
        tensors |= {f"{name}.argument{i}": a.clone() for i, a in enumerate(arguments) if isinstance(a, Tensor)}
        tensors |= {f"{name}.result{i}": r.cpu() for i, r in enumerate(results)}
    save_file(tensors, file, metadata={"device": torch.cuda.get_device_name()})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
