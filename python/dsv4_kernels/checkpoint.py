"""Reads a layer's tensors from the models' safetensors checkpoints, by the names that the models give them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dsv4_kernels.presets import Preset


class CheckpointError(ValueError):
    """A tensor that is missing from a checkpoint or is not what the model's sizes ask for."""


@dataclass(frozen=True)
class Gate:
    """weight [experts, hidden_size] bfloat16; bias [experts] float32 if dense; tid2eid [vocab, k] if hash."""

    weight: Tensor
    bias: Tensor | None
    tid2eid: Tensor | None


def find_file(checkpoint: Path, name: str) -> Path:
    """The file of a tensor: the checkpoint itself, or the shard that a sharded checkpoint's index names."""
    if checkpoint.is_file():
        return checkpoint
    index = checkpoint / "model.safetensors.index.json"
    if not index.is_file():
        single = checkpoint / "model.safetensors"
        if single.is_file():
            return single
        raise CheckpointError(
            f"{checkpoint}: expected a .safetensors file, or a folder with {index.name} or {single.name}"
        )
    shards: dict[str, str] = json.loads(index.read_text())["weight_map"]
    return checkpoint / shards.get(name, next(iter(shards.values())))


def read_tensor(checkpoint: Path, name: str, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> Tensor | None:
    """One tensor, or None if the checkpoint has none of that name. CheckpointError if it is not as expected."""
    from safetensors import safe_open

    with safe_open(find_file(checkpoint, name), framework="pt") as file:
        if name not in file.keys():  # noqa: SIM118 -- safe_open is no dict
            return None
        tensor: Tensor = file.get_tensor(name)
    check_tensor(str(checkpoint), name, tensor, shape, dtypes)
    return tensor


def check_tensor(
    where: str, name: str, tensor: Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]
) -> None:
    """CheckpointError unless the tensor has this shape and one of these dtypes."""
    if tuple(tensor.shape) != shape or tensor.dtype not in dtypes:
        need = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        got = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
        raise CheckpointError(f"{where}: {name}: expected {need} {list(shape)}, got {got}")


def load_gate(checkpoint: Path, layer: int, preset: Preset) -> Gate:
    """The gate of a layer. A layer with `tid2eid` is a hash layer, one with `bias` a dense layer.

    Raises:
        CheckpointError: naming the tensor, its shape and what was expected.
    """
    prefix = f"layers.{layer}.ffn.gate"
    weight = read_tensor(checkpoint, f"{prefix}.weight", (preset.experts, preset.hidden_size), (torch.bfloat16,))
    if weight is None:
        raise CheckpointError(f"{checkpoint}: {prefix}.weight: no such tensor; is {layer} a layer of this checkpoint?")
    bias = read_tensor(checkpoint, f"{prefix}.bias", (preset.experts,), (torch.float32,))
    table_shape = (preset.vocab_size, preset.top_k)
    tid2eid = read_tensor(checkpoint, f"{prefix}.tid2eid", table_shape, (torch.int32, torch.int64))
    if (bias is None) == (tid2eid is None):
        found = "both" if bias is not None else "neither"
        raise CheckpointError(f"{checkpoint}: {prefix}: expected either .bias (dense) or .tid2eid (hash), got {found}")
    return Gate(weight, bias, tid2eid)
