"""Cases of compress_flush and unpack_entries: the models' layers in decode and prefill, and variants beyond them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dsv4_kernels.cache.page_layouts import LAYOUTS_BY_INDEX, PAGE_LAYOUTS, PageLayout, Pages, Quantization
from dsv4_kernels.cases import POISON_BYTE, Baseline, Case, Verdict, conversions, fresh, named, same_bits, to_cpu
from dsv4_kernels.cases.cache import definitions
from dsv4_kernels.cases.cache.definitions import ROPE_DIM, Pool

DECODE_REQUESTS = (1, 16, 64, 256)
ENTRIES_PER_PAGE = 64

# Values that fall on the other side of a bfloat16 than in float64, as a share: a float32 sum is off by about 2^-22, a
# bfloat16 is 2^-8 wide, and there are up to four of them.
FLIPS = 0.01


def quantization_of(given: Any) -> Quantization:
    """The rounding rules of a call of compress_flush."""
    return Quantization(given.amax_floor, given.scale_floor, given.fp4_ties_toward_zero, given.exact_scale)


def check_compress_flush(
    arguments: tuple[Any, ...], results: tuple[Tensor, ...], baseline: tuple[Tensor, ...]
) -> Verdict:
    """The state, and bytes of pages that belong to no new entry, to the bit. Codes and scales: those of the channels
    that float64 gives before quantisation, or of channels one bfloat16 step away, and few of the latter.
    """
    given = named("compress_flush", fresh(to_cpu(arguments)))
    quantization, layout = quantization_of(given), LAYOUTS_BY_INDEX[given.layout]
    expected = Pool(given.pages, given.scales, given.rope, layout, given.entries_per_page)
    slots, channels = definitions.compressed(
        kv=given.kv, score=given.score, ape=given.ape, query_starts=given.query_starts,
        start_positions=given.start_positions, state=given.state, state_table=given.state_table,
        norm_weight=given.norm_weight, cos_sin=given.cos_sin, pool=expected, block_table=given.block_table,
        slot_mapping=given.slot_mapping, ratio=given.ratio, overlap=given.overlap, use_hadamard=given.hadamard,
        round_once=given.round_once, epsilon=given.epsilon,
    )  # fmt: skip
    state, *parts = (result.clone() for result in results)
    if not same_bits(state, given.state):  # compressed() has stored the call's rows
        return Verdict(float("inf"), 0.0, "state")
    scales_part, rope_part = (*parts[1:], None, None)[:2]
    pool = Pool(parts[0], scales_part, rope_part, layout, given.entries_per_page)
    entries = [[part.clone() for part in pool.entry(slot)] for slot in slots]
    for slot in slots:
        for got, before in zip(pool.entry(slot), expected.entry(slot), strict=True):
            got.copy_(before)
    if not all(same_bits(a, b) for a, b in zip(parts, (given.pages, given.scales, given.rope), strict=False)):
        return Verdict(float("inf"), 0.0, "bytes outside of the new entries")
    if not slots:
        return Verdict(0.0, 0.0, "no entry")
    values, rest, got_scales = (torch.stack(part) for part in zip(*entries, strict=True))
    made_of = _made_of(channels, given.hadamard) * 2.0**-7
    variants = [(channels + sign * made_of).to(torch.bfloat16) for sign in (0, -1, 1)]
    wrong = other = 0
    if layout.groups:
        of_group = [definitions.scales_of(variant, layout, quantization) == got_scales for variant in variants]
        same = torch.stack(of_group).unflatten(2, (layout.groups, -1)).all(dim=3)
        wrong, other = int((~same.any(dim=0)).sum()), int((~same[0]).sum())
    exact, low, high = (
        definitions.decode_entries(
            *definitions.encode_entries(variant, got_scales, layout, quantization), got_scales, layout
        )
        for variant in variants
    )
    got = definitions.decode_entries(values, rest, got_scales, layout)
    wrong += int((~((got >= low) & (got <= high))).sum())
    other += int((got != exact).sum())
    if other > 2 + got.numel() * (FLIPS if not given.hadamard else 20 * FLIPS):
        return Verdict(float(other), 0.0, "values on the other side of a rounding")
    return Verdict(float(wrong), 0.0, "codes or scales that no rounding explains")


def _made_of(channels: Tensor, use_hadamard: bool) -> Tensor:
    """The magnitude of what each channel is a sum of, whose rounding it shares."""
    made_of = channels.abs()
    if use_hadamard:
        return made_of.amax(dim=1, keepdim=True).expand_as(made_of)
    pairs = channels[:, -ROPE_DIM:].unflatten(1, (-1, 2))
    return torch.cat((made_of[:, :-ROPE_DIM], pairs.norm(dim=2).repeat_interleave(2, dim=1)), dim=1)


def baseline_finished(
    entries: Tensor, norm_weight: Tensor, cos_sin: Tensor, use_hadamard: bool, round_once: bool, epsilon: float
) -> Tensor:
    """Norm, rotation and Hadamard transform in float32, rounded to bfloat16 between them and at the end."""

    def step(values: Tensor) -> Tensor:
        return values if round_once else values.to(torch.bfloat16).to(torch.float32)

    values = step(torch.nn.functional.rms_norm(step(entries), entries.shape[1:], norm_weight, epsilon))
    even, odd = values[:, -ROPE_DIM:].unflatten(1, (-1, 2)).unbind(2)
    cosine, sine = cos_sin.chunk(2, dim=1)
    turned = torch.stack((even * cosine - odd * sine, odd * cosine + even * sine), dim=2).flatten(1)
    values = torch.cat((values[:, :-ROPE_DIM], turned), dim=1)
    if use_hadamard:
        values, channels = step(values), values.shape[1]
        for bit in range(channels.bit_length() - 1):
            low, high = values.unflatten(1, (-1, 2, 1 << bit)).unbind(2)
            values = torch.stack((low + high, low - high), dim=2).flatten(1)
        values = values * channels**-0.5
    return values.to(torch.bfloat16).to(torch.float32)


def baseline_quantized(values: Tensor, layout: PageLayout, quantization: Quantization) -> tuple[Tensor, Tensor]:
    """The bytes of entries [entries, d] and of their scales: one amax, one quotient, one conversion each."""
    rest = values[:, layout.quantized_dims :].to(torch.bfloat16).contiguous().view(torch.uint8)
    if not layout.groups:
        return rest, rest[:, :0]
    groups = values[:, : layout.quantized_dims].unflatten(1, (layout.groups, layout.group))
    fp8 = layout.element == "float8_e4m3fn"
    amax = groups.abs().amax(dim=2).clamp(min=quantization.amax_floor)
    wanted = (amax / (448.0 if fp8 else 6.0)).clamp(min=quantization.scale_floor)
    if layout.scale == "float8_e4m3fn":
        codes = conversions.encode_e4m3(wanted)
        scale = conversions.decode_e4m3(codes)
    elif layout.scale == "float32" and quantization.exact_scale:
        scale, codes = wanted, wanted.view(torch.uint8)
    else:
        power = conversions.power_of_two_up(wanted)
        scale = (power << 23).view(torch.float32)
        codes = scale.view(torch.uint8) if layout.scale == "float32" else power.to(torch.uint8)
    scaled = (groups / scale[:, :, None]).flatten(1)
    ties_to_even = not quantization.fp4_ties_toward_zero
    quantized = conversions.encode_e4m3(scaled) if fp8 else conversions.encode_e2m1(scaled, ties_to_even)
    return torch.cat((quantized, rest), dim=1), codes


def baseline_compress_flush(
    kv: Tensor,
    score: Tensor,
    ape: Tensor,
    query_starts: Tensor,
    start_positions: Tensor,
    state: Tensor,
    state_table: Tensor,
    norm_weight: Tensor,
    cos_sin: Tensor,
    pages: Tensor,
    block_table: Tensor,
    slot_mapping: Tensor | None,
    ratio: int,
    overlap: bool,
    layout: int,
    entries_per_page: int,
    scales: Tensor | None,
    rope: Tensor | None,
    hadamard: bool,
    round_once: bool,
    epsilon: float,
    amax_floor: float,
    scale_floor: float,
    fp4_ties_toward_zero: bool,
    exact_scale: bool,
) -> tuple[Tensor, ...]:
    """As an engine would write it for a captured graph: of fixed shapes, every index in range, some entry complete."""
    of_page, device = LAYOUTS_BY_INDEX[layout], kv.device
    tokens, requests, head_dim = kv.shape[0], start_positions.shape[0], of_page.head_dim
    kv, score = kv.to(torch.float32), score.to(torch.float32)
    index = torch.arange(tokens, device=device)
    request = (index[:, None] >= query_starts[1:]).sum(dim=1).clamp(max=requests - 1)
    first, start = query_starts[request].to(torch.int64), start_positions[request]
    position = start + index - first
    score = score + ape[position % ratio]

    # As many entries as there may be at most; where there are fewer, one of them comes more than once.
    most = min(tokens, tokens // ratio + requests - 1) or 1
    completes = (position + 1) % ratio == 0
    last = torch.argsort(completes.to(torch.int8), descending=True, stable=True)[:most]
    last = torch.where(completes[last], last, last[0])
    window = 2 * ratio if overlap else ratio
    row = torch.arange(window, device=device)
    rows_at = position[last, None] + 1 - window + row
    earlier = rows_at < start[last, None]
    rows_per_page = state.shape[1]
    flat_state = state.flatten(0, 1)

    def place_of(of_request: Tensor, at: Tensor) -> Tensor:
        page = state_table[of_request, at.clamp(min=0) // rows_per_page % state_table.shape[1]]
        return page * rows_per_page + at.clamp(min=0) % rows_per_page

    place = place_of(request[last, None], rows_at)
    token = torch.where(earlier, 0, first[last, None] + rows_at - start[last, None])

    def gathered(brought: Tensor, which: int) -> Tensor:
        taken = torch.where(earlier[..., None], flat_state[place, which], brought[token])
        return torch.cat((taken[:, :ratio, :head_dim], taken[:, ratio:, head_dim:]), dim=1) if overlap else taken

    weights = gathered(score, 1).masked_fill((rows_at < 0)[..., None], -torch.inf).softmax(dim=1)
    entries = (weights * gathered(kv, 0)).sum(dim=1)
    at = position[last] // ratio
    channels = baseline_finished(entries, norm_weight, cos_sin[at * ratio], hadamard, round_once, epsilon)
    page = block_table[request[last], at // entries_per_page] if slot_mapping is None else slot_mapping[last]
    slots = page.to(torch.int64)
    if slot_mapping is None:
        slots = slots * entries_per_page + at % entries_per_page
    pool = Pages(pages, scales, rope, of_page, entries_per_page)
    quantization = Quantization(amax_floor, scale_floor, fp4_ties_toward_zero, exact_scale)
    pool.put(slots, *baseline_quantized(channels, of_page, quantization))
    kept = place_of(request, position)
    flat_state[kept] = torch.stack((kv, score), dim=1)
    return tuple(tensor for tensor in (state, pages, scales, rope) if tensor is not None)


def compress_flush_bytes(*arguments: Any) -> int:
    """Each row that is needed once, from the call or from the state; rows stored; entries written."""
    given = named("compress_flush", arguments)
    kv, ratio, layout = given.kv, given.ratio, LAYOUTS_BY_INDEX[given.layout]
    capacity = given.state.shape[1] * given.state_table.shape[1]
    width = int(kv.shape[1])
    window = ratio * (2 if given.overlap else 1)
    earlier = entries = stored = 0
    phases: set[int] = set()
    for _, first, end, start in definitions.tokens_of(kv, given.query_starts, given.start_positions):
        last = start + end - first
        for position in range(start + -(start + 1) % ratio, last, ratio):  # of the last token of each block
            entries += 1
            earlier += max(min(start, position + 1) - max(position + 1 - window, 0), 0)
        stored += min(end - first, capacity)
        phases |= {position % ratio for position in range(start, min(last, start + ratio))}
    streams = 2 if given.score is not None else 1
    read = earlier * layout.head_dim * 2 * 4 + kv.numel() * kv.element_size() * streams
    return int(read + entries * layout.entry_bytes + stored * 2 * width * 4 + len(phases) * width * 4)


def check_unpack_entries(
    arguments: tuple[Any, ...], results: tuple[Tensor, ...], baseline: tuple[Tensor, ...]
) -> Verdict:
    """To the bit: float64 holds the product of a code and a scale, float32 rounds it once."""
    pages, slots, layout, entries_per_page, scales, rope = to_cpu(arguments)
    pool = Pool(pages, scales, rope, LAYOUTS_BY_INDEX[layout], entries_per_page)
    expected = torch.full_like(results[0], torch.nan)
    for row, slot in enumerate(slots.tolist()):
        if 0 <= slot < pool.slots:
            values, rest, codes = (part[None] for part in pool.entry(slot))
            expected[row] = definitions.decode_entries(values, rest, codes, pool.layout)[0].to(torch.float32)
    return Verdict(float((results[0].view(torch.int32) != expected.view(torch.int32)).sum()), 0.0, "wrong numbers")


def baseline_unpack_entries(
    pages: Tensor, slots: Tensor, layout: int, entries_per_page: int, scales: Tensor | None, rope: Tensor | None
) -> tuple[Tensor, ...]:
    """As an engine would write it: no check of the slots."""
    pool = Pages(pages, scales, rope, LAYOUTS_BY_INDEX[layout], entries_per_page)
    values, codes = pool.get(slots.clamp(0, pool.count - 1).to(torch.int64))
    of = pool.layout
    fp8 = of.element == "float8_e4m3fn"
    split = of.quantized_dims // (1 if fp8 else 2)
    rest = values[:, split:].contiguous().view(torch.bfloat16).to(torch.float32)
    if not of.groups:
        return (rest,)
    quantized = values[:, :split].contiguous()
    decoded = conversions.decode_e4m3(quantized) if fp8 else conversions.decode_e2m1(quantized)
    scale = codes.contiguous().view(getattr(torch, of.scale)).to(torch.float32)
    groups = decoded.unflatten(1, (of.groups, of.group)) * scale[:, :, None]
    return (torch.cat((groups.flatten(1), rest), dim=1),)


def unpack_entries_bytes(
    pages: Tensor, slots: Tensor, layout: int, entries_per_page: int, scales: Tensor | None, rope: Tensor | None
) -> int:
    page_layout = LAYOUTS_BY_INDEX[layout]
    return int(slots.shape[0]) * (page_layout.entry_bytes + 4 * page_layout.head_dim + slots.element_size())


BASELINES = {
    "compress_flush": Baseline(baseline_compress_flush, check_compress_flush, compress_flush_bytes),
    "unpack_entries": Baseline(baseline_unpack_entries, check_unpack_entries, unpack_entries_bytes),
}


@dataclass(frozen=True)
class Layer:
    """The compressor of one kind of layer. spare: rows of the state beyond those that a block needs."""

    name: str
    layout: str
    ratio: int
    overlap: bool
    hadamard: bool = False
    spare: int = 8

    @property
    def rows(self) -> int:
        """Rows of a request's ring."""
        return self.ratio * (2 if self.overlap else 1) + self.spare


