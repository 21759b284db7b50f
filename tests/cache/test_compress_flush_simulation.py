"""Requests arrive, grow by 1 to 5 tokens, roll back rejected drafts, and leave, for thousands of steps."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from tests.cache.compress_engine import Engine, Request


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Thousands of operations on a few rows each: threads would only wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def simulate(device: str, steps: int, ratio: int, overlap: bool, seed: int, slots: int = 6) -> None:
    random = np.random.default_rng(seed)
    rows = ratio * (2 if overlap else 1) + 5
    one = Engine("indexer_bf16", ratio, overlap, device, slots=slots, state_rows=rows, page_count=480, positions=512)
    one.dtype = torch.bfloat16 if seed % 2 else torch.float32
    live: list[Request] = []
    free_slots = list(range(slots))
    for step in range(steps):
        while free_slots and random.random() < 0.3:
            live.append(one.request(free_slots.pop(int(random.integers(len(free_slots))))))
        for request in [r for r in live if r.length > 300 or random.random() < 0.02]:
            live.remove(request)
            free_slots.append(request.slot)
            one.leave(request)
        random.shuffle(live)
        growth = [(r, int(random.integers(1, 6)) if r.length else int(random.integers(1, 30))) for r in live]
        one.step(growth, padding=int(random.integers(3)), check=step % 20 == 0)
        for request, count in growth:
            if count <= 5 and random.random() < 0.5:
                one.roll_back(request, int(random.integers(count)))
    one.check()
    for request in live:
        one.leave(request)
    assert sorted(one.free_pages) == list(range(one.page_count))


@pytest.mark.thorough
@pytest.mark.parametrize(("ratio", "overlap", "steps"), [(4, True, 7000), (2, False, 2000), (128, False, 1000)])
def test_ten_thousand_steps(ratio: int, overlap: bool, steps: int, real_device: str) -> None:
    simulate(real_device, steps, ratio, overlap, seed=ratio)


@pytest.mark.parametrize(("ratio", "overlap", "steps"), [(4, True, 30), (1, False, 8), (128, False, 12)])
def test_some_steps(ratio: int, overlap: bool, steps: int, device: str) -> None:
    simulate(device, steps, ratio, overlap, seed=ratio + 1)
