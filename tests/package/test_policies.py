"""Tuning is data: what each op launches, by architecture, preset and batch, is what policies.txt records."""

from __future__ import annotations

import pytest
from dsv4_kernels import _native
from dsv4_kernels.images import read_images

from tests.package import policies

WAY_OUT = (
    "launches are not the recorded ones: if that is meant, run python -m tests.package.policies and look at the diff"
)


def test_launches_are_the_recorded_ones() -> None:
    recorded, current = policies.read(policies.RECORD.read_text()), policies.table()
    held = {architecture for _, architecture in current}
    expected = {key: policy for key, policy in recorded.items() if key[1] in held}
    changed = [key for key in expected.keys() | current.keys() if expected.get(key) != current.get(key)]
    assert {key: (expected.get(key), current.get(key)) for key in sorted(changed)} == {}, WAY_OUT


def test_the_record_has_every_architecture() -> None:
    recorded = policies.read(policies.RECORD.read_text())
    cases = {case for case, _ in recorded}
    assert len(cases) > 400
    assert recorded.keys() == {(case, architecture) for case in cases for architecture in policies.MULTIPROCESSORS}
    assert policies.read(policies.write(recorded)) == recorded


# Blocks of a multiprocessor that the host counts on running at once: (kernel, threads, architectures' generations).
RESIDENT = {
    "compress_flush_long_kernel": (256, {"sm_90a": 3, "sm_100a": 2, "sm_103a": 2, "sm_120a": 2, "sm_121a": 2}),
}
REGISTERS = 65536  # of a multiprocessor, allocated to warps by 256


@pytest.mark.parametrize("kernel", RESIDENT)
def test_images_leave_room_for_the_blocks_that_are_counted_on(kernel: str) -> None:
    """From the registers that the assembler gave the images, and no block more would fit."""
    threads, counted_on = RESIDENT[kernel]
    images = [image for image in read_images() if kernel in image["symbol"]]
    assert images
    for image in images:
        warp = -(-image["registers"] * 32 // 256) * 256
        assert REGISTERS // (warp * threads // 32) == counted_on[image["architecture"]], image["symbol"]


def test_numbers_that_callers_choose_by() -> None:
    """docs/decisions/0009 and 0017."""
    assert [_native.moe_tile_max_slots_per_expert(rows) for rows in (16, 64, 128, 32)] == [12, 56, 2**63 - 1, 0]
    assert _native.hash_router_fused_max_bytes() == 16 * 2**20
