"""compress_flush against its definition: every way that tokens may come, every layout, every bad input."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from dsv4_kernels.cache import PAGE_LAYOUTS, compress_flush, unpack_entries

from tests.cache import compress_engine
from tests.cache import compress_oracle as oracle
from tests.cache.compress_engine import Engine
from tests.emulated import DISTINCT, emulated, ptx_folder

# ratio, overlap: the models' kinds of layers, and those between.
KINDS = [(1, False), (2, False), (2, True), (4, False), (4, True), (128, False)]
LONG_KINDS = [(128, False), (128, True)]


def window(ratio: int, overlap: bool) -> int:
    return ratio * (2 if overlap else 1)


def engine(ratio: int, overlap: bool, device: str, layout: str = "indexer_bf16", **options: Any) -> Engine:
    return Engine(layout, ratio, overlap, device, **({"state_rows": window(ratio, overlap) + 3} | options))


@pytest.mark.parametrize(("ratio", "overlap"), KINDS)
def test_decode(ratio: int, overlap: bool, device: str) -> None:
    """Requests at different phases, each bringing a token at a time, over the ends of blocks and pages."""
    one = engine(ratio, overlap, device, slots=3, entries_per_page=2)
    requests = [one.request(slot) for slot in (2, 0, 1)]
    one.step([(request, max(1, ratio * 2 - i - 1)) for i, request in enumerate(requests)])
    for _ in range(5 if ratio > 8 else 2 * ratio + 3):
        one.step([(request, 1) for request in requests])


@pytest.mark.parametrize(("ratio", "overlap"), [*KINDS, (128, True)])
@pytest.mark.parametrize("wide", [False, True])
def test_prefill_and_decode_mixed(ratio: int, overlap: bool, wide: bool, device: str) -> None:
    """One call brings a long request, some of a few tokens, one of none, and padding at the end."""
    layout = "bf16" if wide else "indexer_bf16"
    one = engine(ratio, overlap, device, layout, page_count=96, dtype=torch.bfloat16 if wide else torch.float32)
    a, b, c, d = (one.request(slot) for slot in range(4))
    one.step([(a, 3), (b, ratio + 1), (c, 0), (d, 1)], padding=2)
    one.step([(b, 1), (a, 3 * ratio + 5), (d, 2), (c, 5)], padding=1)
    one.step([(d, 1), (c, 0), (b, 2 * ratio), (a, 1)])


@pytest.mark.parametrize(
    ("ratio", "overlap", "layout"), [(1, False, "indexer_bf16"), (4, True, "bf16"), (128, False, "bf16")]
)
def test_dtypes_of_engines(ratio: int, overlap: bool, layout: str, device: str) -> None:
    """A norm's weight in bfloat16 and int64 starts, as vLLM's and transformers' modules hold them."""
    dtypes = {"norm_dtype": torch.bfloat16, "starts_dtype": torch.int64, "dtype": torch.bfloat16}
    one = engine(ratio, overlap, device, layout, page_count=96, **dtypes)
    a, b, c = (one.request(slot) for slot in range(3))
    one.step([(a, 3), (b, ratio + 1), (c, 0)], padding=2)
    one.step([(b, 1), (a, ratio + 5), (c, 2)], padding=1)


@pytest.mark.parametrize("architecture", DISTINCT)
@pytest.mark.parametrize("layout", ["bf16", "indexer_bf16"])
def test_several_tokens_per_block(layout: str, architecture: str) -> None:
    """On one multiprocessor tens of tokens suffice for several per block, as thousands do on a whole device."""
    ptx_folder()
    with emulated(architecture, multiprocessors=1) as symbols:
        one = engine(4, True, "cpu", layout)
        a, b = one.request(0), one.request(1)
        one.step([(a, 29), (b, 5)], padding=1)
        one.step([(b, 1), (a, 2)])
    assert len(set(symbols)) == (1 if layout == "bf16" else 2), symbols


@pytest.mark.parametrize("architecture", DISTINCT)
def test_long_windows_of_many_requests(architecture: str) -> None:
    """Where not all blocks of a request run at once, it has fewer of them."""
    ptx_folder()
    for multiprocessors in (1, 132):
        with emulated(architecture, multiprocessors=multiprocessors) as symbols:
            one = engine(128, False, "cpu", "bf16")
            one.step([(one.request(0), 128), (one.request(1), 2)])
        (symbol,) = symbols
        assert f"Li{4 if multiprocessors == 1 else 8}E" in symbol