CSA = Layer("CSA", "fp8_ds_mla", 4, True)
HCA = Layer("HCA", "fp8_ds_mla", 128, False)
SPLIT = Layer("CSA", "split", 4, True)
INDEXER = Layer("indexer", "indexer_mxfp4", 4, True, hadamard=True)


def pool_of(layout: PageLayout, pages: int, entries_per_page: int, byte: int) -> Pages:
    """A pool filled with a byte."""

    def filled(*shape: int, dtype: torch.dtype = torch.uint8) -> Tensor:
        size = torch.empty(0, dtype=dtype, device="cpu").element_size()
        return torch.full((*shape[:-1], shape[-1] * size), byte, dtype=torch.uint8, device="cpu").view(dtype)

    if not layout.separate:
        return Pages(filled(pages, layout.page_bytes(entries_per_page)), None, None, layout, entries_per_page)
    shape = (pages, entries_per_page)
    single = layout.groups == 1
    return Pages(
        filled(*shape, layout.value_bytes, dtype=getattr(torch, layout.element) if single else torch.uint8),
        filled(*shape, *(() if single else (layout.groups,)), dtype=getattr(torch, layout.scale)),
        filled(*shape, ROPE_DIM, dtype=torch.bfloat16) if layout.rest_bytes else None,
        layout,
        entries_per_page,
    )


