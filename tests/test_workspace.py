"""Workspaces: a given one is used on every path, a lent one costs a captured graph nothing, and both stay zeroed."""

from __future__ import annotations

import ctypes
import gc
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from dsv4_kernels import InvalidArgumentError, Workspace, _native, torch_ops
from dsv4_kernels.cases import Case, all_cases, fresh, same_bits
from dsv4_kernels.moe import quantize_nvfp4_gpu_fused
from dsv4_kernels.op import Op
from dsv4_kernels.ops import OPS
from dsv4_kernels.router import Router, dense_router_decode, dense_router_decode_workspace_size
from dsv4_kernels.stash import PagedStash, PoolSize
from torch import Tensor

from tests.cuda_graphs import KERNEL, cudart, node_types, until
from tests.emulated import emulated, ptx_folder

torch_ops.register()
WITH_WORKSPACE = [op.name for op in OPS.values() if op.workspace_size is not None]
BF16 = torch.bfloat16


def arguments_of(op: str, device: str = "cpu") -> tuple[Any, ...]:
    """Of the op's smallest case."""
    cases: list[Case] = [case for case in all_cases() if case.op == op and not case.large]
    return min(cases, key=lambda case: case.baseline.moved_bytes(*case.arguments("cpu"))).arguments(device)


def caller(op: str, arguments: tuple[Any, ...]) -> Callable[..., tuple[Tensor, ...]]:
    """The op as a function of its workspace and its tensors, the rest fixed."""
    places = [i for i, argument in enumerate(arguments) if isinstance(argument, Tensor)]

    def call(workspace: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        values = list(arguments)
        for place, tensor in zip(places, tensors, strict=True):
            values[place] = tensor
        return OPS[op](tuple(values), (None,) * len(OPS[op].results), workspace)

    return call


def tensors_of(arguments: tuple[Any, ...]) -> tuple[Tensor, ...]:
    return tuple(argument for argument in arguments if isinstance(argument, Tensor))


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> list[int | None]:
    """The addresses of the workspaces that reach the binding."""
    addresses: list[int | None] = []

    def native(op: Op) -> Callable[..., bool]:
        binding = getattr(_native, op.name)

        def call(*values: Any) -> bool:
            if op.workspace_size is not None:
                workspace = values[len(op.parameters)]
                addresses.append(None if workspace is None else workspace.data_ptr())
            on_device: bool = binding(*values)
            return on_device

        return call

    monkeypatch.setattr(Op, "native", property(native))
    return addresses


WAYS: dict[str, Callable[[Callable[..., Any]], Callable[..., Any]]] = {
    "eager": lambda function: function,
    "compiled": lambda function: torch.compile(function, fullgraph=True, backend="eager"),
    "dynamic": lambda function: torch.compile(function, fullgraph=True, dynamic=True, backend="eager"),
    "functionalised": lambda function: torch.compile(function, fullgraph=True, backend="aot_eager"),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("op", WITH_WORKSPACE)
def test_a_workspace_that_is_too_small_is_refused(op: str, way: str) -> None:
    arguments = arguments_of(op)
    torch.compiler.reset()
    call = WAYS[way](caller(op, arguments))
    with pytest.raises(InvalidArgumentError, match=f"{op}: workspace bytes: expected at least .*, got 1"):
        call(torch.zeros(1, dtype=torch.uint8), *tensors_of(arguments))


@pytest.mark.parametrize("way", ["eager", "compiled", "dynamic", "inductor"])
@pytest.mark.parametrize("kind", ["tensor", "object"])
@pytest.mark.parametrize("op", WITH_WORKSPACE)
def test_the_workspace_that_is_given_is_used(op: str, kind: str, way: str, given: list[int | None]) -> None:
    """The memory itself, not a copy: also where the compiler rewrites calls that change their arguments."""
    arguments = arguments_of(op)
    workspace = Workspace("cpu")
    torch.compiler.reset()
    call = caller(op, arguments)
    call = torch.compile(call, fullgraph=True) if way == "inductor" else WAYS[way](call)
    call(workspace if kind == "object" else workspace.tensor, *tensors_of(arguments))
    assert given == [workspace.tensor.data_ptr()]
    assert not workspace.tensor.any()


@pytest.mark.parametrize("op", WITH_WORKSPACE)
def test_out_overload_takes_it_last(op: str, given: list[int | None], monkeypatch: pytest.MonkeyPatch) -> None:
    if not OPS[op].results:
        return
    arguments = arguments_of(op)
    out = OPS[op].allocate(arguments)
    overload = getattr(torch.ops.dsv4, op).out
    expected = OPS[op](arguments, (None,) * len(out))
    overload(*arguments, *out)
    for got, wanted in zip(out, expected, strict=True):
        assert same_bits(got, wanted)
    with pytest.raises(InvalidArgumentError, match="workspace bytes"):
        overload(*arguments, *out, torch.zeros(1, dtype=torch.uint8))


@pytest.mark.parametrize("op", WITH_WORKSPACE)
def test_opcheck_with_a_workspace(op: str, real_device: str) -> None:
    arguments = arguments_of(op, real_device)
    workspace = Workspace(real_device).tensor
    overloads = getattr(torch.ops.dsv4, op)
    torch.library.opcheck(overloads.default, (*fresh(arguments), workspace))
    if OPS[op].results:
        out = OPS[op].allocate(arguments)
        for tensor in out:
            tensor.zero_()
        torch.library.opcheck(overloads.out, (*arguments, *out, workspace))


@pytest.mark.parametrize("way", ["eager", "compiled", "inductor"])
def test_kernels_compute_in_it(way: str) -> None:
    """A largest magnitude of 2688 that is in the workspace beforehand comes out as the global scale 1."""
    ptx_folder()
    x = torch.ones(4, 32, dtype=BF16)
    workspace = torch.zeros(64, dtype=torch.uint8)

    def call(x: Tensor, workspace: Tensor) -> Tensor:
        return quantize_nvfp4_gpu_fused(x, workspace=workspace)[2]

    torch.compiler.reset()
    function = torch.compile(call, fullgraph=True) if way == "inductor" else WAYS[way](call)
    with emulated("sm_90a"):
        assert function(x, workspace).tolist() == [torch.tensor(1.0).div(2688).item()]
        assert not workspace.any()
        workspace[:4].view(torch.float32).fill_(2688.0)
        assert function(x, workspace).tolist() == [1.0]
        assert not workspace.any()


def test_a_workspace_grows_and_keeps_what_graphs_hold() -> None:
    workspace = Workspace("cpu", size=100)
    first = workspace.tensor
    assert (first.dtype, first.shape, first.device.type) == (torch.uint8, (100,), "cpu")
    assert workspace.reserve(100) is first
    grown = workspace.reserve(101)
    assert grown.numel() >= 101
    assert not grown.any()
    assert workspace.tensor is grown
    address = first.data_ptr()
    del first
    gc.collect()
    assert [tensor.data_ptr() for tensor in workspace._outgrown] == [address]
    hidden, weight = torch.zeros(64, 64, dtype=BF16), torch.zeros(512, 64, dtype=BF16)
    dense_router_decode(hidden, weight, None, 6, workspace=workspace)
    assert workspace.tensor.numel() >= _native.dense_router_decode_workspace_size(64, 512)
    assert Workspace("cpu").tensor.numel() >= _native.dense_router_decode_workspace_size(64, 512)


@pytest.mark.parametrize("size", [0, -1, 1.5, None, True])
def test_a_workspace_of_no_size_is_refused(size: Any) -> None:
    with pytest.raises(InvalidArgumentError, match=f"Workspace: size: expected a number of bytes from 1, got {size}"):
        Workspace("cpu", size=size)


def test_wrong_arguments_are_named_with_a_workspace_too() -> None:
    with pytest.raises(InvalidArgumentError, match="dense_router_decode: hidden: expected a dense tensor"):
        dense_router_decode(None, torch.zeros(8, 64, dtype=BF16), None, 2, workspace=Workspace("cpu"))  # type: ignore[arg-type]
    with pytest.raises(InvalidArgumentError, match="dense_router_decode: workspace: expected a dense tensor"):
        dense_router_decode(torch.zeros(1, 64, dtype=BF16), torch.zeros(8, 64, dtype=BF16), None, 2, workspace=7)  # type: ignore[arg-type]


def test_a_workspace_is_made_outside_of_inference_mode() -> None:
    with torch.inference_mode():
        assert not Workspace("cpu").tensor.is_inference()


def test_its_address_counts_as_fixed() -> None:
    from torch._dynamo import mark_static_address

    marked = torch.zeros(1)
    mark_static_address(marked)
    assert vars(Workspace("cpu").tensor) == vars(marked)


def test_router_passes_the_workspace_that_it_was_given(given: list[int | None]) -> None:
    workspace = Workspace("cpu")
    router = Router("dense", hidden_size=64, experts=8, top_k=2, workspace=workspace)
    router(torch.zeros(3, 64, dtype=BF16))
    assert given == [workspace.tensor.data_ptr()]
    assert "workspace" not in "".join(router.state_dict())
    with pytest.raises(InvalidArgumentError, match=r"Router: workspace: expected a .* or None, got Tensor"):
        Router("dense", hidden_size=64, experts=8, top_k=2, workspace=workspace.tensor)  # type: ignore[arg-type]


class Gate:
    """dense_router_decode on inputs of its own, with what it has to give."""

    def __init__(self, tokens: int = 8, experts: int = 256, seed: int = 0) -> None:
        random = torch.Generator().manual_seed(seed)
        hidden = torch.randn(tokens, 1024, generator=random)
        weight = torch.randn(experts, 1024, generator=random) / 32
        self.hidden, self.weight = hidden.to("cuda", BF16), weight.to("cuda", BF16)
        logits = self.hidden.cpu().double() @ self.weight.cpu().double().T
        scores = torch.nn.functional.softplus(logits).sqrt()
        self.scores, self.best = scores, scores.topk(6).values

    def __call__(self, workspace: Any = None) -> tuple[Tensor, Tensor]:
        return dense_router_decode(self.hidden, self.weight, None, 6, workspace=workspace)

    def check(self, result: tuple[Tensor, Tensor]) -> None:
        """The chosen experts' scores are the largest, and the weights theirs."""
        weights, ids = (tensor.cpu() for tensor in result)
        chosen = self.scores.gather(1, ids.long())
        torch.testing.assert_close(chosen, self.best, rtol=1e-5, atol=0)
        torch.testing.assert_close(weights.double(), chosen / chosen.sum(1, keepdim=True), rtol=1e-5, atol=0)


def capture(call: Callable[[], Any], graph: torch.cuda.CUDAGraph | None = None) -> tuple[torch.cuda.CUDAGraph, Any]:
    graph = graph or torch.cuda.CUDAGraph(keep_graph=True)
    with torch.cuda.graph(graph):
        result = call()
    graph.instantiate()
    return graph, result


def gate_call() -> Callable[[], Any]:
    return Gate()


def gate_call_with_a_workspace() -> Callable[[], Any]:
    return partial(Gate(), Workspace("cuda"))


def quantize_call() -> Callable[[], Any]:
    return partial(quantize_nvfp4_gpu_fused, torch.ones(64, 256, device="cuda"))


def router_call() -> Callable[[], Any]:
    router = Router("dense", hidden_size=1024, experts=256, top_k=6, device="cuda")
    return partial(router, torch.ones(8, 1024, dtype=BF16, device="cuda"))


def stash_call() -> Callable[[], Any]:
    stash = PagedStash({(BF16, 256): PoolSize(8)}, page_size=16)
    rows, count = torch.ones(100, 256, dtype=BF16, device="cuda"), torch.tensor([50], device="cuda")
    return lambda: stash.pop(stash.stash(rows, count))


# With the kernels of a call.
CAPTURED = [(gate_call, 1), (gate_call_with_a_workspace, 1), (quantize_call, 2), (router_call, 1), (stash_call, 2)]


@pytest.mark.gpu
@pytest.mark.parametrize(("make", "kernels"), CAPTURED)
def test_captured_graphs_hold_the_kernels_and_nothing_else(make: Callable[[], Callable[[], Any]], kernels: int) -> None:
    """No fill and no memset, also where the first call is captured, in the default mode, which forbids allocations."""
    graph, _ = capture(make())
    assert node_types(graph) == [KERNEL] * kernels


@pytest.mark.gpu
def test_a_fill_in_a_graph_is_seen() -> None:
    graph, _ = capture(lambda: torch.zeros(1 << 20, device="cuda"))
    assert len(node_types(graph)) == 1


def usage() -> tuple[int, int, int, int]:
    """Blocks of streams, of graphs, free ones; bytes of all."""
    return _native.workspace_usage(torch.cuda.current_device())


def no_graphs() -> None:
    """Waits until the blocks of earlier tests' graphs are free."""
    gc.collect()
    torch.cuda.synchronize()
    until(lambda: usage()[1] == 0)


@pytest.mark.gpu
def test_a_graph_gives_its_block_back() -> None:
    gate = Gate()
    gate()
    no_graphs()
    streams = usage()[0]
    blocks: set[tuple[int, int, int, int]] = set()
    for _ in range(5):  # captured anew: the same block each time
        graph, results = capture(lambda: [gate(), gate()])  # which two calls on one stream share
        assert usage()[:2] == (streams, 1)
        blocks.add(usage())
        graph.replay()
        torch.cuda.synchronize()
        for result in results:
            gate.check(result)
        graph.reset()
        no_graphs()
    assert len(blocks) == 1


@pytest.mark.gpu
def test_a_graph_that_is_destroyed_while_it_runs_keeps_its_block() -> None:
    """The next graph is captured and replayed meanwhile, and finds zeros."""
    gates = [Gate(seed=seed) for seed in (1, 2)]
    streams = [torch.cuda.Stream() for _ in gates]
    for gate in gates:
        gate()
    torch.cuda.synchronize()
    for _ in range(20):
        results = []
        for gate, stream in zip(gates, streams, strict=True):
            with torch.cuda.stream(stream):
                graph = torch.cuda.CUDAGraph()
                graph.capture_begin(capture_error_mode="thread_local")  # unlike torch.cuda.graph() waits for nothing
                result = [gate() for _ in range(200)]
                graph.capture_end()
                for _ in range(5):
                    graph.replay()
                graph.reset()
            results.append(result)
        torch.cuda.synchronize()
        for gate, result in zip(gates, results, strict=True):
            gate.check(result[-1])


@pytest.mark.gpu
def test_graphs_replay_beside_each_other_and_beside_calls() -> None:
    gates = [Gate(seed=seed) for seed in range(4)]
    streams = [torch.cuda.Stream() for _ in gates]
    graphs = [capture(gate) for gate in gates[:2]]
    torch.cuda.synchronize()
    eager: list[list[tuple[Tensor, Tensor]]] = [[], []]
    for _ in range(200):
        for i, (graph, _) in enumerate(graphs):
            with torch.cuda.stream(streams[i]):
                graph.replay()
        for i in (0, 1):
            with torch.cuda.stream(streams[2 + i]):
                eager[i].append(gates[2 + i]())
    torch.cuda.synchronize()
    for gate, (_, result) in zip(gates, graphs, strict=False):
        gate.check(result)
    for gate, results in zip(gates[2:], eager, strict=True):
        for result in results:
            gate.check(result)


@pytest.mark.gpu
def test_streams_of_one_capture_have_blocks_of_their_own() -> None:
    gates = [Gate(seed=seed) for seed in (5, 6)]
    beside = torch.cuda.Stream()

    def forked() -> list[tuple[Tensor, Tensor]]:
        main = torch.cuda.current_stream()
        beside.wait_stream(main)
        with torch.cuda.stream(beside):
            second = [gates[1]() for _ in range(20)]
        first = [gates[0]() for _ in range(20)]
        main.wait_stream(beside)
        return [*first, *second]

    no_graphs()
    graph, results = capture(forked)
    assert usage()[1] == 2
    for _ in range(50):
        graph.replay()
    torch.cuda.synchronize()
    for i, result in enumerate(results):
        gates[i // 20].check(result)


@pytest.mark.gpu
def test_an_abandoned_capture_gives_its_block_back() -> None:
    gate = Gate()
    no_graphs()

    def broken() -> None:
        gate()
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        capture(broken)
    no_graphs()
    gate.check(gate())


@pytest.mark.gpu
def test_many_streams_keep_few_blocks() -> None:
    """Of streams that come and go, and whose handles CUDA uses again."""
    gate = Gate()
    for _ in range(200):
        handle = ctypes.c_void_p()
        assert cudart().cudaStreamCreate(ctypes.byref(handle)) == 0
        with torch.cuda.stream(torch.cuda.ExternalStream(handle.value)):
            result = gate()
        assert cudart().cudaStreamDestroy(handle) == 0
    torch.cuda.synchronize()
    gate.check(result)
    assert usage()[0] <= 64


@pytest.mark.gpu
def test_threads_share_the_library() -> None:
    gates = [Gate(tokens=1 + 9 * i, seed=i) for i in range(6)]
    results: list[list[tuple[Tensor, Tensor]]] = [[] for _ in gates]

    def work(i: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            results[i].extend(gates[i]() for _ in range(200))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(gates))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.cuda.synchronize()
    for gate, got in zip(gates, results, strict=True):
        for result in got:
            gate.check(result)


@pytest.mark.gpu
def test_a_workspace_is_not_made_in_a_capture() -> None:
    refused: list[str] = []
    small = Workspace("cuda", size=64)
    gate = Gate()

    def call() -> None:
        for make in (lambda: Workspace("cuda"), lambda: gate(small)):
            with pytest.raises(InvalidArgumentError, match="expected memory allocated before the capture") as error:
                make()
            refused.append(str(error.value))
        gate()

    capture(call)
    assert str(dense_router_decode_workspace_size(8, 256)) in refused[1]


def as_function(name: str) -> tuple[Callable[..., Any], tuple[Tensor, ...]]:
    """An op as a function of a workspace and tensors, and those."""
    if name == "paged_stash_copy":
        given = [case.arguments("cuda") for case in all_cases() if case.op == name and not case.large]
        arguments = next(a for a in given if all(tensor.is_cuda for tensor in tensors_of(a)))  # without a host pool
        return caller(name, arguments), tensors_of(arguments)
    if name == "quantize_nvfp4_gpu_fused":
        return lambda workspace, x: quantize_nvfp4_gpu_fused(x, workspace=workspace), (torch.ones(64, 256).cuda(),)
    gate = Gate()

    def decode(workspace: Any, hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return dense_router_decode(hidden, weight, None, 6, workspace=workspace)

    return decode, (gate.hidden, gate.weight)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")  # torch's graph trees capture one to make their pool
@pytest.mark.parametrize("lent", [True, False])
@pytest.mark.parametrize("name", ["dense_router_decode", "quantize_nvfp4_gpu_fused", "paged_stash_copy"])
def test_reduce_overhead(name: str, lent: bool) -> None:
    """Graph trees find nothing in their pool but what they put there, and nothing keeps them from capturing."""
    from torch._dynamo import mark_static_address
    from torch._dynamo.utils import counters
    from torch._inductor import config

    assert config.triton.slow_path_cudagraph_asserts  # check_memory_pool
    function, tensors = as_function(name)
    workspace = None if lent else Workspace("cuda")
    by_graph = fresh(tensors)
    for tensor in by_graph:
        mark_static_address(tensor)  # else graph trees leave alone what changes its arguments
    torch.compiler.reset()
    counters.clear()
    compiled = torch.compile(function, mode="reduce-overhead", fullgraph=True)
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        for tensor, value in zip(by_graph, tensors, strict=True):
            tensor.copy_(value)
        by_call = fresh(tensors)
        results = [tensor.view(torch.uint8).clone() for tensor in compiled(workspace, *by_graph)]
        expected = [tensor.view(torch.uint8) for tensor in function(None, *by_call)]
        for got, wanted in zip([*results, *by_graph], [*expected, *by_call], strict=True):
            assert same_bits(got, wanted)
    assert counters["inductor"]["cudagraph_skips"] == 0
    if workspace is not None:
        assert not workspace.tensor.any()
