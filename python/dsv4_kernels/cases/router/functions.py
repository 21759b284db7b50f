"""Cases of the router's ops: the models' gates at the batch sizes of decode and prefill, and variants beyond them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dsv4_kernels.cases import (
    FLOAT32_ULP,
    Baseline,
    Case,
    Composite,
    Verdict,
    named,
    to_cpu,
    worst_relative_error,
)
from dsv4_kernels.cases.router import definitions
from dsv4_kernels.presets import PRESETS, Preset
from dsv4_kernels.router.prefill import dense_router_prefill

TOKENS = (1, 16, 64, 1024, 8192)
DECODE_TOKENS = (1, 8, 16, 33, 64)
FUSED_TOKENS = (1, 16, 64)
ACTIVATION_TOKENS = (1, 64, 128, 1024, 8192)
TOPK_SHAPES = (
    *((rows, columns, 6) for columns in (256, 384) for rows in (1, 128, 1024, 8192)),
    *((rows, 256, 32) for rows in (1, 8192)),
    (64, 32768, 6),
    (64, 32768, 512),
    (64, 32768, 2048),
    (1, 262144, 2048),
)

# A weight is a handful of float32 operations: whatever plain torch loses, this much is always allowed.
WEIGHT_LIMIT = 4 * FLOAT32_ULP


def check_lookup(arguments: tuple[Any, ...], results: tuple[Tensor, ...], baseline: tuple[Tensor, ...]) -> Verdict:
    """Uniform weights, as any with logits that are all alike."""
    given = named("hash_router", to_cpu(arguments))
    ids = definitions.looked_up(given.token_ids, given.hash_lut, given.padding_mask)
    return check_looked_up(ids, definitions.looked_up_weights(ids, None, True, 1.0, 0.0), results, baseline)


def check_lookup_scored(
    arguments: tuple[Any, ...], results: tuple[Tensor, ...], baseline: tuple[Tensor, ...]
) -> Verdict:
    given = named("hash_router_scored", to_cpu(arguments))
    ids = definitions.looked_up(given.token_ids, given.hash_lut, given.padding_mask)
    weighing = given.renormalize, given.scale, given.epsilon
    weights = definitions.looked_up_weights(ids, given.logits, *weighing)
    if given.bias_alt_mask is None:
        return check_looked_up(ids, weights, results, baseline)
    # Tokens of images are chosen as a dense layer's are; the others are checked by themselves.
    images = given.bias_alt_mask
    text = check_looked_up(
        ids[~images], weights[~images], tuple(result[~images] for result in results), (baseline[0][~images],)
    )
    padding = None if given.padding_mask is None else given.padding_mask[images]
    chosen = given.logits[images], given.bias_alt, ids.shape[1], definitions.SQRT_SOFTPLUS, *weighing
    image = check_activation_topk(
        (*chosen, padding, None, None, given.int64_ids),
        tuple(result[images] for result in results),
        tuple(result[images] for result in baseline),
    )
    return image if text.passed else text


def check_fused(arguments: tuple[Any, ...], results: tuple[Tensor, ...], baseline: tuple[Tensor, ...]) -> Verdict:
    given = named("hash_router_fused", to_cpu(arguments))
    ids = definitions.looked_up(given.token_ids, given.hash_lut, given.padding_mask)
    logits, weighing = (
        definitions.logits_of(given.hidden, given.weight),
        (given.renormalize, given.scale, given.epsilon),
    )
    return check_looked_up(ids, definitions.looked_up_weights(ids, logits, *weighing), results, baseline)


def check_looked_up(ids: Tensor, weights: Tensor, results: tuple[Tensor, ...], baseline: tuple[Tensor, ...]) -> Verdict:
    """Ids must be the table's; weights as near to float64 as twice plain torch's."""
    if not torch.equal(results[1].to(ids.dtype), ids):
        return Verdict(float((results[1] != ids).sum()), 0.0, "wrong ids")
    limit = max(2 * worst_relative_error(baseline[0], weights), WEIGHT_LIMIT)
    return Verdict(worst_relative_error(results[0], weights), limit, "weight, relative")


def check_selection(arguments: tuple[Any, ...], results: tuple[Tensor, ...], baseline: tuple[Tensor, ...]) -> Verdict:
    """A chosen expert is right if its float64 score is within rounding of the k-th best; so is their order. Weights are
    checked for the experts that were chosen. Rounding is twice what plain float32 torch shows on the same inputs.
    """
    on_device = named("dense_router_decode", arguments)
    baseline_scores = definitions.scores_of(baseline_logits(on_device.hidden, on_device.weight).cpu())
    given = named("dense_router_decode", to_cpu(arguments))
    weight, k, weighing = given.weight, given.k, (given.renormalize, given.scale, given.epsilon)
    scores = definitions.scores_of(definitions.logits_of(given.hidden, weight))
    selection = scores if given.bias is None else scores + given.bias.to(torch.float64)
    for token in [] if given.bias_alt_mask is None else given.bias_alt_mask.nonzero()[:, 0].tolist():
        selection[token] = scores[token] + given.bias_alt.to(torch.float64)
    rounding = 2 * float((baseline_scores - scores).abs().max()) + 2 * FLOAT32_ULP * float(selection.abs().max())

    weights, ids = results[0], results[1].to(torch.int64)
    if bool(((ids < 0) | (ids >= weight.shape[0])).any()):
        return Verdict(float("inf"), 0.0, "ids out of range")
    if any(len(set(row)) != k for row in ids.tolist()):
        return Verdict(float("inf"), 0.0, "ids chosen twice")
    chosen = selection.gather(1, ids)
    best = selection.topk(k, dim=1).values
    shortfall = float((best - chosen).max()) if ids.numel() else 0.0  # position by position: membership and order
    if shortfall > rounding:
        return Verdict(shortfall, rounding, "score of a chosen expert")
    exact = definitions.weights_of(scores.gather(1, ids), *weighing)
    rounded = definitions.weights_of(baseline_scores.gather(1, ids), *weighing)
    limit = max(2 * worst_relative_error(rounded, exact), WEIGHT_LIMIT)
    return Verdict(worst_relative_error(weights, exact), limit, "weight, relative")


def baseline_lookup(
    token_ids: Tensor, hash_lut: Tensor, padding_mask: Tensor | None, int64_ids: bool = False
) -> tuple[Tensor, Tensor]:
    """As an engine would write it: no check of the ids."""
    ids = hash_lut[token_ids].to(id_dtype(int64_ids))
    return without_padding(torch.full_like(ids, 1.0 / hash_lut.shape[1], dtype=torch.float32), ids, padding_mask)


def id_dtype(int64_ids: bool) -> torch.dtype:
    return torch.int64 if int64_ids else torch.int32


def without_padding(weights: Tensor, ids: Tensor, padding_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Weight 0 and id -1 for the tokens that the mask marks."""
    if padding_mask is None:
        return weights, ids
    return torch.where(padding_mask[:, None], 0.0, weights), torch.where(padding_mask[:, None], -1, ids)


