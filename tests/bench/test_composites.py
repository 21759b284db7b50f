from __future__ import annotations

import pytest
from dsv4_kernels.cases import Composite, composites
from dsv4_kernels.cli.bench import measure
from dsv4_kernels.cli.timing import Ceilings

SMALL = [case for case in composites() if case.labels["tokens"] <= 128]


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.id)
def test_what_is_timed_is_right(case: Composite) -> None:
    arguments = case.arguments("cpu")
    results = case.function(*arguments)
    verdict = case.baseline.verdict(arguments, results)
    assert verdict.passed, verdict


def test_a_composite_has_a_row() -> None:
    row = measure(SMALL[0], "cpu", Ceilings(1e10, 0.0), with_compile=False)
    assert row["op"] == "dense_router_prefill"
    assert row["warm_us"] > 0
    assert row["torch_eager_us"] > 0
