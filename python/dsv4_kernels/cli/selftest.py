"""Check every op against float64 on the device at hand.

Runs each op's cases with the kernels of this device (on the CPU without one), from poisoned outputs and fixed seeds,
and twice: the second run must give the same bits. Exit status 0 if every case passes.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from rich.console import Console
from rich.progress import track

from dsv4_kernels.cases import Case, all_cases, same_bits, to_cpu
from dsv4_kernels.cli.machine import default_device, describe, image_for
from dsv4_kernels.cli.tables import add_ops, op_table
from dsv4_kernels.ops import OPS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda if there is one)")
    parser.add_argument("--op", action="append", help="only the cases of this op; may be given several times")
    parser.add_argument(
        "--check-on-cpu", action="store_true", help="keep plain torch off the device: under a sanitizer, say"
    )
    parser.add_argument("--json", metavar="FILE", help="also write results to this file; - for standard output")


def run(options: argparse.Namespace) -> int:
    """Runs the command; returns the exit status."""
    device = options.device or default_device()
    cases = [case for case in all_cases() if not case.large and (not options.op or case.op in options.op)]
    if not cases:
        print(f"selftest: no op named {', '.join(options.op)}")
        return 2
    console = Console(stderr=options.json == "-")
    results = [
        check(case, device, options.check_on_cpu) for case in track(cases, "checking", console=console, transient=True)
    ]
    failed = [result for result in results if not result["passed"]]
    report = {"machine": describe(device), "passed": not failed, "results": results}
    if options.json == "-":
        print(json.dumps(report, indent=1))
    elif options.json:
        with open(options.json, "w") as file:  # noqa: PTH123
            json.dump(report, file, indent=1)
    print_report(console, report)
    return 1 if failed else 0


def check(case: Case, device: str, check_on_cpu: bool) -> dict[str, Any]:
    """One case as a JSON row."""
    row: dict[str, Any] = {"op": case.op, "case": case.name, "image": image_for(case.op, device)}
    try:
        arguments = case.arguments(device)
        first, second = case.run(arguments), case.run(arguments)
        same = all(same_bits(a, b) for a, b in zip(first, second, strict=True))
        verdict = case.baseline.verdict(to_cpu(arguments) if check_on_cpu else arguments, first)
    except Exception as error:  # a selftest reports what fails, whatever it is
        return row | {"passed": False, "error": None, "limit": None, "what": f"{type(error).__name__}: {error}"}
    what = verdict.what if same else "two runs differ"
    return row | {"passed": verdict.passed and same, "error": verdict.error, "limit": verdict.limit, "what": what}


def print_report(console: Console, report: dict[str, Any]) -> None:
    """A line for each op, and one for each case that failed."""
    of_op: dict[str, list[dict[str, Any]]] = {}
    for result in report["results"]:
        of_op.setdefault(result["op"], []).append(result)

    def cells(op: str) -> list[str]:
        rows = of_op[op]
        measured = [row for row in rows if row["error"] is not None]
        worst = max(
            measured, key=lambda row: row["error"] / row["limit"] if row["limit"] else row["error"], default=None
        )
        text = f"{worst['error']:.1e} / {worst['limit']:.1e} ({worst['what']})" if worst else "-"
        verdict = "[green]pass" if all(row["passed"] for row in rows) else "[red]FAIL"
        return [rows[0]["image"], text, str(len(rows)), verdict]

    table = op_table(f"selftest on {report['machine']['device']}", ["image", "worst error / limit"], ["cases", ""])
    add_ops(table, {op: OPS[op].family for op in of_op}, cells)
    console.print(table)
    for row in report["results"]:
        if not row["passed"]:
            console.print(
                f"[red]FAIL[/] {row['op']}[{row['case']}]: {row['what']}: {row['error']} > {row['limit']}", markup=True
            )
