"""Run what exists of one DeepSeek-V4 layer outside attention, on real shapes.

A batch of tokens goes through the seam behind attention, the router of a hash layer and of a dense layer, the experts
that the first of them chose and the seam behind those, and through the compressed cache of a CSA and of an HCA layer,
one token per request in decode and a prompt in prefill, by the ops that count tails and by the fused one. Weights are
random (seeded); a router's may be read from a safetensors checkpoint by the models' tensor names.
Token ids are random, or a text's by any Hugging Face tokenizer.json. Every result is checked against float64; the table
says what ran where, how long it took, and how far it is from the floor, which is the time to move the fewest bytes at
the bandwidth of a large copy. Exit status 0 if all is right.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from dsv4_kernels.cases import Baseline, Verdict
from dsv4_kernels.cases.router.functions import BASELINES, gate_inputs
from dsv4_kernels.checkpoint import CheckpointError
from dsv4_kernels.cli.demo_cache import CacheStep, cache_steps
from dsv4_kernels.cli.demo_compress import CompressStep, compress_steps
from dsv4_kernels.cli.demo_moe import MoeStep, moe_step
from dsv4_kernels.cli.demo_seams import SeamStep, seam_behind_attention, seam_behind_experts
from dsv4_kernels.cli.machine import default_device, describe, image_for
from dsv4_kernels.cli.timing import ceilings, seconds_per_call
from dsv4_kernels.presets import PRESETS, Preset
from dsv4_kernels.router import Router
from dsv4_kernels.router.router import Mode

# Functions of the router that are no op of their own, by the op whose kernel they run beside torch's product.
KERNELS = {"dense_router_prefill": "activation_topk"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    parser.add_argument("--preset", choices=PRESETS, default="v4-flash", help="the model's sizes (default: v4-flash)")
    parser.add_argument("--tokens", type=int, default=64, help="batch size with random token ids (default: 64)")
    parser.add_argument("--seed", type=int, default=0, help="of everything random (default: 0)")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda if there is one)")
    parser.add_argument(
        "--checkpoint", type=Path, metavar="PATH", help="safetensors file or folder to read the gate from"
    )
    parser.add_argument("--layer", type=int, default=0, metavar="N", help="layer of the checkpoint (default: 0)")
    parser.add_argument("--text", type=Path, metavar="FILE", help="text whose tokens to route; needs --tokenizer")
    parser.add_argument("--tokenizer", type=Path, metavar="FILE", help="a Hugging Face tokenizer.json")
    parser.add_argument("--json", action="store_true", help="print results as JSON")


@dataclass(frozen=True)
class Step:
    """A batch through the router of one layer."""

    layer: str
    router: Router
    token_ids: Tensor
    hidden: Tensor

    @property
    def op(self) -> str:
        """The function that the router picks for the batch."""
        return self.router.op_for(len(self.token_ids))

    @property
    def kernels(self) -> str:
        """The op of whose kernels to say where they ran."""
        return KERNELS.get(self.op, self.op)

    def run(self) -> tuple[Tensor, ...]:
        return self.router(self.hidden, self.token_ids)  # type: ignore[no-any-return]

    def problem(self) -> tuple[Baseline, tuple[Any, ...]]:
        """The batch's problem, whichever function solves it: what to compare results with, and the arguments."""
        gate, weighing = self.router, (self.router.renormalize, self.router.scale, self.router.epsilon)
        if gate.mode == "hash":
            arguments = (self.token_ids, gate.tid2eid, self.hidden, gate.weight, None, *weighing)
            return BASELINES["hash_router_fused"], arguments
        return BASELINES["dense_router_decode"], (self.hidden, gate.weight, gate.bias, gate.top_k, *weighing)

    def verdict(self) -> Verdict:
        baseline, arguments = self.problem()
        return baseline.verdict(arguments, self.run())

    def moved_bytes(self) -> int:
        baseline, arguments = self.problem()
        return baseline.moved_bytes(*arguments)


