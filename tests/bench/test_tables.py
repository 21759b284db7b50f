from __future__ import annotations

from tests.bench import tables


def test_readme_shows_the_recorded_results() -> None:
    text = tables.README.read_text()
    table = tables.figures(tables.read(tables.DEVICE, "peers.json"))
    assert tables.readme_with(text, table) == text, "run python -m tests.bench.tables"


def test_benchmarks_page_shows_the_recorded_results() -> None:
    assert tables.BENCHMARKS.read_text() == tables.benchmarks(), "run python -m tests.bench.tables"


def test_a_changed_time_changes_the_readme() -> None:
    report = tables.read(tables.DEVICE, "peers.json")
    before = tables.figures(report)
    op, case = next(iter(tables.FIGURES))
    (row,) = (row for row in report["rows"] if (row["op"], row["case"]) == (op, case))
    row["us"] += 7
    assert tables.figures(report) != before
    assert tables.peers_of(row) not in tables.benchmarks()


def test_a_faster_peer_is_bold_and_the_fastest_comes_first() -> None:
    row = {"us": 10.04, "peers": {"slower": 1234.56, "equal": 10.04, "faster": 9.999}}
    assert tables.peers_of(row) == "faster **10.0**, equal 10.0, slower 1235"
    assert tables.peers_of(row, 1) == "faster **10.0**"
