"""Cases of hyper-connections: the models' seams at the batch sizes of decode and prefill, and variants beyond them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dsv4_kernels.cases import Baseline, Case, Verdict, named, to_cpu, worst_relative_error
from dsv4_kernels.cases.mhc import definitions
from dsv4_kernels.mhc.presets import HYPER_CONNECTIONS, HyperConnectionPreset

# Coefficients are a few float32 operations behind a float32 sum of up to 32,768 products. TF32 would cost 4e-4.
COEFFICIENT_LIMIT = 1e-5
TOKENS_OF_TWO_LAUNCHES = 2048  # kPartTokens of csrc/mhc/seam_policy.h


def worst(*parts: Verdict) -> Verdict:
    """The part that is nearest to its limit, or furthest beyond it; NaN is."""
    return max(parts, key=lambda part: float("inf") if part.error != part.error else part.error / part.limit)


def of_bfloat16(what: str, got: Tensor, exact: definitions.Rounded, roundings: int = 1) -> Verdict:
    return Verdict(exact.error_of(got, roundings), 1.0, f"{what}, roundings")


def of_coefficients(
    got: tuple[Tensor, ...], baseline: tuple[Tensor, ...], exact: definitions.Coefficients
) -> list[Verdict]:
    parts = []
    for name, value, of_baseline, of_exact in zip(exact._fields, got, baseline, exact, strict=True):
        limit = max(2 * worst_relative_error(of_baseline, of_exact), COEFFICIENT_LIMIT)
        parts.append(Verdict(worst_relative_error(value, of_exact), limit, f"{name}, relative"))
    return parts


def check_pre(arguments: tuple[Any, ...], results: tuple[Tensor, ...], baseline: tuple[Tensor, ...]) -> Verdict:
    """Coefficients and layer input against float64: what rounding to bfloat16 and float32 sums may cost."""
    streams, fn, base, scale, pre_in, weight, epsilon, hc_epsilon, factor, iterations, _ = to_cpu(arguments)
    exact = definitions.coefficients_of(streams, fn, base, scale, epsilon, hc_epsilon, factor, iterations)
    u = definitions.collapsed(streams, exact.pre if pre_in is None else pre_in)
    n = definitions.normed(u, weight, epsilon)
    layer_input = of_bfloat16("layer input", results[0], n, 1 if weight is None else 2)
    return worst(layer_input, *of_coefficients(results[1:], baseline[1:], exact))


def check_post(arguments: tuple[Any, ...], results: tuple[Tensor, ...], baseline: tuple[Tensor, ...]) -> Verdict:
    return of_bfloat16("streams", results[0], definitions.updated(*to_cpu(arguments)))


def check_post_pre(arguments: tuple[Any, ...], results: tuple[Tensor, ...], baseline: tuple[Tensor, ...]) -> Verdict:
    """The new streams, then what follows from them as they were rounded. The baseline's may be rounded otherwise."""
    given = named("hyper_connection_post_pre", arguments)
    update = given.x, given.streams, given.post, given.comb
    seam = given[len(update) :]  # what hyper_connection_pre takes behind the streams
    of_baseline = to_cpu(baseline_pre(results[0].to(given.x.device), *seam))
    return worst(
        check_post(update, results[:1], baseline[:1]), check_pre((results[0], *seam), results[1:], of_baseline)
    )


def check_coefficients(
    arguments: tuple[Any, ...], results: tuple[Tensor, ...], baseline: tuple[Tensor, ...]
) -> Verdict:
    return worst(*of_coefficients(results, baseline, definitions.coefficients_of(*to_cpu(arguments))))


def check_collapse(arguments: tuple[Any, ...], results: tuple[Tensor, ...], baseline: tuple[Tensor, ...]) -> Verdict:
    streams, pre, weight, epsilon, _ = to_cpu(arguments)
    pre = torch.full(streams.shape[:2], 0.25, dtype=torch.float64, device="cpu") if pre is None else pre
    n = definitions.normed(definitions.collapsed(streams, pre), weight, epsilon)
    return of_bfloat16("hidden", results[0], n, 1 if weight is None else 2)


