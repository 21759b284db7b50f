"""PagedStash: pools, free lists and flags of one training step, and activations that go through them."""

from __future__ import annotations

import math
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from dsv4_kernels._native import paged_stash_workspace_size
from dsv4_kernels.errors import InvalidArgumentError
from dsv4_kernels.host_values import integer
from dsv4_kernels.stash.functions import paged_stash_copy, paged_stash_pop
from dsv4_kernels.stash.saved import SavedActivations

# What rows of a tensor go to: their dtype and the elements of one.
PoolKey = tuple[torch.dtype, int]

_LIST_ALIGNMENT = 2  # int64 entries: pieces of the metadata start on 16 bytes


@dataclass(frozen=True)
class PoolSize:
    """pages: in device memory; host_pages: in pinned host memory, for when the first are taken."""

    pages: int
    host_pages: int = 0


@dataclass(frozen=True)
class PoolReport:
    """Pages of one pool, (CUDA, host): how many there are, how many are taken, and the most that ever were since the
    pages were last reset.
    """

    pages: tuple[int, int]
    used: tuple[int, int]
    high_water: tuple[int, int]


@dataclass(frozen=True)
class StashReport:
    """What PagedStash.check() found.

    overflow: a tensor found no pages. The step's results are worthless: reset() and run it again, with larger pools.
    spilled: a tensor went to the host pool. Right, but slow.
    """

    overflow: bool
    spilled: bool
    pools: dict[PoolKey, PoolReport]


class _Step:
    """One step of one stash: what its handles are of. Two are the same if they are the same object."""

    def __init__(self, owner: PagedStash) -> None:
        self.owner = weakref.ref(owner)


@dataclass(eq=False)
class StashHandle:
    """What stash() returns and pop() takes, once: of that stash and of its step, which reset() ends."""

    key: PoolKey
    shape: torch.Size
    num_tokens: Tensor
    record: Tensor = field(repr=False)
    spilled: Tensor = field(repr=False)
    step: _Step = field(repr=False)
    captured: bool = field(default=False, repr=False)  # in a CUDA graph, whose replays stash anew
    popped: bool = False

    def __copy__(self) -> StashHandle:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> StashHandle:
        return self


@dataclass(frozen=True)
class _Pool:
    size: PoolSize
    pool: Tensor
    host_pool: Tensor | None
    free_list: Tensor
    host_list: Tensor | None
    head: Tensor
    tail: Tensor
    capacity: Tensor
    high_water: Tensor


def pages_for(expected_tokens: int, tensors: int = 1, *, factor: float = 1.0, page_size: int = 64) -> int:
    """Pages that hold `tensors` tensors at a time, each of `factor` times as many tokens as are expected.

    Args:
        expected_tokens: rows of one tensor on average: T tokens, top-k routing and R ranks give T * k / R.
        tensors: stashed and not yet popped, at most: layers times tensors of a layer, say.
        factor: room for imbalance; 1.0 for none.
        page_size: as given to PagedStash.
    """
    for name, value, least in (
        ("expected_tokens", expected_tokens, 0),
        ("tensors", tensors, 0),
        ("factor", factor, 0),
        ("page_size", page_size, 1),
    ):
        if not isinstance(value, Real) or not least <= value < math.inf:
            raise InvalidArgumentError(f"pages_for: {name}: expected a finite number from {least}, got {value}")
    return tensors * math.ceil(expected_tokens * factor / page_size)


