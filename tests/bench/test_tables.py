from __future__ import annotations

import json

from tests.bench.readme_table import RESULTS, ROOT, readme_with, table


def test_readme_shows_the_recorded_results() -> None:
    text = (ROOT / "README.md").read_text()
    assert readme_with(text, table(json.loads(RESULTS.read_text()))) == text, "run tests/bench/readme_table.py"
