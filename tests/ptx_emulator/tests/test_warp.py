"""Warp collectives against definitions written out lane by lane."""
# ruff: noqa: E501 (PTX in strings)

from __future__ import annotations

import numpy as np
import pytest

from .harness import Array, compute, kernel, run

VALUES = np.random.default_rng(7).integers(0, 2**32, 64, dtype=np.uint64).astype(np.uint32)


@pytest.mark.parametrize(("mode", "amount", "clamp", "source"), [
    ("bfly", 5, 31, lambda i: i ^ 5), ("idx", 7, 31, lambda i: 7), ("up", 3, 0, lambda i: i - 3 if i >= 3 else None),
    ("down", 4, 31, lambda i: i + 4 if i + 4 < 32 else None),
    # segments of 8 lanes: mask 0x18 in bits 8 to 12
    ("idx", 2, 0x181F, lambda i: (i & 24) | 2), ("down", 3, 0x181F, lambda i: i + 3 if (i & 7) + 3 < 8 else None),
    ("up", 3, 0x1800, lambda i: i - 3 if (i & 7) >= 3 else None), ("bfly", 16, 15, lambda i: i ^ 16 if i ^ 16 < 16 else None),
])  # fmt: skip
def test_shuffles(mode: str, amount: int, clamp: int, source: object) -> None:
    text = f"shfl.sync.{mode}.b32 R|%p5, A, {amount}, {clamp}, 0xffffffff; @!%p5 xor.b32 R, R, 1;"
    got = compute(text, "u32", ("u32", VALUES))
    for lane, value in enumerate(got):
        base = lane // 32 * 32
        place = source(lane % 32)  # type: ignore[operator]
        expected = int(VALUES[lane]) ^ 1 if place is None else int(VALUES[base + place])
        assert int(value) == expected, (mode, lane)


def bits(flags: Array) -> int:
    """A ballot."""
    return sum(int(f) << i for i, f in enumerate(flags))


def test_votes() -> None:
    flags = VALUES & 1 == 1
    prefix = "and.b32 %r9, A, 1; setp.eq.u32 %p5, %r9, 1;"
    ballot = compute(prefix + "vote.sync.ballot.b32 R, %p5, -1;", "u32", ("u32", VALUES))
    for warp in range(2):
        part = slice(32 * warp, 32 * warp + 32)
        assert set(ballot[part].tolist()) == {bits(flags[part])}
    some = compute("setp.lt.u32 %p5, A, 3; vote.sync.any.pred R, %p5, -1;", "pred", ("u32", np.arange(64)))
    every = compute("setp.lt.u32 %p5, A, 32; vote.sync.all.pred R, %p5, -1;", "pred", ("u32", np.arange(64)))
    same = compute("setp.lt.u32 %p5, A, 40; vote.sync.uni.pred R, %p5, -1;", "pred", ("u32", np.arange(64)))
    assert some.tolist() == [1] * 32 + [0] * 32
    assert every.tolist() == [1] * 32 + [0] * 32
    assert same.tolist() == [1] * 32 + [0] * 32