@pytest.mark.parametrize("multiprocessors", [5, 6, 7, 8])
@pytest.mark.parametrize("architecture", DISTINCT)
def test_blocks_of_an_entry_by_what_is_resident(architecture: str, multiprocessors: int) -> None:
    """Two requests of eight blocks each run at once on 6 multiprocessors of three blocks (sm_90a), and on 8 of two, as
    the kernel is compiled for sm_100a and later."""
    ptx_folder()
    resident = 3 if architecture == "sm_90a" else 2
    with emulated(architecture, multiprocessors=multiprocessors) as symbols:
        one = engine(128, False, "cpu", "bf16")
        one.step([(one.request(0), 1), (one.request(1), 1)])
    (symbol,) = symbols
    assert f"Li{8 if resident * multiprocessors >= 16 else 4}E" in symbol


@pytest.mark.parametrize("start", [0, 3, 6])
@pytest.mark.parametrize("tokens", [7, 9, 23])
@pytest.mark.parametrize("rows", [8, 11])
def test_calls_longer_than_the_state(rows: int, tokens: int, start: int, device: str) -> None:
    """The ring comes round within the call: old rows are read where new ones are stored. Then a call continues."""
    one = engine(4, True, device, state_rows=rows, seed=start * 100 + tokens)
    a, b = one.request(0), one.request(1)
    one.step([(a, start), (b, 2)])
    one.step([(b, 1), (a, tokens)])
    one.step([(a, 5), (b, 1)])


def test_paged_state_comes_round_twice(device: str) -> None:
    """Three columns of four rows: the table's first page comes again at positions 12, 24 and 36."""
    one = engine(4, True, device, slots=2, state_rows=4, state_columns=3)
    request = one.request(0)
    for _ in range(10):
        one.step([(request, 5)])


@pytest.mark.parametrize("architecture", DISTINCT)
def test_entries_without_a_place(architecture: str) -> None:
    """A block of several tokens completes entries that go nowhere, and then one that is written: none of them may
    disturb the rows that another one reads."""
    ptx_folder()
    for seed in range(2):
        with emulated(architecture, seed, multiprocessors=1):
            one = engine(4, True, "cpu", "bf16", page_count=128, slots=2, by_slot_mapping=True)
            mapping = one._slot_mapping

            def some(growth: Any, tokens: int, mapping: Any = mapping) -> Any:
                slots = mapping(growth, tokens)
                slots[:280] = -1
                return slots

            one._slot_mapping = some  # type: ignore[method-assign]
            entries = one.entries
            one.entries = lambda growth, entries=entries: tuple(part[70:] for part in entries(growth))  # type: ignore[assignment, misc]
            one.step([(one.request(0), 290)])