def check_head(arguments: tuple[Any, ...], results: tuple[Tensor, ...], baseline: tuple[Tensor, ...]) -> Verdict:
    streams, fn, base, scale, weight, epsilon, hc_epsilon, unrounded = to_cpu(arguments)
    pre = definitions.head_pre_of(streams, fn, base, scale, epsilon, hc_epsilon)
    return check_collapse((streams, pre, weight, epsilon, unrounded), results, baseline)


# --------------------------------------------------------------------------------------------------------- baselines


def baseline_products(streams: Tensor, fn: Tensor, epsilon: float) -> Tensor:
    x = streams.flatten(1).to(torch.float32)
    return (x @ fn.T) * torch.rsqrt(x.square().mean(1, keepdim=True) + epsilon)


def baseline_coefficients(
    streams: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    epsilon: float,
    hc_epsilon: float,
    post_factor: float,
    sinkhorn_iterations: int,
) -> tuple[Tensor, Tensor, Tensor]:
    m = baseline_products(streams, fn, epsilon)
    pre = torch.sigmoid(m[:, :4] * scale[0] + base[:4]) + hc_epsilon
    post = post_factor * torch.sigmoid(m[:, 4:8] * scale[1] + base[4:8])
    comb = torch.softmax((m[:, 8:] * scale[2] + base[8:]).view(-1, 4, 4), 2) + hc_epsilon
    comb = comb / (comb.sum(1, keepdim=True) + hc_epsilon)
    for _ in range(sinkhorn_iterations - 1):
        comb = comb / (comb.sum(2, keepdim=True) + hc_epsilon)
        comb = comb / (comb.sum(1, keepdim=True) + hc_epsilon)
    return pre, post, comb


def baseline_collapse(
    streams: Tensor, pre: Tensor | None, norm_weight: Tensor | None, epsilon: float, norm_unrounded: bool
) -> tuple[Tensor]:
    wide = streams.to(torch.float32)
    u = wide.mean(1) if pre is None else (pre[:, :, None] * wide).sum(1)
    rounded = u.to(torch.bfloat16)
    if norm_weight is None:
        return (rounded,)
    squares = u if norm_unrounded else rounded.to(torch.float32)
    root = torch.rsqrt(squares.square().mean(1, keepdim=True) + epsilon)
    return ((norm_weight.to(torch.float32) * (rounded.to(torch.float32) * root)).to(torch.bfloat16),)


def baseline_pre(
    streams: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    pre_in: Tensor | None,
    norm_weight: Tensor | None,
    epsilon: float,
    hc_epsilon: float,
    post_factor: float,
    sinkhorn_iterations: int,
    norm_unrounded: bool,
) -> tuple[Tensor, ...]:
    coefficients = baseline_coefficients(
        streams, fn, base, scale, epsilon, hc_epsilon, post_factor, sinkhorn_iterations
    )
    pre = coefficients[0] if pre_in is None else pre_in
    return *baseline_collapse(streams, pre, norm_weight, epsilon, norm_unrounded), *coefficients


def baseline_post(x: Tensor, streams: Tensor, post: Tensor, comb: Tensor) -> tuple[Tensor]:
    mixed = torch.einsum("tjk,tjh->tkh", comb, streams.to(torch.float32))
    return ((post[:, :, None] * x[:, None, :].to(torch.float32) + mixed).to(torch.bfloat16),)


def baseline_post_pre(x: Tensor, streams: Tensor, post: Tensor, comb: Tensor, *seam: Any) -> tuple[Tensor, ...]:
    (updated,) = baseline_post(x, streams, post, comb)
    return updated, *baseline_pre(updated, *seam)


def baseline_head(
    streams: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    norm_weight: Tensor | None,
    epsilon: float,
    hc_epsilon: float,
    norm_unrounded: bool,
) -> tuple[Tensor]:
    pre = torch.sigmoid(baseline_products(streams, fn, epsilon) * scale + base) + hc_epsilon
    return baseline_collapse(streams, pre, norm_weight, epsilon, norm_unrounded)


# ------------------------------------------------------------------------------------------------------------- bytes


def read_bytes(arguments: tuple[Any, ...]) -> int:
    return sum(a.numel() * a.element_size() for a in arguments if isinstance(a, Tensor))


