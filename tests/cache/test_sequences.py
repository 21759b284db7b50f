"""Requests that come, grow and go: the pool must hold what the definition gives for all of their tokens."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from dsv4_kernels.cache import (
    AttentionType,
    BlockAllocator,
    CacheHandle,
    CacheState,
    LayerCacheSchema,
    OutOfBlocksError,
    PagedCache,
    Request,
    append_and_flush,
    maybe_flush_csa,
    maybe_flush_hca,
    prepare_forward,
    release,
)
from dsv4_kernels.cases import same_bits

from tests.cache import sequences
from tests.launches import observed

SMALL = {
    "CSA": LayerCacheSchema(AttentionType.CSA, 4, 16, 4, 16, entries_per_block=3, projections=2),
    "CSA, one projection": LayerCacheSchema(AttentionType.CSA, 3, 16, 4, 16, entries_per_block=2),
    "HCA": LayerCacheSchema(AttentionType.HCA, 6, 16, 4, 0, entries_per_block=2),
}


@dataclass
class Running:
    """A request and every token that it has brought."""

    request: Request
    rows: list[torch.Tensor] = field(default_factory=list)


class Engine:
    """A layer's cache as an engine drives it: prepare, fill the batch's rows, run. The batch's tensors stay where they
    are, as a captured graph needs it.
    """

    def __init__(
        self, schema: LayerCacheSchema, device: str, *, slots: int, requests: int, blocks: int, max_new_tokens: int
    ) -> None:
        self.schema, self.max_new_tokens = schema, max_new_tokens
        self.allocator = BlockAllocator(blocks)
        state = CacheState.allocate(schema, slots, device=device)
        paged = PagedCache.allocate(schema, blocks, device=device)
        self.handle = CacheHandle.allocate(state, paged, requests, blocks + 2)  # the pool runs out before the table
        capacity = requests * max_new_tokens
        empty = torch.zeros(capacity, 2, schema.projections * schema.width, device=device)
        self.inputs = sequences.split_rows(schema, empty)
        self.run: Callable[[], None] = self.eager

    def eager(self) -> None:
        append_and_flush(self.handle, self.schema, max_new_tokens=self.max_new_tokens, **self.inputs)

    def capture(self) -> None:
        """From now on, a step is a replay of one graph."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.eager()
        self.run = graph.replay

    def step(self, batch: list[Running], new_rows: list[torch.Tensor]) -> None:
        """Each request of the batch brings its rows."""
        counts = [len(rows) for rows in new_rows]
        prepare_forward(self.handle, self.schema, self.allocator, [r.request for r in batch], counts)
        given = sequences.split_rows(self.schema, torch.cat(new_rows))
        for name, rows in given.items():
            target = self.inputs[name]
            target[: len(rows)] = rows.to(target.device)
            target[len(rows) :] = torch.nan  # rows that no request has must not matter
        self.run()
        for running, rows in zip(batch, new_rows, strict=True):
            running.rows.append(rows)

    def wrong(self, running: Running) -> list[int]:
        """Entries of a request that are not what its tokens give."""
        rows = torch.cat(running.rows)
        count = self.schema.entries(len(rows))
        parts = sequences.stored_entries(self.schema, self.handle, running.request.blocks, count)
        return sequences.wrong_entries(self.schema, parts, rows)


def simulate(schema: LayerCacheSchema, device: str, steps: int, seed: int, graph: bool = False) -> None:
    """Requests arrive, grow by 0 to 5 tokens per step, are left out of batches, leave, and are put out when the pool is
    short; each is checked as it goes.
    """
    choice, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    engine = Engine(schema, device, slots=7, requests=4, blocks=24, max_new_tokens=5)
    if graph:
        engine.capture()
    running: list[Any] = []
    free, seen = list(range(7)), {"left": 0, "put out": 0, "entries": 0}

    def finish(gone: Running, why: str) -> None:
        assert engine.wrong(gone) == []
        seen[why] += 1
        seen["entries"] += schema.entries(gone.request.position)
        running.remove(gone)
        free.append(gone.request.slot)
        release(gone.request, engine.allocator, engine.handle)

    for _ in range(steps):
        if free and choice.random() < 0.2:
            running.append(Running(Request(free.pop(choice.randrange(len(free))))))
            running[-1].rows.append(torch.empty(0, 2, schema.projections * schema.width))
        batch = choice.sample(running, min(len(running), choice.randint(1, 4)))
        if not batch:
            continue
        new_rows = [sequences.token_rows(schema, choice.choice((0, 1, 1, 1, 2, 3, 4, 5)), generator) for _ in batch]
        try:
            engine.step(batch, new_rows)
        except OutOfBlocksError:
            finish(choice.choice(running), "put out")
            continue
        if choice.random() < 0.03:
            finish(choice.choice(running), "left")
    for last in list(running):
        finish(last, "left")
    assert engine.allocator.available == 24, "blocks leaked"
    assert sorted(free) == list(range(7))
    assert all(seen.values()) or steps < 1000, seen


@pytest.mark.thorough
@pytest.mark.parametrize("layer", SMALL)
def test_ten_thousand_steps(layer: str) -> None:
    """On the CPU; CSA's, which overlap, in full length."""
    simulate(SMALL[layer], "cpu", 10_000 if layer == "CSA" else 1_000, seed=1)