@pytest.mark.parametrize("which", ["kv", "score", "both"])
@pytest.mark.parametrize(("ratio", "layout"), [(4, "indexer_bf16"), (128, "bf16")])
def test_strides_of_rows(ratio: int, layout: str, which: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of kv and of score lie apart by different strides."""

    def apart(rows: torch.Tensor, columns: int) -> torch.Tensor:
        wide = torch.full((rows.shape[0], rows.shape[1] + columns), torch.nan, dtype=rows.dtype, device=rows.device)
        wide[:, 4 : 4 + rows.shape[1]] = rows
        return wide[:, 4 : 4 + rows.shape[1]]

    def strided(kv: torch.Tensor, score: torch.Tensor, *rest: Any, **options: Any) -> None:
        kv = kv if which == "score" else apart(kv, 8)
        compress_flush(kv, score if which == "kv" else apart(score, 16), *rest, **options)

    monkeypatch.setattr(compress_engine, "compress_flush", strided)
    one = engine(ratio, ratio == 4, device, layout)
    a, b = one.request(0), one.request(2)
    one.step([(a, 2 * ratio + 1), (b, 3)])
    one.step([(b, ratio), (a, 1)])


@pytest.mark.parametrize(("start", "tokens"), [(0, 300), (100, 260), (127, 131), (130, 127)])
@pytest.mark.parametrize(("ratio", "overlap"), LONG_KINDS)
def test_long_windows_longer_than_the_state(ratio: int, overlap: bool, start: int, tokens: int, device: str) -> None:
    one = engine(ratio, overlap, device, state_rows=window(ratio, overlap), slots=2)
    a, b = one.request(0), one.request(1)
    one.step([(a, start), (b, 2)])
    one.step([(b, 1), (a, tokens)])
    one.step([(a, 128), (b, 1)])


@pytest.mark.parametrize(("ratio", "overlap"), [(2, False), (4, True), (128, False)])
def test_rejected_drafts(ratio: int, overlap: bool, device: str) -> None:
    """Positions go back and come again with other rows, over the ends of blocks."""
    one = engine(ratio, overlap, device, state_rows=window(ratio, overlap) + 4)
    request = one.request(1)
    one.step([(request, 2 * ratio - 3 if ratio > 2 else 1)])
    for rejected in (1, 4, 2, 3, 4, 0, 4):
        one.step([(request, 5)])
        one.roll_back(request, rejected)


@pytest.mark.parametrize(("ratio", "overlap"), [(4, True), (128, False)])
@pytest.mark.parametrize("rows", [4, 7])
def test_paged_state_and_resumed_prefix(ratio: int, overlap: bool, rows: int, device: str) -> None:
    """The state in pages; a second request resumes from the first one's prefix, whose pages it shares for reading."""
    columns = -(-3 * ratio // rows)
    one = engine(ratio, overlap, device, state_rows=rows, state_columns=columns, slots=3)
    first = one.request(0)
    one.step([(first, ratio + 1)])
    second = one.request(1)
    shared = (ratio + 1) // rows  # whole pages; the rest of the prefix is copied, as an engine does
    for column, (page, old) in enumerate(zip(second.state_pages, first.state_pages, strict=True)):
        if column < shared:
            second.state_pages[column] = old
        else:
            one.state[page] = one.state[old]
    second.kv, second.score, second.length = first.kv.copy(), first.score.copy(), first.length
    second.pages = [one.free_pages.pop(0)]
    one.step([(second, ratio - 1)], check=False)
    slot = one.slot_of(second, 0)
    assert one.blocks_of(second, second.length)[0] == 0  # block 0 was the first request's: nothing wrote it here
    assert (one.pages[slot // one.entries_per_page].cpu().numpy()[: one_row(one)] == 0xA5).all()
    one.check()
    one.step([(first, ratio - 1), (second, 3)])


def one_row(one: Engine) -> int:
    return oracle.FORMATS[one.layout].row


@pytest.mark.parametrize("round_once", [False, True])
@pytest.mark.parametrize("hadamard", [False, True])
def test_rounding_and_hadamard(hadamard: bool, round_once: bool, device: str) -> None:
    one = engine(4, True, device, options={"hadamard": hadamard, "round_once": round_once, "epsilon": 1e-3})
    one.step([(one.request(0), 16), (one.request(1), 9)])


@pytest.mark.parametrize("by_slot_mapping", [False, True])
def test_both_tables(by_slot_mapping: bool, device: str) -> None:
    one = engine(2, False, device, by_slot_mapping=by_slot_mapping, entries_per_page=3)
    a, b = one.request(3), one.request(1)
    one.step([(a, 11), (b, 6)])
    one.step([(b, 1), (a, 1)], padding=3)


LAYOUT_OPTIONS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in PAGE_LAYOUTS),
    ("fp8_ds_mla", {"amax_floor": 0.0, "scale_floor": 1e-4}),
    ("indexer_fp8", {"exact_scale": True}),
    ("split", {"exact_scale": False}),
    ("indexer_mxfp4", {"hadamard": True}),
    ("indexer_mxfp4", {"fp4_ties_toward_zero": True}),
    ("v41_fp4", {"fp4_ties_toward_zero": True}),
]


@pytest.mark.parametrize(("layout", "options"), LAYOUT_OPTIONS, ids=str)
def test_codes_and_scales_are_exact(layout: str, options: dict[str, Any], device: str) -> None:
    """The bytes of a layout are those of the oracle for the channels that the same call gives unquantised. Rows span
    20 binades, one is 0 and one tiny; padding and other entries keep their content."""
    wide = PAGE_LAYOUTS[layout].head_dim == 512
    plain, coded = (
        Engine(name, 1, False, device, state_rows=2, entries_per_page=4, page_count=4, options=used)
        for name, used in (
            ("bf16" if wide else "indexer_bf16", {n: v for n, v in options.items() if n == "hadamard"}),
            (layout, options),
        )
    )
    scale = np.ldexp(1.0, np.arange(-10, 10)).astype(np.float32)
    weight = np.repeat(scale, 26)[: PAGE_LAYOUTS[layout].head_dim]
    for one in (plain, coded):
        one.constants[1] = one.to_device(weight * one.weight)
    kv = plain.normal(11, plain.width)
    kv[1] = 0
    kv[2] *= 1e-9
    kv[3] = np.round(kv[3] * 2) / 2
    for one in (plain, coded):
        one._expect = lambda growth: None  # type: ignore[method-assign]
        one.step([(one.request(0), 9), (one.request(1), 2)], rows=(kv, 0 * kv), check=False)
    request = plain.request(0)
    request.pages = [0, 1, 2]
    slots = [*range(9), 12, 13]
    values, scales = oracle.encode(
        plain.read_bf16(slots), layout, **{n: v for n, v in options.items() if n != "hadamard"}
    )
    for slot, value, scale_bytes in zip(slots, values, scales, strict=True):
        oracle.write(coded.expected, slot, 4, layout, value, scale_bytes)
    coded.check()


def test_rope_bits(device: str) -> None:
    """Rows whose norm is exact, so that what is rotated is known: the weights, rounded."""
    one = Engine("bf16", 1, False, device, state_rows=2, slots=1, entries_per_page=8)
    one._expect = lambda growth: None  # type: ignore[method-assign]
    request = one.request(0)
    sign = np.where(one.normal(8, 512) < 0, -1, 1).astype(np.float32)
    one.step([(request, 8)], rows=(1024 * sign, 0 * sign), check=False)
    expected = oracle.bf16(oracle.rope(oracle.bf16(sign * one.weight), one.cos_sin[:8]))
    got = one.read_bf16([one.slot_of(request, block) for block in range(8)])
    assert np.array_equal(got.view(np.int32), expected.view(np.int32))


@pytest.mark.parametrize(("ratio", "overlap"), [(4, True), (128, False)])
def test_masked_and_equal_scores(ratio: int, overlap: bool, device: str) -> None:
    """Scores of -inf weigh nothing, a channel of only such is 0, equal scores give the mean."""
    one = engine(ratio, overlap, device)
    one.ape[:] = 0
    one.constants[0].zero_()
    tokens = 2 * ratio
    kv, score = one.normal(tokens, one.width), np.zeros((tokens, one.width), np.float32)
    score[::2, 3::7] = -np.inf
    score[:, 5::7] = -np.inf
    score[:, 6::7] = -1e30
    one.step([(one.request(0), tokens)], rows=(kv, score))


def test_nan_and_infinity_stay_in_their_entry(device: str) -> None:
    one = engine(2, False, device)
    a, b = one.request(0), one.request(1)
    kv, score = one.normal(8, one.width), one.normal(8, one.width)
    kv[1, 7], score[2, 9], score[5, 3], kv[7, 0] = np.nan, np.nan, np.inf, np.inf
    one._expect = lambda growth: None  # type: ignore[method-assign]
    one.step([(a, 4), (b, 4)], rows=(kv, score), check=False)
    bad = one.read_bf16([one.slot_of(r, block) for r in (a, b) for block in (0, 1)])
    assert np.isnan(bad).any(axis=1).all()
    del one._expect  # the next blocks are sound
    one.expected = [one.pages.cpu().numpy().copy()]
    one.step([(a, 2), (b, 2)])


@pytest.mark.parametrize("layout", PAGE_LAYOUTS)
def test_nan_is_read_back(layout: str, device: str) -> None:
    """A row's NaN is in all channels of its entry, through the norm; a NaN angle in the groups of its pair. All that
    shares a scale with a NaN reads back as NaN, whatever the format; the rest as without it."""
    form = oracle.FORMATS[layout]
    read = []
    for spoilt in (False, True):
        one = engine(1, False, device, layout, page_count=2)
        one._expect = lambda growth: None  # type: ignore[method-assign]
        kv = one.normal(6, one.width)
        if spoilt:
            kv[2, 7] = np.nan
            one.constants[2][4, 3] = torch.nan  # the cosine of the fourth pair
        request = one.request(0)
        one.step([(request, 6)], rows=(kv, 0 * kv), check=False)
        slots = torch.tensor([one.slot_of(request, block) for block in range(6)], device=one.state.device)
        scales, rope = (*one.tensors[1:], None, None)[:2]
        read.append(unpack_entries(one.tensors[0], slots, layout, one.entries_per_page, scales, rope).cpu().numpy())
    clean, got = read
    expected = clean.copy()
    expected[2] = np.nan
    pair = slice(form.head_dim - oracle.ROPE + 6, form.head_dim - oracle.ROPE + 8)
    if pair.start < form.quantized:
        pair = slice(pair.start // form.group * form.group, (pair.start // form.group + 1) * form.group)
    expected[4, pair] = np.nan
    assert not np.isnan(clean).any()
    assert np.array_equal(got, expected, equal_nan=True)


def test_long_context(real_device: str) -> None:
    """Beyond a million positions, up to the last of the table and past it."""
    positions = 1_048_576 + 8
    one = Engine("indexer_bf16", 4, True, real_device, state_rows=12, positions=8)
    one.constants[2] = torch.zeros(positions, 64, device=real_device)
    request = one.request(0)
    start = 1_048_576
    one.constants[2][start - 4 :] = torch.from_numpy(one.cos_sin).to(real_device)[:8].repeat(2, 1)[:12]
    kv, score = one.normal(16, one.width), one.normal(16, one.width)
    table = torch.full((1, start // 16 + 2), -1, dtype=torch.int32, device=real_device)
    table[0, start // 16 - 1 :] = torch.arange(3, dtype=torch.int32)

    def call(first: int, count: int) -> None:
        rows = slice(first - start + 8, first - start + 8 + count)
        compress_flush(
            torch.from_numpy(kv[rows]).to(real_device),
            torch.from_numpy(score[rows]).to(real_device),
            one.constants[0],
            torch.tensor([0, count], dtype=torch.int32, device=real_device),
            torch.tensor([first], device=real_device),
            one.state,
            torch.zeros(1, 1, dtype=torch.int32, device=real_device),
            *one.constants[1:],
            one.pages,
            table,
            ratio=4,
            overlap=True,
            layout="indexer_bf16",
            entries_per_page=4,
        )

    call(start - 8, 3)
    call(start - 5, 8)
    call(start + 3, 1)
    biased = score + one.ape[np.arange(16) % 4]
    before, own = np.arange(0, 4), np.arange(4, 8)
    for block in range(2):  # of positions start - 4 and start
        values = np.concatenate((kv[before + 4 * block, :128], kv[own + 4 * block, 128:]))
        scores = np.concatenate((biased[before + 4 * block, :128], biased[own + 4 * block, 128:]))
        cos_sin = one.constants[2][start - 4 + 4 * block].cpu().numpy()[None]
        expected = oracle.finish(
            oracle.compress(values[None], scores[None]), one.weight, cos_sin, 1e-6, hadamard=False, round_once=False
        )
        assert oracle.ulps_apart(one.read_bf16([3 + block]), expected).max() <= 1
    assert request.length == 0


def untouched(one: Engine, state: torch.Tensor) -> bool:
    same_state = np.array_equal(one.state.cpu().numpy().view(np.int32), state.cpu().numpy().view(np.int32))
    return same_state and bool((one.pages.cpu().numpy() == 0xA5).all())


@pytest.mark.parametrize("ratio", [4, 128])
def test_what_is_out_of_range_writes_nothing(ratio: int, device: str) -> None:
    """Block-table entries, slots, state pages, starts, positions beyond the table, senseless query starts."""
    one = engine(ratio, False, device, page_count=2, positions=ratio)
    before = one.state.clone()
    kv, score = (one.to_device(one.normal(2 * ratio, one.width)) for _ in range(2))

    def call(**changes: Any) -> None:
        arguments: dict[str, Any] = {
            "query_starts": [0, 2 * ratio],
            "start_positions": [0],
            "state_table": [[-1]],
            "block_table": [[-1]],
            "slot_mapping": None,
        } | changes
        tensors = {
            name: None if value is None else torch.tensor(value, device=device if device == "cuda" else "cpu")
            for name, value in arguments.items()
        }
        for name in ("query_starts", "state_table", "block_table"):
            if tensors[name] is not None and int(tensors[name].max()) < 2**31:
                tensors[name] = tensors[name].to(torch.int32)
        compress_flush(
            kv,
            score,
            one.constants[0],
            tensors["query_starts"],
            tensors["start_positions"],
            one.state,
            tensors["state_table"],
            one.constants[1],
            one.constants[2],
            one.pages,
            tensors["block_table"],
            tensors["slot_mapping"],
            ratio=ratio,
            overlap=False,
            layout=one.layout,
            entries_per_page=4,
        )

    for page in (-1, -(2**31), 2, 2**31 - 1):
        call(block_table=[[page]])
    for page in (one.slots, 2**31 - 1, -(2**31)):
        call(state_table=[[page]])
    for slot in (-1, 8, 2**40, -(2**40)):
        call(block_table=None, slot_mapping=[slot] * (2 * ratio))
    for start in (-1, 2**31 - ratio, 2**40, -(2**62)):
        call(start_positions=[start], state_table=[[0]], block_table=[[0]])
    for starts in (
        [-5, 2 * ratio],
        [2 * ratio, 0],
        [2**31 - 1, 2**31 - 1],
        [2 * ratio, 2**31 - 1],
        [2**32, 2**32 + 1],
        [-(2**40), 2**40],
    ):
        call(query_starts=starts, state_table=[[0]], block_table=[[0]])
    call(start_positions=[ratio], block_table=[[0]])  # positions that cos_sin does not have
    call(start_positions=[1], block_table=[[0]], query_starts=[0, ratio - 1])  # a row that the state does not have
    assert untouched(one, before)
    call(block_table=[[0]])  # the same without a fault: block 0 alone has an angle
    assert not (one.pages[0, :256] == 0xA5).all()
    assert (one.pages[0, 256:] == 0xA5).all()


def test_no_tokens_and_no_requests(device: str) -> None:
    one = engine(4, True, device)
    before = one.state.clone()
    one.step([])
    one.step([], padding=3)
    one.step([(one.request(0), 0)])
    assert untouched(one, before)


@pytest.mark.parametrize("layout", PAGE_LAYOUTS)
def test_calls_that_complete_no_entry(layout: str, device: str) -> None:
    """Three of four decode steps, calls of no tokens, of no requests, of padding alone: rows are stored, no page is
    written, in every layout. And no entries are read."""
    one = engine(4, True, device, layout, page_count=3)
    request = one.request(1)
    one.step([])
    one.step([], padding=3)
    one.step([(request, 0)], padding=1)
    assert bool(one.state.isnan().all())
    for token in range(3):
        one.step([(request, 1)])
        stored = one.state[1, : token + 1].cpu().numpy()
        assert np.array_equal(stored[:, 0], request.kv)
        assert np.array_equal(stored[:, 1], request.score)
        assert bool(one.state[1, token + 1 :].isnan().all())
    assert all(bool((part == 0xA5).all()) for part in one.parts)
    none = torch.zeros(0, dtype=torch.int64, device=one.state.device)
    scales, rope = (*one.tensors[1:], None, None)[:2]
    unpacked = unpack_entries(one.tensors[0], none, layout, one.entries_per_page, scales, rope)
    assert unpacked.shape == (0, PAGE_LAYOUTS[layout].head_dim)


def test_many_requests(device: str) -> None:
    """More than a warp can look at once, of uneven lengths, so that the request of a token has to be searched."""
    one = Engine("indexer_bf16", 2, False, device, slots=70, state_rows=4, page_count=256)
    requests = [one.request(slot) for slot in range(70)]
    one.step([(request, i % 4) for i, request in enumerate(requests)])
    one.step([(request, (i + 1) % 3) for i, request in enumerate(requests)], padding=5)
