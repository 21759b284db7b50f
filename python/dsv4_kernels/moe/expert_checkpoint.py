"""Reads the experts of a layer from a checkpoint, by the names of the models, of modelopt and of compressed-tensors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dsv4_kernels.checkpoint import Checkpoint, CheckpointError, find_block
from dsv4_kernels.moe.expert_layout import CODES, GROUPS, MXFP4_SCALES, NVFP4_SCALES, ExpertTensors


@dataclass(frozen=True)
class _Names:
    """The names of a matrix's tensors.

    factor, activation_scale: of NVFP4 weights, the per-tensor scale and the static scale of the product's activations:
    amax / 2688, or its reciprocal.
    """

    codes: str
    scale: str
    factor: str | None = None
    activation_scale: str | None = None
    reciprocal: bool = False


# By the tensor that tells the schemes apart; the first one that is there counts.
_SCHEMES = {
    "scale": _Names("weight", "scale"),  # the models' own
    "weight_packed": _Names("weight_packed", "weight_scale", "weight_global_scale", "input_global_scale", True),
    "weight_scale": _Names("weight", "weight_scale", "weight_scale_2", "input_scale"),  # modelopt
}
_GATE, _UP, _DOWN = range(3)
_MATRICES = {"ffn": ("w1", "w3", "w2"), "mlp": ("gate_proj", "up_proj", "down_proj")}


class ExpertReader:
    """The experts of one layer in a checkpoint, or one tensor-parallel rank's part of each."""

    def __init__(
        self,
        tensors: Checkpoint,
        layer: int | str,
        experts: range,
        hidden_size: int,
        intermediate_size: int,
        rank: int,
        ranks: int,
    ) -> None:
        """Finds the layer and its names, and checks that every tensor of these experts is there and fits.

        Args:
            tensors: the checkpoint.
            layer: number or name of the block; see checkpoint.find_block.
            experts: ids of those that are wanted.
            hidden_size: of the model.
            intermediate_size: of one rank's part.
            rank: which part.
            ranks: how many parts an expert is cut into.

        Raises:
            CheckpointError: naming file and tensor, what was expected and what there is.
        """
        self.tensors = tensors
        self.experts = experts
        self._hidden, self._inner, self._rank, self._ranks = hidden_size, intermediate_size, rank, ranks
        first = experts.start
        endings = {
            f"{block}.experts.{first}.{matrices[_GATE]}.{scheme.codes}": (block, key)
            for key, scheme in _SCHEMES.items()
            for block, matrices in _MATRICES.items()
        }
        prefix, ending = find_block(tensors, layer, tuple(endings))
        block, _ = endings[ending]
        self.prefix, self._matrices = f"{prefix}{block}.experts.", _MATRICES[block]
        marks = [mark for mark in _SCHEMES if self._name(first, _GATE, mark) in tensors]
        if not marks:
            raise CheckpointError(
                f"{tensors.where}: {self._name(first, _GATE, 'scale')}: no such tensor, nor any of "
                f"{', '.join(mark for mark in _SCHEMES if mark != 'scale')}: without scales these are no FP4 weights"
            )
        self._names = _SCHEMES[marks[0]]
        nvfp4 = tensors.info(self._name(first, _GATE, self._names.scale)).dtype in NVFP4_SCALES
        self.format = "nvfp4" if nvfp4 and self._names.factor is not None else "mxfp4"
        self._factors: dict[tuple[int, int], Tensor] = {}
        for expert in experts:
            for matrix in (_GATE, _UP, _DOWN):
                for name, shape, dtypes, _ in self._parts(expert, matrix):
                    self._check(name, shape, dtypes)
                if self.format == "nvfp4":
                    self._factors[expert, matrix] = self._factor(self._name(expert, matrix, str(self._names.factor)))

    def __call__(self, expert: int) -> ExpertTensors:
        """Reads an expert, counted from the first one that is wanted."""
        expert = self.experts[expert]
        parts = [
            [self.tensors.read(*part).view(torch.uint8) for part in self._parts(expert, matrix)]
            for matrix in (_GATE, _UP, _DOWN)
        ]
        l1_codes, l1_scale = (torch.cat(pair) for pair in zip(parts[_GATE], parts[_UP], strict=True))
        l2_codes, l2_scale = parts[_DOWN]
        if self.format == "mxfp4":
            return ExpertTensors(l1_codes, l1_scale, None, l2_codes, l2_scale, None)
        gate, up, down = (self._factors[expert, matrix] for matrix in (_GATE, _UP, _DOWN))
        l1_scale, l2_scale = l1_scale.view(torch.float8_e4m3fn), l2_scale.view(torch.float8_e4m3fn)
        return ExpertTensors(l1_codes, l1_scale, torch.cat((gate, up)), l2_codes, l2_scale, down)

    def activation_scales(self) -> tuple[float, float] | None:
        """The static scales of both products' activations, the largest over the experts; None if there are none."""
        kind = self._names.activation_scale
        if self.format != "nvfp4" or kind is None or self._name(self.experts.start, _GATE, kind) not in self.tensors:
            return None
        largest = [
            max(self._activation_scale(self._name(expert, matrix, kind)) for expert in self.experts for matrix in of)
            for of in ((_GATE, _UP), (_DOWN,))
        ]
        return largest[0], largest[1]

    def _name(self, expert: int, matrix: int, part: str) -> str:
        return f"{self.prefix}{expert}.{self._matrices[matrix]}.{part}"

    def _parts(
        self, expert: int, matrix: int
    ) -> Iterator[tuple[str, tuple[int, ...], tuple[torch.dtype, ...], tuple[slice, ...]]]:
        """Codes and scales of a matrix: name, shape in the checkpoint, dtypes, and this rank's part of it."""
        inner, whole, start = self._inner, self._inner * self._ranks, self._inner * self._rank
        scales = NVFP4_SCALES if self.format == "nvfp4" else MXFP4_SCALES
        for name, pack, dtypes in (
            (self._names.codes, 2, CODES),
            (self._names.scale, GROUPS[self.format], scales),
        ):
            if matrix == _DOWN:
                shape = self._hidden, whole // pack
                part = slice(None), slice(start // pack, (start + inner) // pack)
            else:
                shape = whole, self._hidden // pack
                part = slice(start, start + inner), slice(None)
            yield self._name(expert, matrix, name), shape, dtypes, part if self._ranks > 1 else ()

    def _check(self, name: str, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> None:
        try:
            self.tensors.check(name, shape, dtypes)
        except CheckpointError as error:
            if self._ranks > 1 or name not in self.tensors:
                raise
            there = self.tensors.info(name).shape
            if len(there) != 2 or there == shape or any(a % b for a, b in zip(there, shape, strict=True)):
                raise
            raise CheckpointError(
                f"{error}; a layer that holds one rank's part of the inner width is told so at construction: "
                "tensor_parallel_rank and tensor_parallel_size"
            ) from None

    def _factor(self, name: str) -> Tensor:
        """[1] float32: what a matrix's products are multiplied by."""
        if self._names.reciprocal:
            value = self.tensors.read_number(name, "a finite number above 0", above=True)
            return 1 / torch.tensor([value], dtype=torch.float32, device="cpu")
        value = self.tensors.read_number(name, "a finite number of at least 0")
        return torch.tensor([value], dtype=torch.float32, device="cpu")

    def _activation_scale(self, name: str) -> float:
        value = self.tensors.read_number(
            name,
            "a finite number above 0 (or read the weights with activation_scales=False and set the scales yourself)",
            above=True,
        )
        return 1 / value if self._names.reciprocal else value
