"""Divergence, barriers, atomics, and blocks that wait for each other."""
# ruff: noqa: E501 (PTX in strings)

from __future__ import annotations

import numpy as np
import pytest

from .. import EmulatorFault, Limits
from .harness import kernel, run

START = "ld.param.u64 %d0, [x]; mov.u32 %r0, %tid.x; mov.u32 %r1, %ctaid.x; mov.u32 %r2, %ntid.x; mad.lo.u32 %r3, %r1, %r2, %r0; mul.wide.u32 %d1, %r3, 4; add.u64 %d1, %d0, %d1;"


def test_loops_with_different_trip_counts() -> None:
    """Collatz steps of the global index."""
    text = kernel(START + """
        add.u32 %r5, %r3, 1; mov.u32 %r6, 0;
        LOOP: setp.eq.u32 %p0, %r5, 1; @%p0 bra DONE; and.b32 %r7, %r5, 1; setp.eq.u32 %p1, %r7, 0; add.u32 %r6, %r6, 1;
        @%p1 bra EVEN; mad.lo.u32 %r5, %r5, 3, 1; bra LOOP; EVEN: shr.u32 %r5, %r5, 1; bra LOOP;
        DONE: st.global.u32 [%d1], %r6;""", [".u64 x"])  # fmt: skip
    x = np.zeros(200, np.uint32)
    run(text, x, grid=4, block=50)

    def steps(n: int) -> int:
        count = 0
        while n != 1:
            n, count = (3 * n + 1 if n % 2 else n // 2), count + 1
        return count

    assert x.tolist() == [steps(i + 1) for i in range(200)]


def test_a_thread_spins_until_another_of_its_block_sets_a_flag() -> None:
    """The spinning loop lies before the code that ends it."""
    text = kernel(START + """
        setp.eq.u32 %p0, %r0, 0; @%p0 bra WAIT; bra SET;
        WAIT: ld.volatile.global.u32 %r5, [%d0+8]; setp.eq.u32 %p1, %r5, 0; @%p1 bra WAIT; st.global.u32 [%d0], 5; bra END;
        SET: setp.eq.u32 %p2, %r0, 1; @%p2 st.volatile.global.u32 [%d0+8], 1;
        END: nop;""", [".u64 x"])  # fmt: skip
    x = np.zeros(64, np.uint32)
    run(text, x)
    assert x[0] == 5


@pytest.mark.parametrize("seed", range(4))
def test_a_block_waits_for_another(seed: int) -> None:
    """Each block hands a value on to the next; with one block at a time in a wave, in any order."""
    text = kernel(START + """
        setp.ne.u32 %p0, %r0, 0; @%p0 exit; mul.wide.u32 %d2, %r1, 4; add.u64 %d2, %d0, %d2;
        WAIT: ld.acquire.gpu.global.u32 %r5, [%d2]; setp.eq.u32 %p1, %r5, 0; @%p1 bra WAIT;
        add.u32 %r5, %r5, 10; st.release.gpu.global.u32 [%d2+4], %r5;""", [".u64 x"])  # fmt: skip
    x = np.zeros(9, np.uint32)
    x[0] = 1
    run(text, x, grid=8, seed=seed, limits=Limits(wave_lanes=32))
    assert x.tolist() == [1 + 10 * i for i in range(9)]


GRID_BARRIER = kernel(START + """
        .shared .align 4 .b8 s[16]; bar.sync 0; setp.ne.u32 %p0, %r0, 0; @%p0 bra AFTER;
        atom.add.release.gpu.global.u32 %r5, [%d0], 1; mov.u32 %r6, %nctaid.x;
        WAIT: ld.acquire.gpu.global.u32 %r7, [%d0]; setp.lt.u32 %p1, %r7, %r6; @%p1 bra WAIT;
        AFTER: bar.sync 0; ld.global.u32 %r8, [%d0]; st.global.u32 [%d1+4], %r8;""", [".u64 x"])  # fmt: skip


def test_grid_barrier_over_several_waves() -> None:
    x = np.zeros(32 * 10 + 1, np.uint32)
    run(GRID_BARRIER, x, grid=10, limits=Limits(wave_lanes=64))
    assert (x == 10).all()


def test_waiting_for_blocks_that_cannot_start() -> None:
    """With room for 6 of 10 blocks a grid barrier waits for ever; blocks that wait for nobody all get their turn."""
    limits = Limits(wave_lanes=64, waves=3)
    x = np.zeros(32 * 10 + 1, np.uint32)
    with pytest.raises(EmulatorFault, match="deadlock"):
        run(GRID_BARRIER, x, grid=10, limits=limits)
    x = np.zeros(32 * 10, np.uint32)
    run(kernel(START + "st.global.u32 [%d1], 7;", [".u64 x"]), x, grid=10, limits=limits)
    assert (x == 7).all()


def test_last_block_sums_what_all_have_stored() -> None:
    text = kernel(START + """
        .shared .align 4 .b8 s[16]; setp.ne.u32 %p0, %r0, 0; @%p0 bra CHECK; mul.wide.u32 %d2, %r1, 4; add.u64 %d2, %d0, %d2;
        add.u32 %r4, %r1, 1; st.global.u32 [%d2+8], %r4; membar.gl; atom.global.add.u32 %r5, [%d0], 1;
        mov.u32 %r6, %nctaid.x; sub.u32 %r6, %r6, 1; setp.eq.u32 %p1, %r5, %r6; selp.u32 %r7, 1, 0, %p1; st.shared.u32 [s], %r7;
        CHECK: bar.sync 0; ld.shared.u32 %r8, [s]; setp.eq.u32 %p2, %r8, 0; @%p2 exit; @%p0 exit;
        mov.u32 %r9, 0; mov.u32 %r10, 0; mov.u64 %d3, %d0;
        SUM: ld.volatile.global.u32 %r11, [%d3+8]; add.u32 %r9, %r9, %r11; add.u64 %d3, %d3, 4; add.u32 %r10, %r10, 1; setp.lt.u32 %p3, %r10, %nctaid.x;
        @%p3 bra SUM; st.global.u32 [%d0+4], %r9;""", [".u64 x"])  # fmt: skip
    for seed in range(3):
        x = np.zeros(102, np.uint32)
        run(text, x, grid=100, seed=seed)
        assert x[1] == 5050
        assert x[0] == 100


def test_named_barriers_of_some_warps() -> None:
    """Two warps synchronise on barrier 1 while the two others use barrier 2; a producer only arrives."""
    text = kernel(START + """
        .shared .align 4 .b8 s[1024]; mov.u32 %r4, s; shl.b32 %r5, %r0, 2; add.u32 %r5, %r4, %r5; shr.u32 %r6, %r0, 6; add.u32 %r6, %r6, 1;
        st.shared.u32 [%r5], %r0; setp.lt.u32 %p0, %r0, 32; @%p0 bra PRODUCER; setp.lt.u32 %p1, %r0, 64; @%p1 bra CONSUMER; bra OTHERS;
        PRODUCER: bar.arrive 1, 64; bra END;
        CONSUMER: bar.sync 1, 64; sub.u32 %r7, %r5, 128; ld.shared.u32 %r8, [%r7]; st.global.u32 [%d1], %r8; bra END;
        OTHERS: bar.sync 2, 64; xor.b32 %r7, %r5, 128; ld.shared.u32 %r8, [%r7]; st.global.u32 [%d1], %r8;
        END: nop;""", [".u64 x"])  # fmt: skip
    x = np.zeros(128, np.uint32)
    run(text, x, block=128)
    assert x.tolist() == [0] * 32 + list(range(32)) + list(range(96, 128)) + list(range(64, 96))


def test_barrier_reductions() -> None:
    text = kernel(START + """
        setp.lt.u32 %p0, %r0, 37; barrier.cta.red.popc.aligned.u32 %r5, 0, %p0; bar.red.and.pred %p1, 1, %p0; bar.red.or.pred %p2, 2, !%p0;
        selp.u32 %r6, 1000, 0, %p1; selp.u32 %r7, 100, 0, %p2; add.u32 %r5, %r5, %r6; add.u32 %r5, %r5, %r7; st.global.u32 [%d1], %r5;""", [".u64 x"])  # fmt: skip
    x = np.zeros(64, np.uint32)
    run(text, x, block=64)
    assert (x == 137).all()


ATOMICS = {
    "add.u32 %r5, [%d0], 3;": lambda n: (3 * n, {3 * i for i in range(n)}),
    "max.s32 %r5, [%d0], %r3;": lambda n: (n - 1, None),
    "inc.u32 %r5, [%d0], 9;": lambda n: (n % 10, {i % 10 for i in range(n)}),
    "dec.u32 %r5, [%d0], 9;": lambda n: ((-n) % 10, {(-i) % 10 for i in range(n)}),
    "or.b32 %r5, [%d0], %r3;": lambda n: (127, None),
    "add.f32 %r5, [%d0], 0f3F800000;": lambda n: (int(np.float32(n).view(np.uint32)), None),
}


@pytest.mark.parametrize("operation", ATOMICS)
def test_atomics_of_all_threads_on_one_address(operation: str) -> None:
    threads = 128
    text = kernel(START + f"atom.global.{operation} st.global.u32 [%d1+4], %r5;", [".u64 x"])
    x = np.zeros(threads + 1, np.uint32)
    run(text, x, grid=2, block=64)
    final, old = ATOMICS[operation](threads)
    assert x[0] == final
    assert old is None or set(x[1:].tolist()) == old


def test_compare_and_swap_lets_one_win() -> None:
    text = kernel(
        START
        + "add.u32 %r4, %r3, 1; atom.global.cas.b32 %r5, [%d0], 0, %r4; setp.eq.u32 %p0, %r5, 0; @%p0 atom.global.exch.b32 %r6, [%d0+4], %r4;",
        [".u64 x"],
    )
    winners = set()
    for seed in range(8):
        x = np.zeros(2, np.uint32)
        run(text, x, seed=seed)
        assert x[0] == x[1] != 0
        winners.add(int(x[0]))
    assert len(winners) > 1, "the order of atomics should depend on the seed"


def test_shared_atomics_need_no_barrier_among_themselves() -> None:
    text = kernel(START + """
        .shared .align 4 .b8 s[128]; setp.lt.u32 %p0, %r0, 32; mov.u32 %r4, s; shl.b32 %r5, %r0, 2; add.u32 %r5, %r4, %r5; @%p0 st.shared.u32 [%r5], 0;
        bar.sync 0; and.b32 %r6, %r0, 31; shl.b32 %r6, %r6, 2; add.u32 %r6, %r4, %r6; red.shared.add.u32 [%r6], 2; bar.sync 0;
        @%p0 ld.shared.u32 %r7, [%r5]; @%p0 st.global.u32 [%d1], %r7;""", [".u64 x"])  # fmt: skip
    x = np.zeros(32, np.uint32)
    run(text, x, block=256)
    assert (x == 16).all()


def test_packed_and_vector_additions() -> None:
    text = kernel(START + "red.global.add.noftz.bf16x2 [%d0], 0x3F803F80; red.global.add.v2.f32 [%d0+8], {%r4, %r5};".replace(
        "red.global.add.v2", "mov.b32 %r4, 0f3F800000; mov.b32 %r5, 0f40000000; red.global.add.v2"), [".u64 x"])  # fmt: skip
    x = np.zeros(4, np.uint32)
    run(text, x)
    assert x[0] == 0x42004200
    assert x.view(np.float32)[2:].tolist() == [32.0, 64.0]


def test_the_block_order_depends_on_the_seed_and_results_do_not() -> None:
    text = kernel(
        START
        + "setp.eq.u32 %p0, %r0, 0; @%p0 atom.global.add.u32 %r5, [%d0], 1; mul.wide.u32 %d2, %r1, 4; add.u64 %d2, %d0, %d2; @%p0 st.global.u32 [%d2+4], %r5;",
        [".u64 x"],
    )
    orders = set()
    for seed in range(3):
        x = np.zeros(21, np.uint32)
        run(text, x, grid=20, seed=seed)
        assert sorted(x[1:].tolist()) == list(range(20))
        orders.add(tuple(x[1:].tolist()))
    assert len(orders) == 3


def test_three_dimensional_geometry() -> None:
    text = kernel("""
        ld.param.u64 %d0, [x]; mov.u32 %r0, %tid.x; mov.u32 %r1, %tid.y; mov.u32 %r2, %tid.z; mov.u32 %r3, %ctaid.x; mov.u32 %r4, %ctaid.y; mov.u32 %r5, %ctaid.z;
        mad.lo.u32 %r10, %r5, %nctaid.y, %r4; mad.lo.u32 %r10, %r10, %nctaid.x, %r3; mad.lo.u32 %r10, %r10, %ntid.z, %r2; mad.lo.u32 %r10, %r10, %ntid.y, %r1;
        mad.lo.u32 %r10, %r10, %ntid.x, %r0; mul.wide.u32 %d1, %r10, 4; add.u64 %d0, %d0, %d1; st.global.u32 [%d0], %r10;""", [".u64 x"])  # fmt: skip
    x = np.zeros(2 * 3 * 4 * 5 * 2 * 3, np.uint32)
    run(text, x, grid=(2, 3, 4), block=(5, 2, 3))
    assert (x == np.arange(len(x))).all()


def test_waiting_for_a_thread_that_computes_for_long() -> None:
    """Polling while another thread loops without touching memory is no deadlock."""
    text = kernel(
        START
        + """
        setp.eq.u32 %p0, %r0, 0; @%p0 bra WAIT; setp.ne.u32 %p1, %r0, 32; @%p1 exit; mov.u32 %r5, 0;
        LOOP: add.u32 %r5, %r5, 1; setp.lt.u32 %p2, %r5, 20000; @%p2 bra LOOP; st.release.gpu.global.u32 [%d0], %r5; exit;
        WAIT: ld.acquire.gpu.global.u32 %r6, [%d0]; setp.eq.u32 %p3, %r6, 0; @%p3 bra WAIT; st.global.u32 [%d0+4], %r6;""",
        [".u64 x"],
    )
    x = np.zeros(64, np.uint32)
    run(text, x, block=64)
    assert x[1] == 20000