def baseline_weigh(scores: Tensor, renormalize: bool, scale: float, epsilon: float) -> Tensor:
    return (scores / (scores.sum(dim=1, keepdim=True) + epsilon) if renormalize else scores) * scale


def baseline_lookup_scored(
    token_ids: Tensor,
    hash_lut: Tensor,
    logits: Tensor,
    padding_mask: Tensor | None,
    renormalize: bool,
    scale: float,
    epsilon: float,
    bias_alt: Tensor | None = None,
    bias_alt_mask: Tensor | None = None,
    int64_ids: bool = False,
) -> tuple[Tensor, Tensor]:
    ids = hash_lut[token_ids].to(torch.int64)
    if bias_alt is not None and bias_alt_mask is not None:
        all_scores = torch.nn.functional.softplus(logits.to(torch.float32)).sqrt()
        ids = torch.where(bias_alt_mask[:, None], (all_scores + bias_alt).topk(ids.shape[1], dim=1).indices, ids)
    scores = torch.nn.functional.softplus(logits.to(torch.float32).gather(1, ids)).sqrt()
    weights = baseline_weigh(scores, renormalize, scale, epsilon)
    return without_padding(weights, ids.to(id_dtype(int64_ids)), padding_mask)


def baseline_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """bfloat16 operands, float32 result: what the models compute, in one library call where there is one."""
    if hidden.is_cuda:
        return torch.mm(hidden, weight.T, out_dtype=torch.float32)
    return hidden.to(torch.float32) @ weight.to(torch.float32).T


