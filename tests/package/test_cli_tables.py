"""What the commands print fits a terminal of 80 columns, with whole names."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from dsv4_kernels.cli.tables import add_ops, op_table
from dsv4_kernels.op_table import OPS
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
