"""Show device, driver, versions, and which op has an image for which architecture.

Says why ops would refuse the device, if they would. Exit status 0 in either case.
"""

from __future__ import annotations

import argparse
import json

from rich.console import Console
from rich.table import Table

import dsv4_kernels


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    parser.add_argument("--json", action="store_true", help="print everything as JSON, a row for each image")


def run(options: argparse.Namespace) -> int:
    """Runs the command; returns the exit status."""
    facts = dsv4_kernels.info()
    if options.json:
        print(json.dumps(facts, indent=1))
        return 0
    console = Console()
    console.print(f"dsv4-kernels {facts['version']}")
    console.print(f"device: {facts['device_error'] or 'ready'}", highlight=False)
    images = facts["images"]
    architectures = list(dict.fromkeys(image["architecture"] for image in images))
    architectures.sort(key=lambda name: int("".join(filter(str.isdigit, name))))
    table = Table(title="kernels in the images of each op", box=None)
    for name in ("op", "language", *architectures, "regs", "KiB"):
        table.add_column(name, justify="left" if name in ("op", "language") else "right")
    for op in dict.fromkeys(image["op"] for image in images):
        rows = [image for image in images if image["op"] == op]
        counts = [sum(row["architecture"] == name for row in rows) for name in architectures]
        size = sum({row["sha256"]: row["bytes"] for row in rows}.values())
        registers = max(row["registers"] for row in rows)
        languages = "+".join(sorted({row["language"] for row in rows}))
        table.add_row(
            op, languages, *(str(n) if n else "[red]none" for n in counts), str(registers), f"{size / 1024:.0f}"
        )
    console.print(table)
    compilers = {f"{name} {version}" for image in images for name, version in image["compilers"].items()}
    console.print("compilers: " + ", ".join(sorted(compilers)), highlight=False)
    return 0
