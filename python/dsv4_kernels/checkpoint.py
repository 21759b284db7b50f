"""Reads a layer's tensors from safetensors checkpoints, by the names that the models and the engines give them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from dsv4_kernels.errors import CheckpointError, InvalidArgumentError
from dsv4_kernels.presets import Preset

__all__ = [
    "EXPERT_LAYERS",
    "EXPERT_MATRICES",
    "EXPERT_SCHEMES",
    "GATE_NAMES",
    "HYPER_CONNECTIONS",
    "STACKED_EXPERTS",
    "STACKED_SCALE",
    "SUBLAYER_NORMS",
    "Checkpoint",
    "CheckpointError",
    "ExpertNames",
    "Gate",
    "TensorInfo",
    "check_table",
    "check_tensor",
    "find_block",
    "load_gate",
]

# A .safetensors file, a folder with one or with shards and their index, or the tensors themselves by name.
Source: TypeAlias = str | Path | Mapping[str, Tensor]

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"

# What the tensors of a block are called behind its prefix (find_block): by the models' own checkpoints first, then by
# transformers, vLLM, SGLang and the tools that quantise.

# The layer of experts with its gate.
EXPERT_LAYERS = ("ffn", "mlp")

# A gate's tensors behind `ffn.gate.` or `mlp.gate.`; SGLang has the table in a module of its own.
GATE_NAMES = {
    "weight": ("gate.weight",),
    "bias": ("gate.bias", "gate.e_score_correction_bias"),
    "bias_vl": ("gate.bias_vl", "gate.e_score_correction_bias_vl"),
    "tid2eid": ("gate.tid2eid", "topk.tid2eid"),
}

# Gate, up and down of an expert behind `ffn.experts.E.` or `mlp.experts.E.`
EXPERT_MATRICES = {"ffn": ("w1", "w3", "w2"), "mlp": ("gate_proj", "up_proj", "down_proj")}


@dataclass(frozen=True, eq=False, repr=False)  # what is not generated costs no time at import
class ExpertNames:
    """The names of the tensors of an expert's matrix.

    factor, activation_scale: of NVFP4 weights, the per-tensor scale and the static scale of the product's activations:
    amax / 2688, or its reciprocal.
    """

    codes: str
    scale: str
    factor: str | None = None
    activation_scale: str | None = None
    reciprocal: bool = False


# By the tensor that tells the schemes apart; the first one that is there counts.
EXPERT_SCHEMES = {
    "scale": ExpertNames("weight", "scale"),  # the models' own
    "weight_packed": ExpertNames(  # compressed-tensors
        "weight_packed", "weight_scale", "weight_global_scale", "input_global_scale", reciprocal=True
    ),
    "weight_scale": ExpertNames("weight", "weight_scale", "weight_scale_2", "input_scale"),  # modelopt
    "weight_scale_inv": ExpertNames("weight", "weight_scale_inv"),  # SGLang
}

# All experts in one tensor each, behind `ffn.experts.` or `mlp.experts.`, as transformers' modules hold them: gate's
# and up's rows one behind the other, and down's.
STACKED_EXPERTS = ("gate_up_proj", "down_proj")
STACKED_SCALE = "_scale_inv"

# The hyper-connection around each sublayer: what `fn`, `base` and `scale` follow, and the sublayer's norm.
HYPER_CONNECTIONS = {"attn": ("hc_attn_", "attn_hc."), "ffn": ("hc_ffn_", "ffn_hc.")}
SUBLAYER_NORMS = {
    "attn": ("attn_norm.weight", "input_layernorm.weight"),
    "ffn": ("ffn_norm.weight", "post_attention_layernorm.weight"),
}

# The names that safetensors gives to dtypes.
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "F4": torch.float4_e2m1fn_x2, "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


class TensorInfo(NamedTuple):
    """What is known of a tensor before it is read. dtype: None for one that torch does not have."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None


