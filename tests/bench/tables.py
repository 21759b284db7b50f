"""The tables of times in README.md and docs/benchmarks.md, made from recorded results.

    python -m tests.bench.tables          writes both

test_tables.py fails while a document differs from the results.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "tests" / "bench" / "results"
DEVICE = "h200"  # of the README's figures; docs/benchmarks.md shows every folder of results, this one first
README, BENCHMARKS = ROOT / "README.md", ROOT / "docs" / "benchmarks.md"
BEGIN, END = "<!-- figures -->\n", "<!-- end of figures -->"

TIMES = {
    "floor_us": "floor",
    "warm_us": "warm",
    "cold_us": "cold",
    "torch_compile_us": "torch.compile",
    "torch_eager_us": "torch eager",
}

# The figures that matter most, in the words of a reader: (op, case) of bench.json.
FIGURES = {
    ("dense_router_decode", "v4-flash, 16 tokens"): "gate product, scores and top-6 of 16 tokens, v4-flash",
    ("hash_router_fused", "v4-pro, 16 tokens"): "hash layer's experts and weights, 16 tokens, v4-pro",
    ("activation_topk", "v4-flash, 8192 tokens, float32"): "scores and top-6 of 8192 tokens, v4-flash",
    ("topk_select", "64 x 32768, k 512, float32"): "top-512 of 64 rows of 32,768 scores",
    ("compress_flush", "CSA fp8_ds_mla, decode, 64 requests"): "CSA compression and flush, 64 requests",
    ("compress_flush", "HCA fp8_ds_mla, decode, 64 requests"): "HCA compression and flush, 64 requests",
    ("compress_flush", "CSA fp8_ds_mla, prefill, 8192 tokens"): "CSA compression and flush, prompt of 8192 tokens",
    ("quantize_nvfp4", "16384 x 7168"): "NVFP4 of 16384 x 7168 bfloat16",
    ("paged_stash_copy", "512 MiB bfloat16, pages of 64"): "paged stash of 512 MiB",
}
LAYERS = {("v4-flash", "bfloat16", "MXFP4", tokens) for tokens in (1, 128, 8192)}  # of moe_layers.json


def read(device: str, name: str) -> dict[str, Any]:
    """One recorded report."""
    report: dict[str, Any] = json.loads((RESULTS / device / name).read_text())
    return report


def devices() -> list[str]:
    """The folders of results, the README's first."""
    return sorted((path.parent.name for path in RESULTS.glob("*/bench.json")), key=lambda name: (name != DEVICE, name))


def conditions(report: dict[str, Any]) -> str:
    """Where and with what a report was made."""
    machine = report["machine"]
    return (
        f"one {machine['device']}, driver {machine['driver']}, torch {machine['torch']}, commit "
        f"{machine['commit'][:7]}; copy {report['copy_bandwidth'] / 1e12:.2f} TB/s"
    )


def times_of(row: dict[str, Any]) -> str:
    """The cells of a row; empty where there is no such baseline."""
    return " | ".join(f"{row[name]:.1f}" if row.get(name) is not None else "" for name in TIMES)


def figures(report: dict[str, Any], layers: dict[str, Any]) -> str:
    """The README's table."""
    rows = {(row["op"], row["case"]): row for row in report["rows"]}
    lines = [
        f"Microseconds in a CUDA graph, inputs not in cache ({conditions(report)}):",
        "",
        "| | floor | this package | torch.compile |",
        "|---|---|---|---|",
    ]
    for key, text in FIGURES.items():
        row = rows[key]
        compiled = f"{row['torch_compile_us']:.1f}" if row.get("torch_compile_us") else ""
        lines.append(f"| {text} | {row['floor_us']:.1f} | {row['cold_us']:.1f} | {compiled} |")
    for row in layers["rows"]:
        if (row["preset"], row["activations"], row["weights"], row["tokens"]) not in LAYERS:
            continue
        what = f"{row['tflops']:.0f} TFLOP/s" if row["tokens"] > 1024 else f"{row['tbs']:.1f} TB/s of weights"
        tokens = f"{row['tokens']} token" + ("s" if row["tokens"] > 1 else "")
        lines.append(f"| a layer's experts, v4-flash, MXFP4, {tokens} | | {row['us']:.0f} ({what}) | |")
    return "\n".join([*lines, ""]) + "\n"


def readme_with(text: str, table: str) -> str:
    """The README with the table between its markers replaced."""
    before, rest = text.split(BEGIN)
    return before + BEGIN + table + END + rest.split(END)[1]


def all_rows(device: str) -> list[str]:
    """A section of docs/benchmarks.md: every row of one device."""
    report = read(device, "bench.json")
    lines = [f"## {report['machine']['device']}", "", f"Measured on {conditions(report)}, empty kernel"]
    lines[-1] += f" {report['launch_us']:.2f} us."
    if (RESULTS / device / "bench.png").exists():
        lines += ["", f"![time over floor](../tests/bench/results/{device}/bench.png)"]
    for family in dict.fromkeys(row["family"] for row in report["rows"]):
        lines += ["", f"### {family} ({device})", "", f"| op | case | {' | '.join(TIMES.values())} |"]
        lines.append("|---" * (2 + len(TIMES)) + "|")
        lines += [
            f"| `{row['op']}` | {row['case']} | {times_of(row)} |" for row in report["rows"] if row["family"] == family
        ]
    costs = ", ".join(f"{name} {cost:.2f}" for name, cost in report["calls_us"].items())
    lines += ["", f"Host time of a call without its launch, in microseconds: {costs}."]
    if (RESULTS / device / "moe_layers.json").exists():
        lines += ["", *layer_rows(device)]
    return lines


def layer_rows(device: str) -> list[str]:
    """Whole layers of experts."""
    report = read(device, "moe_layers.json")
    lines = [
        f"### Whole layers of experts ({device})",
        "",
        "From sort to weighted sum, other experts in each call. TB/s counts the weights that are read.",
        "",
        "| model | weights | activations | tokens | us | TB/s | TFLOP/s |",
        "|---" * 7 + "|",
    ]
    for row in report["rows"]:
        lines.append(
            f"| {row['preset']} | {row['weights']} | {row['activations']} | {row['tokens']} | {row['us']:.1f} | "
            f"{row['tbs']:.2f} | {row['tflops']:.0f} |"
        )
    return lines


def benchmarks() -> str:
    """docs/benchmarks.md."""
    lines = [
        "# Benchmarks",
        "",
        "<!-- Written by python -m tests.bench.tables. -->",
        "",
        "Times are medians in microseconds of graph replays on random inputs. *Floor*: the bytes that must move at the",
        "bandwidth of a large copy, plus an empty kernel. *Warm*: one set of inputs, in the L2 cache where it fits.",
        "*Cold*: sets of inputs in turn that together exceed the cache. Baselines ran in the same process. Launches",
        "overlap (programmatic dependent launch), so very small kernels can beat the floor.",
    ]
    for device in devices():
        lines += ["", *all_rows(device)]
    return "\n".join(lines) + "\n"


def main() -> None:
    device = devices()[0]
    table = figures(read(device, "bench.json"), read(device, "moe_layers.json"))
    README.write_text(readme_with(README.read_text(), table))
    BENCHMARKS.write_text(benchmarks())


if __name__ == "__main__":
    main()
