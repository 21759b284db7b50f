"""Cases of the cache's ops: the models' layers at the batch sizes of decode, and variants beyond them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dsv4_kernels.cache.schema import AttentionType, LayerCacheSchema
from dsv4_kernels.cache.state import CacheState, PagedCache
from dsv4_kernels.cases import Case
from dsv4_kernels.cases.cache.baselines import BASELINES

DECODE_REQUESTS = (1, 16, 64)


def tail_rows(generator: torch.Generator, slots: int, rows: int, width: int) -> tuple[Tensor, Tensor]:
    """Values and scores of a tail buffer; the scores spread as a trained layer's do: a few units."""
    values, scores = torch.randn(2, slots, rows, width, generator=generator, dtype=torch.float32, device="cpu")
    return values, 3 * scores


def request_slots_of(generator: torch.Generator, requests: int, slots: int) -> Tensor:
    """Distinct slots in any order."""
    return torch.randperm(slots, generator=generator, device="cpu")[:requests].to(torch.int32)


def csa_compress_case(
    name: str,
    requests: int,
    m: int = 4,
    head_dim: int = 512,
    indexer_head_dim: int = 128,
    full: float = 1.0,
    benched: bool = False,
) -> Case:
    """full: share of the requests whose tail is full. One request in three has no block before."""

    def make(generator: torch.Generator) -> tuple[Any, ...]:
        slots, width = requests + 3, head_dim + indexer_head_dim
        ka, za = tail_rows(generator, slots, m, width)
        kb, zb = tail_rows(generator, slots, m, width)
        kb[::3], zb[::3] = 0.0, -torch.inf
        tail_len = torch.where(
            torch.rand(slots, generator=generator, dtype=torch.float32, device="cpu") < full, m, m - 1
        ).to(torch.int32)
        return ka, za, kb, zb, tail_len, request_slots_of(generator, requests, slots), m, indexer_head_dim

    return Case(
        "csa_compress_tail",
        f"{name}, {requests} requests",
        make,
        BASELINES["csa_compress_tail"],
        benched=benched,
        labels={"requests": requests},
    )


def hca_compress_case(
    name: str, requests: int, m: int = 128, width: int = 512, full: float = 1.0, benched: bool = False
) -> Case:
    def make(generator: torch.Generator) -> tuple[Any, ...]:
        slots = requests + 1
        ka, za = tail_rows(generator, slots, m, width)
        tail_len = torch.where(
            torch.rand(slots, generator=generator, dtype=torch.float32, device="cpu") < full, m, m - 1
        ).to(torch.int32)
        return ka, za, tail_len, request_slots_of(generator, requests, slots), m

    return Case(
        "hca_compress_tail",
        f"{name}, {requests} requests",
        make,
        BASELINES["hca_compress_tail"],
        benched=benched,
        labels={"requests": requests},
    )


def append_case(name: str, schema: LayerCacheSchema, requests: int, benched: bool = False) -> Case:
    """Decode: one token per request, at any phase of its block."""

    def make(generator: torch.Generator) -> tuple[Any, ...]:
        slots, streams, m = requests + 2, schema.projections, schema.m
        head_dim, indexer = streams * schema.head_dim, streams * schema.indexer_head_dim

        def rows(count: int, columns: int) -> Tensor:
            return torch.randn(count, columns, generator=generator, dtype=torch.float32, device="cpu")

        state = CacheState.allocate(schema, slots, device="cpu")
        return (
            rows(requests, head_dim),
            rows(requests, head_dim),
            request_slots_of(generator, requests, slots),
            torch.randint(2**40, (requests,), generator=generator, device="cpu"),
            state.tail_ka,
            state.tail_za,
            state.tail_len,
            state.positions,
            m,
            state.next_kb,
            state.next_zb,
            None,
            rows(requests, indexer) if indexer else None,
            rows(requests, indexer) if indexer else None,
            rows(m, head_dim),
            rows(m, indexer) if indexer else None,
            0,
        )

    return Case(
        "append",
        f"{name}, {requests} requests",
        make,
        BASELINES["append"],
        benched=benched,
        labels={"requests": requests},
    )