def compress_flush_case(
    name: str,
    layer: Layer,
    starts: tuple[int, ...],
    counts: tuple[int, ...],
    benched: bool = False,
    large: bool = False,
    entries_per_page: int = ENTRIES_PER_PAGE,
    zero_pages: bool = False,
    mapped: bool = False,
) -> Case:
    """A call in which request r brings counts[r] tokens from position starts[r] on. mapped: entries go where a
    slot_mapping says, not a block table, those of every third token nowhere.
    """

    def make(generator: torch.Generator) -> tuple[Any, ...]:
        layout = PAGE_LAYOUTS[layer.layout]
        requests, tokens = len(starts), sum(counts)
        width = layout.head_dim * (2 if layer.overlap else 1)
        blocks = max(start + count for start, count in zip(starts, counts, strict=True)) // layer.ratio
        columns = max(1, -(-blocks // entries_per_page))
        kv, score = torch.randn(2, tokens, width, generator=generator, dtype=torch.float32, device="cpu")
        state = torch.randn(requests, layer.rows, 2, width, generator=generator, dtype=torch.float32, device="cpu")
        places = torch.arange(columns * entries_per_page * layer.ratio, dtype=torch.float32, device="cpu")
        angle = places[:, None] * 0.7 ** torch.arange(32, dtype=torch.float32, device="cpu")
        pool = pool_of(layout, requests * columns, entries_per_page, 0 if zero_pages else POISON_BYTE)
        table = (
            torch.randperm(requests * columns, generator=generator, device="cpu")
            .to(torch.int32)
            .view(requests, columns)
        )
        slots = torch.randperm(pool.count, generator=generator, device="cpu")[:tokens].to(torch.int32)
        slots[::3] = -1
        return (
            kv,
            3 * score,
            torch.randn(layer.ratio, width, generator=generator, dtype=torch.float32, device="cpu"),
            torch.tensor(
                (0, *torch.tensor(counts, dtype=torch.int64, device="cpu").cumsum(0).tolist()),
                dtype=torch.int32,
                device="cpu",
            ),
            torch.tensor(starts, dtype=torch.int64, device="cpu"),
            state,
            torch.randperm(requests, generator=generator, device="cpu").to(torch.int32)[:, None],
            1 + 0.1 * torch.randn(layout.head_dim, generator=generator, dtype=torch.float32, device="cpu"),
            torch.cat((angle.cos(), angle.sin()), dim=1),
            pool.pages,
            None if mapped else table,
            slots if mapped else None,
            layer.ratio,
            layer.overlap,
            layout.index,
            entries_per_page,
            pool.scales,
            pool.rope,
            layer.hadamard,
            False,
            1e-6,
            layout.amax_floor,
            0.0,
            False,
            layout.exact_scale,
        )

    return Case(
        "compress_flush",
        f"{layer.name} {layer.layout}, {name}",
        make,
        BASELINES["compress_flush"],
        benched=benched,
        large=large,
        labels={"requests": len(starts), "tokens": sum(counts)},
    )


def decode_case(layer: Layer, requests: int) -> Case:
    """Each request brings the last token of a block: the step that costs most."""
    start = 8 * layer.ratio - 1
    large = requests * layer.ratio > 256
    return compress_flush_case(
        f"decode, {requests} requests", layer, (start,) * requests, (1,) * requests, benched=True, large=large
    )


def steady_case(layer: Layer, requests: int) -> Case:
    """Requests at every phase of a block, as in the middle of serving: few complete an entry."""
    starts = tuple(8 * layer.ratio + request % layer.ratio for request in range(requests))
    name = f"decode, {requests} requests, {requests // layer.ratio} complete"
    return compress_flush_case(name, layer, starts, (1,) * requests, benched=True, large=True)


def unpack_case(layout: str, entries: int, entries_per_page: int, valid: bool = True, benched: bool = False) -> Case:
    """Random entries. valid: whether all slots are in range."""

    def make(generator: torch.Generator) -> tuple[Any, ...]:
        page_layout = PAGE_LAYOUTS[layout]
        page_count = -(-entries // entries_per_page)
        channels = torch.randn(
            page_count * entries_per_page, page_layout.head_dim, generator=generator, dtype=torch.float32, device="cpu"
        )
        pool = pool_of(page_layout, page_count, entries_per_page, 0)
        every = torch.arange(page_count * entries_per_page, device="cpu")
        quantization = Quantization(page_layout.amax_floor, exact_scale=page_layout.exact_scale)
        pool.put(every, *baseline_quantized(channels.to(torch.bfloat16).to(torch.float32), page_layout, quantization))
        slots = torch.randperm(page_count * entries_per_page, generator=generator, device="cpu")[:entries]
        if not valid:
            slots[entries // 3 :: 5] = -1
        return pool.pages, slots, page_layout.index, entries_per_page, pool.scales, pool.rope

    return Case(
        "unpack_entries",
        f"{layout}, {entries} entries",
        make,
        BASELINES["unpack_entries"],
        benched=benched,
        labels={"entries": entries},
    )


CASES = (
    *(decode_case(layer, requests) for layer in (CSA, HCA, INDEXER) for requests in DECODE_REQUESTS),
    *(
        compress_flush_case("prefill, 8192 tokens", layer, (0,), (8192,), benched=True, large=True)
        for layer in (CSA, HCA, INDEXER)
    ),
    decode_case(SPLIT, 64),
    steady_case(CSA, 256),
    steady_case(HCA, 256),
    compress_flush_case(
        "one token", Layer("m 1", "indexer_fp8", 1, False), (0,), (1,), entries_per_page=1, zero_pages=True
    ),
    compress_flush_case(
        "slots", Layer("m 2", "indexer_fp8", 2, False), (3, 2), (5, 6), entries_per_page=6, mapped=True
    ),
    compress_flush_case(
        "mixed", Layer("m 4", "indexer_fp8", 4, True), (3, 0, 5, 40), (1, 23, 3, 4), entries_per_page=4
    ),
    compress_flush_case("mixed", Layer("m 2", "v41_fp8", 2, False), (1, 0, 7), (1, 5, 4), entries_per_page=3),
    compress_flush_case("mixed", Layer("m 1", "v41_fp4", 1, False), (0, 9), (2, 1), entries_per_page=2),
    compress_flush_case("mixed", Layer("m 128", "v41_fp8", 128, False), (126, 0), (3, 129), entries_per_page=2),
    compress_flush_case(
        "mixed", Layer("m 4", "indexer_mxfp4", 4, True, hadamard=True), (2, 7), (3, 9), entries_per_page=5
    ),
    compress_flush_case("mixed", Layer("m 4", "split", 4, True), (2, 7), (3, 9), entries_per_page=5),
    compress_flush_case("mixed", Layer("m 128", "split", 128, False), (126, 0), (3, 1), entries_per_page=2),
    compress_flush_case("mixed", Layer("m 4", "split_indexer", 4, True), (2, 7), (3, 9), entries_per_page=5),
    *(unpack_case(layout, 11, 4, valid=False) for layout in PAGE_LAYOUTS),
    unpack_case("indexer_mxfp4", 2, 2),
    unpack_case("fp8_ds_mla", 4096, ENTRIES_PER_PAGE, benched=True),
    unpack_case("indexer_mxfp4", 4096, ENTRIES_PER_PAGE, benched=True),
)