def row_bytes(streams: Tensor) -> int:
    """Of [tokens, hidden] bfloat16."""
    return streams.shape[0] * streams.shape[2] * 2


COEFFICIENT_BYTES = 4 * (4 + 4 + 16)  # per token

BASELINES = {
    "hyper_connection_pre": Baseline(
        baseline_pre, check_pre, lambda s, *rest: read_bytes((s, *rest)) + row_bytes(s) + COEFFICIENT_BYTES * len(s)
    ),
    "hyper_connection_post": Baseline(
        baseline_post, check_post, lambda x, s, *rest: read_bytes((x, s, *rest)) + 4 * row_bytes(s)
    ),
    "hyper_connection_post_pre": Baseline(
        baseline_post_pre,
        check_post_pre,
        lambda x, s, *rest: read_bytes((x, s, *rest)) + 5 * row_bytes(s) + COEFFICIENT_BYTES * len(s),
    ),
    "hyper_connection_coefficients": Baseline(
        baseline_coefficients,
        check_coefficients,
        lambda s, *rest: read_bytes((s, *rest)) + COEFFICIENT_BYTES * len(s),
    ),
    "hyper_connection_collapse": Baseline(
        baseline_collapse, check_collapse, lambda s, *rest: read_bytes((s, *rest)) + row_bytes(s)
    ),
    "hyper_connection_head": Baseline(
        baseline_head, check_head, lambda s, *rest: read_bytes((s, *rest)) + row_bytes(s)
    ),
}


# ------------------------------------------------------------------------------------------------------------ inputs


def random_streams(generator: torch.Generator, tokens: int, hidden: int) -> Tensor:
    return torch.randn(tokens, 4, hidden, generator=generator, dtype=torch.float32, device="cpu").to(torch.bfloat16)


