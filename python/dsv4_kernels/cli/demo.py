"""Run what exists of one DeepSeek-V4 layer outside attention, on real shapes.

At this point: a batch of tokens goes through the router of a hash layer and of a dense layer. Weights are random (seeded),
or read from a safetensors checkpoint by the models' tensor names; token ids are random, or a text's by any Hugging Face
tokenizer.json. Every result is checked against float64; the table says what ran where, how long it took, and how far it is
from the floor, which is the time to move the fewest bytes at the bandwidth of a large copy. Exit status 0 if all is right.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from dsv4_kernels.cases import Verdict
from dsv4_kernels.checkpoint import CheckpointError, Gate, load_gate
from dsv4_kernels.cli.machine import default_device, describe, image_for
from dsv4_kernels.cli.timing import ceilings, seconds_per_call
from dsv4_kernels.op_table import OPS
from dsv4_kernels.presets import PRESETS, Preset
from dsv4_kernels.router.cases import YARDSTICKS, gate_inputs, plain_logits

DECODE_TOKENS = 64  # the most that dense_router_decode takes at once


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    parser.add_argument("--preset", choices=PRESETS, default="v4-flash", help="the model's sizes (default: v4-flash)")
    parser.add_argument("--tokens", type=int, default=64, help="batch size with random token ids (default: 64)")
    parser.add_argument("--seed", type=int, default=0, help="of everything random (default: 0)")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda if there is one)")
    parser.add_argument("--checkpoint", type=Path, metavar="PATH", help="safetensors file or folder to read the gate from")
    parser.add_argument("--layer", type=int, default=0, metavar="N", help="layer of the checkpoint (default: 0)")
    parser.add_argument("--text", type=Path, metavar="FILE", help="text whose tokens to route; needs --tokenizer")
    parser.add_argument("--tokenizer", type=Path, metavar="FILE", help="a Hugging Face tokenizer.json")
    parser.add_argument("--json", action="store_true", help="print results as JSON")


@dataclass(frozen=True)
class Step:
    """One op of the layer, on the batch in as many calls as the op needs."""

    layer: str
    op: str
    calls: list[tuple[Any, ...]]

    def run(self) -> list[tuple[Tensor, ...]]:
        op = OPS[self.op]
        return [op(arguments, (None,) * len(op.results)) for arguments in self.calls]

    def worst(self) -> Verdict:
        """The verdict of the call that is nearest to its limit, or beyond it."""
        verdicts = [YARDSTICKS[self.op].verdict(*call) for call in zip(self.calls, self.run(), strict=True)]
        return max(verdicts, key=lambda verdict: verdict.error - verdict.limit)

    def moved_bytes(self) -> int:
        return sum(YARDSTICKS[self.op].moved_bytes(*arguments) for arguments in self.calls)


def run(options: argparse.Namespace) -> int:
    """Runs the command; returns the exit status."""
    device = options.device or default_device()
    preset = PRESETS[options.preset]
    generator = torch.Generator().manual_seed(options.seed)
    try:
        token_ids = read_token_ids(options, preset, generator).to(device)
        gates = read_gates(options, preset, generator)
    except (CheckpointError, OSError, ValueError) as error:
        print(f"demo: {error}")
        return 2
    hidden = gate_inputs(generator, len(token_ids), preset.hidden_size, 1)[0].to(device)
    steps = [step for layer, gate in gates.items() for step in layer_steps(layer, gate, preset, token_ids, hidden)]
    best = ceilings(device)
    rows = []
    for step in steps:
        verdict = step.worst()
        rows.append(
            {
                "layer": step.layer,
                "op": step.op,
                "calls": len(step.calls),
                "device": device,
                "image": image_for(step.op, device),
                "time_us": seconds_per_call([step.run], device) * 1e6,
                "floor_us": best.floor(step.moved_bytes()) * 1e6,
                "worst_error": verdict.error,
                "limit": verdict.limit,
                "what": verdict.what,
                "passed": verdict.passed,
            }
        )
    report = {"preset": preset.name, "tokens": len(token_ids), "machine": describe(device), "steps": rows}
    if options.json:
        print(json.dumps(report, indent=1))
    else:
        print_report(report)
    return 0 if all(row["passed"] for row in rows) else 1


def read_token_ids(options: argparse.Namespace, preset: Preset, generator: torch.Generator) -> Tensor:
    """[tokens] int64: a text's, or random. ValueError if the options ask for neither."""
    if (options.text is None) != (options.tokenizer is None):
        raise ValueError("--text and --tokenizer go together")
    if options.text is None:
        if options.tokens < 1:
            raise ValueError(f"--tokens: expected at least 1, got {options.tokens}")
        return torch.randint(preset.vocab_size, (options.tokens,), generator=generator)
    from tokenizers import Tokenizer

    encoded = Tokenizer.from_file(str(options.tokenizer)).encode(options.text.read_text())
    if not encoded.ids:
        raise ValueError(f"{options.text}: no tokens in it")
    return torch.tensor(encoded.ids, dtype=torch.int64)


