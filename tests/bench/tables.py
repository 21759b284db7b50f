"""The tables in README.md, docs/benchmarks.md and docs/verified.md that are made from recorded results.

    python -m tests.bench.tables          writes all of them

test_tables.py fails while a document differs from the results.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "tests" / "bench" / "results"
DEVICE = "h200"  # of the README's figures; docs/benchmarks.md shows every folder of results, this one first
README, BENCHMARKS, VERIFIED = (ROOT / name for name in ("README.md", "docs/benchmarks.md", "docs/verified.md"))
OPS = ROOT / "docs" / "ops.md"

TIMES = {
    "floor_us": "floor",
    "warm_us": "warm",
    "cold_us": "cold",
    "torch_compile_us": "torch.compile",
    "torch_eager_us": "torch eager",
}

# The figures that matter most, in the words of a reader: (op, case) of peers.json.
_LAYER = "v4-flash, MXFP4 weights, bfloat16 rows, "
FIGURES = {
    ("dense_router_decode", "v4-flash, 16 tokens"): "gate product, scores and top-6, 16 tokens",
    ("activation_topk", "v4-flash, 8192 tokens"): "scores and top-6, 8192 tokens",
    ("topk_select", "64 x 32768, k 512"): "top-512 of 64 rows of 32,768 scores",
    ("compress_flush", "CSA, decode, 64 requests"): "CSA compression and flush, 64 requests",
    ("compress_flush", "CSA, prefill, 8192 tokens"): "CSA compression and flush, prompt of 8192 tokens",
    ("quantize_mxfp8", "16384 x 7168"): "MXFP8 of 16384 x 7168 bfloat16",
    ("paged_stash_copy", "512 MiB, hidden 7168"): "paged stash of 512 MiB",
    ("Nvfp4MoE", _LAYER + "1 token"): "layer of experts, MXFP4 weights, 1 token",
    ("Nvfp4MoE", _LAYER + "128 tokens"): "layer of experts, MXFP4 weights, 128 tokens",
    ("Nvfp4MoE", _LAYER + "8192 tokens"): "layer of experts, MXFP4 weights, 8192 tokens",
}


def read(device: str, name: str) -> dict[str, Any]:
    """One recorded report."""
    report: dict[str, Any] = json.loads((RESULTS / device / name).read_text())
    return report


def has(device: str, name: str) -> bool:
    """Whether a device has such a report."""
    return (RESULTS / device / name).exists()


def devices() -> list[str]:
    """The folders of results, the README's first."""
    folders = {path.parent.name for name in ("bench", "peers", "moe_layers") for path in RESULTS.glob(f"*/{name}.json")}
    return sorted(folders, key=lambda name: (name != DEVICE, name))


def conditions(report: dict[str, Any]) -> str:
    """Where and with what a report was made."""
    machine = report["machine"]
    return (
        f"one {machine['device']}, driver {machine['driver']}, torch {machine['torch']}, commit "
        f"{machine['commit'][:7]}; copy {report['copy_bandwidth'] / 1e12:.2f} TB/s"
    )


def microseconds(time: float) -> str:
    """Three digits, or all of those before the point."""
    return f"{time:.0f}" if time >= 100 else f"{time:#.3g}"


def peers_of(row: dict[str, Any], most: int | None = None) -> str:
    """The peers of a row (`most` of them), the fastest first; one that is faster than this package is bold."""
    bold = {True: "**", False: ""}
    return ", ".join(
        f"{name} {bold[time < row['us']]}{microseconds(time)}{bold[time < row['us']]}"
        for name, time in sorted(row["peers"].items(), key=lambda peer: float(peer[1]))[:most]
    )


def times_of(row: dict[str, Any]) -> str:
    """The cells of a row; empty where there is no such baseline."""
    return " | ".join(f"{row[name]:.1f}" if row.get(name) is not None else "" for name in TIMES)


def figures(report: dict[str, Any]) -> str:
    """The README's table."""
    rows = {(row["op"], row["case"]): row for row in report["rows"]}
    lines = ["| microseconds, sizes of v4-flash | this package | peers |", "|---|---|---|"]
    for key, text in FIGURES.items():
        lines.append(f"| {text} | {microseconds(rows[key]['us'])} | {peers_of(rows[key], 3)} |")
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    return "\n".join([*lines, "", f"On {conditions(report)}. {versions}.", ""]) + "\n"