def random_update(generator: torch.Generator, tokens: int, hidden: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, streams, post and comb as a seam finds them."""
    x = torch.randn(tokens, hidden, generator=generator, dtype=torch.float32, device="cpu").to(torch.bfloat16)
    post = 2 * torch.rand(tokens, 4, generator=generator, dtype=torch.float32, device="cpu")
    comb = torch.softmax(2 * torch.randn(tokens, 4, 4, generator=generator, dtype=torch.float32, device="cpu"), 1)
    return x, random_streams(generator, tokens, hidden), post, comb


def random_projection(generator: torch.Generator, hidden: int, rows: int = 24) -> tuple[Tensor, Tensor, Tensor]:
    """fn, base and scale. Products are of the size of one, and the softmax sees differences of a few."""
    fn = torch.randn(rows, 4 * hidden, generator=generator, dtype=torch.float32, device="cpu") * (4 * hidden) ** -0.5
    base = torch.randn(rows, generator=generator, dtype=torch.float32, device="cpu")
    return fn, base, 0.5 + torch.rand(3 if rows == 24 else 1, generator=generator, dtype=torch.float32, device="cpu")


def random_weight(generator: torch.Generator, hidden: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return (1 + 0.2 * torch.randn(hidden, generator=generator, dtype=torch.float32, device="cpu")).to(dtype)


def case(
    op: str,
    preset: HyperConnectionPreset | None,
    tokens: int,
    hidden: int = 0,
    *,
    delayed: bool = False,
    normed: bool = True,
    weight_type: torch.dtype = torch.bfloat16,
    iterations: int = 20,
    mean: bool = False,
    norm_unrounded: bool = False,
    benched: bool = False,
) -> Case:
    """One problem; of a model if there is a preset, else of that many columns."""
    hidden = preset.hidden_size if preset else hidden
    epsilon, hc_epsilon, factor = (
        (preset.epsilon, preset.hc_epsilon, preset.post_factor) if preset else (1e-6, 1e-6, 2.0)
    )
    delayed = delayed or (preset is not None and preset.delayed)
    short = op.removeprefix("hyper_connection_")

    def make(generator: torch.Generator) -> tuple[Any, ...]:
        weight = random_weight(generator, hidden, weight_type) if normed else None
        if short == "post":
            return random_update(generator, tokens, hidden)
        if short == "collapse":
            pre = None if mean else torch.rand(tokens, 4, generator=generator, dtype=torch.float32, device="cpu")
            return random_streams(generator, tokens, hidden), pre, weight, epsilon, norm_unrounded
        if short == "head":
            projection = random_projection(generator, hidden, rows=4)
            return random_streams(generator, tokens, hidden), *projection, weight, epsilon, hc_epsilon, norm_unrounded
        projection = random_projection(generator, hidden)
        constants = epsilon, hc_epsilon, factor, iterations
        if short == "coefficients":
            return random_streams(generator, tokens, hidden), *projection, *constants
        pre_in = torch.rand(tokens, 4, generator=generator, dtype=torch.float32, device="cpu") if delayed else None
        seam = *projection, pre_in, weight, *constants, norm_unrounded
        if short == "pre":
            return random_streams(generator, tokens, hidden), *seam
        return *random_update(generator, tokens, hidden), *seam

    details = [f"{preset.name}, {tokens} tokens" if preset else f"{tokens} x {hidden}"]
    details += ["delayed"] if delayed and short in ("pre", "post_pre") else []
    details += [] if normed else ["no norm"]
    details += ["float32 weight"] if weight_type == torch.float32 else []
    details += [f"{iterations} iterations"] if iterations != 20 else []
    details += ["mean"] if mean else []
    details += ["unrounded"] if norm_unrounded else []
    return Case(
        op,
        ", ".join(details),
        make,
        BASELINES[op],
        benched=benched,
        launches=1 if short in ("post", "collapse") else 2 * -(-tokens // TOKENS_OF_TWO_LAUNCHES),
        large=tokens * hidden > 8 * 8192,
        labels={"preset": preset.name, "tokens": tokens} if preset else {"hidden": hidden, "tokens": tokens},
    )


FLASH, PRO, FLASH_41, GLM = (HYPER_CONNECTIONS[name] for name in ("v4-flash", "v4-pro", "v41-flash", "glm-5.3-flash"))

CASES = (
    *(case("hyper_connection_post_pre", FLASH, tokens, benched=True) for tokens in (1, 16, 64, 512, 8192)),
    *(case("hyper_connection_post_pre", PRO, tokens, benched=True) for tokens in (1, 16, 64, 512, 8192)),
    *(case("hyper_connection_post_pre", FLASH_41, tokens, benched=True) for tokens in (1, 64, 8192)),
    case("hyper_connection_post_pre", GLM, 1),
    case("hyper_connection_post_pre", None, 9, 8),
    case("hyper_connection_post_pre", None, 3, 264, delayed=True, normed=False),
    case("hyper_connection_post_pre", None, 9, 520, weight_type=torch.float32, norm_unrounded=True),
    case("hyper_connection_post_pre", None, 2, 8192, iterations=1),
    *(case("hyper_connection_pre", preset, tokens, benched=True) for preset in (FLASH, PRO) for tokens in (1, 8192)),
    case("hyper_connection_pre", None, 11, 72),
    case("hyper_connection_pre", None, 5, 520, delayed=True, weight_type=torch.float32, iterations=3),
    case("hyper_connection_pre", None, 4, 40, normed=False),
    *(case("hyper_connection_post", preset, tokens, benched=True) for preset in (FLASH, PRO) for tokens in (1, 8192)),
    case("hyper_connection_post", None, 9, 8),
    case("hyper_connection_post", None, 3, 2056),
    *(case("hyper_connection_coefficients", FLASH_41, tokens, benched=True) for tokens in (1, 8192)),
    case("hyper_connection_coefficients", None, 13, 136),
    *(case("hyper_connection_collapse", FLASH_41, tokens, benched=True) for tokens in (1, 8192)),
    case("hyper_connection_collapse", GLM, 3, mean=True),
    case("hyper_connection_collapse", None, 7, 24, weight_type=torch.float32, norm_unrounded=True),
    case("hyper_connection_collapse", None, 2, 8192, normed=False),
    *(case("hyper_connection_head", preset, tokens, benched=True) for preset in (FLASH, PRO) for tokens in (1, 8192)),
    case("hyper_connection_head", None, 10, 328, normed=False),
    case("hyper_connection_head", None, 3, 16, weight_type=torch.float32, norm_unrounded=True),
)
