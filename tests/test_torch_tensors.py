"""What every op owes to torch's tensors: version counters, refused gradients, tensors whose memory is not their value.

Kernels are not run where only the path of a call matters: observed() takes their launches.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from dsv4_kernels import InvalidArgumentError, _native, moe, router, torch_ops
from dsv4_kernels.cases import Case, all_cases, fresh, same_bits
from dsv4_kernels.op import Op
from dsv4_kernels.ops import OPS
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad

from tests.launches import observed

torch_ops.register()
FEWEST_BYTES = {
    op: min(
        (c for c in all_cases() if c.op == op and not c.large),
        key=lambda c: c.baseline.moved_bytes(*c.arguments("cpu")),
    )
    for op in OPS
}
PATHS: dict[str, Callable[[], AbstractContextManager[Any]]] = {"cpu": nullcontext, "kernel": lambda: observed("sm_90a")}
BF16 = torch.bfloat16


@pytest.fixture(params=[True, False], ids=["torch functions", "python"])
def torch_functions(request: pytest.FixtureRequest) -> Iterator[bool]:
    """By which way the binding asks about tensors."""
    _native.mark_written((torch.zeros(1),))
    assert _native.use_torch_functions(True), "this torch lacks a function: see csrc/python/torch_tensor.cpp"
    _native.use_torch_functions(request.param)
    yield request.param
    _native.use_torch_functions(True)


def case_of(op: str) -> tuple[Case, tuple[Any, ...], tuple[Tensor, ...]]:
    """The smallest case, its inputs and outputs to write to."""
    case = FEWEST_BYTES[op]
    arguments = case.arguments("cpu")
    return case, arguments, OPS[op].allocate(arguments)


def call_public(op: Op, arguments: tuple[Any, ...], out: tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
    return op(arguments, out)


def call_torch(op: Op, arguments: tuple[Any, ...], out: tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
    overloads = getattr(torch.ops.dsv4, op.name)
    if not op.results or out[0] is None:
        results = overloads.default(*arguments)
        return results if isinstance(results, tuple) else () if results is None else (results,)
    overloads.out(*arguments, *out)
    return out  # type: ignore[return-value]


CALLS = {"public": call_public, "torch op": call_torch}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("op", OPS)
def test_written_tensors_have_new_versions(op: str, path: str, call: str, torch_functions: bool) -> None:
    """As after torch's own in-place functions: autograd compares versions to find what changed under it."""
    _, arguments, out = case_of(op)
    tensors = [value for value in (*arguments, *out) if isinstance(value, Tensor)]
    changed = {id(tensor) for tensor in (*out, *OPS[op].mutated_of(arguments))}
    before = [tensor._version for tensor in tensors]
    with PATHS[path]():
        CALLS[call](OPS[op], arguments, out)
    for tensor, version in zip(tensors, before, strict=True):
        assert (tensor._version > version) == (id(tensor) in changed)


def test_written_inference_tensors_have_no_version_to_raise(torch_functions: bool) -> None:
    with torch.inference_mode():
        _, arguments, out = case_of("hash_router")
    with observed("sm_90a"):
        OPS["hash_router"](arguments, out)
    _native.mark_written((out[0], None, 3, np.zeros(2)))


@pytest.mark.parametrize("path", PATHS)
def test_autograd_sees_that_a_saved_tensor_was_overwritten(path: str) -> None:
    a = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)).to(BF16).requires_grad_()
    h = a * 1.0
    loss = (h * h).sum()
    rows, used = torch.zeros(4, dtype=torch.int32), torch.tensor([4], dtype=torch.int32)
    with PATHS[path]():
        moe.padded_squared_relu(h.detach(), rows, used, out=h.detach())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def differentiable(values: tuple[Any, ...]) -> list[int]:
    return [i for i, value in enumerate(values) if isinstance(value, Tensor) and value.is_floating_point()]


def names(op: Op) -> list[str]:
    return [argument.name for argument in op.parameters] + list(op.results)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("op", OPS)
def test_gradients_are_refused(op: str, call: str, torch_functions: bool) -> None:
    """Inputs and outputs, one after another: a result without a gradient would lose a summand of one in silence."""
    _, arguments, out = case_of(op)
    values = (*arguments, *out)
    for i in differentiable(values):
        if values[i].element_size() == 1:
            continue  # torch has no gradients in FP8
        given = [value.clone() if isinstance(value, Tensor) else value for value in values]
        given[i].requires_grad_()
        inputs, outputs = tuple(given[: len(arguments)]), tuple(given[len(arguments) :])
        text = (
            f"^{op}: {names(OPS[op])[i]}: expected a tensor without a gradient, got one that requires one; {op} has no"
        )
        with pytest.raises(InvalidArgumentError, match=text):
            CALLS[call](OPS[op], inputs, outputs)
        with torch.no_grad():
            CALLS[call](OPS[op], inputs, outputs)
        if i < len(arguments) and OPS[op].results:
            with pytest.raises(InvalidArgumentError, match=text):
                CALLS[call](OPS[op], inputs, (None,) * len(out))


