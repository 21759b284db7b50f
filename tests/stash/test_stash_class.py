"""PagedStash: what it owns, what it reports, what it refuses, and a training loop through it."""

from __future__ import annotations

import gc
import math
from typing import Any

import pytest
import torch
from dsv4_kernels import InvalidArgumentError
from dsv4_kernels.cases import same_bits
from dsv4_kernels.stash import PagedStash, PoolSize, paged_stash, pages_for
from torch import Tensor, nn

from tests.stash.pools import number, random_rows

BF16 = torch.bfloat16


def small(device: str, pages: int = 8, host_pages: int = 0, **options: Any) -> PagedStash:
    return PagedStash({(BF16, 32): PoolSize(pages, host_pages)}, page_size=16, device=device, **options)


def test_there_and_back(device: str) -> None:
    """Several dtypes and sizes, popped out of order, with rows that have more than one dimension."""
    sizes = {(BF16, 32): PoolSize(8), (torch.uint8, 48): PoolSize(4), (torch.float8_e5m2, 3): PoolSize(9)}
    stash = PagedStash(sizes, page_size=16, device=device)
    a, b = (random_rows((100, 4, 8), BF16, device, seed) for seed in (1, 2))
    c, d = random_rows((40, 48), torch.uint8, device), random_rows((33, 3), torch.float8_e5m2, device)
    handles = [stash.stash(a, number(50, device)), stash.stash(c, number(37, device)), stash.stash(d)]
    handles.append(stash.stash(b, number(64, device)))
    assert (stash.stashed, stash.popped, stash.live) == (4, 0, 4)
    assert same_bits(stash.pop(handles[3])[:64], b[:64])
    assert same_bits(stash.pop(handles[2]), d)
    back = stash.pop(handles[0], zero_rest=True)
    assert back.shape == a.shape
    assert same_bits(back[:50], a[:50])
    assert not back[50:].any()
    out = torch.full_like(c, 7)
    assert stash.pop(handles[1], out=out) is out
    assert same_bits(out[:37], c[:37])
    assert (out[37:] == 7).all()
    report = stash.check()
    assert not report.overflow
    assert not report.spilled
    assert report.pools[BF16, 32].high_water == (8, 0)
    assert report.pools[torch.uint8, 48].high_water == (3, 0)
    assert {pool.used for pool in report.pools.values()} == {(0, 0)}
    assert stash.live == 0


def test_spill_overflow_and_reset(device: str) -> None:
    stash = small(device, 4, 3)
    rows = random_rows((64, 32), BF16, device)
    first = stash.stash(rows)
    assert not stash.check().spilled
    second = stash.stash(rows, number(48, device))
    report = stash.check()
    assert report.spilled
    assert not report.overflow
    pool = report.pools[BF16, 32]
    assert (pool.pages, pool.used, pool.high_water) == ((4, 3), (4, 3), (4, 3))
    assert same_bits(stash.pop(first), rows)
    assert same_bits(stash.pop(second)[:48], rows[:48])
    first, _ = stash.stash(rows), stash.stash(rows)
    assert stash.check().overflow
    stash.reset()
    with pytest.raises(InvalidArgumentError, match="expected one of this step"):
        stash.pop(first)
    report = stash.check()
    assert not report.overflow
    assert not report.spilled
    assert report.pools[BF16, 32].high_water == report.pools[BF16, 32].used == (0, 0)
    assert same_bits(stash.pop(stash.stash(rows)), rows)


def test_pages_for() -> None:
    assert pages_for(64) == 1
    assert pages_for(65) == 2
    assert pages_for(1000, 3, factor=1.5, page_size=128) == 3 * 12
    assert pages_for(0, 5) == 0
    for name, value, least in (("factor", -1.0, 0), ("factor", math.nan, 0), ("page_size", 0, 1), ("tensors", -1, 0)):
        text = f"pages_for: {name}: expected a finite number from {least}, got {value}"
        with pytest.raises(InvalidArgumentError, match=text):
            pages_for(10, **{name: value})  # type: ignore[arg-type]


