"""Token ids and expert ids as engines hold them: columns of matrices, int64; images beside text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from dsv4_kernels import InvalidArgumentError
from dsv4_kernels.cases.router import definitions
from dsv4_kernels.router import dense_router_decode, hash_router, hash_router_fused, hash_router_scored

VOCAB, EXPERTS, K, HIDDEN, TOKENS = 50, 40, 6, 64, 9
Results = tuple[torch.Tensor, torch.Tensor]


def inputs(device: str, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = {
        "table": torch.randint(EXPERTS, (VOCAB, K), generator=generator),
        "logits": 2 * torch.randn(TOKENS, EXPERTS, generator=generator),
        "hidden": torch.randn(TOKENS, HIDDEN, generator=generator).to(torch.bfloat16),
        "weight": (torch.randn(EXPERTS, HIDDEN, generator=generator) / 4).to(torch.bfloat16),
        "bias": 0.3 * torch.randn(EXPERTS, generator=generator),
        "bias_alt": 0.3 * torch.randn(EXPERTS, generator=generator),
        "images": torch.rand(TOKENS, generator=generator) < 0.5,
    }
    return {name: tensor.to(device) for name, tensor in made.items()}


def text_tokens(device: str) -> dict[str, torch.Tensor]:
    """Token ids in the layouts that engines pass; ids outside of the table among them."""
    ids = torch.tensor([3, 49, 0, 50, -1, 7, 2**31 - 1, 12, 7])
    return {
        "contiguous": ids.to(device),
        "a column": torch.stack((ids + 1, ids, ids - 1), dim=1).to(device)[:, 1],
        "a column of int32": torch.stack((ids, ids.flip(0)), dim=1).to(torch.int32).to(device)[:, 0],
        "every other": ids.repeat_interleave(2).to(device)[::2],
        "the same for all": torch.tensor([17]).to(device).expand(TOKENS),
    }


HASH_OPS: dict[str, Callable[[torch.Tensor, dict[str, torch.Tensor], dict[str, Any]], Results]] = {
    "hash_router": lambda ids, given, options: hash_router(ids, given["table"], **options),
    "hash_router_scored": lambda ids, given, options: hash_router_scored(
        ids, given["table"], given["logits"], **options
    ),
    "hash_router_fused": lambda ids, given, options: hash_router_fused(
        ids, given["table"], given["hidden"], given["weight"], **options
    ),
}


def exact(op: str, ids: torch.Tensor, given: dict[str, torch.Tensor]) -> Results:
    host = {name: tensor.cpu() for name, tensor in given.items()}
    experts = definitions.looked_up(ids.cpu(), host["table"], None)
    logits = {
        "hash_router": None,
        "hash_router_scored": host["logits"],
        "hash_router_fused": definitions.logits_of(host["hidden"], host["weight"]),
    }[op]
    return definitions.looked_up_weights(experts, logits, True, 1.0, 0.0), experts


def agrees(results: Results, weights: torch.Tensor, ids: torch.Tensor) -> bool:
    got = results[0].cpu().double(), results[1].cpu().long()
    return torch.equal(got[1], ids.long()) and torch.allclose(got[0], weights, rtol=3e-6, atol=0)


@pytest.mark.parametrize("op", HASH_OPS)
def test_token_ids_that_lie_apart(op: str, device: str) -> None:
    given = inputs(device)
    for layout, ids in text_tokens(device).items():
        assert agrees(HASH_OPS[op](ids, given, {}), *exact(op, ids, given)), layout


@pytest.mark.parametrize("op", HASH_OPS)
def test_int64_ids(op: str, device: str) -> None:
    given, ids = inputs(device), text_tokens(device)["contiguous"]
    results = HASH_OPS[op](ids, given, {"int64_ids": True})
    assert results[1].dtype == torch.int64
    assert agrees(results, *exact(op, ids, given))
    for dtype in (torch.int32, torch.int64):
        out = torch.full((TOKENS + 1, K), -7, dtype=dtype, device=device)
        HASH_OPS[op](ids, given, {"out_ids": out[:-1]})
        assert torch.equal(out[:-1].cpu().long(), results[1].cpu())
        assert (out[-1] == -7).all()


def by_bias(scores: torch.Tensor, bias: torch.Tensor, images: torch.Tensor, bias_alt: torch.Tensor) -> Results:
    """Weights in float64 and ids: the K largest of scores and the bias that holds for the token."""
    selection = scores + torch.where(images[:, None], bias_alt, bias).double()
    ids = selection.topk(K, dim=1).indices
    return definitions.weights_of(scores.gather(1, ids), True, 1.5, 0.0), ids


def test_images_of_a_hash_layer(device: str) -> None:
    """Whatever their token ids: half of these are none of the table's."""
    given = inputs(device)
    host = {name: tensor.cpu() for name, tensor in given.items()}
    ids = torch.where(given["images"], VOCAB + 3, torch.arange(TOKENS, device=device))
    padding = torch.arange(TOKENS, device=device) % 4 == 3
    assert (host["images"] & padding.cpu()).any()
    text = definitions.looked_up(ids.cpu(), host["table"], padding.cpu())
    weights, image_ids = by_bias(definitions.scores_of(host["logits"]), host["bias"], host["images"], host["bias_alt"])
    images = (host["images"] & ~padding.cpu())[:, None]
    weights = torch.where(images, weights, definitions.looked_up_weights(text, host["logits"], True, 1.5, 0.0))
    options = {"bias_alt": given["bias_alt"], "bias_alt_mask": given["images"], "padding_mask": padding, "scale": 1.5}
    results = hash_router_scored(ids, given["table"], given["logits"], **options)
    assert agrees(results, weights, torch.where(images, image_ids, text))
    # Text keeps the bits of the op that knows no images.
    alone = hash_router_scored(ids, given["table"], given["logits"], padding_mask=padding, scale=1.5)
    for result, other in zip(results, alone, strict=True):
        assert torch.equal(result[~given["images"]], other[~given["images"]])


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("int64_ids", [True, False])
def test_images_of_a_dense_layer(with_bias: bool, int64_ids: bool, device: str) -> None:
    given = inputs(device)
    host = {name: tensor.cpu() for name, tensor in given.items()}
    scores = definitions.scores_of(definitions.logits_of(host["hidden"], host["weight"]))
    bias = host["bias"] if with_bias else torch.zeros(EXPERTS)
    results = dense_router_decode(
        given["hidden"], given["weight"], given["bias"] if with_bias else None, K, scale=1.5,
        bias_alt=given["bias_alt"], bias_alt_mask=given["images"], int64_ids=int64_ids,
    )  # fmt: skip
    assert results[1].dtype == (torch.int64 if int64_ids else torch.int32)
    assert agrees(results, *by_bias(scores, bias, host["images"], host["bias_alt"]))