def test_match() -> None:
    small = VALUES % 5
    got = compute("match.any.sync.b32 R, A, -1;", "u32", ("u32", small))
    for lane in range(64):
        warp = small[lane // 32 * 32 : lane // 32 * 32 + 32]
        assert int(got[lane]) == bits(warp == small[lane])
    equal = np.where(np.arange(64) < 32, 9, small)
    got = compute("match.all.sync.b32 R|%p5, A, -1; @%p5 sub.u32 R, R, 1;", "u32", ("u32", equal))
    assert got.tolist() == [0xFFFFFFFE] * 32 + [0] * 32


@pytest.mark.parametrize(("operation", "function"), [
    ("add.u32", lambda w: int(w.astype(np.uint64).sum()) & 0xFFFFFFFF), ("min.u32", lambda w: int(w.min())),
    ("max.s32", lambda w: int(w.view(np.int32).max()) & 0xFFFFFFFF), ("xor.b32", lambda w: int(np.bitwise_xor.reduce(w))),
    ("and.b32", lambda w: int(np.bitwise_and.reduce(w))), ("or.b32", lambda w: int(np.bitwise_or.reduce(w))),
])  # fmt: skip
def test_reductions(operation: str, function: object) -> None:
    got = compute(f"redux.sync.{operation} R, A, -1;", "u32", ("u32", VALUES))
    for warp in range(2):
        part = slice(32 * warp, 32 * warp + 32)
        assert set(got[part].tolist()) == {function(VALUES[part])}  # type: ignore[operator]


def test_reduction_of_floats() -> None:
    values = np.linspace(-3, 2, 32).astype(np.float32)
    values[7] = np.nan
    assert compute("redux.sync.max.f32 R, A, -1;", "f32", ("f32", values), arch="sm_100a").tolist() == [2.0] * 32
    assert compute("redux.sync.max.abs.f32 R, A, -1;", "f32", ("f32", values), arch="sm_100a").tolist() == [3.0] * 32
    assert np.isnan(compute("redux.sync.min.NaN.f32 R, A, -1;", "f32", ("f32", values), arch="sm_100a")).all()


def test_members_that_arrive_apart_wait_for_each_other() -> None:
    """Odd lanes take a long way to the same instruction; the shuffle still sees all 32."""
    text = """
    and.b32 %r9, %r0, 1; setp.eq.u32 %p5, %r9, 0; @%p5 bra MEET; mov.u32 %r8, 0;
    LOOP: add.u32 %r8, %r8, 1; setp.lt.u32 %p6, %r8, %r0; @%p6 bra LOOP;
    MEET: shfl.sync.bfly.b32 R, A, 1, 31, -1;
    """
    assert compute(text, "u32", ("u32", VALUES)).tolist() == VALUES.reshape(-1, 2)[:, ::-1].reshape(-1).tolist()


def test_two_halves_of_a_warp_have_their_own_masks() -> None:
    text = """
    mov.u32 %r9, 0xffff; mov.u32 %r10, %laneid; setp.ge.u32 %p5, %r10, 16; @%p5 mov.u32 %r9, 0xffff0000;
    redux.sync.add.u32 R, A, %r9;
    """
    small = VALUES % 100
    got = compute(text, "u32", ("u32", small))
    assert got.tolist() == np.repeat(small.reshape(-1, 16).sum(axis=1), 16).tolist()


def test_exited_lanes_are_not_waited_for() -> None:
    text = kernel("mov.u32 %r0, %tid.x; setp.ge.u32 %p0, %r0, 20; @%p0 exit; mov.u32 %r1, 1; redux.sync.add.u32 %r2, %r1, -1;"
                  "ld.param.u64 %d0, [x]; mul.wide.u32 %d1, %r0, 4; add.u64 %d0, %d0, %d1; st.global.u32 [%d0], %r2;", [".u64 x"])  # fmt: skip
    x = np.zeros(20, np.uint32)
    run(text, x)
    assert x.tolist() == [20] * 20


def test_elect_chooses_one_lane() -> None:
    got = compute("elect.sync %r9|%p5, -1; selp.u32 R, %r9, 99, %p5;", "u32", ("u32", VALUES))
    assert got.tolist() == ([0] + [99] * 31) * 2


def test_activemask_and_lane_numbers() -> None:
    assert compute("activemask.b32 R;", "u32", ("u32", VALUES)).tolist() == [0xFFFFFFFF] * 64
    assert compute("mov.u32 R, %lanemask_lt;", "u32", ("u32", VALUES)).tolist() == [(1 << i) - 1 for i in range(32)] * 2
    assert (
        compute("mov.u32 R, %lanemask_ge;", "u32", ("u32", VALUES)).tolist()
        == [0xFFFFFFFF & ~((1 << i) - 1) for i in range(32)] * 2
    )
    assert compute("mov.u32 R, %warpid;", "u32", ("u32", VALUES)).tolist() == [0] * 32 + [1] * 32


def test_a_warp_barrier_may_be_reached_at_two_places() -> None:
    """Even and odd lanes wait for each other at different instructions; each then sees what the other stored."""
    text = kernel(
        """.shared .align 4 .b8 s[128]; mov.u32 %r0, %tid.x; mov.u32 %r1, s; shl.b32 %r2, %r0, 2; add.u32 %r2, %r1, %r2;
        st.shared.u32 [%r2], %r0; and.b32 %r3, %r0, 1; setp.eq.u32 %p0, %r3, 0; @%p0 bra EVEN;
        bar.warp.sync -1; bra END; EVEN: bar.warp.sync -1;
        END: xor.b32 %r4, %r2, 4; ld.shared.u32 %r5, [%r4]; ld.param.u64 %d0, [x]; mul.wide.u32 %d1, %r0, 4;
        add.u64 %d0, %d0, %d1; st.global.u32 [%d0], %r5;""",
        [".u64 x"],
    )
    x = np.zeros(32, np.uint32)
    run(text, x)
    assert x.tolist() == [i ^ 1 for i in range(32)]