def run(options: argparse.Namespace) -> int:
    """Runs the command; returns the exit status."""
    device = options.device or default_device()
    preset = PRESETS[options.preset]
    generator = torch.Generator().manual_seed(options.seed)
    try:
        token_ids = read_token_ids(options, preset, generator).to(device)
        routers = make_routers(options, preset, device, generator)
    except (CheckpointError, OSError, ValueError) as error:
        print(f"demo: {error}")
        return 2
    seam = seam_behind_attention(preset.name, len(token_ids), device, generator)
    state, hidden = seam.run()
    routed = [Step(layer, router, token_ids, hidden) for layer, router in routers.items()]
    topk_weights, topk_ids = routed[0].run()
    experts = moe_step(routed[0].layer, preset, hidden, topk_weights, topk_ids, generator)
    next_seam = seam_behind_experts(preset.name, experts.run(), state, generator)
    steps: list[Step | SeamStep | MoeStep | CacheStep | CompressStep] = [seam, *routed, experts, next_seam]
    steps += cache_steps(preset, len(token_ids), device, generator)
    steps += compress_steps(preset, len(token_ids), device, generator)
    best = ceilings(device)
    rows = []
    for step in steps:
        verdict = step.verdict()
        rows.append(
            {
                "layer": step.layer,
                "op": step.op,
                "device": device,
                "image": image_for(step.kernels, device),
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
    """[tokens] int64: a text's, or random. ValueError if the options give neither."""
    if (options.text is None) != (options.tokenizer is None):
        raise ValueError("--text and --tokenizer go together")
    if options.text is None:
        if options.tokens < 1:
            raise ValueError(f"--tokens: expected at least 1, got {options.tokens}")
        return torch.randint(preset.vocab_size, (options.tokens,), generator=generator, device="cpu")
    from tokenizers import Tokenizer

    encoded = Tokenizer.from_file(str(options.tokenizer)).encode(options.text.read_text())
    if not encoded.ids:
        raise ValueError(f"{options.text}: no tokens in it")
    return torch.tensor(encoded.ids, dtype=torch.int64, device="cpu")


def make_routers(
    options: argparse.Namespace, preset: Preset, device: str, generator: torch.Generator
) -> dict[str, Router]:
    """The routers to send the batch through, by what to call their layer: the checkpoint's, or a random one of each
    mode that the model has.
    """
    if options.checkpoint is not None:
        router = Router.from_checkpoint(options.checkpoint, options.layer, preset, device=device)
        return {f"{options.layer} ({router.mode})": router}
    modes: tuple[Mode, ...] = ("hash", "dense") if preset.hash_layers else ("dense",)
    routers: dict[str, Router] = {}
    for mode in modes:
        _, weight, bias = gate_inputs(generator, 1, preset.hidden_size, preset.experts)
        tensors: dict[str, Any] = {"weight": weight, "bias": bias}
        if mode == "hash":
            table = torch.randint(preset.experts, (preset.vocab_size, preset.top_k), generator=generator, device="cpu")
            tensors = {"weight": weight, "tid2eid": table}
        routers[mode] = Router.from_preset(mode, preset, device=device)
        routers[mode].load_state_dict(tensors)
    return routers


def print_report(report: dict[str, Any]) -> None:
    """A line for each op."""
    console = Console()
    machine = report["machine"]["device"]
    console.print(f"{report['preset']}: {report['tokens']} tokens on {machine}", highlight=False)
    table = Table(box=None, padding=(0, 1, 0, 0))
    for name in ("layer", "op", "image", "time us", "floor us", "error", ""):
        words = name in ("layer", "op", "image", "")
        table.add_column(name, justify="left" if words else "right", no_wrap=name not in ("layer", ""))
    for row in report["steps"]:
        figures = [f"{row['time_us']:.1f}", f"{row['floor_us']:.1f}", f"{row['worst_error']:.1e}"]
        verdict = "[green]right" if row["passed"] else f"[red]WRONG: {row['what']}"
        table.add_row(row["layer"], row["op"], row["image"], *figures, verdict)
    console.print(table)
    right = sum(row["passed"] for row in report["steps"])
    console.print(
        f"Shown: what surrounds attention in one {report['preset']} layer (router, experts, compressed cache) on "
        f"{report['tokens']} tokens; {right} of {len(report['steps'])} results are right when checked against float64.",
        highlight=False,
    )
    if any(row["device"] == "cpu" for row in report["steps"]):
        console.print("No CUDA device: this ran the CPU implementations, not the kernels.")