def read_gates(options: argparse.Namespace, preset: Preset, generator: torch.Generator) -> dict[str, Gate]:
    """The gates to route through, by what to call their layer: the checkpoint's, or a random one of each kind."""
    if options.checkpoint is not None:
        gate = load_gate(options.checkpoint, options.layer, preset)
        return {f"{options.layer} ({'hash' if gate.bias is None else 'dense'})": gate}
    gates = {}
    if preset.hash_layers:
        _, weight, _ = gate_inputs(generator, 1, preset.hidden_size, preset.experts)
        table = torch.randint(preset.experts, (preset.vocab_size, preset.top_k), generator=generator)
        gates["hash"] = Gate(weight, None, table)
    _, weight, bias = gate_inputs(generator, 1, preset.hidden_size, preset.experts)
    gates["dense"] = Gate(weight, bias, None)
    return gates


def layer_steps(layer: str, gate: Gate, preset: Preset, token_ids: Tensor, hidden: Tensor) -> list[Step]:
    """What routing a batch through one layer runs."""
    weight = gate.weight.to(hidden.device)
    k, weighing = preset.top_k, (True, preset.routed_scaling, 0.0)
    if gate.tid2eid is not None:
        table = gate.tid2eid.to(hidden.device)
        logits = plain_logits(hidden, weight)
        scored = (token_ids, table, logits, None, *weighing)
        return [
            Step(layer, "hash_router", [(token_ids, table, None)]),
            Step(layer, "hash_router_scored", [scored]),
        ]
    bias = gate.bias.to(hidden.device) if gate.bias is not None else None
    batches = hidden.split(DECODE_TOKENS)
    return [Step(layer, "dense_router_decode", [(batch, weight, bias, k, *weighing) for batch in batches])]


def print_report(report: dict[str, Any]) -> None:
    """A line for each op."""
    console = Console()
    machine = report["machine"]["device"]
    console.print(f"{report['preset']}: {report['tokens']} tokens through the router on {machine}", highlight=False)
    table = Table(box=None)
    for name in ("layer", "op", "image", "calls", "time us", "floor us", "worst error", ""):
        table.add_column(name, justify="left" if name in ("layer", "op", "image", "") else "right")
    for row in report["steps"]:
        figures = [f"{row['time_us']:.1f}", f"{row['floor_us']:.1f}", f"{row['worst_error']:.1e}"]
        verdict = "[green]right" if row["passed"] else f"[red]WRONG: {row['what']}"
        table.add_row(row["layer"], row["op"], row["image"], str(row["calls"]), *figures, verdict)
    console.print(table)
    if any(row["device"] == "cpu" for row in report["steps"]):
        console.print("No CUDA device: this ran the CPU implementations, not the kernels.")
