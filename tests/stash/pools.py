"""Pools with their lists and flags, as the ops' description lays them out, and what they must hold after a call."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from dsv4_kernels.cases import poison
from dsv4_kernels.stash import paged_stash_copy, paged_stash_pop
from torch import Tensor


def number(value: int, device: str) -> Tensor:
    return torch.tensor([value], dtype=torch.int64, device=device)


def random_rows(shape: tuple[int, ...], dtype: torch.dtype, device: str, seed: int = 0) -> Tensor:
    """Random bytes, seen as that dtype."""
    size = torch.empty(0, dtype=dtype).element_size()
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(256, (*shape[:-1], shape[-1] * size), generator=generator, dtype=torch.uint8)
    return rows.view(dtype).to(device)


def as_bytes(tensor: Tensor) -> Tensor:
    return tensor.cpu().view(torch.uint8)


@dataclass
class Record:
    """What a copy leaves for its pop."""

    pages: Tensor
    spilled: Tensor
    tokens: Tensor


class Pools:
    """A CUDA pool, perhaps a host pool, and their lists. Everything that a call should not touch is poison."""

    def __init__(
        self,
        device: str,
        pages: int,
        host_pages: int | None = None,
        page_size: int = 16,
        hidden: int = 32,
        dtype: torch.dtype = torch.bfloat16,
        head: int = 0,
        off_16: bool = False,
    ) -> None:
        """off_16: the pool lies an element off a multiple of 16 bytes, so accesses of 16 bytes cannot move it."""
        self.device, self.page_size, self.hidden, self.dtype = device, page_size, hidden, dtype
        elements = pages * page_size * hidden
        storage = torch.empty(elements + 1, dtype=dtype, device=device)[off_16 : elements + off_16]
        self.pool = poison(storage.view(pages, page_size, hidden))
        self.host_pool = None
        self.host_list = None
        if host_pages is not None:
            pinned = device == "cuda"
            self.host_pool = poison(torch.empty(host_pages, page_size, hidden, dtype=dtype, pin_memory=pinned))
            self.host_list = torch.arange(host_pages, device=device)
        self.list = torch.arange(pages, device=device)
        counts = torch.tensor([pages, host_pages or 0], device=device)
        self.head = torch.full_like(counts, head)
        self.tail, self.capacity = self.head + counts, counts
        self.overflow, self.host_spill = number(0, device), number(0, device)
        self.high_water = torch.zeros_like(counts)

    def record(self, rows: int, tokens: int) -> Record:
        pages = poison(torch.empty(-(-rows // self.page_size) + 2, dtype=torch.int64, device=self.device))
        return Record(pages, number(-7, self.device), number(tokens, self.device))

    def copy(self, rows: Tensor, tokens: int, new_head: Tensor | None = None) -> Record:
        record = self.record(rows.shape[0], tokens)
        paged_stash_copy(
            rows,
            self.pool,
            self.host_pool,
            record.tokens,
            self.list,
            self.host_list,
            self.head,
            self.tail,
            self.capacity,
            record.pages,
            self.overflow,
            self.host_spill,
            record.spilled,
            new_head,
            self.high_water,
        )
        return record

    def pop(self, rows: Tensor, record: Record, new_tail: Tensor | None = None, zero_rest: bool = False) -> Tensor:
        paged_stash_pop(
            self.pool,
            self.host_pool,
            rows,
            record.tokens,
            record.pages,
            record.spilled,
            self.overflow,
            self.list,
            self.host_list,
            self.tail,
            self.capacity,
            new_tail,
            zero_rest,
        )
        return rows

    def poisoned(self, rows: int) -> Tensor:
        return poison(torch.empty(rows, self.hidden, dtype=self.dtype, device=self.device))

    def rows(self, rows: int, seed: int = 0) -> Tensor:
        return random_rows((rows, self.hidden), self.dtype, self.device, seed)

    def free(self, place: int = 0) -> list[int]:
        """Ids on a list, in the order in which they will be taken."""
        entries = self.list if place == 0 else self.host_list
        assert entries is not None
        head, tail, capacity = (int(t[place]) for t in (self.head, self.tail, self.capacity))
        return [int(entries[i % capacity]) for i in range(head, tail)]

    def state(self) -> list[Tensor]:
        """A copy of everything that a call may change, as bytes."""
        shared = [self.pool, self.list, self.head, self.tail, self.overflow, self.host_spill]
        return [as_bytes(t).clone() for t in [*shared, *(t for t in (self.host_pool, self.host_list) if t is not None)]]

    def expect_stashed(self, rows: Tensor, record: Record, ids: list[int], place: int = 0) -> None:
        """The rows are in these pages, and the record says so and no more; other pages are as they were."""
        tokens = max(0, min(int(record.tokens), rows.shape[0]))
        pool = self.pool if place == 0 else self.host_pool
        assert pool is not None
        assert int(record.spilled) == place
        assert record.pages[: len(ids)].tolist() == ids
        assert torch.equal(
            as_bytes(record.pages[len(ids) :]), torch.full_like(as_bytes(record.pages[len(ids) :]), 0xA5)
        )
        held, wanted = as_bytes(pool), as_bytes(rows)
        for page, identity in enumerate(ids):
            part = wanted[page * self.page_size : min((page + 1) * self.page_size, tokens)]
            assert torch.equal(held[identity, : len(part)], part), f"page {page}"
            if page == len(ids) - 1:
                assert (held[identity, len(part) :] == 0xA5).all(), "rows behind the last one"