def baseline_fused(
    token_ids: Tensor, hash_lut: Tensor, hidden: Tensor, weight: Tensor, padding_mask: Tensor | None, *weighing: Any
) -> tuple[Tensor, Tensor]:
    """As engines do: all logits, then the chosen ones."""
    renormalize, scale, epsilon, *ids = weighing
    logits = baseline_logits(hidden, weight)
    return baseline_lookup_scored(
        token_ids, hash_lut, logits, padding_mask, renormalize, scale, epsilon, None, None, *ids
    )


def baseline_selection(
    scores: Tensor, bias: Tensor | None, bias_alt: Tensor | None, bias_alt_mask: Tensor | None
) -> Tensor:
    selection = scores if bias is None else scores + bias
    if bias_alt is None or bias_alt_mask is None:
        return selection
    return torch.where(bias_alt_mask[:, None], scores + bias_alt, selection)


def baseline_dense(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    k: int,
    renormalize: bool,
    scale: float,
    epsilon: float,
    bias_alt: Tensor | None = None,
    bias_alt_mask: Tensor | None = None,
    int64_ids: bool = False,
) -> tuple[Tensor, Tensor]:
    scores = torch.nn.functional.softplus(baseline_logits(hidden, weight)).sqrt()
    ids = baseline_selection(scores, bias, bias_alt, bias_alt_mask).topk(k, dim=1).indices
    return baseline_weigh(scores.gather(1, ids), renormalize, scale, epsilon), ids.to(id_dtype(int64_ids))


def baseline_activation_topk(
    logits: Tensor,
    bias: Tensor | None,
    k: int,
    score_function: int,
    renormalize: bool,
    scale: float,
    epsilon: float,
    padding_mask: Tensor | None,
    bias_alt: Tensor | None,
    bias_alt_mask: Tensor | None,
    int64_ids: bool,
) -> tuple[Tensor, Tensor]:
    x = logits.to(torch.float32)
    if score_function == definitions.SOFTMAX:
        scores = torch.softmax(x, dim=1)
    elif score_function == definitions.SIGMOID:
        scores = torch.sigmoid(x)
    else:
        scores = torch.nn.functional.softplus(x).sqrt()
    ids = baseline_selection(scores, bias, bias_alt, bias_alt_mask).topk(k, dim=1).indices
    weights = baseline_weigh(scores.gather(1, ids), renormalize, scale, epsilon)
    return without_padding(weights, ids.to(id_dtype(int64_ids)), padding_mask)


def check_activation_topk(
    arguments: tuple[Any, ...], results: tuple[Tensor, ...], baseline: tuple[Tensor, ...]
) -> Verdict:
    """As check_selection, from given logits: rounding is that of the scores alone."""
    logits, bias, k, score_function, renormalize, scale, epsilon, padding, bias_alt, mask, _ = to_cpu(arguments)
    scores = definitions.scores_of(logits, score_function)
    selection = scores if bias is None else scores + bias.to(torch.float64)
    for token in [] if mask is None else mask.nonzero()[:, 0].tolist():
        selection[token] = scores[token] + bias_alt.to(torch.float64)
    weights, ids = results[0], results[1].to(torch.int64)
    if padding is not None:
        if bool((ids[padding] != -1).any() | (weights[padding] != 0).any()):
            return Verdict(float("inf"), 0.0, "padding")
        scores, selection, weights, ids = scores[~padding], selection[~padding], weights[~padding], ids[~padding]
    if bool(((ids < 0) | (ids >= logits.shape[1])).any()):
        return Verdict(float("inf"), 0.0, "ids out of range")
    if any(len(set(row)) != k for row in ids.tolist()):
        return Verdict(float("inf"), 0.0, "ids chosen twice")
    rounding = 8 * FLOAT32_ULP * float(selection.abs().max())
    shortfall = float((selection.topk(k, dim=1).values - selection.gather(1, ids)).max())  # membership and order
    if shortfall > rounding:
        return Verdict(shortfall, rounding, "score of a chosen expert")
    exact = definitions.weights_of(scores.gather(1, ids), renormalize, scale, epsilon)
    of_baseline = baseline[0] if padding is None else baseline[0][~padding]
    limit = max(2 * worst_relative_error(of_baseline, exact), WEIGHT_LIMIT)
    if not bool((results[1] == baseline[1]).all()):  # it chose others among near equals: its weights are no measure
        limit = WEIGHT_LIMIT
    return Verdict(worst_relative_error(weights, exact), limit, "weight, relative")


