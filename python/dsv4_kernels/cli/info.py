"""Show device, driver, versions, and which op has an image for which architecture.

Says why ops would refuse the device, if they would. Exit status 0 in either case.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from rich.console import Console

import dsv4_kernels
from dsv4_kernels.cli.tables import add_ops, op_table

WITHOUT_A_DEVICE = (
    "Kernels need an NVIDIA driver of the R580 line or later (see nvidia-smi) and a device of an architecture below. "
    "Without them the same functions run on CPU tensors."
)


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
    if facts["device_error"]:
        console.print(WITHOUT_A_DEVICE, highlight=False)
    images = facts["images"]
    architectures = sorted({image["architecture"] for image in images}, key=lambda name: int(name[3:-1]))
    short = [name.removeprefix("sm_") for name in architectures]
    table = op_table("kernels in the images of each op, by architecture (sm_)", ["language"], [*short, "regs", "KiB"])
    of_op: dict[str, list[dict[str, Any]]] = {}
    for image in images:
        of_op.setdefault(image["op"], []).append(image)

    def cells(op: str) -> list[str]:
        rows = of_op[op]
        counts = [sum(row["architecture"] == name for row in rows) for name in architectures]
        size = sum({row["sha256"]: row["bytes"] for row in rows}.values())
        return [
            "+".join(sorted({row["language"] for row in rows})),
            *(str(n) if n else "[red]none" for n in counts),
            str(max(row["registers"] for row in rows)),
            f"{size / 1024:.0f}",
        ]

    add_ops(table, {op: rows[0]["family"] for op, rows in of_op.items()}, cells)
    console.print(table)
    compilers = {f"{name} {version}" for image in images for name, version in image["compilers"].items()}
    console.print("compilers: " + ", ".join(sorted(compilers)), highlight=False)
    return 0
