"""The entry of a full CSA tail, against the mathematics in float64."""

from __future__ import annotations

import math

import pytest
import torch
from dsv4_kernels.cache import csa_compress_tail
from dsv4_kernels.cases import is_poison, poison

HEAD, INDEXER, M = 12, 16, 4
WIDTH = HEAD + INDEXER


def tails(slots: int, seed: int = 0) -> list[torch.Tensor]:
    """ka, za, kb, zb."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(slots, M, WIDTH, generator=generator) for _ in range(4)]


def expected(buffers: list[torch.Tensor], slot: int) -> list[float]:
    """From the definition, a column at a time."""
    ka, za, kb, zb = (buffer[slot].to(torch.float64).tolist() for buffer in buffers)
    entry = []
    for column in range(WIDTH):
        scores = [row[column] for row in zb + za]
        weights = [math.exp(score - max(scores)) for score in scores]
        values = [row[column] for row in kb + ka]
        entry.append(math.fsum(w * v for w, v in zip(weights, values, strict=True)) / math.fsum(weights))
    return entry


def compress(
    buffers: list[torch.Tensor], tail_len: list[int], request_slots: list[int], device: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of entry and indexer key side by side, poisoned where nothing was written; and the mask."""
    requests = len(request_slots)
    entry = poison(torch.empty(requests, HEAD, dtype=torch.bfloat16, device=device))
    key = poison(torch.empty(requests, INDEXER, dtype=torch.bfloat16, device=device))
    mask = torch.empty(requests, dtype=torch.bool, device=device)
    lengths = torch.tensor(tail_len, dtype=torch.int32, device=device)
    slots = torch.tensor(request_slots, dtype=torch.int32, device=device)
    on_device = [buffer.to(device) for buffer in buffers]
    csa_compress_tail(*on_device, lengths, slots, M, INDEXER, out_entry=entry, out_indexer_key=key, out_valid_mask=mask)
    return torch.cat((entry, key), dim=1).cpu(), mask.cpu()


def close(got: torch.Tensor, want: list[float]) -> bool:
    return torch.allclose(got.to(torch.float64), torch.tensor(want, dtype=torch.float64), rtol=2**-8, atol=1e-6)


def test_full_tails_only(device: str) -> None:
    """Slots in any order; tails below m, padding and slots beyond the state give nothing."""
    buffers = tails(5)
    lengths = [M, M - 1, 0, M, M + 1]
    slots = [3, 1, -1, 0, 5, 4, 2, 2**31 - 1, -(2**31)]
    rows, mask = compress(buffers, lengths, slots, device)
    assert mask.tolist() == [0 <= slot < 5 and lengths[slot] >= M for slot in slots]
    for row, full, slot in zip(rows, mask.tolist(), slots, strict=True):
        assert close(row, expected(buffers, slot)) if full else is_poison(row).all()


def test_first_block_sees_only_itself(device: str) -> None:
    """The block before is masked by -inf, or by the description's -1e9: the same result."""
    buffers = tails(2)
    buffers[2].zero_()
    buffers[3][0], buffers[3][1] = -torch.inf, -1e9
    for buffer in buffers[:2]:
        buffer[1] = buffer[0]
    rows, _ = compress(buffers, [M, M], [0, 1], device)
    assert torch.equal(rows[0], rows[1])
    alone = [buffer.clone() for buffer in buffers]
    alone[2], alone[3] = alone[0], alone[1]  # each row twice: the same softmax-weighted mean
    assert close(rows[0], expected(alone, 0))


def test_masked_and_equal_scores(device: str) -> None:
    buffers = tails(4)
    for z in (buffers[1], buffers[3]):
        z[0] = -torch.inf  # nothing to weigh: 0
        z[1] = 5.0  # all equal: the mean
        z[2] = 3e38  # equal and huge
    buffers[1][3], buffers[3][3] = -torch.inf, -torch.inf
    buffers[1][3, 2] = -1e30  # one row left, however low its score
    rows, _ = compress(buffers, [M] * 4, [0, 1, 2, 3], device)
    assert (rows[0] == 0).all()
    mean = (buffers[0].to(torch.float64) + buffers[2].to(torch.float64)).mean(dim=1) / 2
    assert close(rows[1], mean[1].tolist())
    assert close(rows[2], mean[2].tolist())
    assert torch.equal(rows[3], buffers[0][3, 2].to(torch.bfloat16))


def test_nan_stays_in_its_column(device: str) -> None:
    buffers = tails(1)
    buffers[1][0, 2, 5] = torch.nan
    buffers[2][0, 1, HEAD + 3] = torch.nan
    rows, _ = compress(buffers, [M], [0], device)
    assert rows[0].isnan().nonzero().flatten().tolist() == [5, HEAD + 3]


def test_nothing_undefined_is_returned(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a mask to tell them apart, rows of requests whose tail is not full are zeros in tensors that are
    allocated; those in given tensors stay."""
    buffers = [buffer.to(device) for buffer in tails(3)]
    lengths = torch.tensor([M, M - 1, M], dtype=torch.int32, device=device)
    slots = torch.tensor([1, 2, -1], dtype=torch.int32, device=device)
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda self, *a, **k: poison(new_empty(self, *a, **k)))
    given = poison(torch.empty(3, HEAD, dtype=torch.bfloat16, device=device))
    both = csa_compress_tail(*buffers, lengths, slots, M, INDEXER)
    entry, key = csa_compress_tail(*buffers, lengths, slots, M, INDEXER, out_entry=given)
    assert entry is given
    assert close(torch.cat(both, dim=1)[1].cpu(), expected(tails(3), 2))
    assert torch.equal(both[0][1], entry[1])
    assert torch.equal(both[1], key)
    for rows in (*both, key):
        assert not rows[[0, 2]].any()
    assert is_poison(given[[0, 2]]).all()


@pytest.mark.parametrize("requests", [0, 3])
def test_no_slots(requests: int, device: str) -> None:
    rows, mask = compress(tails(0), [], [0] * requests, device)
    assert is_poison(rows).all()
    assert not mask.any()


@pytest.mark.gpu
def test_state_of_more_than_two_billion_elements() -> None:
    width, slots = 640, 2**31 // (4 * 640) + 7
    buffers = [torch.zeros(slots, 4, width, device="cuda") for _ in range(4)]
    buffers[0][-1] = torch.arange(width, device="cuda") / width
    buffers[3][-1] = -torch.inf
    tail_len = torch.full((slots,), 4, dtype=torch.int32, device="cuda")
    entry, key = csa_compress_tail(*buffers, tail_len, torch.tensor([slots - 1], dtype=torch.int32, device="cuda"), 4)
    expected = (torch.arange(width) / width).to(torch.bfloat16)
    assert torch.equal(torch.cat((entry, key), dim=1)[0].cpu(), expected)
