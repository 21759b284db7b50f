"""Global memory that several blocks read and write: the order that fences, releases and barriers establish, and each of
its faults. One schedule is enough, whichever it is."""
# ruff: noqa: E501 (PTX in strings)

from __future__ import annotations

import numpy as np
import pytest

from .. import EmulatorFault, global_order
from .harness import kernel, run

# %d1: the word of this thread among those of all blocks; %d5: that of thread 0; %d6 = x + 4 * block
START = """
    .shared .align 4 .b8 flag[4]; ld.param.u64 %d0, [x]; ld.param.u64 %d4, [count]; mov.u32 %r0, %tid.x; mov.u32 %r1, %ctaid.x;
    mov.u32 %r2, %ntid.x; mad.lo.u32 %r3, %r1, %r2, %r0; mul.wide.u32 %d2, %r3, 4; add.u64 %d1, %d0, %d2; setp.ne.u32 %p0, %r0, 0;
    mov.u32 %r4, %nctaid.x; sub.u32 %r5, %r4, 1;
"""
# The threads of the block that arrives last go on.
LAST = """
    {sync} @%p0 bra DECIDED; {fence} {arrive} setp.eq.u32 %p1, %r6, %r5; selp.u32 %r7, 1, 0, %p1; st.shared.u32 [flag], %r7;
    DECIDED: bar.sync 0; ld.shared.u32 %r8, [flag]; setp.eq.u32 %p2, %r8, 0; @%p2 exit;
"""
FENCE, ARRIVE = "membar.gl;", "atom.global.add.u32 %r6, [%d4], 1;"
GRID, BLOCK = 6, 64


def launch(body: str, seed: int = 0, grid: int = GRID, cluster: int = 1) -> np.ndarray:
    """Run a kernel with words x, a few for each thread, and counters."""
    x = np.arange(1, 4 * GRID * BLOCK + 1, dtype=np.uint32)
    parameters = [".u64 x", ".u64 count"]
    text = kernel(START + body, parameters)
    run(text, x, np.zeros(64, np.uint32), grid=grid, block=BLOCK, seed=seed, cluster=cluster)
    return x


def fault(body: str, seed: int = 0, grid: int = GRID, cluster: int = 1) -> EmulatorFault:
    """The race that running the kernel raises."""
    with pytest.raises(EmulatorFault) as caught:
        launch(body, seed, grid, cluster)
    assert caught.value.kind == "race"
    return caught.value


def last(sync: str = "bar.sync 0;", fence: str = FENCE, arrive: str = ARRIVE) -> str:
    """What lets the last block go on alone."""
    return LAST.replace("{sync}", sync).replace("{fence}", fence).replace("{arrive}", arrive)


READ_ALL = "ld.global.u32 %r10, [%d0];"
READ_OTHERS = "add.u32 %r11, %r3, 64; rem.u32 %r11, %r11, 384; mul.wide.u32 %d7, %r11, 4; add.u64 %d7, %d0, %d7; ld.global.u32 %r10, [%d7];"
WRITE_FIRST = "@%p0 exit; st.global.u32 [%d0], 0;"
WRITE_ALL = "mov.u32 %r12, 0; ALL: mad.lo.u32 %r13, %r12, 64, %r0; mul.wide.u32 %d8, %r13, 4; add.u64 %d8, %d0, %d8; st.global.u32 [%d8], 0; add.u32 %r12, %r12, 1; setp.lt.u32 %p4, %r12, %r4; @%p4 bra ALL;"
SUM_ALL = WRITE_ALL.replace("st.global.u32 [%d8], 0", "ld.global.u32 %r14, [%d8]")

ARRIVALS = {
    "fence and atomic": ({}, True),
    "release": ({"fence": "", "arrive": "atom.inc.release.gpu.global.u32 %r6, [%d4], 1000;"}, True),
    "acquire and release": ({"fence": "", "arrive": "atom.global.acq_rel.gpu.add.u32 %r6, [%d4], 1;"}, True),
    "a fence of the system": ({"fence": "fence.sc.sys;"}, True),
    "no fence": ({"fence": ""}, False),
    "a fence of the block": ({"fence": "membar.cta;"}, False),
    "a fence of the cluster": ({"fence": "fence.acq_rel.cluster;"}, False),
    "a proxy fence": ({"fence": "fence.proxy.async;"}, False),
    "relaxed": ({"fence": "", "arrive": "atom.inc.relaxed.gpu.global.u32 %r6, [%d4], 1000;"}, False),
    "release of the block": ({"fence": "", "arrive": "atom.inc.release.cta.global.u32 %r6, [%d4], 1000;"}, False),
    "other threads not waited for": ({"sync": ""}, False),
    "every block counts by itself": ({"arrive": "mul.wide.u32 %d9, %r1, 4; add.u64 %d9, %d4, %d9; atom.global.add.u32 %r6, [%d9], 1; mov.u32 %r6, %r5;"}, False),
}  # fmt: skip


