"""Says how many tests were skipped, and of how many: a run that skips all is no run.

python ci/count_skipped.py JUNIT_XML...
"""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ElementTree


def main(reports: list[str]) -> None:
    suites = [suite for report in reports for suite in ElementTree.parse(report).iter("testsuite")]
    total, skipped = (sum(int(suite.get(count, "0")) for suite in suites) for count in ("tests", "skipped"))
    print(f"skipped tests: {skipped} of {total}")


if __name__ == "__main__":
    main(sys.argv[1:])
