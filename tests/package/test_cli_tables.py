"""What the commands print fits a terminal of 80 columns, with whole names."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from dsv4_kernels import info
from dsv4_kernels.cli import bench, demo
from dsv4_kernels.cli.tables import add_ops, op_table
from dsv4_kernels.ops import OPS
from rich.console import Console

pytestmark = pytest.mark.torch


def printed(*arguments: str) -> list[str]:
    command = [sys.executable, "-m", "dsv4_kernels", *arguments]
    done = subprocess.run(command, env=os.environ | {"COLUMNS": "80"}, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def test_info_names_every_op_whole() -> None:
    lines = printed("info")
    assert max(map(len, lines)) <= 80
    assert set(OPS) <= {line.split()[0] for line in lines if line.split()}


def test_selftest_names_every_op_whole() -> None:
    longest = max(OPS, key=len)
    lines = printed("selftest", "--device", "cpu", "--op", longest)
    assert max(map(len, lines)) <= 80
    assert longest in {line.split()[0] for line in lines if line.split()}


def test_ops_stand_under_their_families() -> None:
    console = Console(width=80, record=True)
    table = op_table("title", ["words"], ["number"])
    add_ops(table, {"b": "moe", "a": "router", "c": "moe"}, lambda op: [f"words of {op}", "1"])
    console.print(table)
    firsts = [line.split()[0] for line in console.export_text().splitlines()]
    assert firsts == ["title", "op", "router", "a", "moe", "b", "c"]


def test_info_names_the_fix_where_ops_would_refuse() -> None:
    error = info()["device_error"]
    lines = " ".join(" ".join(printed("info")).split())
    assert ("R580" in lines and "CPU tensors" in lines) if error else "device: ready" in lines


LONGEST = max(OPS, key=len)


def test_demo_ends_with_what_was_shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    step = {"layer": "dense", "op": LONGEST, "image": "cuda sm_90a", "device": "cuda", "time_us": 1.0, "floor_us": 1.0}
    right = step | {"worst_error": 0.0, "passed": True, "what": "ids"}
    wrong = right | {"passed": False}
    demo.print_report({"preset": "v4-pro", "tokens": 7, "machine": {"device": "some"}, "steps": [right, wrong, right]})
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert LONGEST in " ".join(lines).split()
    shown = " ".join(lines)
    shown = shown[shown.index("Shown: ") :]
    assert "v4-pro layer" in shown
    assert "7 tokens; 2 of 3 results are right" in shown
    assert shown.rstrip().endswith("float64.")


def test_bench_names_every_op_whole() -> None:
    console = Console(width=80, record=True, quiet=False)
    row = {"op": LONGEST, "case": "v4-flash, 8192 tokens, float32", "family": OPS[LONGEST].family}
    times = dict.fromkeys(("floor_us", "warm_us", "cold_us", "torch_eager_us", "torch_compile_us"), 1234.5)
    report = {
        "machine": {"device": "some"},
        "copy_bandwidth": 3e12,
        "launch_us": 1.0,
        "rows": [row | times],
        "calls_us": {},
    }
    bench.print_report(console, report)
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= 80
    assert LONGEST in " ".join(lines).split()
