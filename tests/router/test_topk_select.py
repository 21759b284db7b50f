from __future__ import annotations

import math

import pytest
import torch
from dsv4_kernels import InvalidArgumentError
from dsv4_kernels.cases import is_poison, poison
from dsv4_kernels.router import topk_select
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.router import oracle

FLOATS = [torch.float32, torch.bfloat16]


def same(got: float, want: float) -> bool:
    """Equal, with the sign of a zero; any NaN is a NaN."""
    if math.isnan(want):
        return math.isnan(got)
    return got == want and math.copysign(1, got) == math.copysign(1, want)


def check(scores: torch.Tensor, k: int, device: str, lengths: list[int] | None = None) -> None:
    """Sorted and unsorted, against Python's own sort. scores: on the CPU; moved with its strides."""
    rows = scores.tolist()
    ends = lengths if lengths is not None else [len(row) for row in rows]
    lengths_tensor = torch.tensor(lengths, dtype=torch.int32, device=device) if lengths is not None else None
    for in_order in (True, False):
        values, ids = topk_select(on(scores, device), k, lengths=lengths_tensor, sorted=in_order)
        assert values.dtype == torch.float32
        assert ids.dtype == torch.int32
        for row, end, got_values, got_ids in zip(rows, ends, values.tolist(), ids.tolist(), strict=True):
            want_ids = oracle.largest(row[: max(end, 0)], k)
            if not in_order:
                want_ids.sort()
            missing = k - len(want_ids)
            assert got_ids == want_ids + [-1] * missing
            want_values = [row[column] for column in want_ids] + [-math.inf] * missing
            assert all(map(same, got_values, want_values))


def on(tensor: torch.Tensor, device: str) -> torch.Tensor:
    """The same values on a device, in rows as far apart, starting as far behind an aligned address."""
    storage = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage()).to(device)
    return storage.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def random_scores(rows: int, columns: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)


# Both sides of every limit of the kernels: a warp's row, a group of four, a block's part of a row.
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("columns", [1, 3, 5, 255, 256, 257, 384, 385, 513, 1023, 1024])
@pytest.mark.parametrize("k", [1, 8, 9, 32])
def test_short_rows(columns: int, k: int, dtype: torch.dtype, device: str) -> None:
    check(random_scores(6, columns, dtype, columns), k, device)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("rows", "columns", "k"),
    [
        (2, 1025, 1),
        (3, 1000, 33),
        (1, 1024, 40),
        (1, 1025, 40),
        (3, 64, 64),
        (2, 65, 2048),
        (5, 2047, 2047),
        (5, 2049, 2048),
        (2, 4095, 100),
        (1, 4096, 2048),
        (2, 4097, 1000),
        (1, 8192, 2048),
        (3, 16385, 512),
        (1, 32769, 7),
        (1, 262144, 2048),
        (1, 262143, 1),
        (1, 262145, 1),
        (2, 262147, 512),
    ],
)
def test_long_rows(rows: int, columns: int, k: int, dtype: torch.dtype, device: str) -> None:
    check(random_scores(rows, columns, dtype, columns), k, device)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [67, 300])
def test_many_long_rows(rows: int) -> None:
    """One block a row, with more rows than multiprocessors, and two."""
    check(random_scores(rows, 20011), 600, "cuda")


def test_one_million_columns(device: str) -> None:
    """A row of the models' longest context, of a layer that compresses nothing."""
    check(random_scores(1, 1 << 20), 2048, device)


@pytest.mark.gpu
@pytest.mark.parametrize("columns", [524288, 1048575, 1048576])
def test_rows_that_registers_do_not_hold(columns: int) -> None:
    """What is in them, how long they are, and how many: as for shorter rows."""
    column = torch.arange(columns)
    bucket = ((column * 40503 % 4096).to(torch.int32) + 0x3F800000).view(torch.float32)
    special = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-45])[column % 6]
    rows = [torch.ones(columns), column % 3, (column >= columns - 40) * 1.0, -column, bucket, special]
    scores = torch.stack([row.to(torch.float32) for row in rows])
    for k in (1, 512, 2048):
        check(scores, k, "cuda")
        check(scores, k, "cuda", [0, 5, columns, columns - 1, 300000, 2047])
    many = random_scores(140, columns)
    values, ids = topk_select(many.cuda(), 600)
    want = torch.topk(many, 600, dim=1)  # no two of so many floats that are selected are equal, but for a few
    assert torch.equal(values.cpu(), want.values)
    assert torch.equal(many.gather(1, ids.cpu().to(torch.int64)), want.values)