def test_gradients_are_refused_while_tracing() -> None:
    scores = torch.randn(4, 16, requires_grad=True)
    torch.compiler.reset()
    compiled = torch.compile(lambda x: router.topk_select(x, 4), fullgraph=True, backend="eager")
    with pytest.raises(Exception, match="topk_select: scores: expected a tensor without a gradient"):
        compiled(scores)
    with torch.no_grad():
        assert torch.equal(compiled(scores)[0], scores.topk(4).values)


def test_modules_and_the_stash_take_part_in_a_training_step_without_a_gradient() -> None:
    """A module's own tensors require none, so plain hidden states are routed in grad mode too."""
    dense = router.Router("dense", hidden_size=64, experts=16, top_k=4)
    weights, _ = dense(torch.randn(3, 64).to(BF16))
    assert not weights.requires_grad
    with pytest.raises(InvalidArgumentError, match="expected a tensor without a gradient"):
        dense(torch.randn(3, 64).to(BF16).requires_grad_())


@pytest.mark.parametrize(
    "derive",
    [
        lambda f, x: torch.func.grad(lambda v: f(v).sum())(x),
        lambda f, x: torch.func.jvp(f, (x,), (x,)),
        lambda f, x: torch.func.vjp(f, x),
    ],
    ids=["grad", "jvp", "vjp"],
)
@pytest.mark.parametrize("path", PATHS)
def test_derivatives_of_functorch_are_refused(path: str, derive: Callable[..., Any]) -> None:
    with PATHS[path](), pytest.raises(InvalidArgumentError, match=r"^topk_select: scores: expected a"):
        derive(lambda v: router.topk_select(v, 4)[0], torch.randn(3, 16))


def test_tangents_are_refused() -> None:
    x = torch.randn(3, 16)
    with forward_ad.dual_level():
        router.topk_select(x, 4)
        with pytest.raises(InvalidArgumentError, match=r"^topk_select: scores: .* carries a tangent"):
            router.topk_select(forward_ad.make_dual(x, x), 4)


def negated(tensor: Tensor) -> Tensor:
    """The same values, lazily negated."""
    return torch._neg_view(tensor.view(torch.uint8).clone().view(tensor.dtype).neg())


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("op", OPS)
def test_lazily_negated_tensors(op: str, call: str, torch_functions: bool) -> None:
    """Inputs: the same bits as the plain values give. Tensors that are written: refused."""
    _, arguments, out = case_of(op)
    expected = CALLS[call](OPS[op], fresh(arguments), fresh(out))
    for i in differentiable((*arguments, *out)):
        given = list(fresh((*arguments, *out)))
        if given[i].element_size() == 1:
            continue  # FP8 has no negation
        given[i] = negated(given[i])
        inputs, outputs = tuple(given[: len(arguments)]), tuple(given[len(arguments) :])
        if i >= len(arguments) or i in OPS[op].mutated:
            text = f"^{op}: {names(OPS[op])[i]}: .*resolve_neg" if call == "public" else None  # else it is torch's
            with pytest.raises(InvalidArgumentError if call == "public" else RuntimeError, match=text):
                CALLS[call](OPS[op], inputs, outputs)
            continue
        results = CALLS[call](OPS[op], inputs, outputs)
        assert all(same_bits(*pair) for pair in zip(results, expected, strict=True)), names(OPS[op])[i]


def test_lazily_negated_tensors_reach_the_kernel_as_values() -> None:
    x = torch.randn(2, 8, generator=torch.Generator().manual_seed(1))
    imaginary = torch.complex(x, x).conj().imag  # strided, negated
    values, ids = router.topk_select(imaginary, 3)
    assert torch.equal(values, (-x).topk(3).values)
    assert torch.equal(ids.to(torch.int64), (-x).topk(3).indices)


class Wrapped(Tensor):
    """A subclass whose memory is elsewhere, such as a DTensor, that lists what it is shown."""

    inner: Tensor  # type: ignore[assignment]
    seen: list[str]

    @staticmethod
    def __new__(cls, inner: Tensor, seen: list[str]) -> Wrapped:
        options = {"dtype": inner.dtype, "device": inner.device, "strides": inner.stride()}
        self: Wrapped = torch.Tensor._make_wrapper_subclass(cls, inner.shape, **options)
        self.inner, self.seen = inner, seen
        return self

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        def unwrapped(value: Any) -> Any:
            if isinstance(value, Wrapped):
                value.seen.append(str(func))
                return value.inner
            return value

        return func(*map(unwrapped, arguments), **(options or {}))


@pytest.mark.parametrize("op", OPS)
def test_subclasses_behind_any_argument_see_the_op(op: str) -> None:
    _, arguments, out = case_of(op)
    expected = OPS[op](fresh(arguments), fresh(out)) + OPS[op].mutated_of(fresh(arguments))
    assert expected is not None
    for i, value in enumerate((*arguments, *out)):
        if not isinstance(value, Tensor):
            continue
        given, seen = list(fresh((*arguments, *out))), list[str]()
        given[i] = Wrapped(given[i], seen)
        OPS[op](tuple(given[: len(arguments)]), tuple(given[len(arguments) :]))
        assert seen[-1] == (f"dsv4.{op}.out" if out else f"dsv4.{op}.default"), names(OPS[op])[i]


