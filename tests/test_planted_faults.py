"""Faults planted into the PTX of shipped kernels, each an order between blocks: the emulator must notice each of them.

They change no result on the emulator's schedule, nor often on a GPU. Without the fault the same calls run.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from dsv4_kernels import moe, router
from dsv4_kernels.images import read_images

import tests.emulated
from tests.emulated import emulated, ptx_folder
from tests.ptx_emulator import EmulatorFault, Module, parse
from tests.stash.pools import Pools

ARCHITECTURE = "sm_90a"


@contextmanager
def edited(kernel: str, edit: Callable[[str], str], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Inside, ops launch their kernels in the emulator, and those whose name contains `kernel` with an edited text."""
    original = tests.emulated.module_of

    def module_of(symbol: str, architecture: str) -> Module:
        if kernel not in symbol:
            return original(symbol, architecture)
        (image,) = (i for i in read_images() if i["symbol"] == symbol and i["architecture"] == architecture)
        name = image["op"] if image["language"] == "cuda" else image["name"]
        head, *entries = re.split(r"(?=\.visible \.entry)", (ptx_folder() / architecture / f"{name}.ptx").read_text())
        (entry,) = (e for e in entries if e.startswith(f".visible .entry {symbol}("))
        changed = edit(entry)
        assert changed != entry, "nothing to edit"
        return parse(head + changed)

    monkeypatch.setattr(tests.emulated, "module_of", module_of)
    with emulated(ARCHITECTURE):
        yield


def without(line: str, which: int) -> Callable[[str], str]:
    """Remove one of the lines that hold an instruction, counted from the first (0) or the last (-1)."""

    def edit(text: str) -> str:
        lines = text.split("\n")
        places = [i for i, one in enumerate(lines) if re.search(line, one)]
        del lines[places[which]]
        return "\n".join(lines)

    return edit


def unchanged(text: str) -> str:
    """The kernel as it is."""
    return text + "\n"


def route_by_hash() -> None:
    """One token, whose work is split among a cluster."""
    router.hash_router_fused(
        torch.zeros(1, dtype=torch.int64),
        torch.arange(6)[None],
        torch.ones(1, 64, dtype=torch.bfloat16),
        torch.ones(8, 64, dtype=torch.bfloat16),
    )


def sort() -> None:
    """More slots than one block takes."""
    moe.moe_sort(torch.arange(6 * 1024, dtype=torch.int32).reshape(-1, 6) % 64, 64, 16)


def quantize() -> None:
    """Rows for several blocks, of which the last one clears what all of them read."""
    moe.quantize_nvfp4_gpu_fused(torch.rand(130, 112).to(torch.bfloat16))


def stash() -> None:
    """Rows for several blocks, of which the last one moves the head of the list that all of them read."""
    pools = Pools("cpu", 7, hidden=512)
    pools.copy(pools.rows(70), 70)


def pop() -> None:
    """The same with the tail of the list."""
    pools = Pools("cpu", 7, hidden=512)
    rows = pools.rows(70)
    pools.pop(rows, pools.copy(rows, 70))


def weakened(text: str) -> str:
    """Without the release of an atomic."""
    return text.replace("atom.inc.release.", "atom.inc.relaxed.")


CASES = {
    "no wait before a store to the first block": (
        route_by_hash, "hash_router_fused", without(r"barrier\.cluster\.wait", 0), "lifetime", "st.async",
    ),
    "mbarrier initialised without a fence": (
        route_by_hash, "hash_router_fused", without(r"fence\.mbarrier_init", 0), "race", "st.async",
    ),
    "a block ends while others read its counts": (
        sort, "moe_sort", without(r"barrier\.cluster\.wait", -1), "lifetime", "ld.",
    ),
    "counts read before the blocks have met": (
        sort, "moe_sort", without(r"barrier\.cluster\.wait", 0), "lifetime", "ld.",
    ),
    "a block says that it has read before all its threads have": (
        quantize, "quantize_by_amax", without(r"bar\.sync", -2), "race", "st.global",
    ),
    "a block says that it has read without a fence": (
        quantize, "quantize_by_amax", without(r"membar\.gl", -1), "race", "st.global",
    ),
    "a block's arrival does not release its reads, where pages are taken": (
        stash, "paged_stash_copy", weakened, "race", "st.global",
    ),
    "a block arrives before all its threads have read, where pages are taken": (
        stash, "paged_stash_copy", without(r"bar\.sync", 0), "race", "st.global",
    ),
    "a block's arrival does not release its reads, where pages are given back": (
        pop, "paged_stash_pop", weakened, "race", "st.global",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    call, kernel, edit, kind, instruction = CASES[name]
    with edited(kernel, unchanged, monkeypatch):
        call()
    with edited(kernel, edit, monkeypatch), pytest.raises(EmulatorFault) as caught:
        call()
    assert caught.value.kind == kind
    assert str(caught.value.text).startswith(instruction)
