from __future__ import annotations

from tests.bench import tables


def test_readme_shows_the_recorded_results() -> None:
    device = tables.devices()[0]
    table = tables.figures(tables.read(device, "bench.json"), tables.read(device, "moe_layers.json"))
    text = tables.README.read_text()
    assert tables.readme_with(text, table) == text, "run python -m tests.bench.tables"


def test_benchmarks_page_shows_the_recorded_results() -> None:
    assert tables.BENCHMARKS.read_text() == tables.benchmarks(), "run python -m tests.bench.tables"


def test_a_changed_time_changes_both_tables() -> None:
    device = tables.devices()[0]
    report, layers = tables.read(device, "bench.json"), tables.read(device, "moe_layers.json")
    before = tables.figures(report, layers)
    op, case = next(iter(tables.FIGURES))
    (row,) = (row for row in report["rows"] if (row["op"], row["case"]) == (op, case))
    row["cold_us"] += 7
    assert tables.figures(report, layers) != before
    assert tables.times_of(row) not in tables.benchmarks()
