"""Times work on a device, and what the device could do at best."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch

COPY_BYTES = 1 << 30  # of the copy whose bandwidth is the ceiling; far beyond any cache
GRAPH_CALLS = 50  # calls in one captured graph
GRAPH_SECONDS = 0.01  # which a graph takes at most, but for one call of each function
REPEATS = 15


@dataclass(frozen=True)
class Ceilings:
    """copy_bandwidth: bytes per second, read plus written. launch: seconds per launch of an empty kernel."""

    copy_bandwidth: float
    launch: float

    def floor(self, moved_bytes: int) -> float:
        """Seconds that no launch moving these bytes can beat."""
        return moved_bytes / self.copy_bandwidth + self.launch


@cache
def ceilings(device: str) -> Ceilings:
    """Measured once a process."""
    size = COPY_BYTES if device != "cpu" else COPY_BYTES >> 3
    source = torch.randint(256, (size,), dtype=torch.uint8, device=device).view(torch.float32)
    target = torch.empty_like(source)
    # By the copy engine's way and by a kernel's: which is faster differs between devices.
    ways = [lambda: target.copy_(source), lambda: torch.neg(source, out=target)]
    copy = min(seconds_per_call([way], device, calls=4) for way in ways)
    one = torch.ones(1, device=device, dtype=torch.float32)
    launch = seconds_per_call([lambda: one.add_(1)], device) if device != "cpu" else 0.0
    return Ceilings(2 * size / copy, launch)


def seconds_per_call(functions: Sequence[Callable[[], object]], device: str, calls: int = GRAPH_CALLS) -> float:
    """Median time of one call. Several functions, each with inputs of its own, are called in turn."""
    turn = [functions[i % len(functions)] for i in range(max(calls, len(functions)))]
    if device == "cpu":
        return _median([_host_seconds(turn[:3]) / 3 for _ in range(3)])
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        for function in turn[: len(functions)]:
            function()  # loads and tunes outside the capture
        stream.synchronize()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record(stream)
        turn[0]()
        end.record(stream)
        end.synchronize()
        fitting = int(GRAPH_SECONDS / max(start.elapsed_time(end) / 1e3, 1e-6))
        turn = turn[: max(fitting, len(functions))]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for function in turn:
                function()
        graph.replay()
        times = []
        for _ in range(REPEATS):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record(stream)
            graph.replay()
            end.record(stream)
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3 / len(turn))
    return _median(times)


def host_seconds_per_call(function: Callable[[], object], calls: int = 2000) -> float:
    """Time that the host spends in one call: the least of several runs, since what disturbs a run only adds."""
    turn = [function] * calls
    return min(_host_seconds(turn) for _ in range(REPEATS)) / calls


def _host_seconds(functions: Sequence[Callable[[], object]]) -> float:
    started = time.perf_counter()
    for function in functions:
        function()
    return time.perf_counter() - started


def _median(times: list[float]) -> float:
    return statistics.median(times)