def append_tokens_case(name: str, tokens: tuple[int, ...], m: int, round: int) -> Case:
    """Several tokens per request, some of it padding, no bias, one projection, no indexer."""

    def make(generator: torch.Generator) -> tuple[Any, ...]:
        schema = LayerCacheSchema(AttentionType.HCA, m, head_dim=8, rope_dim=4, indexer_head_dim=0)
        state = CacheState.allocate(schema, len(tokens) + 1, device="cpu")
        offsets = torch.tensor((0, *tokens), dtype=torch.int32, device="cpu").cumsum(0, dtype=torch.int32)
        kv, z = torch.randn(2, int(offsets[-1]) + 2, 8, generator=generator, dtype=torch.float32, device="cpu")
        slots = request_slots_of(generator, len(tokens), len(tokens) + 1)
        slots[-1] = -1
        positions = torch.randint(3 * m, (len(tokens),), generator=generator, device="cpu")
        counters = (state.tail_ka, state.tail_za, state.tail_len, state.positions)
        return kv, z, slots, positions, *counters, m, None, None, offsets, None, None, None, None, round

    return Case("append", name, make, BASELINES["append"])


def flush_case(
    name: str,
    schema: LayerCacheSchema,
    requests: int,
    valid: float = 1.0,
    blocks_per_request: int = 2,
    benched: bool = False,
) -> Case:
    """Entries of any number into blocks scattered over the pool; magnitudes differ from row to row. valid: share of the
    requests with a true mask.
    """

    def make(generator: torch.Generator) -> tuple[Any, ...]:
        slots, blocks = requests + 2, blocks_per_request * requests + 3
        paged = PagedCache.allocate(schema, blocks, device="cpu")
        for pool in vars(paged).values():  # whatever a pool holds, what no entry goes to must keep it
            pool.view(-1).view(torch.uint8).random_(generator=generator)
        if not benched:  # the other dtype that ops take, which opcheck can compare
            paged.entries_fp8 = paged.entries_fp8.view(torch.uint8)
            paged.indexer_scale = paged.indexer_scale.view(torch.uint8)
        rows = torch.randn(requests, schema.width, generator=generator, dtype=torch.float32, device="cpu")
        rows *= 10 ** (6 * torch.rand(requests, 1, generator=generator, dtype=torch.float32, device="cpu") - 3)
        entry, key = rows.to(torch.bfloat16).split((schema.head_dim, schema.indexer_head_dim), dim=1)
        number = torch.randint(
            blocks_per_request * schema.entries_per_block, (slots,), generator=generator, device="cpu"
        )
        table = torch.randperm(blocks, generator=generator, device="cpu")[: requests * blocks_per_request].to(
            torch.int32
        )
        where = (
            torch.rand(requests, generator=generator, dtype=torch.float32, device="cpu") < valid,
            request_slots_of(generator, requests, slots),
            (number + 1) * schema.m,
            table.reshape(requests, blocks_per_request),
            paged.entries_fp8,
            paged.entries_rope,
            paged.inv_scale,
        )
        if schema.attention is AttentionType.HCA:
            return entry.contiguous(), *where, schema.m
        indexer = (paged.indexer_keys_fp4, paged.indexer_scale)
        return entry.contiguous(), key.contiguous(), *where, *indexer, schema.m

    op = f"flush_write_{schema.attention.value}"
    return Case(op, f"{name}, {requests} requests", make, BASELINES[op], benched=benched, labels={"requests": requests})


def rotate_case(
    name: str, schema: LayerCacheSchema, requests: int, valid: float = 1.0, clear: bool = True, benched: bool = False
) -> Case:
    def make(generator: torch.Generator) -> tuple[Any, ...]:
        slots = requests + 2
        a, b, following = (tail_rows(generator, slots, schema.m, schema.width) for _ in range(3))
        pending = following if schema.projections == 2 else (None, None)
        mask = torch.rand(requests, generator=generator, dtype=torch.float32, device="cpu") < valid
        tail_len = torch.full((slots,), schema.m, dtype=torch.int32, device="cpu")
        return mask, request_slots_of(generator, requests, slots), *a, *b, tail_len, *pending, clear

    return Case(
        "csa_rotate_state",
        f"{name}, {requests} requests",
        make,
        BASELINES["csa_rotate_state"],
        benched=benched,
        labels={"requests": requests},
    )


