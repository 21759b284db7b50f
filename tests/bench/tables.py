"""The README's table of times, made from the recorded results.

    python tests/bench/readme_table.py          writes it between the markers in README.md

tests/bench/test_readme_table.py fails while README and results differ.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "tests" / "bench" / "results" / "h100" / "bench.json"
BEGIN, END = "<!-- times -->\n", "<!-- end of times -->"


HEADER = ["| op | case | floor | warm | cold | torch.compile | torch eager |", "|---|---|---|---|---|---|---|"]
TIMES = ("floor_us", "warm_us", "cold_us", "torch_compile_us", "torch_eager_us")


def table(report: dict[str, Any]) -> str:
    """Markdown: for each family a folded table with a row for each benched case."""
    machine = report["machine"]
    lines = [
        f"Microseconds on one {machine['device']} (driver {machine['driver']}, torch {machine['torch']}); copy "
        f"{report['copy_bandwidth'] / 1e12:.2f} TB/s, empty kernel {report['launch_us']:.2f} us:",
        "",
    ]
    for family in dict.fromkeys(row["family"] for row in report["rows"]):
        lines += [f"<details><summary>{family}</summary>", "", *HEADER]
        for row in report["rows"]:
            if row["family"] == family:
                times = " | ".join(f"{row[name]:.1f}" if name in row else "" for name in TIMES)
                lines.append(f"| `{row['op']}` | {row['case']} | {times} |")
        lines += ["", "</details>", ""]
    costs = ", ".join(f"{name} {cost:.2f}" for name, cost in report["calls_us"].items())
    lines += [f"What the host spends on a call apart from its launch, in microseconds: {costs}."]
    return "\n".join(lines) + "\n"


def readme_with(text: str, new_table: str) -> str:
    """The README with the table between its markers replaced."""
    before, rest = text.split(BEGIN)
    return before + BEGIN + new_table + END + rest.split(END)[1]


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(readme_with(readme.read_text(), table(json.loads(RESULTS.read_text()))))
