"""Time ops against their floor and against plain torch.

The floor of a case is the time to move its fewest bytes at the bandwidth of a large copy, plus that of a kernel that
does nothing; both are measured first, in the same run. Every op is timed by replays of a captured graph, on random
inputs: "cold" takes inputs in turn that together exceed the L2 cache, "warm" one set. Baselines do the same work in
the same run: torch eager, captured too, and torch.compile. Host cost of a call is timed apart.

What fails while it is timed is reported with its error; everything else is timed and kept, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from dsv4_kernels.cases import Case, Composite, all_cases, composites, fresh
from dsv4_kernels.cli.call_costs import call_costs
from dsv4_kernels.cli.machine import default_device, describe, image_for
from dsv4_kernels.cli.timing import Ceilings, ceilings, seconds_per_call
from dsv4_kernels.ops import OPS

COLD_BYTES = 256 << 20  # of inputs taken in turn: several times the largest L2
MAX_SETS = 50


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    parser.add_argument(
        "--device", help="cuda or cuda:N; cpu times the CPU implementations (default: cuda if there is one)"
    )
    parser.add_argument("--op", action="append", help="only this op; may be given several times")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--json", metavar="FILE", help="also write results to this file")
    parser.add_argument("--plot", metavar="FILE", help="also draw time over floor to this file (needs matplotlib)")


def run(options: argparse.Namespace) -> int:
    """Runs the command; returns the exit status: 1 if something failed while it was timed."""
    device = options.device or default_device()
    benched = [*(case for case in all_cases() if case.benched), *composites()]
    cases = [case for case in benched if not options.op or case.op in options.op]
    cases = [case for case in cases if device != "cpu" or not case.large]
    if not cases:
        print(f"bench: no op named {', '.join(options.op)}")
        return 2
    console = Console()
    best = ceilings(device)
    rows: list[dict[str, Any]] = []
    report = {
        "machine": describe(device),
        "copy_bandwidth": best.copy_bandwidth,
        "launch_us": best.launch * 1e6,
        "rows": rows,
        "calls_us": call_costs(),
    }
    for case in track(cases, "timing", console=console, transient=True):
        rows.append(measure(case, device, best, not options.no_compile))
        if options.json:  # after every row: a run that is stopped leaves what it has measured
            Path(options.json).write_text(json.dumps(report, indent=1) + "\n")
    if options.plot:
        plot(report, Path(options.plot))
    print_report(console, report)
    failed = sum("failed" in row for row in rows)
    if failed:
        print(f"bench: {failed} of {len(rows)} rows failed", file=sys.stderr)
    return 1 if failed else 0


def measure(case: Case, device: str, best: Ceilings, with_compile: bool) -> dict[str, Any]:
    """One case as a JSON row; times in microseconds. `failed` holds the error of each time that could not be taken."""
    row: dict[str, Any] = {"family": family_of(case), "op": case.op, "case": case.name, **case.labels}
    failed: dict[str, str] = {}

    def timed(name: str, calls: Callable[[], Sequence[Callable[[], object]]]) -> None:
        try:
            row[name] = seconds_per_call(calls(), device) * 1e6
        except Exception as error:  # a row reports what fails, whatever it is, and the others go on
            failed[name] = f"{type(error).__name__}: {error}"

    try:
        first = case.arguments(device)
        set_bytes = sum(a.numel() * a.element_size() for a in first if isinstance(a, torch.Tensor))
        count = max(1, min(MAX_SETS, COLD_BYTES // max(set_bytes, 1))) if device != "cpu" else 1
        sets = [first] + [fresh(first) for _ in range(count - 1)]
        moved_bytes, plain = case.baseline.moved_bytes(*first), case.baseline.run
        row["image"] = "several" if isinstance(case, Composite) else image_for(case.op, device)
        row["moved_bytes"], row["floor_us"] = moved_bytes, best.floor(moved_bytes) * 1e6
        row["cold_sets"] = len(sets)
    except Exception as error:
        return row | {"failed": {"inputs": f"{type(error).__name__}: {error}"}}
    timed("warm_us", lambda: calls_of(case, sets[:1]))
    timed("cold_us", lambda: calls_of(case, sets))
    timed("torch_eager_us", lambda: [lambda: plain(*first)])
    if with_compile:
        compiled = torch.compile(plain)
        timed("torch_compile_us", lambda: [lambda: compiled(*first)])
    return row | ({"failed": failed} if failed else {})


def family_of(case: Case) -> str:
    """The folder of the op, or of the function made of several."""
    return case.function.__module__.split(".")[1] if isinstance(case, Composite) else OPS[case.op].family


def calls_of(case: Case, sets: Sequence[tuple[Any, ...]]) -> list[Callable[[], object]]:
    """A call on each set of inputs, into outputs of its own."""
    if isinstance(case, Composite):
        return [partial(case.function, *arguments) for arguments in sets]
    op = OPS[case.op]

    def call(arguments: tuple[Any, ...]) -> Callable[[], object]:
        out = op.allocate(arguments)
        workspace = None
        if op.workspace_size is not None:
            size = op.workspace_bytes(arguments)
            workspace = torch.zeros(size, dtype=torch.uint8, device=arguments[0].device)
        return lambda: op(arguments, out, workspace)

    return [call(arguments) for arguments in sets]


def print_report(console: Console, report: dict[str, Any]) -> None:
    """Times, floors and ratios."""
    device = report["machine"]["device"]
    console.print(
        f"{device}: copy {report['copy_bandwidth'] / 1e12:.2f} TB/s, empty kernel {report['launch_us']:.2f} us",
        highlight=False,
    )
    # An op's name on a line of its own, so that cases have room.
    table = Table(title="microseconds per call", box=None, padding=(0, 1, 0, 0))
    table.add_column("op and case", overflow="fold")
    for name in ("floor", "warm", "cold", "x floor", "eager", "compile"):
        table.add_column(name, justify="right", no_wrap=True)
    op = None
    for row in report["rows"]:
        if row["op"] != op:
            op = row["op"]
            table.add_row(f"[bold]{op}")
        ratio = f"{row['cold_us'] / row['floor_us']:.2f}" if "cold_us" in row else "-"
        times = [f"{row[name]:.2f}" if name in row else "-" for name in ("floor_us", "warm_us", "cold_us")]
        baselines = [f"{row[name]:.1f}" if name in row else "-" for name in ("torch_eager_us", "torch_compile_us")]
        table.add_row(f" {row['case']}", *times, ratio, *baselines)
    console.print(table)
    for row in report["rows"]:
        for name, error in row.get("failed", {}).items():
            console.print(f"FAILED {row['op']}[{row['case']}]: {name}: {error}", markup=False, style="red")
    for name, cost in report["calls_us"].items():
        console.print(f"host cost of a call without its launch, {name}: {cost:.2f} us", highlight=False)


def plot(report: dict[str, Any], path: Path) -> None:
    """Bars: the time of each op's largest case and its baselines', over the floor; of cases that could be timed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = []
    timed = [row for row in report["rows"] if "cold_us" in row]
    for op in dict.fromkeys(row["op"] for row in timed):
        rows.append(max((row for row in timed if row["op"] == op), key=lambda row: row["moved_bytes"]))
    figure, axes = plt.subplots(figsize=(9, 1 + 0.35 * len(rows)))
    series = [("cold_us", "dsv4-kernels"), ("torch_compile_us", "torch.compile"), ("torch_eager_us", "torch eager")]
    for offset, (key, label) in enumerate(series):
        positions = [i + 0.25 * (offset - 1) for i in range(len(rows))]
        axes.barh(positions, [row.get(key, 0) / row["floor_us"] for row in rows], height=0.22, label=label)
    axes.set_yticks(range(len(rows)), [f"{row['op']}  {row['case']}" for row in rows])
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel(f"time / floor on {report['machine']['device']} (1 is as fast as the memory allows)")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