class PagedStash:
    """Activations in pages, for counts that only the device knows.

    Owns a pool in device memory, and one in pinned host memory if asked for, for each dtype and hidden size; their free
    lists; and the flags of a step. All of it is allocated at construction: stash() and pop() launch one kernel each,
    can be captured in a CUDA graph and never synchronise. check(), once a step, does, and says whether all fitted.

        stash = PagedStash({(torch.bfloat16, 4096): PoolSize(pages_for(8192, layers, factor=1.2))})
        handle = stash.stash(x, num_tokens)      # x's memory is free now
        x = stash.pop(handle)                    # in any order
        if stash.check().overflow: ...           # rerun the step
        stash.reset()

    Args:
        pools: the size of each pool, by dtype and hidden size (the elements of a row).
        page_size: rows of a page.
        device: where activations are; "cpu" for the CPU implementation.
        side_stream: copies of stash() run on a stream of their own, beside what comes next. pop() waits for them.

    Raises:
        InvalidArgumentError: a size that makes no pool.
        torch.OutOfMemoryError: the pools do not fit into device memory.
        MemoryError: the host pools cannot be pinned.
    """

    def __init__(
        self,
        pools: Mapping[PoolKey, PoolSize],
        *,
        page_size: int = 64,
        device: torch.device | str = "cuda",
        side_stream: bool = False,
    ) -> None:
        if not pools:
            raise InvalidArgumentError("PagedStash: pools: expected at least one dtype and hidden size, got none")
        page_size = integer("PagedStash", "page_size", page_size, 1, 65536)
        for key, size in pools.items():
            _check_size(key, size)
        device = torch.device(device)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        elif device.type == "cpu":
            device = torch.device("cpu")  # without a number, as its tensors say
        self.page_size, self.device = page_size, device
        self.stashed = self.popped = 0
        self._step = _Step(self)
        self._dropped: deque[StashHandle] = deque()  # whose pages the next call gives back
        self._stream = torch.cuda.Stream(device) if side_stream and device.type == "cuda" else None
        self._pending = False  # whether the side stream has work that no stream waits for yet
        self._rows: dict[tuple[int, int], Tensor] = {}
        self._allocate(dict(pools))

    def _allocate(self, sizes: dict[PoolKey, PoolSize]) -> None:
        # One tensor holds all metadata, what check() reads in front: one copy resets it, one brings it to the host.
        counters = 2 + 8 * len(sizes)
        lists = sum(_padded(s.pages) + _padded(s.host_pages) for s in sizes.values())
        initial = torch.zeros(counters + lists, dtype=torch.int64, device="cpu")
        for number, size in enumerate(sizes.values()):
            counts = torch.tensor([size.pages, size.host_pages], dtype=torch.int64, device="cpu")
            initial[2 + 8 * number : 10 + 8 * number] = torch.cat((counts * 0, counts, counts, counts * 0))
        place = counters
        for size in sizes.values():
            for pages in (size.pages, size.host_pages):
                initial[place : place + pages] = torch.arange(pages, device="cpu")
                place += _padded(pages)
        self._initial = initial.to(self.device)
        self._state = self._initial.clone()
        self._counters = self._state[:counters]
        self.overflow, self.host_spill = self._state[0:1], self._state[1:2]
        self._workspace = torch.zeros(paged_stash_workspace_size(), dtype=torch.uint8, device=self.device)
        self._pools: dict[PoolKey, _Pool] = {}
        place = counters
        for number, (key, size) in enumerate(sizes.items()):
            head, tail, capacity, high_water = self._state[2 + 8 * number : 10 + 8 * number].view(4, 2)
            free_list = self._state[place : place + size.pages]
            place += _padded(size.pages)
            host_list = self._state[place : place + size.host_pages] if size.host_pages else None
            place += _padded(size.host_pages)
            pool = self._device_pool(key, size.pages)
            host_pool = self._host_pool(key, size.host_pages) if size.host_pages else None
            self._pools[key] = _Pool(size, pool, host_pool, free_list, host_list, head, tail, capacity, high_water)

    def _device_pool(self, key: PoolKey, pages: int) -> Tensor:
        dtype, hidden = key
        try:
            return torch.empty(pages, self.page_size, hidden, dtype=dtype, device=self.device)
        except torch.OutOfMemoryError as error:
            size = _gibibytes(pages * self.page_size * hidden * dtype.itemsize)
            text = (
                f"PagedStash: {pages} pages of {self.page_size} x {hidden} {dtype} ({size}) do not fit on {self.device}"
            )
            raise torch.OutOfMemoryError(f"{text}; give it fewer pages and more host_pages. {error}") from error

    def _host_pool(self, key: PoolKey, pages: int) -> Tensor:
        dtype, hidden = key
        if self.device.type != "cuda":
            return torch.empty(pages, self.page_size, hidden, dtype=dtype, device="cpu")
        size = pages * self.page_size * hidden * dtype.itemsize
        what = f"PagedStash: {pages} host pages of {self.page_size} x {hidden} {dtype} ({_gibibytes(size)})"
        available = available_host_memory()
        if available is not None and size > available:
            # Pinned memory cannot be swapped out: allocating more than is available may take the machine down.
            raise MemoryError(f"{what}: the host has {_gibibytes(available)} available; give it fewer host_pages")
        try:
            return torch.empty(pages, self.page_size, hidden, dtype=dtype, pin_memory=True, device="cpu")
        except RuntimeError as error:
            way_out = "give it fewer host_pages, or raise the limit on locked memory (ulimit -l) or the container's"
            raise MemoryError(f"{what} could not be pinned; {way_out}. {error}") from error

    @property
    def live(self) -> int:
        """Handles that have not been popped, without those that nobody can pop any more."""
        return self.stashed - self.popped - len(self._dropped)

    @property
    def device_bytes(self) -> int:
        """Device memory of the pools and their metadata."""
        tensors = [pool.pool for pool in self._pools.values()] + [self._state, self._initial, self._workspace]
        return sum(t.numel() * t.element_size() for t in tensors)

    @property
    def host_bytes(self) -> int:
        """Pinned host memory of the pools."""
        tensors = [pool.host_pool for pool in self._pools.values() if pool.host_pool is not None]
        return sum(t.numel() * t.element_size() for t in tensors)

    def has_pool(self, tensor: Tensor) -> bool:
        """Whether a tensor's rows have a pool here."""
        return (
            tensor.dim() > 0 and tensor.numel() > 0 and tensor.device == self.device and _key_of(tensor) in self._pools
        )

    def stash(self, tensor: Tensor, num_tokens: Tensor | None = None) -> StashHandle:
        """Copies the first num_tokens rows into pages. The tensor is not needed afterwards.

        Args:
            tensor: [rows, ...] on the stash's device, contiguous; the elements of a row are its hidden size.
            num_tokens: one int64 on the device, which must keep its value until pop(); None: all rows.

        Returns:
            The handle for pop(). Where neither pool has room, overflow is set, which check() reports.

        Raises:
            InvalidArgumentError: a tensor that no pool is for, or num_tokens that is not as it should be; nothing has
                changed.
        """
        if not isinstance(tensor, Tensor):
            raise InvalidArgumentError(
                f"PagedStash.stash: tensor: expected a torch tensor, got {type(tensor).__name__}"
            )
        if tensor.dim() == 0 or _key_of(tensor) not in self._pools:
            held = ", ".join(f"{hidden} x {dtype}" for dtype, hidden in self._pools)
            got = "a scalar" if tensor.dim() == 0 else f"{_key_of(tensor)[1]} x {tensor.dtype}"
            raise InvalidArgumentError(f"PagedStash.stash: tensor: expected rows of {held}, got {got}")
        if not tensor.is_contiguous():
            got = f"strides {list(tensor.stride())} for shape {list(tensor.shape)}"
            raise InvalidArgumentError(
                f"PagedStash.stash: tensor: expected a contiguous tensor, got {got}; call .contiguous()"
            )
        if tensor.device != self.device:
            raise InvalidArgumentError(
                f"PagedStash.stash: tensor: expected one on {self.device}, where the pools are, got {tensor.device}"
            )
        key = _key_of(tensor)
        pool, rows = self._pools[key], tensor.shape[0]
        if num_tokens is None:
            num_tokens = self._all_rows(rows)
        elif not isinstance(num_tokens, Tensor):
            raise InvalidArgumentError(
                f"PagedStash.stash: num_tokens: expected a tensor of one int64 on {self.device}, or None for all rows, "
                f"got {num_tokens!r}"
            )
        self._give_back()
        capturing = self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        # The last entry is the flag: one allocation.
        record = torch.empty(-(-rows // self.page_size) + 1, dtype=torch.int64, device=self.device)
        handle = StashHandle(key, tensor.shape, num_tokens, record[:-1], record[-1:], self._step, capturing)
        with self._beside(tensor, record, num_tokens), torch.no_grad():
            paged_stash_copy(
                tensor.detach().view(rows, key[1]),
                pool.pool,
                pool.host_pool,
                num_tokens,
                pool.free_list,
                pool.host_list,
                pool.head,
                pool.tail,
                pool.capacity,
                handle.record,
                self.overflow,
                self.host_spill,
                handle.spilled,
                high_water=pool.high_water,
                workspace=self._workspace,
            )
        self.stashed += 1
        return handle

    def pop(self, handle: StashHandle, *, out: Tensor | None = None, zero_rest: bool = False) -> Tensor:
        """Brings a tensor back and returns its pages.

        Args:
            handle: of stash(), since the last reset(); each can be popped once.
            out: a contiguous tensor of the same shape and dtype to write to.
            zero_rest: zero the rows behind the last token; else they keep what out held, or are undefined.

        Returns:
            out. After an overflow it is not written: the step is worthless, see check().
        """
        if not isinstance(handle, StashHandle):
            raise InvalidArgumentError(f"PagedStash.pop: handle: expected a StashHandle, got {type(handle).__name__}")
        if handle.step.owner() is not self:
            raise InvalidArgumentError("PagedStash.pop: handle: expected one of this stash, got one of another")
        if handle.popped:
            raise InvalidArgumentError("PagedStash.pop: handle: expected one that was not popped, got one that was")
        if handle.step is not self._step:
            raise InvalidArgumentError("PagedStash.pop: handle: expected one of this step, got one from before reset()")
        pool = self._pools[handle.key]
        if out is None:
            out = torch.empty(handle.shape, dtype=handle.key[0], device=self.device)
        elif (
            not isinstance(out, Tensor)
            or (out.shape, out.dtype, out.device) != (handle.shape, handle.key[0], self.device)
            or not out.is_contiguous()
        ):
            got = type(out).__name__
            if isinstance(out, Tensor):
                got = f"{out.dtype} on {out.device}, shape {list(out.shape)}, strides {list(out.stride())}"
            raise InvalidArgumentError(
                f"PagedStash.pop: out: expected a contiguous tensor of shape {list(handle.shape)} and {handle.key[0]} "
                f"on {self.device}, got {got}"
            )
        self.join()
        with torch.no_grad():
            paged_stash_pop(
                pool.pool,
                pool.host_pool,
                out.detach().view(handle.shape[0], handle.key[1]),
                handle.num_tokens,
                handle.record,
                handle.spilled,
                self.overflow,
                pool.free_list,
                pool.host_list,
                pool.tail,
                pool.capacity,
                None,
                zero_rest,
                workspace=self._workspace,
            )
        handle.popped = True
        self.popped += 1
        return out

    def reset(self) -> None:
        """A new step: all pages free, all flags clear, high-water marks at 0. Handles from before are void."""
        self.join()
        self._state.copy_(self._initial)
        self._step = _Step(self)
        self._dropped.clear()
        self.stashed = self.popped = 0

    def check(self) -> StashReport:
        """What happened since the last reset(). The only call that synchronises: once a step, outside of captures."""
        self._give_back()
        self.join()
        overflow, spilled, *counters = self._counters.tolist()
        pools = {}
        for number, (key, pool) in enumerate(self._pools.items()):
            head, tail, high = (counters[8 * number + i : 8 * number + i + 2] for i in (0, 2, 6))
            pages = (pool.size.pages, pool.size.host_pages)
            used = (pages[0] - tail[0] + head[0], pages[1] - tail[1] + head[1])
            pools[key] = PoolReport(pages, used, (high[0], high[1]))
        return StashReport(bool(overflow), bool(spilled), pools)

    def join(self) -> None:
        """Makes the current stream wait for the side stream, as pop(), reset() and check() do.

        To be called before a capture begins or ends that follows a stash().
        """
        if self._stream is not None and self._pending:
            torch.cuda.current_stream(self.device).wait_stream(self._stream)
            self._pending = False

    @contextmanager
    def saved_activations(
        self, select: Callable[[Tensor], Tensor | bool | None] | None = None
    ) -> Iterator[SavedActivations[StashHandle]]:
        """Autograd's saved tensors go through the stash: out of memory between forward and backward.

            with stash.saved_activations() as saved:
                y = experts(saved.mark(x, num_tokens))

        A marked tensor is stashed when an operation saves it, once however many do, and popped when backward first
        needs it. It then stays until the last of these operations has run backward, or with retain_graph until the
        graph is gone, however often they read it; a later graph that saves it stashes it anew. Pages of a graph that
        goes without running backward are given back by the next call of stash() or check(). Rows behind the last token
        come back as zeros, so gradients equal those without the stash, bit for bit, where those rows were zeros or
        count for nothing.

        Args:
            select: asked about every other tensor that is saved: its num_tokens, True for all rows, None to leave it.
                What is saved of an operation's result can only be chosen so.
        """
        saved = SavedActivations(self, select)
        with torch.autograd.graph.saved_tensors_hooks(saved.pack, saved.unpack):
            yield saved

    def drop(self, handle: StashHandle) -> None:
        """Says that nobody will pop a handle. The next stash() or check() outside of a capture gives its pages back.

        It launches nothing, so it may be called from a finaliser, in any thread and at any time. What was stashed in a
        capture stays until reset(): each replay stashes it again.
        """
        if not handle.popped and not handle.captured and handle.step is self._step:
            self._dropped.append(handle)

    def _give_back(self) -> None:
        """Returns the pages of dropped handles, by way of a tensor that nobody reads."""
        if not self._dropped or (self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
            return
        while self._dropped:
            handle = self._dropped.popleft()
            if not handle.popped and handle.step is self._step:
                self.pop(handle)

    def _all_rows(self, rows: int) -> Tensor:
        """A count of so many rows, filled on the current stream: another one would have to wait for that."""
        on_device = self.device.type == "cuda"
        stream = torch.cuda.current_stream(self.device).cuda_stream if on_device else 0
        count = self._rows.get((rows, stream))
        if count is None:
            count = torch.full((1,), rows, dtype=torch.int64, device=self.device)
            if on_device and torch.cuda.is_current_stream_capturing():
                return count  # belongs to the graph
            self._rows[rows, stream] = count
        return count

    def _beside(self, *tensors: Tensor) -> Any:
        """The context in which a copy runs: on the side stream if there is one, behind what the current one has."""
        if self._stream is None:
            return nullcontext()
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        self._pending = True
        for tensor in tensors:
            tensor.record_stream(self._stream)  # their memory may be given back at once: not before the copy is done
        return torch.cuda.stream(self._stream)


def _key_of(tensor: Tensor) -> PoolKey:
    return tensor.dtype, math.prod(tensor.shape[1:])


def _padded(entries: int) -> int:
    return -(-entries // _LIST_ALIGNMENT) * _LIST_ALIGNMENT


def _gibibytes(size: int) -> str:
    return f"{size / (1 << 30):.2f} GiB"


def _check_size(key: PoolKey, size: PoolSize) -> None:
    if (
        not isinstance(key, tuple)
        or len(key) != 2
        or not isinstance(key[0], torch.dtype)
        or type(key[1]) is not int
        or key[1] < 1
    ):
        raise InvalidArgumentError(f"PagedStash: pools: expected keys of a dtype and a hidden size, got {key!r}")
    if not isinstance(size, PoolSize):
        raise InvalidArgumentError(f"PagedStash: pools: expected a PoolSize, got {size!r}")
    integer("PagedStash", "pools (pages)", size.pages, 0)
    integer("PagedStash", "pools (host_pages)", size.host_pages, 0)


def available_host_memory() -> int | None:
    """Bytes of host memory that can be had without swapping; None where the system does not say."""
    try:
        with open("/proc/meminfo") as file:  # noqa: PTH123
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None
