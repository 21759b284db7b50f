"""What holds for every op of the table, on every device: right, repeatable, traceable, capturable, empty-safe."""

from __future__ import annotations

import importlib

import pytest
import torch
from dsv4_kernels import images, torch_ops
from dsv4_kernels.cases import Case, all_cases, fresh, is_poison, poison, same_bits
from dsv4_kernels.ops import OPS

from tests.emulated import SAME_PTX, has_own_ptx
from tests.launches import observed

torch_ops.register()
CASES = [case for case in all_cases() if not case.large]

# Ops of which an architecture has kernels of its own; all others' are those of another one: see tests.emulated.
OWN_KERNELS = {image["op"] for image in images.read_images() if any(has_own_ptx(image["symbol"], a) for a in SAME_PTX)}


def small_case(op: str) -> Case:
    """The op's case with the fewest bytes among those that write every element: the rest has no defined value."""

    def writes_everything(case: Case) -> bool:
        outputs = case.run(case.arguments("cpu"))[: len(OPS[op].results)]  # what is changed in place was defined before
        return not any(is_poison(output).any() for output in outputs)

    cases = [case for case in CASES if case.op == op and writes_everything(case)]
    return min(cases, key=lambda case: case.baseline.moved_bytes(*case.arguments("cpu")))


def test_every_op_has_cases() -> None:
    assert {case.op for case in CASES} == set(OPS)


@pytest.mark.parametrize("case", [case for case in CASES if case.op not in OWN_KERNELS], ids=lambda case: case.id)
def test_results(case: Case, device: str) -> None:
    check_results(case, device)


@pytest.mark.every_architecture
@pytest.mark.parametrize("case", [case for case in CASES if case.op in OWN_KERNELS], ids=lambda case: case.id)
def test_results_of_ops_with_kernels_of_their_own(case: Case, device: str) -> None:
    check_results(case, device)