@pytest.mark.parametrize("read", [READ_ALL, READ_OTHERS])
@pytest.mark.parametrize("name", ARRIVALS)
def test_write_over_what_other_blocks_have_read(name: str, read: str) -> None:
    """The last block writes what all blocks read."""
    how, right = ARRIVALS[name]
    body = read + last(**how) + (WRITE_FIRST if read == READ_ALL else WRITE_ALL)
    for seed in range(3):
        if right:
            launch(body, seed)
        else:
            found = fault(body, seed)
            assert "write to global memory that another block read" in found.detail
            assert str(found.text).startswith("st.global")


@pytest.mark.parametrize("name", ARRIVALS)
def test_read_of_what_other_blocks_have_written(name: str) -> None:
    how, right = ARRIVALS[name]
    body = "st.global.u32 [%d1], 7;" + last(**how) + SUM_ALL
    for seed in range(3):
        if right:
            launch(body, seed)
        else:
            found = fault(body, seed)
            assert "read of global memory that another block wrote" in found.detail


@pytest.mark.parametrize("name", ARRIVALS)
def test_write_over_what_other_blocks_have_written(name: str) -> None:
    how, right = ARRIVALS[name]
    body = "st.global.u32 [%d1], 7;" + last(**how) + WRITE_ALL
    if right:
        assert (launch(body)[: GRID * BLOCK] == 0).all()
    else:
        assert "write to global memory that another block wrote" in fault(body).detail


def test_a_read_after_the_arrival() -> None:
    """What a block does after its arrival is not covered, though the block has synchronised."""
    for late in (READ_ALL, "@!%p0 ld.global.u32 %r10, [%d0];"):
        body = last().replace("st.shared", late + "st.shared")
        launch(body + "ld.global.u32 %r10, [%d0];")
        fault(body + WRITE_FIRST)


def test_a_block_that_is_not_the_last() -> None:
    """The first block to arrive does not know that the others have read, nor does one in the middle."""
    for number in (0, 3):
        body = READ_ALL + last().replace("%r6, %r5;", f"%r6, {number};") + WRITE_FIRST
        for seed in range(3):
            fault(body, seed)


def test_writing_the_value_that_is_there() -> None:
    body = "ld.global.u32 %r10, [%d0]; @%p0 exit; st.global.u32 [%d0], {};"
    assert launch(body.replace("{}", "1"))[0] == 1
    fault(body.replace("{}", "2"))


def test_a_flag_hands_memory_on_from_block_to_block() -> None:
    """Each block reads what all before it left and writes it anew: the order passes through those between."""
    body = """
        @%p0 bra READY; mul.wide.u32 %d5, %r1, 4; add.u64 %d5, %d4, %d5;
        SPIN: ld.{acquire}.gpu.global.u32 %r6, [%d5]; setp.eq.u32 %p1, %r6, 0; setp.ne.and.u32 %p1, %r1, 0, %p1; @%p1 bra SPIN;
        READY: bar.sync 0; mul.wide.u32 %d6, %r0, 4; add.u64 %d6, %d0, %d6; ld.global.u32 %r7, [%d6]; add.u32 %r7, %r7, 1; st.global.u32 [%d6], %r7;
        {sync} @%p0 exit; {fence} st.{release}.gpu.global.u32 [%d5+4], 1;
    """

    def text(acquire: str = "acquire", release: str = "release", fence: str = "", sync: str = "bar.sync 0;") -> str:
        return (
            body.replace("{acquire}", acquire)
            .replace("{release}", release)
            .replace("{fence}", fence)
            .replace("{sync}", sync)
        )

    for right in (text(), text("relaxed", "relaxed", "fence.acq_rel.gpu;")):
        assert launch(right)[:BLOCK].tolist() == list(range(1 + GRID, 1 + GRID + BLOCK))
    for wrong in (text(release="relaxed"), text(sync=""), text(release="relaxed", fence="fence.acq_rel.cta;")):
        fault(wrong)


@pytest.mark.parametrize("cluster", [1, 2])
def test_a_flag_between_warps_of_a_cluster(cluster: int) -> None:
    """A release and an acquire order warps of one block as they do blocks."""
    body = """
        setp.ge.u32 %p1, %r0, 32; mul.wide.u32 %d5, %r1, 4; add.u64 %d5, %d4, %d5; @%p1 bra TAKE;
        st.global.u32 [%d1], 7; bar.warp.sync 0xffffffff; @!%p0 st.{release}.gpu.global.u32 [%d5], 1; exit;
        TAKE: ld.acquire.gpu.global.u32 %r6, [%d5]; setp.eq.u32 %p2, %r6, 0; @%p2 bra TAKE;
        ld.global.u32 %r7, [%d1+-128]; st.global.u32 [%d1+-128], 9; st.global.u32 [%d1], %r7;
    """
    x = launch(body.replace("{release}", "release"), cluster=cluster)
    assert (x[: GRID * BLOCK].reshape(GRID, 2, 32) == np.array([[[9], [7]]])).all()
    assert "that thread" in fault(body.replace("{release}", "relaxed"), cluster=cluster).detail


