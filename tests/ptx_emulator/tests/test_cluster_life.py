"""The life of shared memory in a cluster: blocks that have not started, mbarriers that are not made yet, blocks that
end too early. Every fault shows with one seed, and beside it is the kernel without it, which runs."""
# ruff: noqa: E501 (PTX in strings)

from __future__ import annotations

import numpy as np
import pytest

from .. import EmulatorFault
from .harness import kernel, run

START = """
    .shared .align 16 .b8 s[512]; .shared .align 8 .b64 bar[1]; .reg .b32 %rank, %other, %place, %there, %signal;
    mov.u32 %r0, %tid.x; mov.u32 %r1, s; mov.u32 %r2, bar; shl.b32 %r3, %r0, 2; add.u32 %place, %r1, %r3; setp.eq.u32 %p0, %r0, 0;
    mov.u32 %rank, %cluster_ctarank; xor.b32 %other, %rank, 1; ld.param.u64 %d0, [y];
    mapa.shared::cluster.u32 %there, %place, %other; mapa.shared::cluster.u32 %signal, %r2, %other;
"""
ARRIVE, WAIT = "barrier.cluster.arrive.aligned;", "barrier.cluster.wait.aligned;"
RELAXED = "barrier.cluster.arrive.relaxed.aligned;"
BARRIER = ARRIVE + WAIT
INIT = "@%p0 mbarrier.init.shared::cta.b64 [%r2], 1;"
FENCE = "@%p0 fence.mbarrier_init.release.cluster;"
EXPECT = "@%p0 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r2], 128;"
AWAIT = "AGAIN: mbarrier.try_wait.parity.shared::cta.b64 %p1, [%r2], 0; @!%p1 bra AGAIN;"


def launch(body: str, block: int = 32, cluster: int = 2) -> None:
    """Run a kernel in two clusters."""
    run(kernel(START + body, [".u64 y"]), np.zeros(64, np.uint32), grid=2 * cluster, block=block, cluster=cluster)


def fault(body: str, block: int = 32, cluster: int = 2) -> EmulatorFault:
    """The fault that running the kernel raises."""
    with pytest.raises(EmulatorFault) as caught:
        launch(body, block, cluster)
    return caught.value


ACCESSES = {
    "load": "ld.shared::cluster.u32 %r5, [%there];",
    "store": "st.shared::cluster.u32 [%there], 1;",
    "atomic": "atom.shared::cluster.add.u32 %r5, [%there], 1;",
    "generic": "cvt.u64.u32 %d3, %place; cvta.shared.u64 %d3, %d3; mapa.u64 %d3, %d3, %other; ld.u32 %r5, [%d3];",
    "arrival": "@%p0 mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%signal];",
    "asynchronous store": "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.u32 [%there], 1, [%signal];",
    "bulk copy": "@%p0 cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%there], [%r1], 128, [%signal];",
    "multicast": "mov.u16 %h1, 3; setp.eq.and.u32 %p4, %rank, 0, %p0; @%p4 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%r1+128], [%d0], 128, [%r2], %h1;",
}
ASYNCHRONOUS = ("asynchronous store", "bulk copy", "multicast")


@pytest.mark.parametrize("access", ACCESSES)
def test_block_that_may_not_have_started(access: str) -> None:
    """Without a barrier of the cluster, or with one that was only arrived at."""
    own = INIT + FENCE + "st.shared.u32 [%place], %r0; bar.sync 0;"
    if access in ASYNCHRONOUS:
        body, last = own + EXPECT + ARRIVE + "{wait}" + ACCESSES[access] + AWAIT, BARRIER
    else:
        body, last = own + ARRIVE + "{wait}" + ACCESSES[access], BARRIER
    launch(body.replace("{wait}", WAIT) + last)
    found = fault(body.replace("{wait}", "") + WAIT)
    assert found.kind == "lifetime"
    assert "may not have started" in found.detail
    assert str(found.text) in ACCESSES[access]
    assert fault(body.replace(ARRIVE + "{wait}", "") + BARRIER).kind == "lifetime"


def test_a_block_that_a_third_one_has_met() -> None:
    """That a block has started may be known from another one, but not from those of the other cluster."""
    meet = "setp.eq.u32 %p2, %rank, 0;" + INIT + FENCE + RELAXED + WAIT
    launch(meet + "st.shared::cluster.u32 [%there], 1;" + BARRIER, cluster=4)


SEND = "@!%p0 bra END; st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.u32 [%there], 1, [%signal]; END:"
ONE_WORD = EXPECT.replace("128", "4")


@pytest.mark.parametrize(("fence", "arrive", "right"), [
    (FENCE, RELAXED, True), ("", ARRIVE, True), ("fence.acq_rel.cluster;", RELAXED, True), ("", RELAXED, False),
    ("fence.acq_rel.cta;", RELAXED, False), ("fence.proxy.async.shared::cta;", RELAXED, False),
])  # fmt: skip
def test_initialisation_of_another_blocks_mbarrier(fence: str, arrive: str, right: bool) -> None:
    """It reaches other blocks with a releasing arrival, or with a relaxed one behind a fence."""
    body = INIT + fence + ONE_WORD + arrive + WAIT + SEND + AWAIT + BARRIER
    if right:
        launch(body)
        return
    found = fault(body)
    assert found.kind == "race"
    assert "mbarrier" in found.detail
    assert "st.async" in str(found.text)