@pytest.mark.parametrize("levels", ["ties", "one bucket", "special", "short", "ascending"])
def test_contents_of_rows_that_registers_do_not_hold(levels: str, device: str) -> None:
    columns = 262144 + 300
    column = torch.arange(columns)
    lengths = None
    if levels == "ties":
        row = (column % 3).to(torch.float32)
    elif levels == "one bucket":
        row = ((column * 40503 % 4096).to(torch.int32) + 0x3F800000).view(torch.float32)
    elif levels == "special":
        row = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-45])[column % 6]
    elif levels == "short":
        row, lengths = -column.to(torch.float32), [3000]
    else:
        row = column.to(torch.float32)
    check(row[None], 700, device, lengths)


@pytest.mark.parametrize("k", [6, 32, 500])
@pytest.mark.parametrize("columns", [200, 3000, 9000])
def test_ties(columns: int, k: int, device: str) -> None:
    """All equal; two levels; a few levels; all the best at the end; zeros of both signs."""
    column = torch.arange(columns)
    zeros = torch.where(column % 3 == 0, -0.0, 0.0)
    rows = [torch.full((columns,), 7.0), column % 2, -(column % 5), (column >= columns - 40) * 1.0, zeros]
    check(torch.stack([row.to(torch.float32) for row in rows]), k, device)


@pytest.mark.parametrize("k", [3, 8, 9, 17, 32])
@pytest.mark.parametrize("columns", [256, 700])
def test_best_that_lie_together(columns: int, k: int, device: str) -> None:
    """In order; the best with one lane of a warp; as many equal ones as are ranked at once, and one more."""
    column = torch.arange(columns)
    rows = [column, -column, (column // 4 % 32 == 3) * 1000 - column]
    rows += [(column < several) * 1 for several in (32, 33, 64, 65)]
    rows += [(column % 5 < 2) * (column < 160) * 500 + column % 3]
    check(torch.stack([row.to(torch.float32) for row in rows]), k, device)


@pytest.mark.parametrize("k", [5, 20, 40, 300])
@pytest.mark.parametrize("columns", [150, 5000])
def test_not_numbers_and_infinities(columns: int, k: int, device: str) -> None:
    """NaN is behind -infinity, but before the filling."""
    generator = torch.Generator().manual_seed(columns)
    special = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-45, -1e-45, 3.4e38])
    mixed = special[torch.randint(len(special), (3, columns), generator=generator)]
    only_nan = torch.full((1, columns), math.nan)
    negative_nan = -only_nan
    lowest = torch.full((1, columns), -math.inf)
    lowest[0, 100] = math.nan
    check(torch.cat([mixed, only_nan, negative_nan, lowest]), k, device, [columns, 149, 31, 17, columns, 101])


@pytest.mark.parametrize("columns", [40, 3000, 10000])
@pytest.mark.parametrize("k", [1, 32, 700])
def test_lengths(columns: int, k: int, device: str) -> None:
    """0, 1, around k, all, negative, beyond; what is behind a length is never selected, whatever it holds."""
    lengths = [0, 1, 2, k - 1, k, k + 1, columns - 1, columns, columns + 1, -1, -(2**31), 2**31 - 1]
    scores = random_scores(len(lengths), columns)
    for row, length in enumerate(lengths):
        scores[row, min(max(length, 0), columns) :] = math.inf if row % 2 else math.nan
    check(scores, k, device, lengths)


@pytest.mark.parametrize("levels", ["one outlier", "neighbours", "halves"])
def test_scores_that_crowd_the_bins(levels: str, device: str) -> None:
    """Selected entries whose keys lie so unevenly that many share a bin of the final sort; a first bin with too many
    entries, which has to be divided."""
    scores = torch.rand(2, 9000, generator=torch.Generator().manual_seed(1)) + 1
    if levels == "one outlier":
        scores[:, 4321] = 1e30
    elif levels == "neighbours":
        scores = (scores * 2**23).round() / 2**23
        scores[:, ::2] = 2 + scores[:, ::2] * 2**-20
        scores[:, 17] = 1e9
    else:
        scores[:, ::3] = 0.5
    check(scores, 1999, device)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("offset", [0, 1, 2, 3])