class Checkpoint:
    """The tensors of a checkpoint by name. Files are opened once, at first use, until the `with` block ends.

    Every failure is a CheckpointError that names the file and, where there is one, the tensor.
    """

    def __init__(self, source: Source) -> None:
        """Reads the index, if the source is a folder that has one.

        Args:
            source: a .safetensors file, a folder with one or with shards and their index, or a mapping from names to
                tensors.
        """
        self._tensors: Mapping[str, Tensor] | None = None
        self._files: dict[Path, Any] = {}
        self._shards: dict[str, Path] | None = None
        self._open = ExitStack()
        if isinstance(source, Mapping):
            self.where, self._tensors = "state dict", source
            return
        path = Path(source)
        self.where = str(path)
        self._single = path
        if path.is_dir():
            index = path / INDEX
            if index.is_file():
                self._shards = _read_index(index)
                return
            self._single = path / SINGLE
        if not self._single.is_file():
            raise CheckpointError(f"{path}: expected a .safetensors file, or a folder with {INDEX} or {SINGLE}")

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()
        self._files.clear()

    def __contains__(self, name: str) -> bool:
        """Whether there is such a tensor. CheckpointError if the index says so and the shard does not hold it."""
        if self._tensors is not None:
            return name in self._tensors
        if self._shards is not None:
            return name in self._shards and self._file_of(name) is not None
        return name in self._names(self._single, name)

    def info(self, name: str) -> TensorInfo:
        """Shape and dtype of a tensor, without reading it. CheckpointError if there is none."""
        if self._tensors is not None:
            if name not in self._tensors:
                raise CheckpointError(f"{self.where}: {name}: no such tensor")
            tensor = self._tensors[name]
            if not isinstance(tensor, Tensor):
                raise CheckpointError(f"{self.where}: {name}: expected a tensor, got {type(tensor).__name__}")
            return TensorInfo(tuple(tensor.shape), tensor.dtype)
        part = self._slice(name)
        shape, dtype = tuple(part.get_shape()), part.get_dtype()
        if dtype == "F4" and shape:  # safetensors counts codes, torch pairs of them
            shape = (*shape[:-1], shape[-1] // 2)
        return TensorInfo(shape, _DTYPES.get(dtype))

    def check(self, name: str, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> None:
        """CheckpointError unless there is such a tensor of this shape and one of these dtypes. Reads no values."""
        _check_info(self._place(name), name, self.info(name), shape, dtypes)

    def read(
        self, name: str, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], part: tuple[slice, ...] = ()
    ) -> Tensor:
        """One tensor, or a part of it: of files only that part is read.

        Args:
            name: in the checkpoint.
            shape: that the whole tensor must have.
            dtypes: of which it must have one.
            part: the range of each dimension; default all of it.

        Raises:
            CheckpointError: there is none, or it is not as expected.
        """
        self.check(name, shape, dtypes)
        if self._tensors is not None:
            return self._tensors[name][part] if part else self._tensors[name]
        from safetensors import SafetensorError

        try:
            entry = self._slice(name)
            # safetensors cannot cut a tensor of packed FP4.
            if part and entry.get_dtype() != "F4":
                cut: Tensor = entry[part]
                return cut
            tensor: Tensor = self._file_of(name).get_tensor(name)
            return tensor[part] if part else tensor
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{self._place(name)}: {name}: cannot be read: {error}") from error

    def find(self, prefix: str, endings: tuple[str, ...]) -> str | None:
        """The first of these names behind a prefix that there is, or None."""
        return next((prefix + ending for ending in endings if prefix + ending in self), None)

    def read_number(self, name: str, need: str, least: float = 0.0, *, above: bool = False) -> float:
        """A float32 tensor of one element. CheckpointError unless it is finite and at least (or above) `least`.

        need: what it must be, in words.
        """
        info = self.info(name)
        shape = info.shape if math.prod(info.shape) == 1 and len(info.shape) <= 1 else (1,)
        value = float(self.read(name, shape, (torch.float32,)))
        if not math.isfinite(value) or value < least or (above and value == least):
            raise CheckpointError(f"{self._place(name)}: {name}: expected {need}, got {value}")
        return value

    def _place(self, name: str) -> str:
        """The file of a tensor, for error texts."""
        return str(self._shards[name]) if self._shards and name in self._shards else self.where

    def _slice(self, name: str) -> Any:
        file = self._file_of(name)
        if file is None:
            raise CheckpointError(f"{self.where}: {name}: no such tensor")
        return file.get_slice(name)

    def _file_of(self, name: str) -> Any:
        """The open file that holds a tensor, or None if the checkpoint has none of that name."""
        path = self._single if self._shards is None else self._shards.get(name)
        if path is None or (self._shards is None and name not in self._names(path, name)):
            return None
        if name not in self._names(path, name):
            raise CheckpointError(f"{path}: {name}: no such tensor in this shard, but {INDEX} says that it is here")
        return self._files[path][0]

    def _names(self, path: Path, name: str) -> frozenset[str]:
        """The tensors of a file, which is opened for `name`."""
        if path not in self._files:
            from safetensors import SafetensorError, safe_open

            if not path.is_file():
                raise CheckpointError(f"{path}: {name}: no such file, but {INDEX} says that the tensor is there")
            try:
                file = self._open.enter_context(safe_open(path, framework="pt"))
                self._files[path] = file, frozenset(file.keys())
            except (OSError, SafetensorError) as error:
                raise CheckpointError(
                    f"{path}: {name}: expected a complete .safetensors file, got one that cannot be read: {error}"
                ) from error
        names: frozenset[str] = self._files[path][1]
        return names


def _read_index(index: Path) -> dict[str, Path]:
    """The shard of each tensor."""
    need = f"{index}: expected JSON with `weight_map`, from names of tensors to files"
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # ValueError: no UTF-8, no JSON
        raise CheckpointError(f"{need}, got {error}") from error
    shards = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(shards, dict):
        got = f"the keys {', '.join(map(repr, content)) or 'none'}" if isinstance(content, dict) else repr(content)[:80]
        raise CheckpointError(f"{need}, got {got}")
    for name, shard in shards.items():
        if not isinstance(shard, str) or not shard:
            raise CheckpointError(f"{index}: {name}: expected the name of a file, got {shard!r}")
    return {name: index.parent / shard for name, shard in shards.items()}


def check_tensor(
    where: str, name: str, tensor: Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]
) -> None:
    """CheckpointError unless the tensor has this shape and one of these dtypes."""
    _check_info(where, name, TensorInfo(tuple(tensor.shape), tensor.dtype), shape, dtypes)


