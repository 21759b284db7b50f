"""Does the test suite notice faults? Plants those of faults.toml one at a time in a copy of the checkout.

    python -m tests.mutation --list
    python -m tests.mutation [NAME ...] [--python-only] [--build FOLDER] [--json FILE]

Each fault is planted, the library built for sm_90a if the fault is in compiled code (the first build takes as long as
any, the others build what has changed), and its tests are run until one fails: first the narrow ones that faults.toml
names, then the family's. Results: noticed, survived, or broken where the fault could not be planted or no test ran.
Exit status 0 if every fault is noticed or may survive by faults.toml.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.mutation.planting import Copy, Fault, read_faults


def main() -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutation", description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="only these faults (default: all)")
    parser.add_argument("--list", action="store_true", help="show the faults and stop")
    parser.add_argument("--python-only", action="store_true", help="only faults that need no build")
    parser.add_argument(
        "--build",
        metavar="FOLDER",
        help="keep the copy and its build here for later runs (default: a temporary one)",
    )
    parser.add_argument(
        "--build-python", metavar="FILE", default=os.environ.get("DSV4_TEST_BUILD_PYTHON", sys.executable)
    )
    parser.add_argument("--narrow", action="store_true", help="only the tests that a fault names, not the family's")
    parser.add_argument(
        "--timeout", type=float, default=1800, help="seconds for one run of tests; what takes longer is broken"
    )
    parser.add_argument("--json", metavar="FILE", help="also write the results to this file, after every fault")
    options = parser.parse_args()
    faults = read_faults()
    unknown = set(options.names) - {fault.name for fault in faults}
    if unknown:
        parser.error(f"no fault is named {', '.join(sorted(unknown))}; see --list")
    faults = [fault for fault in faults if not options.names or fault.name in options.names]
    faults = [fault for fault in faults if not (options.python_only and fault.is_compiled)]
    if options.list:
        for fault in faults:
            print(f"{fault.name:24} {fault.kind:38} {fault.file}: {fault.what}")
        return 0
    with tempfile.TemporaryDirectory(prefix="dsv4-mutation-") as temporary:
        folder = Path(options.build or temporary).resolve()
        copy = Copy(folder / "checkout", folder / "build", options.build_python)
        if any(fault.is_compiled for fault in faults):
            print("building without a fault", flush=True)
            failure = copy.build_without_fault()
            if failure:
                print(failure)
                return 2
        results = []
        for fault in faults:
            results.append(measured(copy, fault, options))
            print(line_of(results[-1]), flush=True)
            if options.json:
                Path(options.json).write_text(json.dumps({"score": score(results), "faults": results}, indent=1) + "\n")
    print(summary(results))
    accepted = [r["result"] == "noticed" or (r["result"] == "survived" and r["may_survive"]) for r in results]
    return 0 if all(accepted) else 1


def measured(copy: Copy, fault: Fault, options: argparse.Namespace) -> dict[str, Any]:
    """Plants one fault, runs its tests, restores the file; a row of the report."""
    row = {"name": fault.name, "class": fault.kind, "file": fault.file, "what": fault.what}
    row["may_survive"] = fault.may_survive
    path, started = copy.folder / fault.file, time.monotonic()
    original = path.read_text()
    try:
        path.write_text(fault.planted_in(original))
        result, by = noticed_by(copy, fault, options)
    except ValueError as error:
        result, by = "broken", str(error)
    finally:
        path.write_text(original)
        if fault.is_compiled:  # the next fault may be in Python
            copy.restore()
    test = by.removeprefix("FAILED ").split(" - ")[0]
    if result == "noticed" and by.startswith("FAILED ") and copy.run(test, timeout=options.timeout)[0] != "passed":
        result, by = "broken", f"fails without the fault too: {test}"
    return row | {"result": result, "by": by, "seconds": round(time.monotonic() - started)}


def noticed_by(copy: Copy, fault: Fault, options: argparse.Namespace) -> tuple[str, str]:
    """The result for a fault that is planted, and the first test that failed."""
    if fault.is_compiled and copy.built():
        return "noticed", "the build"
    # A fault in Python shows on the CPU in most cases; the kernels take the longest.
    runs = [(tests, fault.is_compiled) for tests in fault.tests]
    if not options.narrow:
        runs.append((fault.family_tests, True))
    for tests, emulated in runs:
        outcome, first = copy.test(tests, options.timeout, emulated)
        if outcome != "passed":
            return ("noticed" if outcome == "failed" else "broken"), first
    return "survived", ""


def line_of(row: dict[str, Any]) -> str:
    """A row as a line."""
    by = row["by"].removeprefix("FAILED ").split(" - ")[0].replace("\n", " ")
    return f"{row['result']:9} {row['name']:24} {row['seconds']:5} s  {by or row['may_survive']}"[:160]


def score(results: list[dict[str, Any]]) -> str:
    """Noticed of those that should be."""
    counted = [row for row in results if row["result"] != "broken" and not row["may_survive"]]
    noticed = sum(row["result"] == "noticed" for row in counted)
    return f"{noticed} of {len(counted)} noticed" + (f" ({noticed / len(counted):.0%})" if counted else "")


def summary(results: list[dict[str, Any]]) -> str:
    """The score, by class too, and what survived."""
    lines = [score(results)]
    for kind in dict.fromkeys(row["class"] for row in results):
        lines.append(f"  {kind}: {score([row for row in results if row['class'] == kind])}")
    for row in results:
        if row["result"] != "noticed":
            lines.append(
                f"{row['result']}: {row['name']} ({row['file']}): {row['what']}. {row['may_survive'] or row['by']}"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