def test_subclasses_that_hand_themselves_on() -> None:
    class Watching(Tensor):
        @classmethod
        def __torch_dispatch__(cls, func: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
            with torch._C._DisableTorchDispatch():
                return func(*arguments, **(options or {}))

    x = torch.randn(3, 16)
    watching = torch.Tensor._make_subclass(Watching, x)
    assert torch.equal(router.topk_select(watching, 4)[0], x.topk(4).values)


def test_subclasses_of_plain_memory_are_read() -> None:
    class Named(torch.nn.Parameter):
        pass

    x = torch.randn(3, 16)
    assert torch.equal(router.topk_select(Named(x, requires_grad=False), 4)[0].as_subclass(Tensor), x.topk(4).values)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_runs_the_op_for_each() -> None:
    x = torch.randn(3, 5, 16)
    values, _ = torch.vmap(lambda v: router.topk_select(v, 4))(x)
    assert torch.equal(values, x.topk(4).values)


def test_dtensors_are_refused_by_name() -> None:
    from torch.distributed import destroy_process_group, init_process_group
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, distribute_tensor
    from torch.testing._internal.distributed.fake_pg import FakeStore

    init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        mesh = init_device_mesh("cpu", (2,))
        hidden, weight = torch.zeros(2, 64, dtype=BF16), torch.zeros(16, 64, dtype=BF16)
        sharded = distribute_tensor(weight, mesh, [Replicate()])
        with pytest.raises(InvalidArgumentError, match=r"^dense_router_decode: weight: .* type DTensor"):
            router.dense_router_decode(hidden, sharded, None, 2)
    finally:
        destroy_process_group()


def fake(tensor: Tensor) -> Tensor:
    with FakeTensorMode() as mode:
        return mode.from_tensor(tensor)


SCORES = torch.randn(3, 16)
# What no op can read, and how the refusal describes it.
UNREADABLE: dict[str, tuple[Callable[[], Any], str]] = {
    "nested": (
        lambda: torch.nested.as_nested_tensor([SCORES[0], SCORES[1]], layout=torch.strided),
        "a nested cpu tensor",
    ),
    "jagged": (
        lambda: torch.nested.as_nested_tensor([SCORES[0], SCORES[1]], layout=torch.jagged),
        "one of type NestedTensor",
    ),
    "sparse": (lambda: SCORES.to_sparse(), "a cpu tensor with layout sparse_coo"),
    "meta": (lambda: SCORES.to("meta"), "a meta tensor with layout strided"),
    "fake among real ones": (lambda: fake(SCORES), "one of type FakeTensor"),
    "list": (lambda: SCORES.tolist(), "list"),
    "numpy": (lambda: SCORES.numpy(), "numpy.ndarray; torch.from_dlpack makes one of the same memory"),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("what", UNREADABLE)
@pytest.mark.parametrize("with_out", [True, False], ids=["out", "allocating"])
def test_other_tensors_are_refused_by_name(what: str, with_out: bool) -> None:
    make, described = UNREADABLE[what]
    out = {"out_values": torch.zeros(3, 4), "out_ids": torch.zeros(3, 4, dtype=torch.int32)} if with_out else {}
    if what in ("numpy", "list") and not with_out:
        described = "got None; outputs are allocated for torch tensors only" if what == "numpy" else described
        with pytest.raises(InvalidArgumentError, match=re.escape(described)):
            router.topk_select(make(), 4)
        return
    if what == "fake among real ones" and not with_out:
        assert router.topk_select(make(), 4)[0].shape == (3, 4)
        return
    with pytest.raises(InvalidArgumentError, match=r"^topk_select: scores: expected .*" + re.escape(described)):
        router.topk_select(make(), 4, **out)


def test_arrays_of_others_behind_any_argument() -> None:
    """On the host there is the CPU implementation alone, and that takes torch's."""
    for op in OPS:
        _, arguments, out = case_of(op)
        for i, value in enumerate((*arguments, *out)):
            if isinstance(value, Tensor) and value.dtype in (torch.float32, torch.int32, torch.int64, torch.uint8):
                given: list[Any] = list(fresh((*arguments, *out)))
                given[i] = given[i].numpy()
                text = rf"^{op}: {names(OPS[op])[i]}: expected a torch tensor in host memory, got numpy.ndarray"
                with pytest.raises(InvalidArgumentError, match=text):
                    OPS[op].run(tuple(given[: len(arguments)]), tuple(given[len(arguments) :]))


def test_a_failed_allocation_is_told_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not as an output that the caller did not give."""

    def refused(*_: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(Op, "_filled", refused)
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        router.topk_select(SCORES, 4)
    with pytest.raises(InvalidArgumentError, match=r"^topk_select: top_k: "):
        router.topk_select(SCORES, -1)
