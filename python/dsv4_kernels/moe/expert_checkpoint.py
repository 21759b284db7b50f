"""Reads the experts of a layer from a checkpoint, by the names that dsv4_kernels.checkpoint lists."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from dsv4_kernels.checkpoint import (
    EXPERT_MATRICES,
    EXPERT_SCHEMES,
    STACKED_EXPERTS,
    STACKED_SCALE,
    Checkpoint,
    CheckpointError,
    ExpertNames,
    find_block,
)
from dsv4_kernels.moe.expert_layout import CODES, GROUPS, MXFP4_SCALES, NVFP4_SCALES, ExpertTensors

_GATE, _UP, _DOWN = range(3)


class ExpertReader:
    """The experts of one layer in a checkpoint, or one tensor-parallel rank's part of each."""

    def __init__(
        self,
        tensors: Checkpoint,
        layer: int | str,
        experts: Sequence[int],
        hidden_size: int,
        intermediate_size: int,
        rank: int,
        ranks: int,
    ) -> None:
        """Finds the layer and its names, and checks that every tensor of these experts is there and fits.

        Args:
            tensors: the checkpoint.
            layer: number or name of the block; see checkpoint.find_block.
            experts: ids of those that are wanted, in the order of their places here; one may come again.
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
        first = experts[0]
        endings = {
            f"{block}.experts.{first}.{matrices[_GATE]}.{scheme.codes}": block
            for scheme in EXPERT_SCHEMES.values()
            for block, matrices in EXPERT_MATRICES.items()
        }
        endings |= {f"{block}.experts.{STACKED_EXPERTS[0]}": block for block in EXPERT_MATRICES}
        prefix, ending = find_block(tensors, layer, tuple(endings))
        block = endings[ending]
        self.prefix, self._matrices = f"{prefix}{block}.experts.", EXPERT_MATRICES[block]
        self._stacked = ending.endswith(STACKED_EXPERTS[0])
        self._names = ExpertNames("", STACKED_SCALE) if self._stacked else self._find_scheme(first)
        nvfp4 = tensors.info(self._name(first, _GATE, self._names.scale)).dtype in NVFP4_SCALES
        self.format = "nvfp4" if nvfp4 and self._names.factor is not None else "mxfp4"
        self._factors: dict[tuple[int, int], Tensor] = {}
        for expert in dict.fromkeys(experts):
            for matrix in (_GATE, _UP, _DOWN):
                for name, shape, dtypes, _ in self._parts(expert, matrix):
                    self._check(name, shape, dtypes)
                if self.format == "nvfp4":
                    self._factors[expert, matrix] = self._factor(self._name(expert, matrix, str(self._names.factor)))

    def __call__(self, expert: int) -> ExpertTensors:
        """Reads an expert, counted from the first one that is wanted."""
        expert = self.experts[expert]
        parts = [[self._read(*part) for part in self._parts(expert, matrix)] for matrix in (_GATE, _UP, _DOWN)]
        l1_codes, l1_scale = (torch.cat(pair) for pair in zip(parts[_GATE], parts[_UP], strict=True))
        l2_codes, l2_scale = parts[_DOWN]
        if self.format == "mxfp4":
            return ExpertTensors(l1_codes, l1_scale, None, l2_codes, l2_scale, None)
        gate, up, down = (self._factors[expert, matrix] for matrix in (_GATE, _UP, _DOWN))
        l1_scale, l2_scale = l1_scale.view(torch.float8_e4m3fn), l2_scale.view(torch.float8_e4m3fn)
        return ExpertTensors(l1_codes, l1_scale, torch.cat((gate, up)), l2_codes, l2_scale, down)

    def _read(
        self, name: str, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], part: tuple[slice, ...]
    ) -> Tensor:
        """The bytes of a matrix's codes or scales."""
        read = self.tensors.read(name, shape, dtypes, part).view(torch.uint8)
        return read[0] if self._stacked else read

    def activation_scales(self) -> tuple[float, float] | None:
        """The static scales of both products' activations, the largest over the experts; None if there are none."""
        kind = self._names.activation_scale
        if self.format != "nvfp4" or kind is None or self._name(self.experts[0], _GATE, kind) not in self.tensors:
            return None
        largest = [
            max(self._activation_scale(self._name(expert, matrix, kind)) for expert in self.experts for matrix in of)
            for of in ((_GATE, _UP), (_DOWN,))
        ]
        return largest[0], largest[1]

    def _find_scheme(self, expert: int) -> ExpertNames:
        marks = [mark for mark in EXPERT_SCHEMES if self._name(expert, _GATE, mark) in self.tensors]
        if not marks:
            others = ", ".join(mark for mark in EXPERT_SCHEMES if mark != "scale")
            raise CheckpointError(
                f"{self.tensors.where}: {self._name(expert, _GATE, 'scale')}: no such tensor, nor any of {others}: "
                "without scales these are no FP4 weights"
            )
        return EXPERT_SCHEMES[marks[0]]

    def _name(self, expert: int, matrix: int, part: str) -> str:
        if self._stacked:
            return f"{self.prefix}{STACKED_EXPERTS[matrix == _DOWN]}{part}"
        return f"{self.prefix}{expert}.{self._matrices[matrix]}.{part}"

    def _parts(
        self, expert: int, matrix: int
    ) -> Iterator[tuple[str, tuple[int, ...], tuple[torch.dtype, ...], tuple[slice, ...]]]:
        """Codes and scales of a matrix: name, shape in the checkpoint, dtypes, and this rank's part of it."""
        inner, whole, start = self._inner, self._inner * self._ranks, self._inner * self._rank
        scales = NVFP4_SCALES if self.format == "nvfp4" else MXFP4_SCALES
        for kind, pack, dtypes in (
            (self._names.codes, 2, CODES),
            (self._names.scale, GROUPS[self.format], scales),
        ):
            if matrix == _DOWN:
                shape: tuple[int, ...] = self._hidden, whole // pack
                part: tuple[slice, ...] = slice(None), slice(start // pack, (start + inner) // pack)
            else:
                shape = whole, self._hidden // pack
                part = slice(start, start + inner), slice(None)
            name = self._name(expert, matrix, kind)
            if self._stacked:
                yield name, self._stacked_shape(name, shape, matrix), dtypes, self._stacked_part(expert, matrix, part)
            else:
                yield name, shape, dtypes, part if self._ranks > 1 else ()

    def _stacked_shape(self, name: str, shape: tuple[int, ...], matrix: int) -> tuple[int, ...]:
        """Of all experts' tensor: at least as many as are wanted, and gate's and up's rows together."""
        experts = max(max(self.experts) + 1, *self.tensors.info(name).shape[:1])
        return (experts, shape[0] * (1 if matrix == _DOWN else 2), shape[1])

    def _stacked_part(self, expert: int, matrix: int, part: tuple[slice, ...]) -> tuple[slice, ...]:
        rows, columns = part
        if matrix == _UP:
            whole = self._inner * self._ranks
            rows = slice(rows.start + whole, rows.stop + whole)
        return slice(expert, expert + 1), rows, columns

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
