"""PagedStash: what it owns, what it reports, what it refuses, and a training loop through it."""

from __future__ import annotations

import copy
import gc
import math
from typing import Any

import pytest
import torch
from dsv4_kernels import InvalidArgumentError
from dsv4_kernels.cases import same_bits
from dsv4_kernels.stash import PagedStash, PoolSize, paged_stash, paged_stash_copy, pages_for
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
        (
            lambda s: PagedStash({(BF16, 1): PoolSize(-1)}, device="cpu"),
            "pools \\(pages\\): expected an int, 0 or more, got -1",
        ),
        (
            lambda s: PagedStash({(BF16, 1): PoolSize(1)}, page_size=0),
            "page_size: expected an int from 1 to 65536, got 0",
        ),
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


@pytest.mark.thorough
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
    gradients = [torch.autograd.grad(y.sum(), weight, retain_graph=keep)[0] for keep in (True, True, False)]
    assert all(same_bits(gradient, gradients[0]) for gradient in gradients)
    assert (gradients[0] == 4).all()  # of four rows of ones
    assert stash.live == 0


class Product(torch.autograd.Function):
    """x @ w, with a backward that looks at saved_tensors once for each, as many are written."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x @ w

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        assert ctx.saved_tensors[0].data_ptr() == ctx.saved_tensors[0].data_ptr()
        return gradient @ ctx.saved_tensors[1].T, ctx.saved_tensors[0].T @ gradient


def one_tensor_at_a_time(x: Tensor, w: Tensor, mark: Any) -> None:
    Product.apply(mark(x * 2), w).square().sum().backward()  # type: ignore[no-untyped-call]


def two_losses(x: Tensor, w: Tensor, mark: Any) -> None:
    """Both of one activation, each with a backward of its own before the next forward."""
    h = mark((x * 2).detach().requires_grad_())
    for scale in (1.0, 3.0):
        ((h @ w) * scale).square().sum().backward()


def two_losses_of_one_graph(x: Tensor, w: Tensor, mark: Any) -> None:
    y = mark(x * 2) @ w
    y.sum().backward(retain_graph=True)
    y.square().sum().backward()


def accumulated(x: Tensor, w: Tensor, mark: Any) -> None:
    h = mark(x.detach() * 3)
    for _ in range(3):
        (h @ w).square().mean().backward()


def several_operations_and_views(x: Tensor, w: Tensor, mark: Any) -> None:
    h = mark(x * 2)
    ((h @ w).relu().sum() + (h * h).sum() + h.exp().mean() + (h.view(5, 16) ** 3).sum()).backward()


def twice_differentiated(x: Tensor, w: Tensor, mark: Any) -> None:
    (gradient,) = torch.autograd.grad((mark(x * 1.5) @ w).tanh().sum(), x, create_graph=True)
    gradient.square().sum().backward()


@pytest.mark.parametrize(
    "backward",
    [
        one_tensor_at_a_time,
        two_losses,
        two_losses_of_one_graph,
        accumulated,
        several_operations_and_views,
        twice_differentiated,
    ],
)
def test_saved_tensors_are_asked_for_more_than_once(backward: Any, real_device: str) -> None:
    """Gradients to the bit as without the stash, and no page left."""

    def gradients(mark: Any) -> list[Tensor | None]:
        generator = torch.Generator().manual_seed(4)
        x, w = torch.randn(10, 8, generator=generator), torch.randn(8, 8, generator=generator)
        x, w = x.to(real_device).requires_grad_(), w.to(real_device).requires_grad_()
        backward(x, w, mark)
        return [x.grad, w.grad]

    stash = PagedStash({(torch.float32, 8): PoolSize(32)}, page_size=4, device=real_device)
    expected = gradients(lambda tensor: tensor)
    with stash.saved_activations() as saved:
        got = gradients(saved.mark)
    assert stash.stashed > 0
    for a, b in zip(expected, got, strict=True):
        assert a is b is None or same_bits(a, b)
    gc.collect()
    report = stash.check()
    assert (stash.live, report.overflow) == (0, False)
    assert report.pools[torch.float32, 8].used == (0, 0)


def test_pages_of_graphs_that_never_run_backward(real_device: str) -> None:
    """A metric in each of many steps: its graph goes, its pages come back, with no reset()."""
    stash = PagedStash({(torch.float32, 8): PoolSize(6, 2)}, page_size=4, device=real_device)
    x, w = torch.ones(10, 8, device=real_device), torch.ones(8, 8, device=real_device, requires_grad=True)
    for _ in range(20):
        with stash.saved_activations() as saved:
            metric = (saved.mark(x * 1) @ w).mean()
        assert stash.live == 1
        del metric
        assert stash.live == 0
    with stash.saved_activations() as saved:
        loss = (saved.mark(x * 2) @ w).sum()
    loss.backward()
    assert (w.grad == 20).all()
    report = stash.check()
    pool = report.pools[torch.float32, 8]
    assert (report.overflow, report.spilled, pool.used, pool.high_water) == (False, False, (0, 0), (3, 0))
    with stash.saved_activations() as saved:
        loss = (saved.mark(x * 2) @ w).sum()
    stash.reset()
    del loss  # of before the reset: its pages are free already
    assert stash.live == 0
    assert stash.check().pools[torch.float32, 8].used == (0, 0)


def test_handles_are_of_one_stash_and_step(real_device: str) -> None:
    """Pages of another stash, or of a handle's copy, are never given back."""
    first, second = small(real_device, 2), small(real_device, 2)
    rows = [torch.full((32, 32), value, dtype=BF16, device=real_device) for value in (1, 2, 3)]
    handle, live = first.stash(rows[0]), second.stash(rows[1])
    with pytest.raises(InvalidArgumentError, match=r"^PagedStash.pop: handle: expected one of this stash, got one of"):
        second.pop(handle)
    assert second.check().pools[BF16, 32].used == (2, 0)
    assert (second.pop(live) == 2).all()
    assert (first.pop(handle) == 1).all()
    handle = first.stash(rows[2])
    twin = copy.deepcopy(copy.copy(handle))
    assert (first.pop(handle) == 3).all()
    with pytest.raises(InvalidArgumentError, match="expected one that was not popped"):
        first.pop(twin)
    with pytest.raises(InvalidArgumentError, match=r"^PagedStash.pop: handle: expected a StashHandle, got int"):
        first.pop(3)  # type: ignore[arg-type]
    assert first.check().pools[BF16, 32].used == (0, 0)


