"""Memory that an op writes and another argument uses too is refused: by every op, on host tensors too."""

from __future__ import annotations

import re
import sys
from functools import cache
from typing import Any

import pytest
import torch
from dsv4_kernels import InvalidArgumentError
from dsv4_kernels.cases import all_cases
from dsv4_kernels.moe import moe_finalize, padded_squared_relu
from dsv4_kernels.ops import OPS
from dsv4_kernels.router import topk_select
from hypothesis import given, settings
from hypothesis import strategies as st

ALIGNMENT = 256  # what the strictest op asks of an address


def span(tensor: torch.Tensor) -> int:
    """Bytes from its first element to behind its last."""
    extents = zip(tensor.shape, tensor.stride(), strict=True)
    return (1 + sum((extent - 1) * stride for extent, stride in extents)) * tensor.element_size()


def at(buffer: torch.Tensor, offset: int, like: torch.Tensor) -> torch.Tensor:
    """A tensor of the same shape, strides and values at that place of a buffer of bytes."""
    typed = buffer[offset : offset + span(like)].view(like.dtype)
    placed = typed.as_strided(like.shape, like.stride(), typed.storage_offset())
    placed.copy_(like)
    return placed


@cache
def case_arguments(name: str) -> tuple[Any, ...]:
    """Of the op's smallest case whose tensors all hold something."""
    cases = [case.arguments("cpu") for case in all_cases() if case.op == name and not case.large]

    def elements(arguments: tuple[Any, ...]) -> int:
        tensors = [a for a in (*arguments, *OPS[name].allocate(arguments)) if isinstance(a, torch.Tensor)]
        return sum(t.numel() for t in tensors) if all(t.numel() for t in tensors) else sys.maxsize

    return tuple(min(cases, key=elements))


def call(name: str, arguments: list[Any], outputs: list[torch.Tensor]) -> None:
    op = OPS[name]
    workspace = () if op.workspace_size is None else (torch.zeros(1 << 22, dtype=torch.uint8),)
    op.native(*arguments, *workspace, *outputs)


def tensors_of(name: str) -> tuple[list[Any], list[torch.Tensor], dict[str, tuple[list[Any], int]], list[str]]:
    """Arguments, outputs, where each tensor of the call stands (with its name), and the names of those it writes."""
    op = OPS[name]
    arguments = [a.clone() if isinstance(a, torch.Tensor) else a for a in case_arguments(name)]
    outputs = list(op.allocate(tuple(arguments)))
    places = {a.name: (arguments, i) for i, a in enumerate(op.parameters) if isinstance(arguments[i], torch.Tensor)}
    places |= {result: (outputs, i) for i, result in enumerate(op.results)}
    places = {n: (values, i) for n, (values, i) in places.items() if values[i].numel()}
    return arguments, outputs, places, [*op.results, *(op.parameters[i].name for i in op.mutated)]


# What may be the same tensor: where the op advances an end of the lists, and results that take a value's place.
IN_PLACE = {
    ("paged_stash_copy", "new_free_list_head", "free_list_head"),
    ("paged_stash_pop", "new_free_list_tail", "free_list_tail"),
    ("padded_squared_relu", "out", "x"),
    ("moe_finalize", "out", "shared"),
    ("hyper_connection_post", "out_streams", "streams"),
    ("hyper_connection_post_pre", "out_streams", "streams"),
}