def check_results(case: Case, device: str) -> None:
    arguments = case.arguments(device)
    before = fresh(arguments)
    results = case.run(arguments)
    verdict = case.baseline.verdict(arguments, results)
    assert verdict.passed, verdict
    for argument, old in zip(arguments, before, strict=True):
        assert not isinstance(argument, torch.Tensor) or same_bits(argument, old), "input written"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_same_bits_twice(case: Case, device_of_each_kind: str) -> None:
    arguments = case.arguments(device_of_each_kind)
    for first, second in zip(case.run(arguments), case.run(arguments), strict=True):
        assert same_bits(first, second)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_checks_reject_wrong_results(case: Case) -> None:
    """A check that accepts anything would make every other test here empty."""
    arguments = case.arguments("cpu")
    results = case.run(arguments)
    for broken in range(len(results)):
        if not results[broken].numel():
            continue
        changed = [result.clone() for result in results]
        flat = changed[broken].view(-1)
        flat = flat.view(torch.uint8) if flat.element_size() == 1 else flat
        flat[flat.numel() // 2] += 1
        if same_bits(changed[broken], results[broken]):  # a bfloat16 poison pattern too large to feel a 1
            flat[flat.numel() // 2] *= 2
        assert not case.baseline.verdict(arguments, tuple(changed)).passed


@pytest.mark.parametrize("op", OPS)
def test_opcheck(op: str, real_device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # opcheck sees by allclose whether an argument was changed, which torch has not for FP8.
    allclose = torch.allclose

    def by_bits_if_fp8(a: torch.Tensor, b: torch.Tensor, **options: object) -> bool:
        return same_bits(a, b) if a.is_floating_point() and a.element_size() == 1 else allclose(a, b, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(torch, "allclose", by_bits_if_fp8)
    arguments = small_case(op).arguments(real_device)
    overloads = getattr(torch.ops.dsv4, op)
    torch.library.opcheck(overloads.default, fresh(arguments))
    if not OPS[op].results:
        return
    out = OPS[op].allocate(arguments)
    for tensor in out:
        tensor.zero_()
    torch.library.opcheck(overloads.out, (*arguments, *out))


@pytest.mark.parametrize("op", OPS)
def test_public_function_traces_and_matches_eager(op: str, real_device: str) -> None:
    """torch.compile(fullgraph=True) sees the public function as the torch op."""
    arguments = small_case(op).arguments(real_device)

    def call(*values: object) -> tuple[torch.Tensor, ...]:
        return OPS[op](values, (None,) * len(OPS[op].results))

    torch.compiler.reset()  # else the ops count as recompilations of one function, and there is a limit on those
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    by_trace, by_call = fresh(arguments), fresh(arguments)
    results = compiled(*by_trace) + OPS[op].mutated_of(by_trace)
    for traced, eager in zip(results, call(*by_call) + OPS[op].mutated_of(by_call), strict=True):
        assert traced.shape == eager.shape
        assert traced.dtype == eager.dtype
        assert same_bits(traced, eager)


@pytest.mark.parametrize("op", OPS)
def test_public_function_has_every_argument(op: str) -> None:
    """The function in the family's namespace takes what the table declares, by the same names."""
    import inspect

    function = getattr(importlib.import_module(f"dsv4_kernels.{OPS[op].family}"), op)
    parameters = inspect.signature(function).parameters
    declared = [argument.name for argument in OPS[op].parameters]
    assert [name for name in parameters if name in declared] == declared
    assert set(OPS[op].results) <= set(parameters)
    assert function.__doc__
    for name in (*declared, *OPS[op].results):
        assert f"{name}:" in function.__doc__ or len(OPS[op].results) == 0, f"{name} is not documented"


# Ops that launch another op's kernel: scores of a table's experts with a second bias are chosen from as all are.
ALSO_LAUNCHES = {"hash_router_scored": ("activation_topk",)}


@pytest.mark.parametrize("architecture", ["sm_90a", "sm_100a", "sm_103a", "sm_120a", "sm_121a"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_launches_known_images(case: Case, architecture: str) -> None:
    """Without a GPU: checks, dispatch and parameters of the C entry point, up to the launch."""
    arguments = case.arguments("cpu")
    op = OPS[case.op]
    out = op.allocate(arguments)
    with observed(architecture) as launches:
        op(arguments, out)
    assert len(launches) == case.launches
    for launch in launches:
        known = [i for i in images.read_images() if i["symbol"] == launch.symbol and i["architecture"] == architecture]
        assert len(known) == 1
        (image,) = known
        assert image["op"] in (case.op, *ALSO_LAUNCHES.get(case.op, ()))
        assert [size for _, size in image["parameters"]] == [len(value) for value in launch.parameters]
        assert launch.dynamic_shared == image["dynamic_shared"] or image["language"] == "cuda"
        threads = launch.block[0] * launch.block[1] * launch.block[2]
        assert threads == (image["threads"] or threads)
        assert threads <= 1024


@pytest.mark.gpu
@pytest.mark.parametrize("case", [case for case in CASES if case.benched], ids=lambda case: case.id)
def test_graph_replay_follows_new_inputs(case: Case) -> None:
    """Captured once on one set of inputs, replayed on others written to the same memory."""
    arguments = case.arguments("cuda")
    op = OPS[case.op]
    out = op.allocate(arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        op(arguments, out)
    for salt in (1, 2):
        given = case.arguments("cuda", salt)
        for argument, new in zip(arguments, given, strict=True):
            if isinstance(argument, torch.Tensor):
                argument.copy_(new)
        for tensor in out:
            poison(tensor)
        graph.replay()
        torch.cuda.synchronize()
        verdict = case.baseline.verdict(given, out + op.mutated_of(arguments))
        assert verdict.passed, verdict


@pytest.mark.gpu
@pytest.mark.parametrize("op", OPS)
def test_two_streams_at_once(op: str) -> None:
    """Interleaved calls on two streams give what calls on their own give."""
    cases = [case for case in CASES if case.op == op and case.benched][:2]
    inputs = [case.arguments("cuda") for case in cases]
    alone = [case.run(arguments) for case, arguments in zip(cases, inputs, strict=True)]
    streams = [torch.cuda.Stream() for _ in cases]
    torch.cuda.synchronize()
    results: list[list[tuple[torch.Tensor, ...]]] = [[] for _ in cases]
    for _ in range(20):
        for i, (case, arguments) in enumerate(zip(cases, inputs, strict=True)):
            with torch.cuda.stream(streams[i]):
                results[i].append(case.run(arguments))
    torch.cuda.synchronize()
    for expected, got in zip(alone, results, strict=True):
        for outputs in got:
            for a, b in zip(expected, outputs, strict=True):
                assert same_bits(a, b)
