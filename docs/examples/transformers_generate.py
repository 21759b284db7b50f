"""DeepSeek-V4 of Hugging Face transformers, as it is and on this package: tokens, logits and speed beside float32.

    python docs/examples/transformers_generate.py                                 toy sizes, also on the CPU
    python docs/examples/transformers_generate.py --size v4-flash --layers 8      real widths, random FP4 experts; a GPU
    python docs/examples/transformers_generate.py --checkpoint FOLDER --layers 8  the weights of a model's first layers

Three models with the same weights, one after another: float32 (the experts dequantised as they are used), transformers
in bfloat16 with its own experts, and transformers on this package with FP4 experts. Each generates greedily; then each
reads float32's text, so that every position can be compared. --json writes what is printed.

Random weights: every value is a bfloat16 number, experts are MXFP4. Row v of the language head leans toward the
embedding of one other token, so that next tokens are decided by a margin, as a trained model's mostly are.
"""

from __future__ import annotations

import argparse
import gc
import inspect
import json
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from dsv4_kernels.cli.machine import describe
from dsv4_kernels.integrations.transformers import swap_in
from dsv4_kernels.presets import PRESETS
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, FineGrainedFP8Config
from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS, FP8Experts
from transformers.integrations.moe import use_experts_implementation
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as modeling
from transformers.models.deepseek_v4.configuration_deepseek_v4 import DeepseekV4Config

KINDS = {0: "sliding_attention", 4: "compressed_sparse_attention", 128: "heavily_compressed_attention"}
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
E2M1_RMS = 2.93  # of codes that are equally frequent
GROUP = 32
DECIDED = 8.0  # by how many standard deviations of the other logits the language head leans to one token

TOY = {
    "vocab_size": 256,
    "hidden_size": 128,
    "moe_intermediate_size": 64,
    "num_attention_heads": 2,
    "q_lora_rank": 64,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "o_groups": 2,
    "o_lora_rank": 32,
    "index_n_heads": 8,
    "index_topk": 16,
    "sliding_window": 16,
}
YARN = {"rope_type": "yarn", "factor": 16, "original_max_position_embeddings": 65536, "beta_fast": 32, "beta_slow": 1}


def make_config(size: str, layers: int) -> Any:
    """The first layers of a public model, or a toy with one layer of each kind."""
    ratios = (0, 4, 128) * layers if size == "toy" else PRESETS[size].compress_ratios
    sizes = dict(TOY)
    if size != "toy":
        preset = PRESETS[size]
        sizes = {
            "vocab_size": preset.vocab_size,
            "hidden_size": preset.hidden_size,
            "moe_intermediate_size": preset.expert_intermediate,
            "n_routed_experts": preset.experts,
            "num_experts_per_tok": preset.top_k,
            "routed_scaling_factor": preset.routed_scaling,
        }
        if size == "v4-pro":
            sizes |= {"num_attention_heads": 128, "q_lora_rank": 1536, "o_groups": 16, "index_topk": 1024}
    return DeepseekV4Config(
        **sizes,
        num_hidden_layers=layers,
        layer_types=[KINDS[ratio] for ratio in ratios[:layers]],
        num_hash_layers=min(3, layers),
        rope_parameters=dict(YARN),
        attn_implementation="eager",
        pad_token_id=0,
        eos_token_id=None,
    )


def generator(name: str, device: str) -> torch.Generator:
    """The random numbers of one tensor, the same for every model."""
    return torch.Generator(device).manual_seed(zlib.crc32(name.encode()))


def random_values(name: str, shape: Sequence[int], device: str, dtype: torch.dtype) -> Tensor:
    """Normal, with the variance that keeps a product's, as bfloat16 numbers."""
    values = torch.randn(*shape, generator=generator(name, device), device=device, dtype=torch.float32)
    scale = 1.0 if name.endswith("embed_tokens.weight") else shape[-1] ** -0.5
    return values.mul_(scale).to(torch.bfloat16).to(dtype)