@pytest.mark.parametrize("name", OPS)
def test_overlapping_memory_is_refused(name: str) -> None:
    tried = 0
    for written in tensors_of(name)[3]:
        for other in tensors_of(name)[2]:
            arguments, outputs, places, _ = tensors_of(name)
            if (
                other == written
                or written not in places
                or (name, written, other) in IN_PLACE
                or (name, other, written) in IN_PLACE
            ):
                continue
            (ours, i), (theirs, j) = places[written], places[other]
            call(name, arguments, outputs)  # right as it is
            first, second = ours[i], theirs[j]
            buffer = torch.zeros(span(first) + span(second) + 2 * ALIGNMENT, dtype=torch.uint8)
            offset = -buffer.data_ptr() % ALIGNMENT
            # Beside each other: all right. Then at one place.
            behind = offset + -(-span(first) // ALIGNMENT) * ALIGNMENT
            ours[i], theirs[j] = at(buffer, offset, first), at(buffer, behind, second)
            call(name, arguments, outputs)
            theirs[j] = at(buffer, offset, second)
            with pytest.raises(InvalidArgumentError) as refused:
                call(name, arguments, outputs)
            pattern = rf"{name}: (\w+): expected memory that no other argument uses, got memory of (\w+); .+"
            found = re.fullmatch(pattern, str(refused.value))
            assert found, refused.value
            assert {found[1], found[2]} == {written, other}
            tried += 1
    assert tried


def test_in_place_means_the_same_elements() -> None:
    """moe_finalize adds to its shared input in place: whole, not a row further or in rows of another distance."""
    rows, slots = torch.ones(2, 8, dtype=torch.bfloat16), torch.tensor([[0], [1]], dtype=torch.int32)
    memory = torch.full((4, 8), 3.0, dtype=torch.bfloat16)
    assert moe_finalize(rows, slots, None, memory[:2], out=memory[:2]).tolist() == [[4.0] * 8] * 2
    for shared in (memory[1:3], memory[::2]):
        with pytest.raises(InvalidArgumentError, match=r"moe_finalize: out: .* got memory of shared"):
            moe_finalize(rows, slots, None, shared, out=memory[:2])
    with pytest.raises(InvalidArgumentError, match=r"moe_finalize: out: .* got memory of rows"):
        moe_finalize(rows, slots, out=rows)


def test_public_functions_refuse_it() -> None:
    scores = torch.randn(4, 8)
    with pytest.raises(
        InvalidArgumentError, match="topk_select: out_values: expected memory that no other argument uses"
    ):
        topk_select(scores, 8, out_values=scores)
    ids = torch.empty(4, 8, dtype=torch.int32)
    with pytest.raises(InvalidArgumentError, match=r"topk_select: out_values: .* got memory of out_ids"):
        topk_select(scores, 8, out_values=ids.view(torch.float32), out_ids=ids)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_views_of_one_buffer(data: st.DataObject) -> None:
    """Rows of any distance anywhere in a buffer: refused if and only if they have a byte in common, where the distances
    are equal or one is contiguous; at different distances if they have, and only if the spans of both meet. The very
    same view is none of these: the op works in place."""
    rows, columns = data.draw(st.integers(1, 4)), data.draw(st.sampled_from([8, 16]))
    strides = [data.draw(st.sampled_from([columns, columns + 8, 32, 40])) for _ in range(2)]
    starts = [8 * data.draw(st.integers(0, 24)) for _ in range(2)]
    buffer = torch.zeros(400, dtype=torch.bfloat16)
    x, out = (
        buffer.as_strided((rows, columns), (stride, 1), start) for stride, start in zip(strides, starts, strict=True)
    )
    places = [
        {start + row * stride + column for row in range(rows) for column in range(columns)}
        for stride, start in zip(strides, starts, strict=True)
    ]
    shared = bool(places[0] & places[1])
    exact = rows == 1 or strides[0] == strides[1] or columns in strides
    routes = torch.zeros(rows, dtype=torch.int32)
    try:
        padded_squared_relu(x, routes, torch.tensor(rows, dtype=torch.int32), out=out)
        refusal = ""
    except InvalidArgumentError as error:
        refusal = str(error)
    assert refusal == "" or "memory of x" in refusal
    if starts[0] == starts[1] and (rows == 1 or strides[0] == strides[1]):
        assert not refusal
        return
    spans_meet = max(map(min, places)) <= min(map(max, places))
    assert not (shared and not refusal)
    assert not (exact and refusal and not shared)
    assert not (refusal and not spans_meet)
