"""The tensors of a batch that captured graphs read, and what is known to be in them: a step writes what has changed."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class _Known:
    """What a tensor was last written with, and the tensor's version then."""

    tensor: Tensor | None = None
    version: int = -1
    values: list[Any] = field(default_factory=list)

    def holds(self, tensor: Tensor) -> bool:
        """Whether nobody has written to the tensor since. An inference tensor does not tell."""
        return self.tensor is tensor and not tensor.is_inference() and tensor._version == self.version

    def written(self, tensor: Tensor, values: list[Any]) -> None:
        self.tensor, self.values = tensor, values
        self.version = -1 if tensor.is_inference() else tensor._version


@dataclass
class BatchTensors:
    """Writes to tensors of the device without waiting for it.

    The values go through page-locked memory of torch's caching allocator, which gives the memory of a copy that is
    under way to nobody else; so a step never waits for the copies of the one before.
    """

    _vectors: dict[str, _Known] = field(default_factory=dict)
    _table: _Known = field(default_factory=_Known)

    def write_vector(self, name: str, tensor: Tensor, values: list[int]) -> None:
        """New values for all of a tensor of one dimension; `name` tells it from others."""
        known = self._vectors.setdefault(name, _Known())
        if known.holds(tensor) and known.values == values:
            return
        tensor.copy_(_staged(values, tensor), non_blocking=True)
        known.written(tensor, values)

    def write_rows(self, table: Tensor, rows: list[list[int]], changed: list[int]) -> None:
        """Writes rows to the first ones of a table, -1 behind a row's end and in all further rows.

        changed: which of the rows differ from what the table holds, ascending; see changed_rows(). The lists are
        copied.
        """
        count = table.shape[0]
        held: list[Any] = self._table.values if self._table.holds(table) else [None] * count
        stale = [*changed, *(row for row in range(len(rows), count) if held[row] != [])]
        self._table.tensor = None  # not known until all is written
        begin = end = 0  # rows of one copy
        for row in stale:
            if row != end:
                self._write_run(table, rows, begin, end)
                begin = row
            end = row + 1
            held[row] = list(rows[row]) if row < len(rows) else []
        self._write_run(table, rows, begin, end)
        self._table.written(table, held)

    def changed_rows(self, table: Tensor, rows: list[list[int]]) -> list[int]:
        """Which rows differ from what the table holds."""
        if not self._table.holds(table):
            return list(range(len(rows)))
        held = self._table.values
        return [number for number, row in enumerate(rows) if row != held[number]]

    def _write_run(self, table: Tensor, rows: list[list[int]], begin: int, end: int) -> None:
        if begin == end:
            return
        columns = table.shape[1]
        values: list[int] = []
        for row in range(begin, end):
            blocks = rows[row] if row < len(rows) else []
            values += blocks
            values += [-1] * (columns - len(blocks))
        table[begin:end].copy_(_staged(values, table).view(end - begin, columns), non_blocking=True)


def _staged(values: list[int], like: Tensor) -> Tensor:
    """The values on the host in the dtype of the tensor that they go to; page-locked where that is on a device."""
    if not values:
        return torch.empty(0, dtype=like.dtype, device="cpu")
    # Through an array: torch.tensor() takes three times as long for a list.
    code = "q" if like.dtype == torch.int64 else "i"
    staged = torch.frombuffer(array(code, values), dtype=like.dtype)
    return staged.pin_memory() if like.is_cuda else staged
