"""From token rows to quantised entries in pages in one launch, and back to numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4_kernels import _native
from dsv4_kernels.cache.page_layouts import LAYOUTS_BY_INDEX, PAGE_LAYOUTS, PageLayout
from dsv4_kernels.errors import InvalidArgumentError
from dsv4_kernels.op import InOut, op, output


@op(_native.compress_flush)
def _compress_flush(
    kv: Tensor,
    score: Tensor | None,
    ape: Tensor | None,
    query_starts: Tensor,
    start_positions: Tensor,
    state: InOut,
    state_table: Tensor,
    norm_weight: Tensor,
    cos_sin: Tensor,
    pages: InOut,
    block_table: Tensor | None,
    slot_mapping: Tensor | None,
    ratio: int,
    overlap: bool,
    layout: int,
    entries_per_page: int,
    scales: InOut | None = None,
    rope: InOut | None = None,
    hadamard: bool = False,
    round_once: bool = False,
    epsilon: float = 1e-6,
    amax_floor: float = 0.0,
    scale_floor: float = 0.0,
    fp4_ties_toward_zero: bool = False,
    exact_scale: bool = False,
) -> None:
    """compress_flush, the layout as a number and what None stands for resolved."""


def compress_flush(
    kv: Tensor,
    score: Tensor | None,
    ape: Tensor | None,
    query_starts: Tensor,
    start_positions: Tensor,
    state: Tensor,
    state_table: Tensor,
    norm_weight: Tensor,
    cos_sin: Tensor,
    pages: Tensor,
    block_table: Tensor | None = None,
    slot_mapping: Tensor | None = None,
    *,
    ratio: int,
    overlap: bool,
    layout: str,
    entries_per_page: int,
    scales: Tensor | None = None,
    rope: Tensor | None = None,
    hadamard: bool = False,
    round_once: bool = False,
    epsilon: float = 1e-6,
    amax_floor: float | None = None,
    scale_floor: float = 0.0,
    fp4_ties_toward_zero: bool = False,
    exact_scale: bool | None = None,
) -> None:
    """Stores the rows of new tokens, compresses the blocks that they complete, and writes the entries to pages.

    One launch, for decode, prefill and both in one call, for any number of tokens per request. Which blocks complete is
    decided on the device, so that a call captured in a CUDA graph is right for every replay.

        entry[c] = sum over rows of softmax(score)[c] * kv[c]

    over the `ratio` rows of a block or, with overlap, over columns [0, d) of the rows of the block before and columns
    [d, 2d) of its own. Then RMS norm, rotation of neighbouring pairs of the last 64 channels by the position of the
    block's first token, Hadamard rotation if asked for, quantisation. Source: equations 11, 12 and 20 to 23 of the
    DeepSeek-V4 report; class Compressor of the models' published inference code.

    The state holds rows by position: that of position p is row p % rows of page state_table[r, p // rows % columns].
    A rejected draft's positions simply come again, and rows of a shared prefix may be anyone's. With one column the
    table gives each request a ring; with more, pages. rows * columns must be at least ratio (2 * ratio with overlap)
    plus the number of tokens that may be taken back. It needs no initial value.

    Args:
        kv: [tokens, width] float32 or bfloat16, width d or, with overlap, 2d; rows may be strided, each aligned to 4
            elements.
        score: like kv; None where a block is one row.
        ape: [ratio, width] float32, added to the score at row position % ratio; or None.
        query_starts: [requests + 1] int32 or int64, ascending: request r brings tokens query_starts[r] to
            query_starts[r + 1]. Tokens beyond the last are padding.
        start_positions: [requests] int32 or int64, the position of each request's first token in this call; negative
            for a request that takes no part.
        state: [state pages, rows, 2, width] float32: kv, then score with ape; changed in place. May have no pages where
            a block is one row.
        state_table: [requests, columns] int32. Rows of a page that is out of range are not stored.
        norm_weight: [d] float32 or bfloat16.
        cos_sin: [positions, 64] float32: 32 cosines, then 32 sines.
        pages: [pages, at least PAGE_LAYOUTS[layout].page_bytes(entries_per_page)] uint8, changed in place; rows may be
            strided. Of split and split_indexer, what flush_write_hca and flush_write_csa write: entries_fp8 [pages,
            entries_per_page, 448] float8_e4m3fn and indexer_keys_fp4 [pages, entries_per_page, 64] uint8 of PagedCache.
        block_table: [requests, blocks] int32: entry i of request r goes to slot i % entries_per_page of page
            block_table[r, i // entries_per_page]; -1 for none.
        slot_mapping: [tokens] int32 or int64, instead of block_table: page * entries_per_page + slot of the entry that
            the token completes; -1 for none.
        ratio: tokens per block: 1, 2, 4 or 128.
        overlap: whether rows have two streams, as in the models' layers of ratio 4.
        layout: one of PAGE_LAYOUTS; decides d.
        entries_per_page: entries of a page.
        scales: of split, inv_scale [pages, entries_per_page] float32, and of split_indexer, indexer_scale [pages,
            entries_per_page, 8] float8_e4m3fn; changed in place. Other layouts hold them in pages.
        rope: of split, entries_rope [pages, entries_per_page, 64] bfloat16, changed in place.
        hadamard: the models' rotation of indexer keys: all 128 channels, times 128^-1/2.
        round_once: round to bfloat16 only before quantisation, as some engines do, not after each step.
        epsilon: of the norm.
        amax_floor: what a group's largest magnitude counts as at least; None for the layout's own.
        scale_floor: what a group's scale is at least, before it is rounded; some engines use 1e-4 instead of a floor of
            the magnitude.
        fp4_ties_toward_zero: FP4 ties go toward zero, as in engines that compare, not to the even code.
        exact_scale: for scales in float32 (indexer_fp8, split): not rounded up to a power of two. None for the layout's
            own: rounded up in indexer_fp8, as they are in split.

    No entry is written whose slot is -1 or out of range, whose first position is not in cos_sin, or that needs rows of
    a state page out of range. Requests of one call must not share state pages or slots. A score of -inf has weight 0; a
    channel whose scores are all -inf is 0. The same call gives the same bits. Sums over rows are float32, in one order
    for few tokens and in another for many, so that an entry may differ by a rounding between batches of other sizes.
    """
    page_layout = _layout("compress_flush", layout)
    _compress_flush(
        kv,
        score,
        ape,
        query_starts,
        start_positions,
        state,
        state_table,
        norm_weight,
        cos_sin,
        pages,
        block_table,
        slot_mapping,
        ratio,
        overlap,
        page_layout.index,
        entries_per_page,
        scales,
        rope,
        hadamard,
        round_once,
        epsilon,
        page_layout.amax_floor if amax_floor is None else amax_floor,
        scale_floor,
        fp4_ties_toward_zero,
        page_layout.exact_scale if exact_scale is None else exact_scale,
    )


@op(_native.unpack_entries)
def _unpack_entries(
    pages: Tensor,
    slots: Tensor,
    layout: int,
    entries_per_page: int,
    scales: Tensor | None = None,
    rope: Tensor | None = None,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """unpack_entries, the layout as a number."""
    return output(out, pages, (slots.shape[0], LAYOUTS_BY_INDEX[layout].head_dim), torch.float32)


def unpack_entries(
    pages: Tensor,
    slots: Tensor,
    layout: str,
    entries_per_page: int,
    scales: Tensor | None = None,
    rope: Tensor | None = None,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """Entries of pages as numbers: value * scale.

    Args:
        pages: as compress_flush has them; rows may be strided.
        slots: [entries] int32 or int64: page * entries_per_page + slot.
        layout: one of PAGE_LAYOUTS.
        entries_per_page: entries of a page.
        scales: as compress_flush has them.
        rope: likewise.
        out: [entries, d] float32 to write to.

    Returns:
        [entries, d] float32; a row whose slot is out of range is NaN.
    """
    index = _layout("unpack_entries", layout).index
    return _unpack_entries(pages, slots, index, entries_per_page, scales, rope, out=out)


def _layout(op: str, name: str) -> PageLayout:
    layout = PAGE_LAYOUTS.get(name) if isinstance(name, str) else None
    if layout is None:
        raise InvalidArgumentError(f"{op}: layout: expected {' or '.join(PAGE_LAYOUTS)}, got {name}")
    return layout
