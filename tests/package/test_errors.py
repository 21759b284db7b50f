"""Error texts through Python: each names the op, the argument, what it needs and what it got.

Run on CPU tensors: the checks are the library's own and are made before it is decided where to run.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import dsv4_kernels
import pytest
import torch
from dsv4_kernels import moe, router
from dsv4_kernels.cases import all_cases
from dsv4_kernels.ops import OPS

FORM = r"{op}: {argument}: (expected .+, got .+|must be (given|omitted) .+)"

TOKENS, VOCAB, EXPERTS, K, HIDDEN = 4, 10, 16, 2, 128


def token_ids(**options: Any) -> torch.Tensor:
    return torch.zeros(TOKENS, dtype=options.get("dtype", torch.int64))


def table(k: int = K) -> torch.Tensor:
    return torch.zeros(VOCAB, k, dtype=torch.int32)


def logits() -> torch.Tensor:
    return torch.zeros(TOKENS, EXPERTS)


def decode(**changes: Any) -> Any:
    arguments: dict[str, Any] = {
        "hidden": torch.zeros(TOKENS, HIDDEN, dtype=torch.bfloat16),
        "weight": torch.zeros(EXPERTS, HIDDEN, dtype=torch.bfloat16),
        "bias": torch.zeros(EXPERTS),
        "k": K,
    }
    return router.dense_router_decode(**arguments | changes)


def relu(**changes: Any) -> Any:
    arguments: dict[str, Any] = {
        "x": torch.zeros(TOKENS, 8, dtype=torch.bfloat16),
        "permutation_map": torch.zeros(TOKENS, dtype=torch.int32),
        "n_used": torch.tensor(1, dtype=torch.int32),
    }
    return moe.padded_squared_relu(**arguments | changes)


# What is called, and the whole text of the refusal.
REFUSALS: dict[str, tuple[Callable[[], Any], str]] = {
    "dtype": (
        lambda: router.hash_router(token_ids(dtype=torch.float32), table()),
        "hash_router: token_ids: expected dtype int32 or int64, got float32",
    ),
    "dtype that no op takes": (
        lambda: router.hash_router(token_ids(dtype=torch.complex64), table()),
        "hash_router: token_ids: expected dtype int32 or int64, got an unsupported dtype",
    ),
    "rank": (
        lambda: router.hash_router(token_ids()[:, None], table()),
        "hash_router: token_ids: expected shape [any], got [4, 1]",
    ),
    "rank above the highest": (
        lambda: router.hash_router(torch.zeros(1, 1, 1, 1, 1, dtype=torch.int64), table()),
        "hash_router: token_ids: expected rank 1, got rank 5",
    ),
    "shape that follows from another argument": (
        lambda: router.hash_router_scored(token_ids(), table(), logits()[:-1]),
        "hash_router_scored: logits: expected shape [4, any], got [3, 16]",
    ),
    "shape of an output": (
        lambda: router.hash_router(token_ids(), table(), out_ids=torch.zeros(TOKENS, K + 1, dtype=torch.int32)),
        "hash_router: out_ids: expected shape [4, 2], got [4, 3]",
    ),
    "dtype of an output": (
        lambda: router.hash_router(token_ids(), table(), out_ids=torch.zeros(TOKENS, K)),
        "hash_router: out_ids: expected dtype int32 or int64, got float32",
    ),
    "stride": (
        lambda: router.hash_router(token_ids(), table(), padding_mask=torch.zeros(2 * TOKENS, dtype=torch.bool)[::2]),
        "hash_router: padding_mask: expected a contiguous tensor, got strides [2] for shape [4]; call .contiguous()",
    ),
    "stride of rows": (
        lambda: router.hash_router_scored(token_ids(), table(), torch.zeros(EXPERTS, TOKENS).T),
        "hash_router_scored: logits: expected contiguous rows that do not overlap, got strides [1, 4] for shape "
        "[4, 16]; call .contiguous()",
    ),
    "rows that overlap": (
        lambda: relu(out=torch.zeros(8, dtype=torch.bfloat16).expand(TOKENS, 8)),
        "padded_squared_relu: out: expected contiguous rows that do not overlap, got strides [0, 1] for shape [4, 8]; "
        "call .contiguous()",
    ),
    "k too large": (
        lambda: router.hash_router(token_ids(), table(33)),
        "hash_router: hash_lut columns (k): expected 1 to 32, got 33",
    ),
    "k of zero": (
        lambda: router.hash_router(token_ids(), table(0)),
        "hash_router: hash_lut columns (k): expected 1 to 32, got 0",
    ),
    "k above the experts": (
        lambda: decode(k=EXPERTS + 1),
        "dense_router_decode: top_k: expected 1 to 16, got 17",
    ),
    "k that is negative": (
        lambda: decode(k=-1),
        "dense_router_decode: top_k: expected 1 to 16, got -1",
    ),
    "tokens": (
        lambda: decode(hidden=torch.zeros(65, HIDDEN, dtype=torch.bfloat16)),
        "dense_router_decode: hidden rows (tokens): expected 0 to 64, got 65",
    ),
    "multiple": (
        lambda: decode(hidden=torch.zeros(TOKENS, 100, dtype=torch.bfloat16)),
        "dense_router_decode: hidden columns: expected a multiple of 64, got 100",
    ),
    "experts": (
        lambda: decode(weight=torch.zeros(513, HIDDEN, dtype=torch.bfloat16), bias=None),
        "dense_router_decode: weight rows (experts): expected 1 to 512, got 513",
    ),
    "workspace": (
        lambda: decode(workspace=torch.zeros(16, dtype=torch.uint8)),
        "dense_router_decode: workspace bytes: expected at least "
        f"{router.dense_router_decode_workspace_size(TOKENS, EXPERTS)}, got 16",
    ),
    "no tensor": (
        lambda: router.hash_router([1, 2], table()),  # type: ignore[arg-type]
        "hash_router: token_ids: expected a dense tensor on cpu or cuda, got list",
    ),
    "None": (
        lambda: router.hash_router(None, table()),  # type: ignore[arg-type]
        "hash_router: token_ids: expected a dense tensor on cpu or cuda, got NoneType",
    ),
    "no tensor where one is optional": (
        lambda: router.hash_router(token_ids(), table(), padding_mask=3),  # type: ignore[arg-type]
        "hash_router: padding_mask: expected a dense tensor on cpu or cuda, or None, got int 3",
    ),
    "no number": (
        lambda: decode(k="6"),
        "dense_router_decode: k: expected an int of 32 bits, got str",
    ),
    "n_used of several": (
        lambda: relu(n_used=torch.zeros(2, dtype=torch.int32)),
        "padded_squared_relu: n_used: expected shape [1], got [2]",
    ),
    "permutation_map": (
        lambda: relu(permutation_map=torch.zeros(TOKENS, dtype=torch.int64)),
        "padded_squared_relu: permutation_map: expected dtype int32, got int64",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusal(name: str) -> None:
    call, text = REFUSALS[name]
    with pytest.raises(dsv4_kernels.InvalidArgumentError, match=f"^{re.escape(text)}$"):
        call()


def tensor_arguments() -> list[tuple[str, int, str]]:
    """(op, position, name) of every tensor that an op takes."""
    return [
        (op.name, position, parameter.name)
        for op in OPS.values()
        for position, parameter in enumerate(op.parameters)
        if "Tensor" in str(parameter.type)
    ]


def valid_arguments(op: str) -> list[Any]:
    """Of the op's smallest case."""
    cases = [case.arguments("cpu") for case in all_cases() if case.op == op and not case.large]
    assert cases, f"{op} has no cases"
    return list(min(cases, key=lambda arguments: sum(a.numel() for a in arguments if isinstance(a, torch.Tensor))))


