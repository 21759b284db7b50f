"""Which of autograd's saved tensors go through a stash, and how they come back."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

Handle = TypeVar("Handle")


class Stash(Protocol[Handle]):
    """What the hooks need of a PagedStash."""

    @property
    def device(self) -> torch.device: ...
    def has_pool(self, tensor: Tensor) -> bool: ...
    def stash(self, tensor: Tensor, num_tokens: Tensor | None = None) -> Handle: ...
    def pop(self, handle: Handle, *, zero_rest: bool = False) -> Tensor: ...
    def drop(self, handle: Handle) -> None: ...


class _Entry(Generic[Handle]):
    """One tensor in the stash. It lives as long as autograd keeps what an operation saved of it, and so does what came
    back; if it goes before that, its pages are given back.
    """

    def __init__(self, stash: Stash[Handle], handle: Handle) -> None:
        self._stash, self._handle = stash, handle
        self._restored: Tensor | None = None
        self._stream: torch.cuda.Stream | None = None  # that it came back on
        self._lock = threading.Lock()  # backward of several graphs may run in several threads
        weakref.finalize(self, stash.drop, handle).atexit = False

    @property
    def waits(self) -> bool:
        """Whether it is still in its pages."""
        return self._restored is None

    def restore(self) -> Tensor:
        """The tensor: popped once, then the same one for everybody who asks."""
        with self._lock:
            on_device = self._stash.device.type == "cuda"
            stream = torch.cuda.current_stream(self._stash.device) if on_device else None
            if self._restored is None:
                self._restored, self._stream = self._stash.pop(self._handle, zero_rest=True), stream
            elif stream is not None and self._stream is not None and stream != self._stream:
                stream.wait_stream(self._stream)
                self._restored.record_stream(stream)
            return self._restored


@dataclass(frozen=True)
class _Saved:
    """What autograd keeps in place of a tensor."""

    entry: _Entry[Any]
    shape: torch.Size


class SavedActivations(Generic[Handle]):
    """The hooks of one PagedStash.saved_activations() context."""

    def __init__(self, stash: Stash[Handle], select: Callable[[Tensor], Tensor | bool | None] | None) -> None:
        self._stash = stash
        self._select = select
        # By where the bytes are. A tensor that is gone frees its address for another one, so each is watched.
        self._marked: dict[tuple[Any, ...], tuple[weakref.ref[Tensor], Tensor | None]] = {}
        # Entries belong to what autograd saved.
        self._entries: dict[tuple[Any, ...], tuple[weakref.ref[Tensor], weakref.ref[_Entry[Handle]]]] = {}

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
        source_of, entry_of = self._entries.get(place, (_nothing, _nothing))
        known = entry_of()
        if known is not None and known.waits and source_of() is not None:
            return _Saved(known, tensor.shape)
        watch, num_tokens = self._marked.get(place, (None, None))
        source = watch() if watch is not None else None
        if source is None:
            chosen = self._select(tensor) if self._select is not None and self._stash.has_pool(tensor) else None
            if chosen is None or chosen is False:
                return tensor
            source, num_tokens = tensor, None if chosen is True else chosen
        # A saved view of another shape has the rows of what was marked.
        entry = _Entry(self._stash, self._stash.stash(source.detach(), num_tokens))
        self._entries[place] = (weakref.ref(source), weakref.ref(entry))
        return _Saved(entry, tensor.shape)

    def unpack(self, saved: Any) -> Tensor:
        """Of saved_tensors_hooks: the tensor that a backward operation needs."""
        if not isinstance(saved, _Saved):
            tensor: Tensor = saved
            return tensor
        return saved.entry.restore().view(saved.shape)


def _nothing() -> None:
    """A weak reference to what is gone."""


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """Tells apart tensors that do not hold the same bytes of memory at the same state."""
    return tensor.data_ptr(), tensor.numel(), tensor.dtype, tensor._version