def test_a_mask_and_a_bias_come_together(device: str) -> None:
    given = inputs(device)
    ids = text_tokens(device)["contiguous"]
    for call in (
        lambda **options: hash_router_scored(ids, given["table"], given["logits"], **options),
        lambda **options: dense_router_decode(given["hidden"], given["weight"], None, K, **options),
    ):
        with pytest.raises(InvalidArgumentError, match="bias_alt: expected a tensor, got none"):
            call(bias_alt_mask=given["images"])
        with pytest.raises(InvalidArgumentError, match="bias_alt_mask: expected a tensor, got none"):
            call(bias_alt=given["bias_alt"])
        with pytest.raises(InvalidArgumentError, match=r"bias_alt: expected shape \[40\], got \[39\]"):
            call(bias_alt=given["bias_alt"][:-1], bias_alt_mask=given["images"])


def test_more_experts_than_one_row_of_the_kernel(device: str) -> None:
    logits, table = torch.zeros(1, 1025, device=device), torch.zeros(1, K, dtype=torch.int64, device=device)
    bias, images = torch.zeros(1025, device=device), torch.ones(1, dtype=torch.bool, device=device)
    with pytest.raises(InvalidArgumentError, match=r"logits columns \(experts, with bias_alt\): expected 1 to 1024"):
        hash_router_scored(
            torch.zeros(1, dtype=torch.int64, device=device), table, logits, bias_alt=bias, bias_alt_mask=images
        )


def test_what_lies_apart_may_not_be_written(device: str) -> None:
    """The memory between strided ids is in use only where the ids are; all of one element is one element."""
    both = torch.zeros(TOKENS, 2 * K, dtype=torch.int64, device=device)
    given = inputs(device)
    ids = text_tokens(device)["contiguous"]
    column = both.view(-1)[:: 2 * K]
    column.copy_(ids)
    with pytest.raises(InvalidArgumentError, match=r"out_ids: .* memory of token_ids"):
        hash_router(column, given["table"], out_ids=both.view(-1)[: TOKENS * K].view(TOKENS, K))
    one = both.view(-1)[TOKENS * K :][:1].expand(TOKENS)
    assert hash_router(one, given["table"], out_ids=both.view(-1)[: TOKENS * K].view(TOKENS, K))[1].shape == (TOKENS, K)
    with pytest.raises(InvalidArgumentError, match=r"out_ids: .* memory of token_ids"):
        hash_router(
            both.view(-1)[:1].expand(TOKENS), given["table"], out_ids=both.view(-1)[: TOKENS * K].view(TOKENS, K)
        )