def test_bytes(device: str) -> None:
    """Of pages of 16 rows of 32 bfloat16; beside the pages, device memory holds their lists."""
    stash = small(device, 4, 3)
    assert stash.host_bytes == 3 * 1024
    assert 4 * 1024 < stash.device_bytes < 5 * 1024


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda s: s.stash(torch.zeros(4, 31, dtype=BF16)), "PagedStash.stash: tensor: expected rows of 32 x torch"),
        (lambda s: s.stash(torch.zeros(4, 32)), "got 32 x torch.float32"),
        (lambda s: s.stash(torch.zeros((), dtype=BF16)), "got a scalar"),
        (lambda s: s.stash(torch.zeros(32, 4, dtype=BF16).T), "expected a contiguous tensor, got strides \\[1, 4\\]"),
        (lambda s: PagedStash({}), "PagedStash: pools: expected at least one"),
        (lambda s: PagedStash({(BF16, 0): PoolSize(1)}), "pools: expected keys of a dtype and a hidden size"),
        (lambda s: PagedStash({(BF16, 1): PoolSize(-1)}, device="cpu"), "expected a PoolSize that is not negative"),
        (lambda s: PagedStash({(BF16, 1): PoolSize(1)}, page_size=0), "page_size: expected 1 to 65536, got 0"),
        (lambda s: s.pop(s.stash(torch.zeros(4, 32, dtype=BF16)), out=torch.zeros(5, 32)), "shape \\[4, 32\\]"),
        (
            lambda s: [s.pop(h) for h in [s.stash(torch.zeros(4, 32, dtype=BF16))] * 2],
            "expected one that was not popped",
        ),
    ],
    ids=range(10),
)
def test_refusals(call: Any, text: str) -> None:
    with pytest.raises(InvalidArgumentError, match=text):
        call(small("cpu"))


def test_memory_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch says is passed on, with the pool, its size and the way out."""
    stash = small("cpu")
    stash.device = torch.device("cuda", 0)
    with pytest.raises(MemoryError, match=r"1000000000000 host pages of 16 x 32 torch.bfloat16 .* the host has .* GiB"):
        stash._host_pool((BF16, 32), 10**12)

    def refuse(*_: object, **options: object) -> None:
        raise (RuntimeError if options.get("pin_memory") else torch.OutOfMemoryError)("words of CUDA")

    monkeypatch.setattr(torch, "empty", refuse)
    with pytest.raises(MemoryError, match=r"could not be pinned; .*ulimit -l.* words of CUDA"):
        stash._host_pool((BF16, 32), 2)
    with pytest.raises(torch.OutOfMemoryError, match=r"2 pages .* do not fit on cuda:0; .*host_pages\. words of CUDA"):
        stash._device_pool((BF16, 32), 2)
    assert paged_stash.available_host_memory() is None or paged_stash.available_host_memory() > 0  # type: ignore[operator]


class Expert(nn.Module):
    """Two linear layers that save their inputs, and an activation that saves its result."""

    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(hidden, inner, bias=False), nn.Linear(hidden, inner, bias=False)
        self.down = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor, mark: Any) -> Tensor:
        x = mark(x)  # saved twice
        return self.down(mark(torch.sigmoid(self.gate(x)) * self.up(x)))  # type: ignore[no-any-return]


def train(device: str, stashed: bool, dtype: torch.dtype, **options: Any) -> tuple[list[Tensor], dict[str, int]]:
    """Losses and last gradients of a few steps whose number of tokens changes; rows behind them are zero."""
    torch.manual_seed(3)
    rows, hidden, inner, layers = 96, 32, 48, 3
    model = nn.ModuleList([Expert(hidden, inner) for _ in range(layers)]).to(device, dtype)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05)
    sizes = {(dtype, hidden): PoolSize(layers * 6 - 2, 9), (dtype, inner): PoolSize(layers * 6)}
    stash = PagedStash(sizes, page_size=16, device=device, **options)
    losses, seen = [], {"stashed": 0, "spills": 0}
    for step, tokens in enumerate((96, 1, 0, 50, 96)):
        count = number(tokens, device)
        x = torch.randn(rows, hidden, generator=torch.Generator().manual_seed(step)).to(device, dtype)
        x[tokens:] = 0
        optimiser.zero_grad()

        def forward(mark: Any, x: Tensor = x) -> Tensor:
            for layer in model:
                x = x + layer(x * 1.0, mark)
            return x.float().square().sum()

        if stashed:
            stash.reset()
            with stash.saved_activations() as saved:
                loss = forward(lambda t, saved=saved, count=count: saved.mark(t, count))
            assert stash.live == 2 * layers
            seen["stashed"] += stash.stashed
        else:
            loss = forward(lambda t: t)
        loss.backward()
        if stashed:
            report = stash.check()
            assert not report.overflow
            assert stash.live == 0
            assert all(pool.used == (0, 0) for pool in report.pools.values())
            seen["spills"] += report.spilled
        optimiser.step()
        losses.append(loss.detach())
    return losses + [p.grad.clone() for p in model.parameters() if p.grad is not None], seen


@pytest.mark.parametrize("side_stream", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_training_gives_the_same_bits(dtype: torch.dtype, side_stream: bool, real_device: str) -> None:
    plain, _ = train(real_device, False, dtype)
    stashed, seen = train(real_device, True, dtype, side_stream=side_stream)
    assert len(plain) == 5 + 9
    for a, b in zip(plain, stashed, strict=True):
        assert same_bits(a, b)
    assert seen == {"stashed": 30, "spills": 2}


def test_training_with_emulated_kernels(device: str) -> None:
    plain, stashed = (train(device, flag, torch.float32)[0] for flag in (False, True))
    assert all(same_bits(a, b) for a, b in zip(plain, stashed, strict=True))


def test_saved_memory_is_freed(real_device: str) -> None:
    """Nothing holds a stashed tensor between forward and backward."""
    import weakref

    stash = small(real_device)
    weight = torch.randn(32, 32, device=real_device, dtype=BF16, requires_grad=True)
    with stash.saved_activations() as saved:
        x = saved.mark(random_rows((64, 32), torch.uint8, real_device).to(BF16))
        watch = weakref.ref(x.untyped_storage())
        y = x @ weight
        z = y.sum()
        del x
    gc.collect()
    assert watch() is None or stash.live == 1
    z.backward()
    assert stash.live == 0
    with stash.saved_activations() as saved:
        y = saved.mark(torch.ones(4, 32, dtype=BF16, device=real_device)) @ weight
    y.sum().backward(retain_graph=True)
    with pytest.raises(InvalidArgumentError, match="not popped"):
        y.sum().backward()


def test_select_chooses_results_too(real_device: str) -> None:
    stash = PagedStash({(torch.float32, 8): PoolSize(16)}, page_size=4, device=real_device)
    x = torch.randn(10, 8, device=real_device, requires_grad=True)
    asked: list[tuple[int, ...]] = []

    def select(tensor: Tensor) -> bool:
        asked.append(tuple(tensor.shape))
        return tensor.shape[0] == 10

    expected = torch.autograd.grad(x.exp().sigmoid().sum(), x)[0]
    with stash.saved_activations(select):
        y = x.exp().sigmoid().sum()
    assert stash.live == len(asked) == 2
    y.backward()
    assert same_bits(x.grad, expected)


def test_a_marked_tensor_that_is_gone_marks_nothing(real_device: str) -> None:
    """Its address may be another's by now; and bytes that were changed since are others."""
    stash = small(real_device)
    weight = torch.ones(32, 32, device=real_device, dtype=BF16, requires_grad=True)
    with stash.saved_activations() as saved:
        x = saved.mark(torch.ones(16, 32, device=real_device, dtype=BF16))
        x.mul_(2)  # after the mark
        (x @ weight).sum()
        assert stash.stashed == 0
        saved.mark(x)
        address = x.data_ptr()
        del x
        for _ in range(8):
            other = torch.ones(16, 32, device=real_device, dtype=BF16)
            if other.data_ptr() == address:
                break
        (other @ weight).sum()
        assert stash.stashed == 0