@pytest.mark.parametrize("layer", SMALL)
def test_a_few_steps_on_each_device(layer: str, device: str) -> None:
    simulate(SMALL[layer], device, 12, seed=3)


@pytest.mark.gpu
@pytest.mark.parametrize("layer", SMALL)
def test_replays_of_one_graph(layer: str) -> None:
    simulate(SMALL[layer], "cuda", 10_000 if layer == "CSA" else 2_000, seed=2, graph=True)


DECODE = {
    "CSA": LayerCacheSchema.csa(entries_per_block=16),
    "CSA, one projection": LayerCacheSchema.csa(projections=1, entries_per_block=16),
    "HCA": LayerCacheSchema.hca(entries_per_block=2),
}


@pytest.mark.gpu
@pytest.mark.parametrize("layer", DECODE)
def test_decode_of_the_models_layers(layer: str) -> None:
    """300 replays with requests at different phases, beside the CPU step by step: state to the bit, entries right."""
    schema, generator = DECODE[layer], torch.Generator().manual_seed(4)
    engines = [Engine(schema, device, slots=9, requests=7, blocks=64, max_new_tokens=1) for device in ("cuda", "cpu")]
    engines[0].capture()
    batches = [[Running(Request(slot)) for slot in (8, 0, 3, 5, 1, 2, 7)] for _ in engines]
    for number in range(300):
        present = [i for i in range(7) if number >= 5 * i]  # they arrive one by one
        rows = [sequences.token_rows(schema, 1, generator) for _ in present]
        for engine, batch in zip(engines, batches, strict=True):
            engine.step([batch[i] for i in present], rows)
        if number % 50 == 49:
            states = [[t for t in vars(engine.handle.state).values() if t is not None] for engine in engines]
            for got, want in zip(*states, strict=True):
                assert same_bits(got.cpu(), want)
    for engine, batch in zip(engines, batches, strict=True):
        assert [engine.wrong(running) for running in batch] == [[]] * 7


@pytest.mark.parametrize("layer", SMALL)
def test_launches_do_not_depend_on_the_state(layer: str) -> None:
    """A full tail, an empty one, padding: the same kernels with the same parameters, but for the temporaries."""
    schema = SMALL[layer]
    engine = Engine(schema, "cpu", slots=3, requests=2, blocks=4, max_new_tokens=1)
    flush = maybe_flush_csa if schema.attention is AttentionType.CSA else maybe_flush_hca
    seen = []
    for length, slots in ((schema.m, [0, 1]), (0, [2, 0]), (1, [-1, -1])):
        engine.handle.state.tail_len.fill_(length)
        engine.handle.request_slots[:] = torch.tensor(slots, dtype=torch.int32)
        with observed("sm_90a") as launches:
            flush(engine.handle, schema, schema.m)
        seen.append([(launch.symbol, tuple(launch.grid), tuple(launch.block)) for launch in launches])
    assert len(seen[0]) == 3
    assert seen[0] == seen[1] == seen[2]


def test_flushing_the_other_kind_of_layer() -> None:
    for schema, flush, need in (
        (SMALL["HCA"], maybe_flush_csa, "CSA attention, got HCA"),
        (SMALL["CSA"], maybe_flush_hca, "HCA attention, got CSA"),
    ):
        engine = Engine(schema, "cpu", slots=1, requests=1, blocks=1, max_new_tokens=1)
        with pytest.raises(ValueError, match=f"schema: expected {need}"):
            flush(engine.handle, schema, schema.m)


def test_window_layers_keep_nothing() -> None:
    schema = LayerCacheSchema.swa()
    engine = Engine(schema, "cpu", slots=1, requests=1, blocks=0, max_new_tokens=3)
    engine.step([Running(Request(0))], [sequences.token_rows(schema, 3, torch.Generator())])
    assert engine.handle.state.tail_len.tolist() == [0]


def test_a_draft_that_is_rejected_within_its_block(device: str) -> None:
    """The rows of the rejected tokens are overwritten, for what append writes follows from positions."""
    schema, generator = SMALL["CSA"], torch.Generator().manual_seed(6)
    engine = Engine(schema, device, slots=1, requests=1, blocks=2, max_new_tokens=3)
    running = Running(Request(0))
    engine.step([running], [sequences.token_rows(schema, 1, generator)])
    engine.step([running], [sequences.token_rows(schema, 2, generator)])
    running.request.position -= 1  # the last one is rejected
    running.rows[-1] = running.rows[-1][:1]
    engine.step([running], [sequences.token_rows(schema, 3, generator)])
    engine.step([running], [sequences.token_rows(schema, 3, generator)])
    assert running.request.position == 8
    assert engine.wrong(running) == []


def test_the_oracle_finds_faults() -> None:
    """An entry of other tokens, and the description's rotation where there are two projections."""
    schema, generator = SMALL["CSA"], torch.Generator().manual_seed(7)
    engine = Engine(schema, "cpu", slots=1, requests=1, blocks=4, max_new_tokens=4)
    running = Running(Request(0))
    for number in range(4):
        engine.step([running], [sequences.token_rows(schema, 4, generator)])
        if number == 1:
            state = engine.handle.state
            state.tail_kb[0] = 0.0  # what is kept of block 1 for entry 2 is lost
    assert engine.wrong(running) == [2]
    running.rows[0] = sequences.token_rows(schema, 4, generator)
    assert engine.wrong(running) == [0, 1, 2]