def _check_info(
    where: str, name: str, info: TensorInfo, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]
) -> None:
    if info.shape != shape or info.dtype not in dtypes:
        need = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        dtype = "an unknown dtype" if info.dtype is None else str(info.dtype).removeprefix("torch.")
        raise CheckpointError(f"{where}: {name}: expected {need} {list(shape)}, got {dtype} {list(info.shape)}")


def find_block(tensors: Checkpoint, layer: int | str, endings: tuple[str, ...]) -> tuple[str, str]:
    """Which names a block's tensors have.

    Args:
        tensors: the checkpoint.
        layer: N for `layers.N.` (the models' own names) or `model.layers.N.` (what transformers saves); or the name of
            the block, for those of multi-token prediction and models inside others: "mtp.0", "language_model.layers.3".
        endings: what one of the block's tensors is called behind that, the models' own name first.

    Returns:
        The prefix, with its last dot, and the ending that was found behind it.

    Raises:
        CheckpointError: naming what was looked for.
    """
    if isinstance(layer, bool) or not isinstance(layer, (int, str)) or layer == "":
        raise InvalidArgumentError(
            f"checkpoint: layer: expected a number or the name of a block such as 'mtp.0', got {layer!r}"
        )
    block = f"layers.{layer}" if isinstance(layer, int) else layer.removesuffix(".")
    prefixes = (f"{block}.", f"model.{block}.")
    for prefix in prefixes:
        for ending in endings:
            if prefix + ending in tensors:
                return prefix, ending
    raise CheckpointError(
        f"{tensors.where}: {prefixes[0]}{endings[0]}: no such tensor, nor under {prefixes[1]}; "
        f"is {block} a block of this checkpoint?"
    )


@dataclass(frozen=True)
class Gate:
    """weight [experts, hidden_size] bfloat16 or float32; tid2eid [vocab, k] of a hash layer, else None; bias [experts]
    float32 of a dense layer, else None; bias_vl [experts] float32, or None: the bias of image tokens.
    """

    weight: Tensor
    bias: Tensor | None
    bias_vl: Tensor | None
    tid2eid: Tensor | None


def load_gate(source: Source, layer: int | str, preset: Preset) -> Gate:
    """The gate of a layer. A layer with `tid2eid` is a hash layer, whatever bias vision checkpoints keep beside it.

    Args:
        source: a file, a folder or a mapping; see Checkpoint.
        layer: number or name of the block; see find_block.
        preset: the model's sizes.

    Raises:
        CheckpointError: naming the tensor, its shape and what was expected; a table that check_table refuses.
    """
    with Checkpoint(source) as tensors:
        first = GATE_NAMES["weight"][0]
        prefix, ending = find_block(tensors, layer, tuple(f"{name}.{first}" for name in EXPERT_LAYERS))
        block = prefix + ending.removesuffix(first)

        def read(key: str, shape: tuple[int, ...], *dtypes: torch.dtype) -> Tensor | None:
            name = tensors.find(block, GATE_NAMES[key])
            if name is None:
                return None
            tensor = tensors.read(name, shape, dtypes)
            if key == "tid2eid":
                check_table(tensors.where, name, tensor, preset.experts)
            return tensor

        weight = tensors.read(block + first, (preset.experts, preset.hidden_size), (torch.bfloat16, torch.float32))
        tid2eid = read("tid2eid", (preset.vocab_size, preset.top_k), torch.int32, torch.int64)
        bias = read("bias", (preset.experts,), torch.float32)
        bias_vl = read("bias_vl", (preset.experts,), torch.float32)
    if bias is None and tid2eid is None:
        raise CheckpointError(
            f"{tensors.where}: {block}gate: expected .bias (dense) or .tid2eid (hash), got neither; looked for "
            f"{', '.join((*GATE_NAMES['bias'], *GATE_NAMES['tid2eid']))}"
        )
    return Gate(weight, bias if tid2eid is None else None, bias_vl, tid2eid)


def check_table(where: str, name: str, table: Tensor, experts: int) -> None:
    """CheckpointError unless the entries of a hash layer's table are experts, and not all of them 0, as in a table that
    no checkpoint has filled. Synchronises; a table without values (of the meta device) is not looked at.
    """
    if table.is_meta or not table.numel():
        return
    lowest, highest = (int(value) for value in table.aminmax())
    if lowest < 0 or highest >= experts:
        got = lowest if lowest < 0 else highest
        raise CheckpointError(f"{where}: {name}: expected experts from 0 to {experts - 1}, got {got}")
    if highest == 0 and experts > 1:
        raise CheckpointError(
            f"{where}: {name}: expected the experts of each token, got 0 in every entry; was the table ever loaded?"
        )