def leaning_head(embedding: Tensor, dtype: torch.dtype) -> Tensor:
    """[vocab, hidden]: noise, and a share of the embedding of the token that each follows."""
    vocab, hidden = embedding.shape
    noise = random_values("lm_head.weight", (vocab, hidden), str(embedding.device), torch.float32)
    before = torch.randperm(vocab, generator=generator("order", str(embedding.device)), device=embedding.device)
    # About a quarter of the last hidden state is still the token's embedding.
    share = DECIDED / (0.25 * hidden)
    return noise.add_(embedding[before].float(), alpha=share).to(torch.bfloat16).to(dtype)


def random_codes(name: str, experts: int, rows: int, columns: int, device: str) -> tuple[Tensor, Tensor]:
    """MXFP4: [experts, rows, columns / 2] int8, two codes in each, and [.., columns / 32] E8M0."""
    numbers = generator(name, device)
    shape = (experts, rows, columns // 2)
    codes = torch.randint(0, 256, shape, generator=numbers, device=device, dtype=torch.uint8).view(torch.int8)
    middle = 127 + torch.tensor(columns**-0.5 / E2M1_RMS).log2().round().int().item()
    shape = (experts, rows, columns // GROUP)
    exponents = torch.randint(middle - 1, middle + 2, shape, generator=numbers, device=device, dtype=torch.uint8)
    return codes, exponents.view(torch.float8_e8m0fnu)


def dequantized(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """[rows, columns] of one expert, in plain torch."""
    table = torch.tensor(E2M1, device=codes.device)
    both = codes.view(torch.uint8).to(torch.int64)
    values = table[torch.stack((both & 15, both >> 4), dim=2)].flatten(1)
    return (values.unflatten(1, (-1, GROUP)) * scale.to(torch.float32).unsqueeze(2)).flatten(1).to(dtype)


def fp4_experts(config: Any, scale_fmt: str = "ue8m0") -> Any:
    """The module in which transformers holds FP4 experts."""
    named = type("FP4Experts", (FP8Experts,), {})
    decorated = use_experts_implementation(named, experts_interface=ALL_FP8_EXPERTS_FUNCTIONS)
    config.expert_dtype = "fp4"  # where transformers 5.17 looks
    try:
        return decorated(config, scale_fmt=scale_fmt, expert_dtype="fp4")
    except TypeError:
        return decorated(config, scale_fmt=scale_fmt)


def exact_experts(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """An experts implementation of transformers: each expert in float32, dequantised as it is used."""
    out = torch.zeros_like(hidden_states)
    for expert in top_k_index.unique().tolist():
        token, slot = torch.where(top_k_index == expert)
        both = dequantized(self.gate_up_proj[expert], self.gate_up_proj_scale_inv[expert], torch.float32)
        down = dequantized(self.down_proj[expert], self.down_proj_scale_inv[expert], torch.float32)
        rows = self._apply_gate(hidden_states[token] @ both.T) @ down.T
        out.index_add_(0, token, rows * top_k_weights[token, slot, None])
    return out


def build(config: Any, device: str, dtype: torch.dtype, fp4: bool, step: Callable[[], None]) -> Any:
    """The random model in this dtype, its experts as FP4 codes or as values."""
    with torch.device("meta"):
        model = modeling.DeepseekV4ForCausalLM(config).eval()
        if fp4:
            for layer in model.model.layers:
                layer.mlp.experts = fp4_experts(config)
    kept = model._keep_in_fp32_modules_strict if fp4 or runs_with_float32_norms() else []
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        path, _, leaf = name.rpartition(".")
        owner = model.get_submodule(path)
        to = torch.float32 if any(part in kept for part in name.split(".")) else dtype
        if ".experts." in name:
            if leaf in ("gate_up_proj", "down_proj"):
                fill_experts(owner, leaf, name, device, dtype, fp4)
            continue
        if "inv_freq" in leaf:
            value = getattr(type(owner)(config), leaf).to(device)
        elif leaf == "tid2eid":
            order = torch.rand(
                tensor.shape[0], config.n_routed_experts, generator=generator(name, device), device=device
            )
            value = order.topk(tensor.shape[1]).indices
        elif name == "lm_head.weight":
            value = leaning_head(model.model.embed_tokens.weight, to)
        elif tensor.dim() > 1:
            value = random_values(name, tensor.shape, device, to)
        else:
            value = torch.full(tensor.shape, float(leaf in ("weight", "scale", "hc_scale")), device=device, dtype=to)
        put(owner, leaf, value)
        step()
    return model


def fill_experts(experts: Any, leaf: str, name: str, device: str, dtype: torch.dtype, fp4: bool) -> None:
    """One matrix of all experts of a layer."""
    hidden, inner = experts.hidden_dim, experts.intermediate_dim
    rows, columns = (2 * inner, hidden) if leaf == "gate_up_proj" else (hidden, inner)
    codes, scale = random_codes(name, experts.num_experts, rows, columns, device)
    if fp4:
        put(experts, leaf, codes)
        put(experts, f"{leaf}_scale_inv", scale)
        return
    values = torch.empty(experts.num_experts, rows, columns, device=device, dtype=dtype)
    for expert in range(experts.num_experts):
        values[expert] = dequantized(codes[expert], scale[expert], dtype)
    put(experts, leaf, values)


def put(owner: Any, leaf: str, value: Tensor) -> None:
    """In the place of a parameter or buffer without memory."""
    if leaf in owner._parameters:
        owner._parameters[leaf] = torch.nn.Parameter(value, requires_grad=False)
    else:
        owner._buffers[leaf] = value


def runs_with_float32_norms() -> bool:
    """Whether transformers' own bfloat16 model does; 5.17 passes their float32 results on, which its layers refuse."""
    return "cache" in inspect.signature(modeling.DeepseekV4Model.forward).parameters


def load(folder: str, layers: int | None, device: str, dtype: torch.dtype, plain: bool) -> Any:
    """A checkpoint's model with dequantised weights. plain: for transformers' own modules in bfloat16."""
    options: dict[str, Any] = {} if layers is None else {"num_hidden_layers": layers}
    config = transformers.AutoConfig.from_pretrained(folder, **options)
    if getattr(config, "quantization_config", None):
        options["quantization_config"] = FineGrainedFP8Config(dequantize=True)
    if device != "cpu":
        options["device_map"] = device
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager", **options).eval()
    return model.to(dtype) if plain and not runs_with_float32_norms() else model


def seconds(function: Callable[[], Any]) -> tuple[float, Any]:
    """How long a call takes, its device included, and what it returns."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def measure(model: Any, prompt: Tensor, new_tokens: int, text: Tensor | None, warm: bool) -> dict[str, Any]:
    """A model's own continuation, its logits on a text (its own if there is none), and its speed."""
    options: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    length = prompt.shape[1]
    if warm:
        model.generate(prompt, max_new_tokens=3, **options)
    prefill, _ = seconds(lambda: model.generate(prompt, max_new_tokens=1, **options))
    whole, own = seconds(lambda: model.generate(prompt, max_new_tokens=new_tokens, **options))
    read = own if text is None else text
    logits = model(read[:, :-1], use_cache=False).logits[:, length - 1 :].float().cpu()
    return {
        "tokens": own.cpu(),
        "logits": logits,
        "prefill_seconds": prefill,
        "tokens_per_second": prompt.shape[0] * (new_tokens - 1) / max(whole - prefill, 1e-9),
    }


def compared(given: dict[str, Any], exact: dict[str, Any], length: int) -> dict[str, Any]:
    """What is written of a run."""
    same = (given["tokens"] == exact["tokens"])[:, length:]
    difference = (given["logits"] - exact["logits"]).double()
    return {
        "equal_tokens": int(same.sum()),
        "of": same.numel(),
        "same_best_token_on_the_same_text": int((given["logits"].argmax(2) == exact["logits"].argmax(2)).sum()),
        "logits_error": float(difference.norm() / exact["logits"].double().norm()),
        "prefill_ms": 1e3 * given["prefill_seconds"],
        "tokens_per_second": given["tokens_per_second"],
    }


def release() -> None:
    """Gives back the memory of a model that is no longer named. Modules and their forward functions name each other."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("toy", "v4-flash", "v4-pro"), default="toy")
    parser.add_argument("--checkpoint", help="a folder of transformers' or the models' own; instead of random weights")
    parser.add_argument(
        "--layers", type=int, help="how many, from the first; default 3 (toy), 8, or a checkpoint's all"
    )
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=128, help="tokens")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no-float32", action="store_true", help="compare with transformers in bfloat16 alone")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    return parser.parse_args(arguments)


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the models, prints a table, and returns what --json writes."""
    options = parse(arguments)
    layers = options.layers or (None if options.checkpoint else 3 if options.size == "toy" else 8)
    ALL_FP8_EXPERTS_FUNCTIONS.register("exact", exact_experts)
    random = not options.checkpoint
    config = (
        make_config(options.size, layers) if random else transformers.AutoConfig.from_pretrained(options.checkpoint)
    )
    numbers = torch.Generator().manual_seed(0)
    prompt = torch.randint(1, config.vocab_size, (options.batch, options.prompt), generator=numbers).to(options.device)

    def model(dtype: torch.dtype, fp4: bool, experts: str | None) -> Any:
        if not random:
            return load(options.checkpoint, layers, options.device, dtype, plain=experts is None)
        fresh = make_config(options.size, layers)
        if experts:
            fresh._experts_implementation = experts
        one = build(fresh, options.device, dtype, fp4, lambda: progress.advance(task))
        if experts:
            one.config._experts_implementation = experts
        return one

    runs: dict[str, tuple[Callable[[], Any], bool]] = {
        "float32": (lambda: model(torch.float32, True, "exact"), False),
        "transformers": (lambda: model(torch.bfloat16, False, None), True),
        "dsv4_kernels": (lambda: swap_in(model(torch.bfloat16, True, "exact")), True),
    }
    if options.no_float32:
        del runs["float32"]
    found: dict[str, dict[str, Any]] = {}
    console = Console(width=100)
    with Progress(console=console, transient=True) as progress:
        whole = progress.add_task("models", total=len(runs))
        for name, (make, warm) in runs.items():
            task = progress.add_task(f"{name}: weights", total=None)
            one = make()
            progress.update(task, description=f"{name}: generates")
            text = next(iter(found.values()))["tokens"].to(options.device) if found else None
            found[name] = measure(one, prompt, options.new_tokens, text, warm)
            del one
            release()
            progress.remove_task(task)
            progress.advance(whole)

    exact = next(iter(found.values()))
    rows = {name: compared(run, exact, options.prompt) for name, run in found.items()}
    result = {
        "machine": describe(options.device),
        "transformers": transformers.__version__,
        "weights": options.checkpoint or f"random, {options.size}",
        "layers": layers if random else config.num_hidden_layers if layers is None else layers,
        "batch": options.batch,
        "prompt": options.prompt,
        "new_tokens": options.new_tokens,
        "runs": rows,
        "speedup": rows["dsv4_kernels"]["tokens_per_second"] / rows["transformers"]["tokens_per_second"],
        "prefill_speedup": rows["transformers"]["prefill_ms"] / rows["dsv4_kernels"]["prefill_ms"],
    }
    table = Table(title=f"{result['weights']}, {result['layers']} layers, {result['machine']['device']}")
    for column in ("", "tokens equal", "best token equal", "logits' error", "prompt, ms", "tokens per second"):
        table.add_column(column, justify="right")
    for name, row in rows.items():
        equal, best = (f"{row[key]} of {row['of']}" for key in ("equal_tokens", "same_best_token_on_the_same_text"))
        speed = (f"{row['prefill_ms']:.1f}", f"{row['tokens_per_second']:.1f}")
        table.add_row(name, equal, best, f"{row['logits_error']:.2e}", *speed)
    console.print(table)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return result


if __name__ == "__main__":
    main()
