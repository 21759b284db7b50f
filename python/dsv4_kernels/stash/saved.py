"""Which of autograd's saved tensors go through a stash, and how they come back."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from dsv4_kernels.stash.paged_stash import PagedStash, StashHandle


@dataclass
class _Entry:
    """One tensor in the stash, and how many operations saved it and have not asked for it yet."""

    handle: StashHandle
    waiting: int = 0
    restored: Tensor | None = None


@dataclass(frozen=True)
class _Saved:
    """What autograd keeps in place of a tensor."""

    entry: _Entry
    shape: torch.Size


class SavedActivations:
    """The hooks of one PagedStash.saved_activations() context."""

    def __init__(self, stash: PagedStash, select: Callable[[Tensor], Tensor | bool | None] | None) -> None:
        self._stash = stash
        self._select = select
        # By where the bytes are. A tensor that is gone frees its address for another one, so each is watched.
        self._marked: dict[tuple[Any, ...], tuple[weakref.ref[Tensor], Tensor | None]] = {}
        self._entries: dict[tuple[Any, ...], tuple[weakref.ref[Tensor], _Entry]] = {}

    def mark(self, tensor: Tensor, num_tokens: Tensor | None = None) -> Tensor:
        """Has a tensor stashed when an operation saves it, or a view of all of it. Returns the tensor.

        Args:
            tensor: [rows, ...], contiguous, of a dtype and hidden size that the stash has a pool for.
            num_tokens: one int64 on the device, which must keep its value until backward; None: all rows.
        """
        if not self._stash.has_pool(tensor) or not tensor.is_contiguous():
            # The same refusal that stash() has, at the place where it can be acted on.
            self._stash.stash(tensor, num_tokens)
        self._marked[_place(tensor)] = (weakref.ref(tensor), num_tokens)
        return tensor

    def pack(self, tensor: Tensor) -> Any:
        """Of saved_tensors_hooks: the tensor itself, or what stands for it."""
        if not tensor.is_contiguous() or not tensor.numel() or tensor.device != self._stash.device:
            return tensor
        place = _place(tensor)
        known = self._entries.get(place)
        if known is not None and known[0]() is not None and known[1].restored is None:
            return self._hold(known[1], tensor)
        watch, num_tokens = self._marked.get(place, (None, None))
        source = watch() if watch is not None else None
        if source is None:
            chosen = self._select(tensor) if self._select is not None and self._stash.has_pool(tensor) else None
            if chosen is None or chosen is False:
                return tensor
            source, num_tokens = tensor, None if chosen is True else chosen
        # A saved view of another shape has the rows of what was marked.
        entry = _Entry(self._stash.stash(source.detach(), num_tokens))
        self._entries[place] = (weakref.ref(source), entry)
        return self._hold(entry, tensor)

    def _hold(self, entry: _Entry, tensor: Tensor) -> _Saved:
        entry.waiting += 1
        return _Saved(entry, tensor.shape)

    def unpack(self, saved: Any) -> Tensor:
        """Of saved_tensors_hooks: the tensor that a backward operation needs."""
        if not isinstance(saved, _Saved):
            tensor: Tensor = saved
            return tensor
        entry = saved.entry
        if entry.restored is None:
            entry.restored = self._stash.pop(entry.handle, zero_rest=True)
        result = entry.restored.view(saved.shape)
        entry.waiting -= 1
        if entry.waiting == 0:
            entry.restored = None  # nobody else will ask: its memory lives as long as this operation needs it
        return result


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """Tells apart tensors that do not hold the same bytes of memory at the same state."""
    return tensor.data_ptr(), tensor.numel(), tensor.dtype, tensor._version
