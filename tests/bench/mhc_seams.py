"""Times the seams of hyper-connections against their targets on one H200, by replays of a graph.

    python -m tests.bench.mhc_seams FILE

Cold: inputs and fn in turn from more memory than the L2 cache holds, as in a forward pass. Warm: one set of inputs.
Exit status 1 if a target is missed. Needs a GPU.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv4_kernels.cases import Case, all_cases
from dsv4_kernels.cli.bench import measure
from dsv4_kernels.cli.machine import describe
from dsv4_kernels.cli.timing import Ceilings, ceilings


@dataclass(frozen=True)
class Target:
    """microseconds: at most. bandwidth: at least this part of a copy's, of the fewest bytes that must move."""

    op: str
    preset: str
    tokens: int
    microseconds: float | None = None
    bandwidth: float | None = None

    def case(self) -> Case:
        wanted = {"preset": self.preset, "tokens": self.tokens}
        (found,) = (c for c in all_cases() if c.op == self.op and c.benched and wanted.items() <= c.labels.items())
        return found

    def judge(self, row: dict[str, Any], best: Ceilings) -> dict[str, Any]:
        """The row with what was reached of the target."""
        if "cold_us" not in row:
            return row | {"met": False}
        if self.microseconds is not None:
            return row | {"target_us": self.microseconds, "met": row["cold_us"] <= self.microseconds}
        reached = row["moved_bytes"] / (row["cold_us"] / 1e6) / best.copy_bandwidth
        return row | {"of_copy": reached, "target_of_copy": self.bandwidth, "met": reached >= (self.bandwidth or 0)}


SEAM, POST, HEAD = "hyper_connection_post_pre", "hyper_connection_post", "hyper_connection_head"
TARGETS = (
    Target(SEAM, "v4-flash", 1, microseconds=6.5),
    Target(SEAM, "v4-pro", 1, microseconds=8.5),
    Target(SEAM, "v4-flash", 16, microseconds=8.0),
    Target(SEAM, "v4-pro", 16, microseconds=11.0),
    Target(SEAM, "v4-flash", 64, microseconds=8.0),
    Target(SEAM, "v4-pro", 64, microseconds=11.0),
    *(Target(SEAM, preset, 8192, bandwidth=0.85) for preset in ("v4-flash", "v41-flash", "v4-pro")),
    *(Target(op, preset, 8192, bandwidth=0.93) for op in (POST, HEAD) for preset in ("v4-flash", "v4-pro")),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json", type=Path)
    options = parser.parse_args()
    best = ceilings("cuda")
    rows = []
    for target in TARGETS:
        rows.append(target.judge(measure(target.case(), "cuda", best, with_compile=False), best))
        print(json.dumps(rows[-1]), flush=True)
    report = {"machine": describe("cuda"), "copy_bandwidth": best.copy_bandwidth, "rows": rows}
    options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0 if all(row["met"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