@pytest.mark.parametrize("num_tokens", [3, 1.5, "3", torch.tensor([3], dtype=torch.int32), torch.tensor([3, 4])])
def test_counts_that_are_none_change_nothing(num_tokens: Any) -> None:
    stash = small("cpu")
    with pytest.raises(InvalidArgumentError, match="num_tokens: expected"):
        stash.stash(torch.zeros(16, 32, dtype=BF16), num_tokens)
    assert (stash.stashed, stash.live, stash.check().pools[BF16, 32].used) == (0, 0, (0, 0))


def test_pools_that_are_none_for_the_op() -> None:
    """The op says what is wrong, also for dtypes that it sees as bytes."""
    rows = torch.zeros(4, 3).to(torch.float8_e5m2)
    for pool, host in ((None, None), (torch.zeros(2, 2, 3), None), (torch.zeros(2, 2, 3).to(torch.float8_e5m2), rows)):
        numbers = torch.zeros(2, dtype=torch.int64)
        arguments = (
            rows,
            pool,
            host,
            numbers[:1],
            numbers,
            None,
            numbers,
            numbers,
            numbers,
            numbers,
            *[numbers[:1]] * 3,
        )
        with pytest.raises(InvalidArgumentError, match=r"^paged_stash_copy: (cuda_dst|host_dst|src): expected"):
            paged_stash_copy(*arguments)  # type: ignore[arg-type]


@pytest.mark.gpu
def test_counts_of_all_rows_are_filled_where_they_are_read() -> None:
    """A count that one stream has not filled yet is no other stream's."""
    stash, streams = small("cuda"), [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    with torch.cuda.stream(streams[0]):
        torch.cuda._sleep(500_000_000)
        first = stash._all_rows(77)
    with torch.cuda.stream(streams[1]):
        second = stash._all_rows(77).clone()
        streams[1].synchronize()
        assert not streams[0].query()
        assert second.item() == 77
    with torch.cuda.stream(streams[0]):
        assert stash._all_rows(77) is first
    torch.cuda.synchronize()


@pytest.mark.gpu
def test_backward_on_two_streams() -> None:
    """What one stream pops is waited for on the other that saved it too."""
    stash = PagedStash({(torch.float32, 1024): PoolSize(4096)}, page_size=16)
    side = torch.cuda.Stream()
    for turn in range(10):
        x = torch.full((16 * 1024, 1024), float(turn + 1), device="cuda")
        weights = [torch.ones(1024, device="cuda", requires_grad=True) for _ in range(2)]
        with stash.saved_activations() as saved:
            h = saved.mark(x * 1)
            a = (h * weights[0]).sum()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                b = (h * weights[1]).sum()
            torch.cuda.current_stream().wait_stream(side)
        (a + b).backward()
        torch.cuda.synchronize()
        for weight in weights:
            assert (weight.grad == (turn + 1) * 16 * 1024).all()
        assert stash.live == 0
        stash.reset()


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
