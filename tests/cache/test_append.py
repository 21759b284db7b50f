"""Rows of new tokens in the tail buffers, against a loop over tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dsv4_kernels import InvalidArgumentError
from dsv4_kernels.cache import append
from dsv4_kernels.cases import is_poison, poison
from hypothesis import given, settings
from hypothesis import strategies as st

HEAD, INDEXER = 8, 4


class Problem:
    """Random token rows for a batch, and poisoned state."""

    def __init__(
        self,
        positions: list[int],
        tokens: list[int],
        request_slots: list[int],
        *,
        m: int = 4,
        slots: int = 5,
        streams: int = 2,
        indexer: int = INDEXER,
        ape: bool = True,
        extra: int = 0,
    ) -> None:
        generator = torch.Generator().manual_seed(sum(tokens))
        self.m, self.streams, self.indexer, self.slots = m, streams, indexer, slots
        self.positions, self.tokens, self.request_slots = positions, tokens, request_slots
        total = sum(tokens) + extra
        self.kv, self.z = torch.randn(2, total, streams * HEAD, generator=generator)
        self.indexer_kv, self.indexer_z = torch.randn(2, total, streams * indexer, generator=generator)
        self.ape = torch.randn(m, streams * HEAD, generator=generator) if ape else None
        self.indexer_ape = torch.randn(m, streams * indexer, generator=generator) if ape and indexer else None
        rows = (slots, m, HEAD + indexer)
        names = ("tail_ka", "tail_za", *(("next_kb", "next_zb") if streams == 2 else ()))
        self.state = {name: poison(torch.empty(rows)) for name in names}
        self.state["tail_len"] = poison(torch.empty(slots, dtype=torch.int32))
        self.state["slot_positions"] = poison(torch.empty(slots, dtype=torch.int64))

    def run(self, device: str, round: int = 0, offsets: bool = True) -> dict[str, torch.Tensor]:
        """The state that a call leaves."""
        state = {name: tensor.to(device, copy=True) for name, tensor in self.state.items()}
        bounds = torch.tensor([0, *self.tokens]).cumsum(0).to(torch.int32)
        inputs: dict[str, Any] = {
            "kv": self.kv,
            "z": self.z,
            "request_slots": torch.tensor(self.request_slots, dtype=torch.int32),
            "positions": torch.tensor(self.positions, dtype=torch.int64),
            "token_offsets": bounds if offsets else None,
            "indexer_kv": self.indexer_kv if self.indexer else None,
            "indexer_z": self.indexer_z if self.indexer else None,
            "ape": self.ape,
            "indexer_ape": self.indexer_ape,
        }
        inputs = {name: tensor if tensor is None else tensor.to(device) for name, tensor in inputs.items()}
        append(**inputs, **state, m=self.m, round=round)
        return {name: tensor.cpu() for name, tensor in state.items()}

    def expected(self, round: int = 0) -> dict[str, torch.Tensor]:
        """By a loop over tokens."""
        state = {name: tensor.clone() for name, tensor in self.state.items()}
        token = 0
        for slot, start, count in zip(self.request_slots, self.positions, self.tokens, strict=True):
            for number in range(count):
                self._take(state, token, slot, start, start + number, round)
                token += 1
        return state

    def _take(
        self, state: dict[str, torch.Tensor], token: int, slot: int, start: int, position: int, round: int
    ) -> None:
        if start < 0 or not 0 <= slot < self.slots or position // self.m != start // self.m + round:
            return
        row = position % self.m
        zero = torch.zeros(1)
        for stream in range(self.streams):
            main = slice(stream * HEAD, (stream + 1) * HEAD)
            side = slice(stream * self.indexer, (stream + 1) * self.indexer)
            ape = self.ape[row, main] if self.ape is not None else zero
            indexer_ape = self.indexer_ape[row, side] if self.indexer_ape is not None else zero
            values = torch.cat((self.kv[token, main], self.indexer_kv[token, side]))
            scores = torch.cat((self.z[token, main] + ape, self.indexer_z[token, side] + indexer_ape))
            is_a = stream == self.streams - 1  # b first, then a
            state["tail_ka" if is_a else "next_kb"][slot, row] = values
            state["tail_za" if is_a else "next_zb"][slot, row] = scores
        state["tail_len"][slot] = row + 1
        state["slot_positions"][slot] = position + 1


def same(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(got[name].view(torch.uint8), want[name].view(torch.uint8)) for name in want)


@pytest.mark.parametrize("round", [0, 1, 2])
@pytest.mark.parametrize(("streams", "indexer", "ape"), [(2, INDEXER, True), (1, INDEXER, False), (1, 0, True)])
def test_several_tokens(streams: int, indexer: int, ape: bool, round: int, device: str) -> None:
    """Blocks that begin, go on, end and are crossed; no tokens; padding; rows of tokens that no request has."""
    problem = Problem(
        [0, 3, 6, 7, 2, 0, -4],
        [3, 1, 5, 0, 7, 2, 3],
        [4, 0, 2, 1, 3, -1, 1],
        streams=streams,
        indexer=indexer,
        ape=ape,
        extra=3,
    )
    got = problem.run(device, round)
    assert same(got, problem.expected(round))
    assert is_poison(got["tail_ka"]).any()


@pytest.mark.parametrize("m", [1, 3, 4, 7])
@pytest.mark.parametrize("position", [0, 1_000_003, 2**31 - 1, 2**31, 2**40 + 6, 2**62 - 1])
def test_one_token_at_long_positions(position: int, m: int, device: str) -> None:
    """Without offsets: one token per request; more token rows than requests are skipped."""
    problem = Problem([position, position + 1], [1, 1], [1, 3], m=m, extra=2)
    got = problem.run(device, offsets=False)
    assert same(got, problem.expected())
    assert got["slot_positions"][[1, 3]].tolist() == [position + 1, position + 2]


@pytest.mark.parametrize("slot", [-1, 5, 2**31 - 1, -(2**31)])
def test_slots_outside_the_state(slot: int, device: str) -> None:
    problem = Problem([1], [4], [slot])
    for rows in problem.run(device).values():
        assert is_poison(rows).all()


def test_blocks_longer_than_a_warp(device: str) -> None:
    problem = Problem([250, 5], [140, 131], [0, 1], m=128, slots=2, streams=1, indexer=0)
    for number in (0, 1, 2):
        assert same(problem.run(device, number), problem.expected(number))


def test_strided_rows(device: str) -> None:
    """Columns of wider products, each of another width."""
    problem = Problem([2, 5], [1, 1], [0, 1])
    want = problem.expected()
    for extra, name in enumerate(("kv", "z", "indexer_kv", "indexer_z")):
        rows = getattr(problem, name)
        wide = torch.full((rows.shape[0], rows.shape[1] + 12 + 4 * extra), torch.nan, device=device)
        wide[:, 8 : 8 + rows.shape[1]] = rows
        setattr(problem, name, wide[:, 8 : 8 + rows.shape[1]])
    assert same(problem.run(device), want)


@pytest.mark.parametrize("what", ["address", "stride"])
@pytest.mark.parametrize("name", ["kv", "z", "indexer_kv", "indexer_z"])
def test_rows_off_16_bytes_are_refused(name: str, what: str) -> None:
    problem = Problem([2, 5], [1, 1], [0, 1])
    rows = getattr(problem, name)
    columns = rows.shape[1]
    wide = torch.zeros(rows.shape[0], columns + (8 if what == "address" else 5))
    first = 1 if what == "address" else 0
    setattr(problem, name, wide[:, first : first + columns])
    before = {name: tensor.clone() for name, tensor in problem.state.items()}
    with pytest.raises(InvalidArgumentError, match=f"^append: {name}: expected .*16"):
        problem.run("cpu")
    assert same(problem.state, before)


def test_nothing_to_append(device: str) -> None:
    for tokens, slots in (([], []), ([0, 0], [0, 1])):
        for rows in Problem([0] * len(tokens), tokens, slots).run(device).values():
            assert is_poison(rows).all()


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_batch(data: st.DataObject) -> None:
    slots = data.draw(st.integers(1, 6))
    requests = data.draw(st.lists(st.integers(0, slots - 1), unique=True, max_size=slots))
    positions = [data.draw(st.integers(-2, 40)) for _ in requests]
    tokens = [data.draw(st.integers(0, 9)) for _ in requests]
    problem = Problem(
        positions, tokens, requests, m=data.draw(st.integers(1, 7)), slots=slots, streams=data.draw(st.integers(1, 2))
    )
    for number in range(4):
        assert same(problem.run("cpu", number), problem.expected(number))