def replaced(text: str, mark: str, table: str) -> str:
    """A document with the table between `<!-- mark -->` and `<!-- end of mark -->` replaced."""
    begin, end = f"<!-- {mark} -->\n", f"<!-- end of {mark} -->"
    before, rest = text.split(begin)
    return before + begin + table + end + rest.split(end)[1]


def readme() -> str:
    """The README with today's figures."""
    return replaced(README.read_text(), "figures", figures(read(DEVICE, "peers.json")))


def ran() -> str:
    """The table of docs/verified.md: what was run on which device, at which commit."""
    lines = ["| device | what | commit | torch, driver | outcome |", "|---" * 5 + "|"]
    for path in sorted(RESULTS.glob("*/*.json"), reverse=True):
        report = json.loads(path.read_text())
        machine = report["machine"]
        if "results" in report:
            right = sum(result["passed"] for result in report["results"])
            outcome = f"{right} of {len(report['results'])} cases right"
        else:
            rows = report["rows"] if "rows" in report else list(report["runs"].values())
            failed = sum("error" in row for row in rows)
            outcome = f"{len(rows)} rows" + (f", {failed} failed" if failed else "")
        software = f"{machine['torch']}, {machine['driver']}"
        lines.append(f"| {machine['device']} | {path.stem} | {machine['commit'][:7]} | {software} | {outcome} |")
    never = [f"`{op}`" for op in re.findall(r"^\| `\w+\.(\w+)`", OPS.read_text(), re.MULTILINE) if op not in tested()]
    return "\n".join([*lines, "", f"Ops in none of these selftests: {', '.join(never) or 'none'}.", ""])


def tested() -> set[str]:
    """The ops that a recorded selftest has run."""
    reports = [json.loads(path.read_text()) for path in RESULTS.glob("*/selftest.json")]
    return {result["op"] for report in reports for result in report["results"]}


def verified() -> str:
    """docs/verified.md with today's table of runs."""
    return replaced(VERIFIED.read_text(), "ran", ran())


def all_rows(device: str) -> list[str]:
    """A section of docs/benchmarks.md: everything recorded of one device."""
    reports = [name for name in ("peers.json", "bench.json", "moe_layers.json") if has(device, name)]
    lines = [f"## {read(device, reports[0])['machine']['device']}"]
    for name in reports:
        lines += ["", *SECTIONS[name](device)]
    return lines


def bench_rows(device: str) -> list[str]:
    """Every row of `bench`."""
    report = read(device, "bench.json")
    lines = [f"Every op, on {conditions(report)}, empty kernel {report['launch_us']:.2f} us."]
    if has(device, "bench.png"):
        lines += ["", f"![time over floor](../tests/bench/results/{device}/bench.png)"]
    for family in dict.fromkeys(row["family"] for row in report["rows"]):
        lines += ["", f"### {family} ({device})", "", f"| op | case | {' | '.join(TIMES.values())} |"]
        lines.append("|---" * (2 + len(TIMES)) + "|")
        lines += [
            f"| `{row['op']}` | {row['case']} | {times_of(row)} |" for row in report["rows"] if row["family"] == family
        ]
    costs = ", ".join(f"{name} {cost:.2f}" for name, cost in report["calls_us"].items())
    return [*lines, "", f"Host time of a call without its launch, in microseconds: {costs}."]


def peer_rows(device: str) -> list[str]:
    """Other libraries beside this one, each pair measured in one process."""
    report = read(device, "peers.json")
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    lines = [
        f"### Beside other libraries ({device})",
        "",
        f"On {conditions(report)}, empty kernel {report['launch_us']:.2f} us. {versions}.",
        "Each row was measured in one process, in CUDA graphs. Results were compared on the same inputs. Bold: faster",
        "than this package.",
        "",
        *(f"- {note}" for note in report["notes"]),
        "",
        "| op | case | this package | peers |",
        "|---" * 4 + "|",
    ]
    for row in report["rows"]:
        lines.append(f"| `{row['op']}` | {row['case']} | {microseconds(row['us'])} | {peers_of(row)} |")
    return lines


def layer_rows(device: str) -> list[str]:
    """Whole layers of experts."""
    report = read(device, "moe_layers.json")
    lines = [
        f"### Whole layers of experts ({device})",
        "",
        f"On {conditions(report)}. From sort to weighted sum, other experts in each call. TB/s counts the",
        "weights that are read.",
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


SECTIONS = {"peers.json": peer_rows, "bench.json": bench_rows, "moe_layers.json": layer_rows}


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
    README.write_text(readme())
    BENCHMARKS.write_text(benchmarks())
    VERIFIED.write_text(verified())


if __name__ == "__main__":
    main()