def test_fence_before_the_initialisation() -> None:
    body = (
        "{early} @%p0 mbarrier.init.shared::cta.b64 [%r2], 1; {late}"
        + ONE_WORD
        + RELAXED
        + WAIT
        + SEND
        + AWAIT
        + BARRIER
    )
    launch(body.replace("{late}", FENCE).replace("{early}", ""))
    for early in (FENCE, "fence.acq_rel.cluster;"):
        assert fault(body.replace("{early}", early).replace("{late}", "")).kind == "race"


@pytest.mark.parametrize("thread", [1, 33])
def test_initialisation_of_the_blocks_own_mbarrier(thread: int) -> None:
    """The other threads of the block need a barrier, those of the same warp too."""
    rest = f"setp.eq.u32 %p4, %r0, {thread}; @%p4 mbarrier.arrive.shared::cta.b64 _, [%r2];"
    launch(INIT + "bar.sync 0;" + rest, 64, 1)
    launch(INIT + rest.replace(f" {thread};", " 0;"), 64, 1)
    found = fault(INIT + rest, 64, 1)
    assert found.kind == "race"
    assert "mbarrier" in found.detail


def test_memory_behind_a_relaxed_barrier() -> None:
    """A relaxed arrival orders the memory that a fence before it covers, and no other."""
    body = (
        "st.shared.u32 [%place], %r0; {fence} {more}"
        + RELAXED
        + WAIT
        + "ld.shared::cluster.u32 %r5, [%there];"
        + BARRIER
    )
    fence = "fence.acq_rel.cluster;"
    launch(body.replace("{fence}", fence).replace("{more}", ""))
    assert fault(body.replace("{fence}", "").replace("{more}", "")).kind == "race"
    assert fault(body.replace("{fence}", fence).replace("{more}", "st.shared.u32 [%place], 5;")).kind == "race"


def test_a_write_behind_a_relaxed_barrier() -> None:
    """Reads of others are not over because they arrived relaxed."""
    body = "st.shared.u32 [%place], %r0;" + BARRIER + "ld.shared::cluster.u32 %r5, [%there]; {arrive}" + WAIT
    body += "st.shared.u32 [%place], 5;" + BARRIER
    launch(body.replace("{arrive}", ARRIVE))
    assert fault(body.replace("{arrive}", RELAXED)).kind == "race"


LATE = "st.shared.u32 [%place], %r0; " + INIT + BARRIER + "{access} {end}"


@pytest.mark.parametrize("access", [a for a in ACCESSES if a not in ASYNCHRONOUS])
@pytest.mark.parametrize(("end", "right"), [
    (ARRIVE + WAIT, True), ("", False), (ARRIVE, False), (RELAXED + WAIT, False), ("bar.sync 0;", False),
])  # fmt: skip
def test_block_that_ends_too_early(access: str, end: str, right: bool) -> None:
    body = LATE.replace("{access}", ACCESSES[access]).replace("{end}", end)
    if right:
        launch(body)
        return
    found = fault(body)
    assert found.kind == "lifetime"
    assert "may end before" in found.detail
    assert str(found.text) in ACCESSES[access]


def test_access_after_the_last_barrier() -> None:
    found = fault("st.shared.u32 [%place], %r0;" + BARRIER + BARRIER + "ld.shared::cluster.u32 %r5, [%there];")
    assert found.kind == "lifetime"


def test_one_warp_of_a_block_may_wait_for_all() -> None:
    """A block lives as long as one of its threads."""
    body = "st.shared.u32 [%place], %r0;" + BARRIER + "ld.shared::cluster.u32 %r5, [%there];" + ARRIVE
    launch(body + "setp.ge.u32 %p3, %r0, 32; @%p3 exit;" + WAIT, block=64)
    assert fault(body + "setp.ge.u32 %p3, %r0, 0; @%p3 exit;" + WAIT, block=64).kind == "lifetime"


def test_a_reader_may_end_before_the_block_that_it_has_read() -> None:
    """Only the block that is read waits: an mbarrier tells it."""
    body = (
        "st.shared.u32 [%place], %r0;"
        + INIT
        + BARRIER
        + "setp.eq.u32 %p2, %rank, 0; @%p2 bra READ; {wait} bra END; READ:"
    )
    body += "ld.shared::cluster.u32 %r5, [%there]; bar.warp.sync 0xffffffff; @%p0 mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%signal]; END:"
    launch(body.replace("{wait}", AWAIT))
    assert fault(body.replace("{wait}", "")).kind == "lifetime"


@pytest.mark.parametrize("access", ASYNCHRONOUS)
def test_what_is_still_on_its_way_when_its_block_ends(access: str) -> None:
    body = "st.shared.u32 [%place], %r0;" + INIT + EXPECT + BARRIER + ACCESSES[access] + "{wait}" + BARRIER
    launch(body.replace("{wait}", AWAIT))
    found = fault(body.replace("{wait}", ""))
    assert found.kind == "missing wait"
    assert "block ended" in found.detail