def wrong_dtype(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.complex64)  # which no op takes, not even those that take any


def wrong_rank(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(*tensor.shape, 1, 1)


@pytest.mark.parametrize("spoil", [wrong_dtype, wrong_rank], ids=lambda spoil: spoil.__name__)
@pytest.mark.parametrize(("op", "position", "name"), tensor_arguments())
def test_every_tensor_of_every_op_is_checked(
    op: str, position: int, name: str, spoil: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    arguments = valid_arguments(op)
    if arguments[position] is None:
        arguments[position] = torch.zeros(3, dtype=torch.float64)
    arguments[position] = spoil(arguments[position])
    with pytest.raises(dsv4_kernels.InvalidArgumentError) as refused:
        OPS[op](tuple(arguments), (None,) * len(OPS[op].results))
    assert re.fullmatch(FORM.format(op=op, argument=re.escape(name)), str(refused.value)), refused.value


@pytest.mark.parametrize(
    ("op", "result"), [(op.name, result) for op in OPS.values() for result in op.results], ids=lambda value: str(value)
)
def test_every_output_of_every_op_is_checked(op: str, result: str) -> None:
    arguments = tuple(valid_arguments(op))
    out = list(OPS[op].allocate(arguments))
    index = OPS[op].results.index(result)
    out[index] = out[index].to(torch.float64)
    with pytest.raises(dsv4_kernels.InvalidArgumentError) as refused:
        OPS[op](arguments, tuple(out))
    assert re.fullmatch(FORM.format(op=op, argument=result), str(refused.value)), refused.value


def float_arguments() -> list[tuple[str, int, str]]:
    """(op, position, name) of every float that an op takes."""
    return [
        (op.name, position, parameter.name)
        for op in OPS.values()
        for position, parameter in enumerate(op.parameters)
        if str(parameter.type) == "float"
    ]


@pytest.mark.parametrize(("op", "position", "name"), float_arguments())
def test_every_float_of_every_op_is_checked(op: str, position: int, name: str) -> None:
    """All are finite, and all but the routers' factor at least 0. The text holds the value, whatever it is."""
    arguments = valid_arguments(op)
    arguments += [parameter.default_value for parameter in OPS[op].parameters[len(arguments) :]]
    negative = [] if name == "scale" else [-0.5, -1e-30, -0.1]
    for value in (math.nan, -math.nan, math.inf, -math.inf, *negative):
        arguments[position] = value
        with pytest.raises(dsv4_kernels.InvalidArgumentError) as refused:
            OPS[op](tuple(arguments), (None,) * len(OPS[op].results))
        got = "nan" if math.isnan(value) else re.escape(f"{value:g}")
        assert re.fullmatch(f"{op}: {name}: expected a finite number.*, got {got}", str(refused.value)), refused.value


def test_errors_are_of_the_types_that_callers_expect() -> None:
    assert issubclass(dsv4_kernels.InvalidArgumentError, ValueError)
    assert issubclass(dsv4_kernels.InvalidArgumentError, dsv4_kernels.KernelError)
    for name in ("NoDriverError", "NoImageError", "CudaError"):
        assert issubclass(getattr(dsv4_kernels, name), dsv4_kernels.KernelError)