def baseline_topk_select(
    scores: Tensor, k: int, lengths: Tensor | None, sorted: bool, with_values: bool
) -> tuple[Tensor, Tensor]:
    columns = scores.shape[1]
    if lengths is not None:
        scores = scores.masked_fill(torch.arange(columns, device=scores.device) >= lengths[:, None], -torch.inf)
    values, ids = scores.topk(min(k, columns), dim=1, sorted=sorted)
    if lengths is not None:
        ids = ids.masked_fill(ids >= lengths[:, None], -1)
    if k > columns:
        values = torch.nn.functional.pad(values, (0, k - columns), value=-torch.inf)
        ids = torch.nn.functional.pad(ids, (0, k - columns), value=-1)
    return values.to(torch.float32)[:, : k if with_values else 0], ids.to(torch.int32)


def check_topk_select(arguments: tuple[Any, ...], results: tuple[Tensor, ...], baseline: tuple[Tensor, ...]) -> Verdict:
    """Nothing is rounded, so everything must be equal, values bit for bit."""
    scores, k, lengths, by_score, with_values = to_cpu(arguments)
    ids = definitions.largest(scores, k, lengths, by_score)
    wrong = int((results[1] != ids).sum())
    if with_values:
        values = scores.to(torch.float32).gather(1, ids.clamp(min=0).to(torch.int64)).masked_fill(ids < 0, -torch.inf)
        wrong += int((results[0].view(torch.int32) != values.view(torch.int32)).sum())
    return Verdict(float(wrong), 0.0, "wrong values and ids")


RESULT_BYTES = 8  # of a routed slot: a float32 weight and an int32 id


def lookup_bytes(token_ids: Tensor, hash_lut: Tensor, *_: Any) -> int:
    slots = token_ids.shape[0] * hash_lut.shape[1]
    return token_ids.shape[0] * token_ids.element_size() + slots * (hash_lut.element_size() + RESULT_BYTES)


def lookup_scored_bytes(token_ids: Tensor, hash_lut: Tensor, logits: Tensor, *_: Any) -> int:
    slots = token_ids.shape[0] * hash_lut.shape[1]
    return lookup_bytes(token_ids, hash_lut) + slots * logits.element_size()


def fused_bytes(token_ids: Tensor, hash_lut: Tensor, hidden: Tensor, weight: Tensor, *_: Any) -> int:
    """The rows of the gate that some token chose, each once."""
    rows: int = hash_lut[token_ids].unique().numel() * weight.shape[1] * weight.element_size()
    return lookup_bytes(token_ids, hash_lut) + hidden.numel() * hidden.element_size() + rows


def dense_bytes(hidden: Tensor, weight: Tensor, bias: Tensor | None, k: int, *_: Any) -> int:
    read = [tensor for tensor in (hidden, weight, bias) if tensor is not None]
    return sum(tensor.numel() * tensor.element_size() for tensor in read) + hidden.shape[0] * k * RESULT_BYTES


def activation_topk_bytes(logits: Tensor, bias: Tensor | None, k: int, *_: Any) -> int:
    return logits.numel() * logits.element_size() + logits.shape[0] * k * RESULT_BYTES


def topk_select_bytes(scores: Tensor, k: int, *_: Any) -> int:
    return scores.numel() * scores.element_size() + scores.shape[0] * k * RESULT_BYTES


BASELINES = {
    "hash_router": Baseline(baseline_lookup, check_lookup, lookup_bytes),
    "hash_router_scored": Baseline(baseline_lookup_scored, check_lookup_scored, lookup_scored_bytes),
    "hash_router_fused": Baseline(baseline_fused, check_fused, fused_bytes),
    "dense_router_decode": Baseline(baseline_dense, check_selection, dense_bytes),
    "activation_topk": Baseline(baseline_activation_topk, check_activation_topk, activation_topk_bytes),
    "topk_select": Baseline(baseline_topk_select, check_topk_select, topk_select_bytes),
}


def padding_of(generator: torch.Generator, tokens: int, padded: bool) -> Tensor | None:
    """A mask that marks about a third of the tokens, or none."""
    return torch.rand(tokens, generator=generator, dtype=torch.float32, device="cpu") < 0.3 if padded else None


def image_mask_of(generator: torch.Generator, tokens: int) -> Tensor:
    """A mask that marks about half of the tokens, among them the first."""
    mask = torch.rand(tokens, generator=generator, dtype=torch.float32, device="cpu") < 0.5
    mask[:1] = True
    return mask


