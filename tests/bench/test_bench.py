"""The benchmark keeps what it has measured when a row fails, and every row's baseline can be captured."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from dsv4_kernels.cases import Case, all_cases, composites
from dsv4_kernels.cli import bench
from dsv4_kernels.cli.timing import Ceilings

BENCHED = [*(case for case in all_cases() if case.benched), *composites()]


def small_case(op: str) -> Case:
    cases = [case for case in BENCHED if case.op == op and not case.large]
    return min(cases, key=lambda case: case.baseline.moved_bytes(*case.arguments("cpu")))


def refuse(*_: Any) -> Any:
    raise RuntimeError("operation not permitted when stream is capturing")


@pytest.fixture
def options(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> argparse.Namespace:
    monkeypatch.setattr(bench, "ceilings", lambda device: Ceilings(1e10, 0.0))
    monkeypatch.setattr(bench, "call_costs", dict)
    monkeypatch.setattr(bench, "composites", list)
    file = str(tmp_path / "bench.json")
    return argparse.Namespace(device="cpu", op=None, no_compile=True, json=file, plot=None)


def report_of(options: argparse.Namespace, cases: list[Case], monkeypatch: pytest.MonkeyPatch) -> tuple[int, Any]:
    monkeypatch.setattr(bench, "all_cases", lambda: cases)
    status = bench.run(options)
    return status, json.loads(Path(options.json).read_text())


def test_a_run_that_is_stopped_leaves_its_rows(options: argparse.Namespace, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = bench.measure

    def stop_at_the_second(case: Case, *rest: Any) -> dict[str, Any]:
        if case.op == "moe_sort":
            raise KeyboardInterrupt
        return measured(case, *rest)

    monkeypatch.setattr(bench, "measure", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        report_of(options, [small_case("hash_router"), small_case("moe_sort")], monkeypatch)
    assert [row["op"] for row in json.loads(Path(options.json).read_text())["rows"]] == ["hash_router"]


def test_a_baseline_that_fails_costs_its_own_time_only(
    options: argparse.Namespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failing, sound = small_case("hash_router"), small_case("moe_sort")
    failing = dataclasses.replace(failing, baseline=dataclasses.replace(failing.baseline, run=refuse))
    status, report = report_of(options, [failing, sound], monkeypatch)
    first, second = report["rows"]
    text = "RuntimeError: operation not permitted when stream is capturing"
    assert status == 1
    assert first["failed"] == {"torch_eager_us": text}
    assert first["warm_us"] > 0
    assert "torch_eager_us" not in first
    assert "failed" not in second
    assert second["torch_eager_us"] > 0
    printed = capsys.readouterr()
    assert "1 of 2 rows failed" in printed.err
    assert text.split(": ")[1][:20] in printed.out


def test_an_op_or_inputs_that_fail_cost_no_other_row(
    options: argparse.Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_inputs = dataclasses.replace(small_case("hash_router"), make=refuse)
    refused = small_case("moe_sort")
    ids, *rest = refused.make(torch.Generator())
    refused = dataclasses.replace(refused, make=lambda generator: (ids[0], *rest))
    status, report = report_of(options, [without_inputs, refused, small_case("append")], monkeypatch)
    first, second, third = report["rows"]
    assert status == 1
    assert list(first["failed"]) == ["inputs"]
    assert second["failed"]
    assert "failed" not in third
    assert third["warm_us"] > 0


def test_success_is_said_so(options: argparse.Namespace, monkeypatch: pytest.MonkeyPatch) -> None:
    status, report = report_of(options, [small_case("hash_router")], monkeypatch)
    assert status == 0
    assert "failed" not in report["rows"][0]


@pytest.mark.gpu
@pytest.mark.parametrize("case", BENCHED, ids=lambda case: case.id)
def test_a_baseline_can_be_captured(case: Case) -> None:
    """As bench does: once outside, then in a graph."""
    arguments = case.arguments("cuda")
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        case.baseline.run(*arguments)
        stream.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            case.baseline.run(*arguments)
        graph.replay()
        stream.synchronize()
