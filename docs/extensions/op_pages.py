"""Sphinx extension: a page for each op, docs/ops/<op>.md, written at the start of a build and not checked in.

A page holds the public function's docstring, the images, the torch schema, the C declaration, and every recorded time.
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
from pathlib import Path
from typing import Any

import dsv4_kernels
import torch
from dsv4_kernels import torch_ops
from sphinx.application import Sphinx

ROOT = Path(__file__).resolve().parents[2]
LANGUAGES = {"cuda": "CUDA C++", "triton": "Triton", "cute": "CuTe DSL"}
TIMES = {"floor_us": "floor", "warm_us": "warm", "cold_us": "cold", "torch_compile_us": "torch.compile"}


def c_declaration(header: str, op: str) -> str:
    """What a family's header says of an op: the comment before its struct, the struct, functions of its name."""
    found = re.search(
        rf"/\*(?:(?!\*/).)*\*/\ntypedef struct dsv4_{op}_args \{{.*?\}} dsv4_{op}_args;", header, re.DOTALL
    )
    if not found:
        raise ValueError(f"no struct dsv4_{op}_args with a comment before it")
    functions = re.findall(
        rf"^DSV4_API [^;]*?\bdsv4_{op}(?:_workspace_size)?\([^;]*;", header, re.MULTILINE | re.DOTALL
    )
    return "\n\n".join([found.group(), *functions])


def recorded(op: str) -> list[str]:
    """Tables of every recorded time of an op, by device."""
    lines: list[str] = []
    for path in sorted((ROOT / "tests" / "bench" / "results").glob("*/*.json"), reverse=True):
        report: dict[str, Any] = json.loads(path.read_text())
        rows = [row for row in report.get("rows", ()) if row.get("op") == op]
        if not rows:
            continue
        lines += ["", f"{report['machine']['device']}, commit {report['machine']['commit'][:7]}, microseconds:", ""]
        if path.stem == "peers":
            lines += ["| case | this package | peers |", "|---|---|---|"]
            for row in rows:
                peers = ", ".join(f"{name} {us:.4g}" for name, us in row["peers"].items())
                lines.append(f"| {row['case']} | {row['us']:.4g} | {peers} |")
        else:
            lines += ["| case | " + " | ".join(TIMES.values()) + " |", "|---" * (1 + len(TIMES)) + "|"]
            for row in rows:
                cells = [f"{row[name]:.1f}" if row.get(name) is not None else "" for name in TIMES]
                lines.append("| " + " | ".join([row["case"], *cells]) + " |")
    return lines


def page(op: str, images: list[dict[str, Any]]) -> str:
    """The page of an op in MyST Markdown."""
    family = images[0]["family"]
    function = getattr(importlib.import_module(f"dsv4_kernels.{family}"), op)
    summary = (inspect.getdoc(function) or "").split("\n\n")[0].replace("\n", " ")
    languages = ", ".join(sorted({LANGUAGES[image["language"]] for image in images}))
    architectures = sorted({image["architecture"] for image in images}, key=lambda name: int(name[3:-1]))
    header = (Path(dsv4_kernels.__file__).parent / "include" / "dsv4" / f"{family}.h").read_text()
    return "\n".join(
        [
            f"# {op}",
            "",
            summary,
            "",
            f"Family {{doc}}`../families/{family}`. Kernels in {languages}, with native images for "
            f"{', '.join(architectures)}; on host tensors the CPU backend.",
            "",
            "## Python",
            "",
            "```{eval-rst}",
            f".. autofunction:: dsv4_kernels.{family}.{op}",
            "   :no-index:",
            "```",
            "",
            "## torch",
            "",
            "```text",
            str(getattr(torch.ops.dsv4, op).default._schema),
            "```",
            "",
            "## C",
            "",
            "```c",
            f"#include <dsv4/{family}.h>",
            "",
            c_declaration(header, op),
            "```",
            "",
            "## Measured",
            *(
                recorded(op)
                or ["", "No time of this op alone is recorded; {doc}`../benchmarks` has those it is part of."]
            ),
            "",
        ]
    )


def write_pages(app: Sphinx) -> None:
    """Writes the page of each op that has images, if this build has an index of ops."""
    if not (Path(app.srcdir) / "ops.md").exists():
        return
    torch_ops.register()
    folder = Path(app.srcdir) / "ops"
    folder.mkdir(exist_ok=True)
    images: dict[str, list[dict[str, Any]]] = {}
    for image in dsv4_kernels.info()["images"]:
        images.setdefault(image["op"], []).append(image)
    for old in folder.glob("*.md"):
        if old.stem not in images:
            old.unlink()
    for op, of_op in images.items():
        target, text = folder / f"{op}.md", page(op, of_op)
        if not target.exists() or target.read_text() != text:
            target.write_text(text)


def setup(app: Sphinx) -> dict[str, Any]:
    """Writes the pages before Sphinx looks for sources."""
    app.connect("builder-inited", write_pages)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