def hash_router_case(
    preset: Preset, tokens: int, dtype: torch.dtype = torch.int64, padded: bool = False, int64_ids: bool = False
) -> Case:
    def make(generator: torch.Generator) -> tuple[Any, ...]:
        token_ids = torch.randint(preset.vocab_size, (tokens,), generator=generator, dtype=dtype, device="cpu")
        table = torch.randint(
            preset.experts, (preset.vocab_size, preset.top_k), generator=generator, dtype=dtype, device="cpu"
        )
        return token_ids, table, padding_of(generator, tokens, padded), int64_ids

    return Case(
        "hash_router",
        f"{preset.name}, {tokens} tokens, {str(dtype).removeprefix('torch.')}"
        + ", padding" * padded
        + ", int64 ids" * int64_ids,
        make,
        BASELINES["hash_router"],
        benched=dtype is torch.int32 and preset.name == "v4-flash",
        labels={"preset": preset.name, "tokens": tokens},
    )


def hash_router_scored_case(
    preset: Preset, tokens: int, logit_dtype: torch.dtype = torch.float32, padded: bool = False, images: bool = False
) -> Case:
    """images: a bias for about half of the tokens, and int64 ids."""

    def make(generator: torch.Generator) -> tuple[Any, ...]:
        token_ids = torch.randint(preset.vocab_size, (tokens,), generator=generator, dtype=torch.int32, device="cpu")
        table = torch.randint(
            preset.experts, (preset.vocab_size, preset.top_k), generator=generator, dtype=torch.int32, device="cpu"
        )
        logits = (3 * torch.randn(tokens, preset.experts, generator=generator, dtype=torch.float32, device="cpu")).to(
            logit_dtype
        )
        settings = token_ids, table, logits, padding_of(generator, tokens, padded), True, preset.routed_scaling, 0.0
        if not images:
            return *settings, None, None, False
        bias_alt = 0.1 * torch.randn(preset.experts, generator=generator, dtype=torch.float32, device="cpu")
        return *settings, bias_alt, image_mask_of(generator, tokens), True

    return Case(
        "hash_router_scored",
        f"{preset.name}, {tokens} tokens, {str(logit_dtype).removeprefix('torch.')}"
        + ", padding" * padded
        + ", images" * images,
        make,
        BASELINES["hash_router_scored"],
        benched=logit_dtype is torch.float32 and preset.name == "v4-flash" and not images,
        labels={"preset": preset.name, "tokens": tokens},
    )


