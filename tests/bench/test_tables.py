from __future__ import annotations

from tests.bench import tables


def test_documents_show_the_recorded_results() -> None:
    assert tables.README.read_text() == tables.readme(), "run python -m tests.bench.tables"
    assert tables.VERIFIED.read_text() == tables.verified(), "run python -m tests.bench.tables"


def test_a_table_is_replaced_between_its_marks() -> None:
    text = "a\n<!-- t -->\nold\n<!-- end of t -->\nb"
    assert tables.replaced(text, "t", "new\n") == "a\n<!-- t -->\nnew\n<!-- end of t -->\nb"


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