def test_clusters() -> None:
    """Inside a cluster its barrier orders reads and writes; other clusters need more."""
    body = (
        "mov.u32 %r15, %cluster_ctarank; setp.ne.or.u32 %p0, %r15, 0, %p0; "
        + READ_ALL
        + "{barrier} @%p0 exit; st.global.u32 [%d0], 0;"
    )
    barrier = "barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;"
    launch(body.replace("{barrier}", barrier), grid=2, cluster=2)
    fault(body.replace("{barrier}", "bar.sync 0;"), grid=2, cluster=2)
    fault(body.replace("{barrier}", barrier.replace("arrive", "arrive.relaxed")), grid=2, cluster=2)
    fault(body.replace("{barrier}", barrier), grid=4, cluster=2)


@pytest.mark.parametrize("distance", [32, 1])
def test_inside_a_block(distance: int) -> None:
    """A neighbour's word is read, of the next warp or of the same one, and then written by its owner."""
    body = f"xor.b32 %r10, %r3, {distance}; mul.wide.u32 %d5, %r10, 4; add.u64 %d5, %d0, %d5; ld.global.u32 %r11, [%d5]; {{}} st.global.u32 [%d1], %r11;"
    x = launch(body.replace("{}", "bar.sync 0;"))[: GRID * BLOCK]
    assert x.tolist() == [(i ^ distance) + 1 for i in range(GRID * BLOCK)]
    for barrier in ("", "membar.gl;"):
        found = fault(body.replace("{}", barrier))
        assert found.detail.startswith("write to global memory that thread")
    launch(body.replace("{}", "bar.sync 0;").replace(f"%r3, {distance}", "%r3, 0"))


def test_parts_of_a_place() -> None:
    """Accesses of several widths: those that share a byte need order, neighbours do not."""
    body = "ld.global.v4.u32 {%r10, %r11, %r12, %r13}, [%d0+16]; setp.ne.or.u32 %p0, %r1, 0, %p0; @%p0 exit; {};"
    launch(body.replace("{}", "st.global.v4.u32 [%d0], {%r0, %r0, %r0, %r0}; st.global.u32 [%d0+32], 0"))
    for store in ("st.global.u8 [%d0+16], 0", "st.global.u32 [%d0+28], 0", "st.global.v2.u32 [%d0+24], {%r0, %r0}"):
        fault(body.replace("{}", store))
    byte = "ld.global.u8 %r10, [%d0+21]; setp.ne.or.u32 %p0, %r1, 0, %p0; @%p0 exit; {};"
    launch(byte.replace("{}", "st.global.u8 [%d0+20], 0; st.global.u16 [%d0+22], 0"))
    fault(byte.replace("{}", "st.global.v4.u32 [%d0+16], {%r0, %r0, %r0, %r0}"))


def test_reads_before_an_ordered_write_are_not_looked_at_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loop that reads and writes its word takes time for each turn, not for all turns before."""
    looked = []
    original = global_order._Reads.overlapping

    def overlapping(
        self: global_order._Reads, offsets: np.ndarray, width: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        looked.append(len(offsets))
        return original(self, offsets, width)

    monkeypatch.setattr(global_order._Reads, "overlapping", overlapping)
    body = "mov.u32 %r10, 0; LOOP: ld.global.u32 %r11, [%d1]; add.u32 %r11, %r11, 1; st.global.u32 [%d1], %r11; add.u32 %r10, %r10, 1; setp.lt.u32 %p3, %r10, 100; @%p3 bra LOOP;"
    assert (launch(body)[: GRID * BLOCK] == np.arange(101, 101 + GRID * BLOCK)).all()
    assert sum(looked) == 100 * GRID * BLOCK


def test_large_allocations() -> None:
    """Records take memory where they are used, so memory of any size is watched."""
    text = kernel(
        "ld.param.u64 %d0, [x]; mov.u32 %r1, %ctaid.x; add.u64 %d0, %d0, 1500000000; {} ld.global.u32 %r2, [%d0]; st.global.u32 [%d0], %r1;",
        [".u64 x"],
    )
    large = np.zeros(400_000_000, np.uint32)
    run(text.replace("{}", "mul.wide.u32 %d1, %r1, 4; add.u64 %d0, %d0, %d1;"), large, grid=4, block=1)
    with pytest.raises(EmulatorFault, match="race"):
        run(text.replace("{}", ""), large, grid=4, block=1)