@pytest.mark.gpu
@pytest.mark.parametrize("side_stream", [False, True])
def test_captured_step(side_stream: bool) -> None:
    """A step with reset, stashes and pops in one graph, replayed with other counts and other data."""
    stash = small("cuda", 10, 10, side_stream=side_stream)
    a, b = (random_rows((96, 32), BF16, "cuda", seed) for seed in (1, 2))
    counts = number(96, "cuda"), number(96, "cuda")
    back = torch.empty_like(a), torch.empty_like(b)

    def step() -> None:
        stash.reset()
        handles = stash.stash(a, counts[0]), stash.stash(b, counts[1])
        for handle, out in zip(handles, back, strict=True):
            stash.pop(handle, out=out, zero_rest=True)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for seed, tokens in enumerate([(96, 96), (1, 0), (17, 80), (96, 64)]):
        for source, count, value in zip((a, b), counts, tokens, strict=True):
            source.copy_(random_rows((96, 32), BF16, "cuda", 10 + seed))
            count.fill_(value)
        graph.replay()
        for source, out, value in zip((a, b), back, tokens, strict=True):
            assert same_bits(out[:value], source[:value])
            assert not out[value:].any()
        report = stash.check()
        assert not report.overflow
        assert report.spilled == (sum(-(-t // 16) for t in tokens) > 10)


@pytest.mark.gpu
def test_side_stream_keeps_memory_that_is_given_back() -> None:
    """The copy runs while its source's memory is already free for others on the main stream."""
    stash = PagedStash({(torch.uint8, 4096): PoolSize(4096)}, side_stream=True)
    for turn in range(10):
        stash.reset()
        x = torch.full((64 * 2048, 4096), turn, dtype=torch.uint8, device="cuda")
        handle = stash.stash(x)
        del x
        torch.full((64 * 2048, 4096), 255, dtype=torch.uint8, device="cuda")
        assert (stash.pop(handle) == turn).all()