def reset_case(
    name: str, schema: LayerCacheSchema, requests: int, valid: float = 1.0, clear: bool = True, benched: bool = False
) -> Case:
    def make(generator: torch.Generator) -> tuple[Any, ...]:
        slots = requests + 2
        a = tail_rows(generator, slots, schema.m, schema.width)
        mask = torch.rand(requests, generator=generator, dtype=torch.float32, device="cpu") < valid
        tail_len = torch.full((slots,), schema.m, dtype=torch.int32, device="cpu")
        return mask, request_slots_of(generator, requests, slots), *a, tail_len, clear

    return Case(
        "hca_reset_state",
        f"{name}, {requests} requests",
        make,
        BASELINES["hca_reset_state"],
        benched=benched,
        labels={"requests": requests},
    )


CSA, HCA = LayerCacheSchema.csa(), LayerCacheSchema.hca()
ONE_PROJECTION = LayerCacheSchema.csa(projections=1)
SMALL_CSA = LayerCacheSchema(AttentionType.CSA, 3, 24, 4, 16, 2, projections=2)
SMALL_HCA = LayerCacheSchema(AttentionType.HCA, 70, 20, 8, 0, 3)

CASES = (
    *(csa_compress_case("CSA", requests, benched=True) for requests in DECODE_REQUESTS),
    csa_compress_case("half of them full", 9, full=0.5),
    csa_compress_case("blocks of 1", 3, m=1, head_dim=64, indexer_head_dim=0),
    csa_compress_case("blocks of 7, no entry", 5, m=7, head_dim=0, indexer_head_dim=20),
    *(hca_compress_case("HCA", requests, benched=True) for requests in DECODE_REQUESTS),
    hca_compress_case("half of them full", 7, m=130, width=36, full=0.5),
    hca_compress_case("blocks of 1", 3, m=1, width=4),
    hca_compress_case("blocks of 300", 2, m=300, width=64),
    *(append_case("CSA", CSA, requests, benched=True) for requests in DECODE_REQUESTS),
    *(append_case("HCA", HCA, requests, benched=True) for requests in DECODE_REQUESTS),
    append_case("CSA, one projection", ONE_PROJECTION, 5),
    append_tokens_case("1 to 5 tokens of blocks of 4", (3, 0, 5, 1, 2, 4), 4, 0),
    append_tokens_case("1 to 5 tokens of blocks of 4, second block", (3, 0, 5, 1, 2, 4), 4, 1),
    append_tokens_case("up to 300 tokens of blocks of 128, second block", (300, 1, 77), 128, 1),
    *(flush_case("CSA", CSA, requests, benched=True) for requests in DECODE_REQUESTS),
    flush_case("half of them valid", SMALL_CSA, 11, valid=0.5),
    *(flush_case("HCA", HCA, requests, benched=True) for requests in DECODE_REQUESTS),
    flush_case("half of them valid", SMALL_HCA, 11, valid=0.5),
    flush_case("widest entry", LayerCacheSchema(AttentionType.HCA, 1, 1024, 0, 0, 1), 2),
    *(rotate_case("CSA", CSA, requests, benched=True) for requests in DECODE_REQUESTS),
    rotate_case("CSA, rows left", CSA, 64, clear=False, benched=True),
    rotate_case("one projection, half of them valid", ONE_PROJECTION, 4, valid=0.5),
    rotate_case("half of them valid, rows left", SMALL_CSA, 7, valid=0.5, clear=False),
    *(reset_case("HCA, rows left", HCA, requests, clear=False, benched=True) for requests in DECODE_REQUESTS),
    reset_case("HCA", HCA, 1, benched=True),
    reset_case("HCA", HCA, 16, benched=True),
    reset_case("half of them valid", SMALL_HCA, 7, valid=0.5),
)
