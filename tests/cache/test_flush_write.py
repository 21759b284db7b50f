"""Quantised entries in the pool: codes and scales from their definition, and nothing else touched."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from dsv4_kernels import InvalidArgumentError
from dsv4_kernels.cache import compress_flush, flush_write_csa, flush_write_hca
from dsv4_kernels.cases import is_poison, poison, same_bits
from dsv4_kernels.cpu.cache import functions as on_cpu

ml_dtypes = pytest.importorskip("ml_dtypes")
numpy = pytest.importorskip("numpy")

M, PER_BLOCK, BLOCKS = 4, 3, 6
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


class Pool:
    """A poisoned pool, and a batch to write to it."""

    def __init__(self, entry: torch.Tensor, key: torch.Tensor | None, rope: int, device: str) -> None:
        shape = (BLOCKS, PER_BLOCK)
        indexer = 0 if key is None else key.shape[1]

        def pool(*columns: int, dtype: torch.dtype) -> torch.Tensor:
            return poison(torch.empty(*shape, *columns, dtype=dtype, device=device))

        self.device, self.entry, self.key = device, entry.to(device), None if key is None else key.to(device)
        self.fp8 = pool(entry.shape[1] - rope, dtype=torch.float8_e4m3fn)
        self.rope = pool(rope, dtype=torch.bfloat16)
        self.scale = pool(dtype=torch.float32)
        self.keys = pool(indexer // 2, dtype=torch.uint8)
        self.key_scale = pool(indexer // 16, dtype=torch.float8_e4m3fn)

    def write(
        self,
        mask: list[bool] | None = None,
        slots: list[int] | None = None,
        positions: list[int] | None = None,
        table: list[list[int]] | None = None,
        m: int = M,
    ) -> None:
        """By default request r writes entry r of a sequence that has blocks 0, 1, 2, ..."""
        requests = len(self.entry)
        where: tuple[torch.Tensor, ...] = (
            torch.tensor(mask or [True] * requests),
            torch.tensor(slots or list(range(requests)), dtype=torch.int32),
            torch.tensor(positions or [m * (r + 1) for r in range(requests)]),
            torch.tensor(table or [list(range(BLOCKS))] * requests, dtype=torch.int32),
        )
        where = tuple(tensor.to(self.device) for tensor in where)
        rows = (self.fp8, self.rope, self.scale)
        if self.key is None:
            flush_write_hca(self.entry, *where, *rows, m)
        else:
            flush_write_csa(self.entry, self.key, *where, *rows, self.keys, self.key_scale, m)

    def rows(self) -> list[torch.Tensor]:
        """Every part, one row per entry, on the host."""
        fp8, key_scale = self.fp8.view(torch.uint8), self.key_scale.view(torch.uint8)
        parts = (fp8, self.rope, self.scale[..., None], self.keys, key_scale)
        return [part.flatten(0, 1).cpu() for part in parts]

    def written(self) -> list[int]:
        """Which rows; all parts agree on it."""
        touched = [(~is_poison(part)).any(dim=1) for part in self.rows() if part.shape[1]]
        for part in touched:
            assert torch.equal(part, touched[0])
        return touched[0].nonzero()[:, 0].tolist()  # type: ignore[no-any-return]


def random_rows(requests: int, columns: int, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    scale = 10 ** (8 * torch.rand(requests, 1, generator=generator) - 4)
    return (torch.randn(requests, columns, generator=generator) * scale).to(torch.bfloat16)


def e4m3_codes(values: list[float]) -> list[int]:
    """By an independent library, from values that float32 holds."""
    array = numpy.clip(numpy.array(values, dtype=numpy.float32), -448, 448)
    codes: list[int] = array.astype(ml_dtypes.float8_e4m3fn).view(numpy.uint8).tolist()
    return codes


def float32(value: float | Fraction) -> float:
    """The nearest float32 of an exact quotient."""
    return float(torch.tensor(float(value), dtype=torch.float64).to(torch.float32))


def e2m1_code(value: float) -> int:
    """The nearest code, the even one of two."""
    size = min(abs(value), 6.0)
    best = min(range(8), key=lambda code: (abs(E2M1[code] - size), code % 2))
    return best | (8 if math.copysign(1, value) < 0 else 0)


def test_fp8_codes_and_scales(device: str) -> None:
    """A quotient of two float32 numbers, taken in float64 and rounded to float32, is the float32 quotient."""
    entry = random_rows(5, 48)
    pool = Pool(entry, None, 16, device)
    pool.write()
    codes, rope, scales = pool.rows()[:3]
    assert pool.written() == [0, 1, 2, 3, 4]
    for row in range(5):
        values = entry[row, :32].to(torch.float64).tolist()
        scale = max(float32(max(map(abs, values)) / 448), 2.0**-126)
        assert scales[row].item() == scale
        assert codes[row].tolist() == e4m3_codes([float32(value / scale) for value in values])
        assert same_bits(rope[row], entry[row, 32:])


def test_nvfp4_codes_and_scales(device: str) -> None:
    key = random_rows(5, 64, seed=2)
    pool = Pool(random_rows(5, 8), key, 4, device)
    pool.write()
    packed, scale_codes = pool.rows()[3:]
    for row in range(5):
        for group in range(4):
            values = key[row, 16 * group : 16 * group + 16].to(torch.float64).tolist()
            scale_code = e4m3_codes([float32(max(map(abs, values)) / 6)])[0]
            assert scale_codes[row, group].item() == scale_code
            scale = float(numpy.array([scale_code], dtype=numpy.uint8).view(ml_dtypes.float8_e4m3fn)[0])
            want = [e2m1_code(float32(value / scale)) if scale else 0 for value in values]
            got = packed[row, 8 * group : 8 * group + 8].tolist()
            assert [byte >> shift & 15 for byte in got for shift in (0, 4)] == want


def test_ties_go_to_the_even_code(device: str) -> None:
    """Scale 1: the midpoints of E2M1, and of E4M3 around 16."""
    key = torch.tensor([6, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, -0.25, -0.75, -1.25, -1.75, -2.5, -3.5, -5, -6])
    entry = torch.tensor([448.0, 17, 19, 21, -17, -19, -21, 0])
    pool = Pool(entry[None].to(torch.bfloat16), key[None].to(torch.bfloat16), 0, device)
    pool.write()
    codes, _, scales, packed, key_scale = (part[0] for part in pool.rows())
    assert scales.item() == 1.0
    assert codes.view(torch.float8_e4m3fn).to(torch.float32).tolist() == [448, 16, 20, 20, -16, -20, -20, 0]
    assert key_scale.view(torch.float8_e4m3fn).to(torch.float32).tolist() == [1.0]
    nibbles = [byte >> shift & 15 for byte in packed.tolist() for shift in (0, 4)]
    assert nibbles == [7, 0, 2, 2, 4, 4, 6, 6, 8, 10, 10, 12, 12, 14, 14, 15]


def test_zeros_tiny_and_huge_rows(device: str) -> None:
    """Zeros have a scale to divide by; an indexer scale that rounds to 0 has codes 0; a huge one saturates."""
    entry = torch.zeros(4, 8)
    entry[1] = 1e-40
    entry[2], entry[3] = 3e38, torch.tensor([1.0, torch.inf, -torch.inf, -1.0, 0.0, 0.0, 2.0, 3.0])
    key = torch.zeros(4, 16)
    key[1], key[2], key[3] = 1e-3, 1e6, torch.inf
    pool = Pool(entry.to(torch.bfloat16), key.to(torch.bfloat16), 0, device)
    pool.write()
    codes, _, scales, packed, key_scale = pool.rows()
    assert codes[0].tolist() == [0] * 8
    assert scales[0].item() == 2.0**-126
    assert scales[1].item() == 2.0**-126
    assert codes[1].tolist() == e4m3_codes([float(entry.to(torch.bfloat16)[1, 0]) * 2.0**126] * 8)
    assert codes[2].tolist() == [0x7E] * 8
    assert codes[3].tolist() == [0, 0x7F, 0x7F, 0x80, 0, 0, 0, 0]  # finite over infinite; infinite over itself
    assert key_scale[:4, 0].tolist() == [0, 0, 0x7E, 0x7E]
    assert packed[:4].tolist() == [[0] * 8, [0] * 8, [0x77] * 8, [0x77] * 8]


def test_nan(device: str) -> None:
    """Reaches the scale of its group, so that nothing of it comes back finite, and no other group."""
    entry, key = random_rows(2, 12, 3), random_rows(2, 32, 4)
    entry[1], key[1] = entry[0], key[0]
    entry[1, 3], key[1, 20] = torch.nan, -torch.nan
    pool = Pool(entry, key, 4, device)
    pool.write()
    codes, rope, scales, packed, key_scale = pool.rows()
    assert scales.isnan()[:2].flatten().tolist() == [False, True]
    assert (codes[1] == 0x7F).all()
    assert torch.equal(rope[0], rope[1])
    assert key_scale[1].tolist() == [key_scale[0, 0].item(), 0x7F]
    assert torch.equal(packed[1, :8], packed[0, :8])
    assert (packed[1, 8:] == 0x77).all()


def test_where_entries_go(device: str) -> None:
    """Through slot, position and table to a row of the pool; everything that leads outside writes nothing."""
    table = [[4, 1, -1, BLOCKS, 2**31 - 1]] * 9
    slots = [6, 5, 4, 3, 2, 1, 0, -1, 7]
    #            slot 0: beyond the table, 1: block 2^31 - 1, 2: block 6 of 6, 3: block -1, 4 and 5: entries 5 and 0
    positions = [5 * PER_BLOCK * M + M, 5 * PER_BLOCK * M, 4 * PER_BLOCK * M, 3 * PER_BLOCK * M, 6 * M, M, 0]
    for key in (None, random_rows(9, 16)):
        pool = Pool(random_rows(9, 8), key, 4, device)
        pool.write(slots=slots, positions=positions, table=table)
        assert pool.written() == [1 * PER_BLOCK + 2, 4 * PER_BLOCK + 0]


def test_masked_requests(device: str) -> None:
    pool = Pool(random_rows(4, 8), random_rows(4, 16), 4, device)
    pool.write(mask=[False, True, False, True])
    assert pool.written() == [1, 3]


@pytest.mark.parametrize("m", [1, 4, 128])
def test_long_positions(m: int, device: str) -> None:
    """Entries of sequences of more than a million tokens, and beyond 2^31: the last one of a wide table."""
    columns = 1_000_003 // (m * PER_BLOCK) + 1
    table = torch.full((1, columns), -1)
    table[0, -1] = 2
    last = columns * PER_BLOCK * m
    pool = Pool(random_rows(1, 8), None, 4, device)
    pool.write(positions=[last], table=table.tolist(), m=m)
    assert pool.written() == [2 * PER_BLOCK + PER_BLOCK - 1]
    for beyond in (last + m, 2**31 * m, 2**62):
        pool = Pool(random_rows(1, 8), None, 4, device)
        pool.write(positions=[beyond], table=table.tolist(), m=m)
        assert pool.written() == []


WIDTHS = [(1024, 64, 256), (512, 64, 128), (64, 64, 0), (12, 0, 272), (0, 0, 16)]


@pytest.mark.parametrize(("head", "rope", "indexer"), WIDTHS)
def test_widths(head: int, rope: int, indexer: int, device: str) -> None:
    """On the device as on the CPU, which the tests above hold to the definition."""
    entry, key = random_rows(2, head, 5), random_rows(2, indexer, 6)
    pools = [Pool(entry, key, rope, where) for where in (device, "cpu")]
    pools[0].write()
    cpu = pools[1]
    where = (torch.tensor([True] * 2), torch.arange(2, dtype=torch.int32), torch.tensor([M, 2 * M]))
    table = torch.arange(BLOCKS, dtype=torch.int32).repeat(2, 1)
    assert cpu.key is not None
    parts = (cpu.fp8, cpu.rope, cpu.scale, cpu.keys, cpu.key_scale)
    on_cpu.flush_write_csa(cpu.entry, cpu.key, *where, table, *parts, M)
    for got, want in zip(pools[0].rows(), cpu.rows(), strict=True):
        assert same_bits(got, want)


def test_a_short_mask_is_refused() -> None:
    """One flag for each request, also in the op that has no other tensor of that extent behind it."""
    for key in (None, random_rows(3, 16)):
        pool = Pool(random_rows(3, 8), key, 4, "cpu")
        with pytest.raises(InvalidArgumentError, match=r"valid_mask: expected shape \[3\], got \[2\]"):
            pool.write(mask=[True, True])
        assert pool.written() == []


def test_strided_block_table(device: str) -> None:
    pool = Pool(random_rows(2, 8), None, 4, device)
    wide = torch.full((2, 9), -1, dtype=torch.int32)
    wide[:, 2:4] = torch.tensor([[3, 0], [0, 5]])
    where = (torch.tensor([True] * 2), torch.arange(2, dtype=torch.int32), torch.tensor([M, (PER_BLOCK + 1) * M]))
    on_device = [tensor.to(device) for tensor in (*where, wide)]
    flush_write_hca(pool.entry, *on_device[:3], on_device[3][:, 2:4], pool.fp8, pool.rope, pool.scale, M)
    assert pool.written() == [3 * PER_BLOCK, 5 * PER_BLOCK]


def test_compress_flush_writes_the_same_bytes(device: str) -> None:
    """The split layouts of compress_flush: blocks of one row, whose channels another call gives unquantised."""
    generator = torch.Generator().manual_seed(5)
    tokens = 7
    starts = torch.tensor([0, tokens], dtype=torch.int32, device=device)
    table = torch.arange(3, dtype=torch.int32, device=device)[None]
    cos_sin = torch.randn(tokens, 64, generator=generator).to(device)

    def compress(kv: torch.Tensor, layout: str, pages: torch.Tensor, **parts: torch.Tensor) -> None:
        compress_flush(
            kv,
            None,
            None,
            starts,
            torch.zeros(1, dtype=torch.int64, device=device),
            torch.zeros(0, 2, 2, kv.shape[1], device=device),
            torch.zeros(1, 1, dtype=torch.int32, device=device),
            torch.ones(kv.shape[1], device=device),
            cos_sin,
            pages,
            table,
            ratio=1,
            overlap=False,
            layout=layout,
            entries_per_page=PER_BLOCK,
            **parts,
        )

    def unquantised(kv: torch.Tensor, layout: str) -> torch.Tensor:
        pages = torch.zeros(3, PER_BLOCK * 2 * kv.shape[1], dtype=torch.uint8, device=device)
        compress(kv, layout, pages)
        return pages.view(torch.bfloat16).view(-1, kv.shape[1])[:tokens]

    kv, key = (random_rows(tokens, n, seed=n).to(torch.float32).to(device) for n in (512, 128))
    kv[3] = key[3] = 0
    written = Pool(unquantised(kv, "bf16"), unquantised(key, "indexer_bf16"), 64, device)
    written.write(slots=list(range(tokens)), positions=[i + 1 for i in range(tokens)], m=1)
    fused = Pool(written.entry, written.key, 64, device)
    compress(kv, "split", fused.fp8, scales=fused.scale, rope=fused.rope)
    compress(key, "split_indexer", fused.keys, scales=fused.key_scale)
    assert written.written() == fused.written() == list(range(tokens))
    assert all(map(same_bits, written.rows(), fused.rows()))