def gate_inputs(
    generator: torch.Generator, tokens: int, hidden_size: int, experts: int, with_bias: bool = True
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Hidden states and a gate whose logits spread as a trained gate's do: a few units."""
    hidden = torch.randn(tokens, hidden_size, generator=generator, dtype=torch.float32, device="cpu").to(torch.bfloat16)
    weight = (
        torch.randn(experts, hidden_size, generator=generator, dtype=torch.float32, device="cpu") * 2 / hidden_size**0.5
    ).to(torch.bfloat16)
    bias = torch.randn(experts, generator=generator, dtype=torch.float32, device="cpu") * 0.1 if with_bias else None
    return hidden, weight, bias


def fused_case(
    name: str,
    tokens: int,
    hidden_size: int,
    experts: int,
    k: int,
    vocab_size: int,
    scale: float = 1.0,
    renormalize: bool = True,
    padded: bool = False,
    int64_ids: bool = False,
    benched: bool = False,
) -> Case:
    def make(generator: torch.Generator) -> tuple[Any, ...]:
        token_ids = torch.randint(vocab_size, (tokens,), generator=generator, dtype=torch.int32, device="cpu")
        table = torch.randint(experts, (vocab_size, k), generator=generator, device="cpu")
        hidden, weight, _ = gate_inputs(generator, tokens, hidden_size, experts)
        padding = padding_of(generator, tokens, padded)
        return token_ids, table, hidden, weight, padding, renormalize, scale, 0.0, int64_ids

    return Case(
        "hash_router_fused",
        f"{name}, {tokens} tokens",
        make,
        BASELINES["hash_router_fused"],
        benched=benched,
        labels={"preset": name, "tokens": tokens},
    )


def dense_case(
    name: str,
    tokens: int,
    hidden_size: int,
    experts: int,
    k: int,
    scale: float = 1.0,
    renormalize: bool = True,
    with_bias: bool = True,
    images: bool = False,
    benched: bool = False,
) -> Case:
    """images: a bias for about half of the tokens, and int64 ids."""

    def make(generator: torch.Generator) -> tuple[Any, ...]:
        settings = *gate_inputs(generator, tokens, hidden_size, experts, with_bias), k, renormalize, scale, 0.0
        if not images:
            return *settings, None, None, False
        bias_alt = 0.1 * torch.randn(experts, generator=generator, dtype=torch.float32, device="cpu")
        return *settings, bias_alt, image_mask_of(generator, tokens), True

    return Case(
        "dense_router_decode",
        f"{name}, {tokens} tokens",
        make,
        BASELINES["dense_router_decode"],
        benched=benched,
        labels={"preset": name, "tokens": tokens},
    )


def activation_case(
    name: str,
    tokens: int,
    experts: int,
    k: int,
    score_function: int = definitions.SQRT_SOFTPLUS,
    dtype: torch.dtype = torch.float32,
    scale: float = 1.0,
    renormalize: bool = True,
    with_options: bool = False,
    benched: bool = False,
) -> Case:
    """with_options: padding, a bias for marked tokens and int64 ids."""

    def make(generator: torch.Generator) -> tuple[Any, ...]:
        logits = (2 * torch.randn(tokens, experts, generator=generator, dtype=torch.float32, device="cpu")).to(dtype)
        bias, bias_alt = 0.1 * torch.randn(2, experts, generator=generator, dtype=torch.float32, device="cpu")
        settings = (logits, bias, k, score_function, renormalize, scale, 1e-20 if with_options else 0.0)
        if not with_options:
            return *settings, None, None, None, False
        padding, marked = torch.randint(2, (2, tokens), generator=generator, device="cpu").to(torch.bool)
        return *settings, padding & ~marked, bias_alt.clone(), marked, True

    return Case(
        "activation_topk",
        f"{name}, {tokens} tokens, {str(dtype).removeprefix('torch.')}",
        make,
        BASELINES["activation_topk"],
        benched=benched,
        labels={"preset": name, "tokens": tokens},
    )


def topk_select_case(
    rows: int,
    columns: int,
    k: int,
    dtype: torch.dtype = torch.float32,
    sorted: bool = True,
    with_values: bool = True,
    with_lengths: bool = False,
    levels: int = 0,
    benched: bool = False,
) -> Case:
    """levels: round the scores to so many different ones, so that most are ties."""

    def make(generator: torch.Generator) -> tuple[Any, ...]:
        scores = torch.randn(rows, columns, generator=generator, dtype=torch.float32, device="cpu")
        if levels:
            scores = (scores * (levels / 6)).round()
        lengths = torch.randint(
            columns // 3, columns + 9, (rows,), generator=generator, dtype=torch.int32, device="cpu"
        )
        return scores.to(dtype), k, lengths if with_lengths else None, sorted, with_values

    name = f"{rows} x {columns}, k {k}, {str(dtype).removeprefix('torch.')}"
    options = {"by column": not sorted, "ids only": not with_values, "lengths": with_lengths}
    options[f"{levels} levels"] = levels > 0
    name += "".join(f", {text}" for text, holds in options.items() if holds)
    return Case(
        "topk_select",
        name,
        make,
        BASELINES["topk_select"],
        benched=benched,
        large=rows * columns > 1 << 17,
        labels={"rows": rows, "columns": columns, "k": k},
    )


CASES = (
    *(hash_router_case(PRESETS["v4-flash"], tokens, torch.int32) for tokens in TOKENS),
    *(hash_router_case(PRESETS["v4-pro"], tokens, torch.int64) for tokens in (1, 1000)),
    hash_router_case(PRESETS["v4-flash"], 11, padded=True),
    hash_router_case(PRESETS["v4-flash"], 11, torch.int32, padded=True, int64_ids=True),
    *(hash_router_scored_case(PRESETS["v4-flash"], tokens) for tokens in TOKENS),
    *(hash_router_scored_case(PRESETS["v4-pro"], tokens, torch.bfloat16) for tokens in (1, 1000)),
    hash_router_scored_case(PRESETS["v4-flash"], 11, padded=True),
    hash_router_scored_case(PRESETS["v4-flash"], 21, padded=True, images=True),
    hash_router_scored_case(PRESETS["v4-pro"], 2100, torch.bfloat16, images=True),
    *(
        fused_case(p.name, tokens, p.hidden_size, p.experts, p.top_k, p.vocab_size, p.routed_scaling, benched=True)
        for p in PRESETS.values()
        if p.hash_layers
        for tokens in FUSED_TOKENS
    ),
    fused_case("rows beyond one step", 300, 17000, 19, 3, 50),
    fused_case("one chunk, not renormalised", 33, 8, 7, 5, 11, 1.0, renormalize=False),
    fused_case("padding", 9, 64, 16, 4, 20, 1.5, padded=True),
    fused_case("padding, int64 ids", 9, 64, 16, 4, 20, 1.5, padded=True, int64_ids=True),
    fused_case("largest k", 40, 1088, 129, 32, 70, 2.5),
    *(
        dense_case(p.name, tokens, p.hidden_size, p.experts, p.top_k, p.routed_scaling, benched=True)
        for p in PRESETS.values()
        for tokens in DECODE_TOKENS
    ),
    dense_case("no bias, not renormalised", 5, 512, 100, 3, 1.0, renormalize=False, with_bias=False),
    dense_case("one expert", 2, 64, 1, 1),
    dense_case("most experts, largest k", 64, 192, 512, 32),
    dense_case("top-3 of 129", 17, 1088, 129, 3),
    dense_case("images", 33, 512, 256, 6, 1.5, images=True),
    dense_case("images, no other bias", 9, 256, 384, 6, 2.5, with_bias=False, images=True),
    *(
        activation_case(p.name, tokens, p.experts, p.top_k, scale=p.routed_scaling, benched=True)
        for p in (PRESETS["v4-flash"], PRESETS["v4-pro"])
        for tokens in ACTIVATION_TOKENS
    ),
    activation_case("v4-flash", 128, 256, 6, dtype=torch.bfloat16, scale=1.5, benched=True),
    activation_case("every option", 77, 384, 6, dtype=torch.bfloat16, scale=2.5, with_options=True),
    activation_case("sigmoid, top-8 of 160", 33, 160, 8, definitions.SIGMOID, scale=2.5),
    activation_case("softmax, top-4 of 60, not renormalised", 33, 60, 4, definitions.SOFTMAX, renormalize=False),
    activation_case("softmax, top-9 of 515, every option", 9, 515, 9, definitions.SOFTMAX, with_options=True),
    activation_case("one expert", 3, 1, 1),
    activation_case("top-32 of 1024", 17, 1024, 32),
    *(topk_select_case(*shape, benched=True) for shape in TOPK_SHAPES),
    topk_select_case(64, 32768, 2048, torch.bfloat16, benched=True),
    topk_select_case(64, 32768, 2048, sorted=False, with_values=False, benched=True),
    topk_select_case(5, 300, 32, torch.bfloat16, with_lengths=True),
    topk_select_case(3, 1000, 6, levels=5),
    topk_select_case(3, 1000, 31, sorted=False, with_lengths=True),
    topk_select_case(3, 2049, 2048),
    topk_select_case(3, 9000, 33, levels=9, with_lengths=True),
    topk_select_case(2, 40000, 777, torch.bfloat16, sorted=False, with_lengths=True),
)


def prefill_case(preset: Preset, tokens: int) -> Composite:
    def make(generator: torch.Generator) -> tuple[Any, ...]:
        inputs = gate_inputs(generator, tokens, preset.hidden_size, preset.experts)
        return *inputs, preset.top_k, True, preset.routed_scaling, 0.0

    def route(hidden: Tensor, weight: Tensor, bias: Tensor | None, k: int, *weighing: Any) -> tuple[Tensor, Tensor]:
        renormalize, scale, epsilon = weighing
        return dense_router_prefill(hidden, weight, bias, k, renormalize=renormalize, scale=scale, epsilon=epsilon)

    return Composite(
        "dense_router_prefill",
        f"{preset.name}, {tokens} tokens",
        make,
        BASELINES["dense_router_decode"],
        large=tokens > 1024,
        labels={"preset": preset.name, "tokens": tokens},
        function=route,
    )


COMPOSITES = tuple(
    prefill_case(PRESETS[name], tokens) for name in ("v4-flash", "v4-pro") for tokens in (128, 1024, 8192)
)
