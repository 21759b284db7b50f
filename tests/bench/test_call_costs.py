"""The benchmark of calls: figures of every way in, and nothing left behind in the process."""

from __future__ import annotations

import ctypes

import torch
from dsv4_kernels.cli import call_costs
from dsv4_kernels.cli.call_costs import CHashRouterArgs, CTensor, Library
from dsv4_kernels.router import hash_router

from tests.package import c_abi


def test_structs_are_those_of_the_headers() -> None:
    """tests/package/test_c_interface.py compares c_abi's with the compiler's."""
    for mine, other in ((CTensor, c_abi.Tensor), (CHashRouterArgs, c_abi.HashRouterArgs)):
        names = [name for name, _ in mine._fields_]
        assert names == [name for name, _ in other._fields_]
        assert [getattr(mine, n).offset for n in names] == [getattr(other, n).offset for n in names]
        assert ctypes.sizeof(mine) == ctypes.sizeof(other)


def test_every_way_in_has_a_cost() -> None:
    costs = call_costs.call_costs()
    assert list(costs)[:4] == ["C function", "binding", "python function", "python function, allocating"]
    assert 0 < costs["C function"] < costs["binding"] < costs["torch op"]


def test_launches_are_left_out_inside_alone() -> None:
    """Inside, outputs keep what they hold; outside, the CPU implementation writes them."""
    token_ids, table = torch.zeros(1, dtype=torch.int32), torch.full((8, 6), 5, dtype=torch.int32)
    weights, ids = torch.full((1, 6), -1.0), torch.full((1, 6), -1, dtype=torch.int32)
    with Library().launches_left_out():
        hash_router(token_ids, table, out_weights=weights, out_ids=ids)
    assert (ids == -1).all()
    hash_router(token_ids, table, out_weights=weights, out_ids=ids)
    assert (ids == 5).all()