@pytest.mark.parametrize(("columns", "k"), [(100, 6), (1300, 50)])
def test_strided_and_misaligned_rows(columns: int, k: int, offset: int, dtype: torch.dtype, device: str) -> None:
    wide = torch.full((5, columns + 9), math.inf, dtype=dtype)
    wide[:, offset : offset + columns] = random_scores(5, columns, dtype, offset)
    check(wide[:, offset : offset + columns], k, device)
    check(wide[:, : columns + 8][:, offset : offset + columns], k, device)


@pytest.mark.parametrize(("columns", "k"), [(100, 6), (5000, 40)])
def test_without_values(columns: int, k: int, device: str) -> None:
    scores = random_scores(3, columns).to(device)
    values, ids = topk_select(scores, k, with_values=False)
    assert values.shape == (3, 0)
    assert torch.equal(ids, topk_select(scores, k)[1])


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_rows(data: st.DataObject) -> None:
    columns, k = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 40))
    values = st.floats(width=32) | st.sampled_from([0.0, -0.0, 1.0, math.nan])
    rows = data.draw(st.lists(st.lists(values, min_size=columns, max_size=columns), min_size=1, max_size=4))
    lengths = data.draw(st.lists(st.integers(-2, columns + 2), min_size=len(rows), max_size=len(rows)))
    check(torch.tensor(rows), k, "cpu", lengths)


@pytest.mark.parametrize(("columns", "k"), [(100, 6), (3000, 33), (40, 64)])
def test_writes_only_its_outputs(columns: int, k: int, device: str) -> None:
    values = poison(torch.empty(9, k, device=device))
    ids = poison(torch.empty(9, k, dtype=torch.int32, device=device))
    scores = random_scores(5, columns).to(device)
    lengths = torch.tensor([columns, 3, 0, 50, 7], dtype=torch.int32, device=device)
    topk_select(scores, k, lengths=lengths, out_values=values[2:7], out_ids=ids[2:7])
    for buffer in (values, ids):
        touched = ~is_poison(buffer)
        assert touched[2:7].all()
        assert not touched[:2].any()
        assert not touched[7:].any()


@pytest.mark.parametrize("k", [3, 100])
def test_empty(k: int, device: str) -> None:
    values, ids = topk_select(torch.empty(0, 50, device=device), k)
    assert values.shape == ids.shape == (0, k)
    values, ids = topk_select(torch.empty(2, 0, device=device), k)
    assert ids.cpu().tolist() == [[-1] * k] * 2
    assert values.cpu().tolist() == [[-math.inf] * k] * 2


@pytest.mark.gpu
@pytest.mark.parametrize(("columns", "k"), [(1024, 6), (5000, 40)])
def test_rows_beyond_two_to_the_31_elements(columns: int, k: int) -> None:
    stride = 2**28 + 4
    storage = torch.empty(9 * stride, dtype=torch.bfloat16, device="cuda")
    scores = storage.as_strided((9, columns), (stride, 1))
    some = random_scores(9, columns, torch.bfloat16)
    scores.copy_(some)
    values, ids = topk_select(scores, k)
    want_values, want_ids = topk_select(some, k)
    assert torch.equal(values.cpu(), want_values)
    assert torch.equal(ids.cpu(), want_ids)


@pytest.mark.parametrize(
    ("columns", "k", "text"),
    [
        (10, 0, "top_k: expected 1 to 2048, got 0"),
        (10, 2049, "top_k: expected 1 to 2048, got 2049"),
        (1048577, 4, "scores columns: expected 0 to 1048576, got 1048577"),
    ],
)
def test_refuses_what_is_outside_its_range(columns: int, k: int, text: str, device: str) -> None:
    with pytest.raises(InvalidArgumentError) as raised:
        topk_select(torch.zeros(1, columns, device=device), k)
    assert str(raised.value) == f"topk_select: {text}"
