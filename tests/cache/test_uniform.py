"""UniformCache against the definitions of the entries, however the tokens come."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from dsv4_kernels import InvalidArgumentError
from dsv4_kernels.cache import UniformCache, rope_table
from torch import Tensor

from tests.cache import compress_oracle
from tests.conftest import GPU

BATCH, LENGTH = 2, 21


class Rows:
    """Random rows of a batch, and the entries that the definitions make of them."""

    def __init__(self, ratio: int, overlap: bool, head_dim: int = 128, length: int = LENGTH) -> None:
        g = torch.Generator().manual_seed(ratio)
        self.ratio, self.overlap, self.head_dim = ratio, overlap, head_dim
        width = head_dim * (2 if overlap else 1)
        self.kv, self.score = torch.randn(2, BATCH, length, width, generator=g)
        self.ape = torch.randn(ratio, width, generator=g)
        self.weight = 1 + 0.1 * torch.randn(head_dim, generator=g)
        self.table = rope_table("v4-flash", 512)

    def entries(self, sequence: int) -> Any:
        """[entries, head_dim], one after another; rounded once."""
        kv, d, ratio = self.kv[sequence].double().numpy(), self.head_dim, self.ratio
        score = self.score[sequence].double() + self.ape.repeat(kv.shape[0] // ratio + 1, 1)[: kv.shape[0]]
        made = []
        for end in range(ratio, kv.shape[0] + 1, ratio):
            own = slice(end - ratio, end)
            values, scores = kv[own, -d:], score.numpy()[own, -d:]
            if self.overlap and end > ratio:
                before = slice(end - 2 * ratio, end - ratio)
                values = np.concatenate((kv[before, :d], values))
                scores = np.concatenate((score.numpy()[before, :d], scores))
            weights = np.exp(scores - scores.max(axis=0))
            pooled = (values * weights).sum(axis=0) / weights.sum(axis=0)
            made.append(
                compress_oracle.finish(
                    pooled[None],
                    self.weight.double().numpy(),
                    self.table[end - ratio : end - ratio + 1].double().numpy(),
                    1e-6,
                    False,
                    True,
                )[0]
            )
        return np.stack(made)

    def feed(self, cache: UniformCache, start: int, end: int) -> Tensor:
        device = cache.pages.device
        rows = (self.kv[:, start:end], self.score[:, start:end], self.ape, self.weight, self.table)
        kv, score, ape, weight, table = (tensor.to(device) for tensor in rows)
        return cache.feed(kv, score, ape, weight, table, round_once=True)

    def is_right(self, entries: Tensor) -> bool:
        return all(
            np.allclose(entries[sequence].float().cpu().numpy(), self.entries(sequence), rtol=2**-7, atol=1e-3)
            for sequence in range(BATCH)
        )


FEEDS = {"at once": [LENGTH], "by token": [1] * LENGTH, "in pieces": [3, 7, 1, 1, 9]}


@pytest.mark.parametrize("pieces", FEEDS.values(), ids=FEEDS)
@pytest.mark.parametrize(("ratio", "overlap"), [(4, True), (2, False)])
def test_entries_however_tokens_come(ratio: int, overlap: bool, pieces: list[int], device_of_each_kind: str) -> None:
    rows = Rows(ratio, overlap)
    cache = UniformCache(BATCH, LENGTH, ratio, "indexer_bf16", overlap=overlap, device=device_of_each_kind)
    start = 0
    for tokens in pieces:
        entries = rows.feed(cache, start, start + tokens)
        start += tokens
        assert entries.shape == (BATCH, start // ratio, 128)
    assert rows.is_right(entries)
    assert cache.positions.tolist() == [LENGTH] * BATCH


def test_overlap_is_the_models_by_default() -> None:
    assert [UniformCache(1, 8, ratio).overlap for ratio in (2, 4, 128)] == [False, True, False]


def test_rows_of_one_token_need_no_score() -> None:
    rows, cache = Rows(1, False), UniformCache(BATCH, LENGTH, 1, "indexer_bf16")
    entries = cache.feed(rows.kv, None, None, rows.weight, rows.table, round_once=True)
    rows.score.zero_()
    rows.ape.zero_()
    assert rows.is_right(entries)


def test_room_grows_and_entries_stay() -> None:
    rows, cache = Rows(1, False), UniformCache(BATCH, 4, 1, "indexer_bf16")
    rows.feed(cache, 0, 4)
    with pytest.raises(
        InvalidArgumentError, match=r"feed: kv: expected at most 4 tokens in all, got 21; reserve\(21\)"
    ):
        rows.feed(cache, 4, LENGTH)
    cache.reserve(200)  # more than one page
    assert rows.is_right(rows.feed(cache, 4, LENGTH))
    cache.reserve(3)
    assert cache.capacity == 200


def test_rejected_tokens_are_taken_back() -> None:
    rows, drafts = Rows(4, True), Rows(4, True)
    drafts.kv, drafts.score = drafts.kv.flip(1), drafts.score.flip(1)
    cache = UniformCache(BATCH, 64, 4, "indexer_bf16", retained=3)
    rows.feed(cache, 0, 10)
    drafts.feed(cache, 10, 13)
    cache.resume(10)
    assert rows.is_right(rows.feed(cache, 10, LENGTH))
    with pytest.raises(InvalidArgumentError, match=r"resume: length: expected 0 or at least 18 .*, got 17"):
        cache.resume(17)
    cache.resume(0)
    assert rows.is_right(rows.feed(cache, 0, LENGTH))


def test_sequences_are_reordered() -> None:
    rows, cache = Rows(4, True), UniformCache(BATCH, 64, 4, "indexer_bf16")
    rows.feed(cache, 0, 10)
    cache.reorder(torch.tensor([1, 1]))
    rows.kv[0], rows.score[0] = rows.kv[1], rows.score[1]
    assert rows.is_right(rows.feed(cache, 10, LENGTH))


def test_quantised_entries_are_read_back() -> None:
    rows, cache = Rows(4, True), UniformCache(BATCH, LENGTH, 4, "indexer_fp8")
    entries = rows.feed(cache, 0, LENGTH)
    for sequence in range(BATCH):
        exact = rows.entries(sequence)
        assert np.abs(entries[sequence].numpy() - exact).max() <= np.abs(exact).max() * 2**-4
        assert np.square(entries[sequence].numpy() - exact).mean() < np.square(exact).mean() * 2**-9


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"layout": "split"}, "UniformCache: layout: expected bf16 or .*, got 'split'"),
        ({"batch": -1}, "UniformCache: batch: expected an int, 0 or more, got -1"),
        ({"ratio": 0}, "UniformCache: ratio: expected an int, 1 or more, got 0"),
    ],
)
def test_refusals(options: dict[str, Any], text: str) -> None:
    with pytest.raises(InvalidArgumentError, match=text):
        UniformCache(**({"batch": 1, "capacity": 8, "ratio": 4} | options))


def test_what_does_not_fit_changes_nothing() -> None:
    rows, cache = Rows(4, True), UniformCache(BATCH + 1, LENGTH, 4, "indexer_bf16")
    with pytest.raises(InvalidArgumentError, match="feed: kv: expected 3 sequences, got 2"):
        rows.feed(cache, 0, 8)
    rows.table = rows.table[:4]
    short = UniformCache(BATCH, LENGTH, 4, "indexer_bf16")
    with pytest.raises(InvalidArgumentError, match="cos_sin: expected the position of each entry, below 8, got 4"):
        rows.feed(short, 0, 8)
    assert short.length == 0
    assert not short.positions.any()


@pytest.mark.parametrize("where", [GPU])
def test_a_captured_feed_goes_on_at_every_replay(where: str) -> None:
    rows = Rows(4, True)
    cache = UniformCache(BATCH, 64, 4, "indexer_bf16", device=where)
    rows.feed(cache, 0, 3)
    kv, score = torch.zeros(2, BATCH, 1, 256, device=where)
    ape, weight, table = rows.ape.to(where), rows.weight.to(where), rows.table.to(where)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        cache.feed(kv, score, ape, weight, table, round_once=True)
    for token in range(3, LENGTH):
        kv.copy_(rows.kv[:, token : token + 1])
        score.copy_(rows.score[:, token : token + 1])
        graph.replay()
    assert rows.is_right(cache.rows[:, : LENGTH // 4])
    assert cache.positions.tolist() == [LENGTH] * BATCH
