"""Every kind of fault, planted: the kernel is wrong in one place, and the emulator must say where. Beside each planted
fault is the kernel without it, which must run."""
# ruff: noqa: E501 (PTX in strings)

from __future__ import annotations

import numpy as np
import pytest

from .. import EmulatorFault, Memory, UnknownInstruction, emulate, parse
from .harness import kernel, run

ADDRESS = "ld.param.u64 %d0, [x]; mov.u32 %r0, %tid.x; mov.u32 %r9, %ctaid.x; mul.wide.u32 %d1, %r0, 4; add.u64 %d2, %d0, %d1;"
SHARED = ".shared .align 16 .b8 s[1024]; mov.u32 %r1, s; shl.b32 %r2, %r0, 2; add.u32 %r3, %r1, %r2;"


def fault(text: str, *arguments: object, **options: object) -> EmulatorFault:
    """The fault that running the kernel raises."""
    with pytest.raises(EmulatorFault) as caught:
        run(text, *arguments, **options)  # type: ignore[arg-type]
    return caught.value


def ints(count: int) -> np.ndarray:
    """An array of int32."""
    return np.arange(count, dtype=np.int32)


def test_out_of_bounds_names_everything() -> None:
    text = kernel(ADDRESS + "\nst.global.u32 [%d2], %r0;", [".u64 x"])
    run(text, ints(64), block=64)
    x = ints(60)
    found = fault(text, x, block=64)
    assert found.kind == "out of bounds"
    assert found.kernel == "k"
    assert found.thread == (60, 0, 0)
    assert found.block == (0, 0, 0)
    assert found.address == x.ctypes.data + 240
    assert found.text == "st.global.u32 [%d2], %r0"
    assert found.line is not None
    assert text.split("\n")[found.line - 1].strip() == found.text + ";"
    assert "'argument 0'" in found.detail
    assert "240 bytes" in found.detail


def test_read_between_two_allocations() -> None:
    text = kernel(ADDRESS + "ld.global.u32 %r5, [%d2+400];", [".u64 x", ".u64 y"])
    assert fault(text, ints(32), ints(32)).kind == "out of bounds"


def test_null_pointer() -> None:
    text = kernel("mov.u64 %d0, 0; ld.global.u32 %r5, [%d0];")
    assert fault(text).kind == "out of bounds"


def test_write_to_constant_memory() -> None:
    module = ".const .align 4 .b8 table[16] = {1, 2, 3};"
    text = kernel("mov.u64 %d0, table; cvta.const.u64 %d0, %d0; st.u32 [%d0], 5;", module=module)
    assert fault(text).kind == "out of bounds"


def test_misaligned() -> None:
    text = kernel(ADDRESS + "ld.global.u32 %r5, [%d2+2];", [".u64 x"])
    found = fault(text, ints(64))
    assert found.kind == "misaligned"
    assert found.thread == (0, 0, 0)
    vector = kernel(ADDRESS + "ld.global.v4.u32 {%r4, %r5, %r6, %r7}, [%d2];", [".u64 x"])
    assert fault(vector, np.zeros(64, "i4")).thread in ((1, 0, 0), (0, 0, 0))


def test_misaligned_and_out_of_bounds_in_shared_memory() -> None:
    text = kernel(ADDRESS + SHARED + "st.shared.u32 [%r3+1], %r0;", [".u64 x"])
    assert fault(text, ints(32)).kind == "misaligned"
    text = kernel(ADDRESS + SHARED + "st.shared.u32 [%r3+1000], %r0;", [".u64 x"])
    found = fault(text, ints(32))
    assert found.kind == "out of bounds"
    assert found.thread == (6, 0, 0)


def test_uninitialised_global_memory() -> None:
    text = kernel(ADDRESS + "ld.global.u32 %r5, [%d2];", [".u64 x"])
    run(text, ints(32))
    found = fault(text, ints(32), poison=[0])
    assert found.kind == "uninitialised"
    assert "'argument 0'" in found.detail
    written_first = kernel(ADDRESS + "st.global.u32 [%d2], 1; ld.global.u32 %r5, [%d2];", [".u64 x"])
    run(written_first, ints(32), poison=[0])


def test_uninitialised_shared_memory() -> None:
    body = ADDRESS + SHARED + "setp.lt.u32 %p1, %r0, 31; @{} st.shared.u32 [%r3], %r0; ld.shared.u32 %r5, [%r3];"
    text = kernel(body.replace("@{}", "@%p1"), [".u64 x"])
    found = fault(text, ints(32))
    assert found.kind == "uninitialised"
    assert found.thread == (31, 0, 0)
    run(kernel(body.replace("@{}", ""), [".u64 x"]), ints(32))


NEIGHBOUR = "xor.b32 %r4, %r2, {mask}; add.u32 %r4, %r4, %r1;"


@pytest.mark.parametrize(
    ("mask", "barrier"), [(128, "bar.sync 0;"), (4, "bar.sync 0;"), (4, "bar.warp.sync 0xffffffff;")]
)
def test_read_after_write_race(mask: int, barrier: str) -> None:
    """A neighbour's value is read: in the next warp (128 bytes away) or in the same warp."""
    body = (
        ADDRESS
        + SHARED
        + NEIGHBOUR.format(mask=mask)
        + "st.shared.u32 [%r3], %r0; {} ld.shared.u32 %r5, [%r4]; st.global.u32 [%d2], %r5;"
    )
    x = ints(64)
    run(kernel(body.replace("{}", barrier), [".u64 x"]), x, block=64)
    assert x.tolist() == [i ^ (mask // 4) for i in range(64)]
    found = fault(kernel(body.replace("{}", ""), [".u64 x"]), ints(64), block=64)
    assert found.kind == "race"
    assert "ld.shared" in str(found.text)


def test_a_warp_barrier_does_not_order_two_warps() -> None:
    body = (
        ADDRESS
        + SHARED
        + NEIGHBOUR.format(mask=128)
        + "st.shared.u32 [%r3], %r0; bar.warp.sync 0xffffffff; ld.shared.u32 %r5, [%r4];"
    )
    assert fault(kernel(body, [".u64 x"]), ints(64), block=64).kind == "race"


@pytest.mark.parametrize("mask", [128, 4])
def test_write_after_read_race(mask: int) -> None:
    body = (
        ADDRESS
        + SHARED
        + NEIGHBOUR.format(mask=mask)
        + (
            "st.shared.u32 [%r3], %r0; bar.sync 0; ld.shared.u32 %r5, [%r4]; {} add.u32 %r5, %r5, 100; st.shared.u32 [%r3], %r5;"
        )
    )
    run(kernel(body.replace("{}", "bar.sync 0;"), [".u64 x"]), ints(64), block=64)
    found = fault(kernel(body.replace("{}", ""), [".u64 x"]), ints(64), block=64)
    assert found.kind == "race"
    assert "st.shared" in str(found.text)


def test_write_write_race() -> None:
    body = ADDRESS + SHARED + "{} st.shared.u32 [%r1], %r0;"
    assert fault(kernel(body.replace("{}", ""), [".u64 x"]), ints(64), block=64).kind == "race"
    run(kernel(body.replace("{}", "setp.eq.u32 %p1, %r0, 40; @%p1"), [".u64 x"]), ints(64), block=64)


def test_all_threads_may_store_the_same_value() -> None:
    run(kernel(ADDRESS + SHARED + "st.shared.u32 [%r1], 5;", [".u64 x"]), ints(64), block=64)


def test_global_write_write_race_in_one_instruction() -> None:
    text = kernel(ADDRESS + "st.global.u32 [%d0], %r0;", [".u64 x"])
    assert fault(text, ints(32)).kind == "race"


def test_divergent_barrier() -> None:
    """Half of the block does not reach the barrier."""
    body = ADDRESS + "setp.ge.u32 %p1, %r0, 32; @%p1 bra SKIP; bar.sync 0; SKIP: st.global.u32 [%d2], 1;"
    found = fault(kernel(body, [".u64 x"]), ints(64), block=64)
    assert found.kind == "divergent barrier"
    assert "32 of 64 threads" in found.detail


def test_threads_of_one_warp_at_different_barriers() -> None:
    body = (
        ADDRESS
        + "and.b32 %r5, %r0, 1; setp.eq.u32 %p1, %r5, 0; @%p1 bra EVEN; bar.sync 0; bra END; EVEN: bar.sync 0; END: nop;"
    )
    found = fault(kernel(body, [".u64 x"]), ints(64), block=64)
    assert found.kind == "divergent barrier"
    assert "one warp" in found.detail


def test_whole_warps_may_meet_from_different_places() -> None:
    body = (
        ADDRESS
        + "setp.ge.u32 %p1, %r0, 32; @%p1 bra UPPER; bar.sync 0; bra END; UPPER: bar.sync 0; END: st.global.u32 [%d2], 7;"
    )
    x = ints(64)
    run(kernel(body, [".u64 x"]), x, block=64)
    assert (x == 7).all()


def test_barrier_with_the_wrong_count() -> None:
    body = ADDRESS + "bar.sync 1, {};"
    run(kernel(body.replace("{}", "64"), [".u64 x"]), ints(64), block=64)
    assert fault(kernel(body.replace("{}", "96"), [".u64 x"]), ints(64), block=64).kind == "divergent barrier"
    assert fault(kernel(body.replace("{}", "40"), [".u64 x"]), ints(64), block=64).kind == "invalid operand"


def test_deadlock_spinning_on_a_flag_that_nobody_sets() -> None:
    wait = "SPIN: ld.acquire.gpu.global.u32 %r5, [%d0]; setp.ne.u32 %p1, %r5, 99; @%p1 bra SPIN;"
    found = fault(kernel(ADDRESS + wait, [".u64 x"]), ints(32), grid=3)
    assert found.kind == "deadlock"


def test_deadlock_of_a_collective_that_a_lane_never_reaches() -> None:
    body = ADDRESS + (
        "setp.eq.u32 %p1, %r0, 3; @%p1 bra OTHER; bar.warp.sync 0xffffffff; bra END;"
        "OTHER: SPIN: ld.volatile.global.u32 %r5, [%d0]; setp.ne.u32 %p2, %r5, 99; @%p2 bra SPIN; END: nop;"
    )
    assert fault(kernel(body, [".u64 x"]), ints(32)).kind == "deadlock"


def test_aligned_collective_in_a_diverged_warp() -> None:
    body = (
        ADDRESS
        + SHARED
        + "st.shared.u32 [%r3], %r0; bar.sync 0; setp.lt.u32 %p1, %r0, 16; @!%p1 exit; ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r5}, [%r1];"
    )
    assert fault(kernel(body, [".u64 x"]), ints(32)).kind == "divergent warp"


COPY = (
    ADDRESS
    + SHARED
    + "cp.async.ca.shared.global [%r3], [%d2], 4; {commit} {wait} bar.sync 0; ld.shared.u32 %r5, [%r3]; st.global.u32 [%d2], %r5;"
)


def test_missing_wait_after_asynchronous_copy() -> None:
    right = COPY.replace("{commit}", "cp.async.commit_group;").replace("{wait}", "cp.async.wait_group 0;")
    run(kernel(right, [".u64 x"]), ints(32))
    for commit, wait in (("", ""), ("cp.async.commit_group;", ""), ("", "cp.async.wait_group 0;"),
                         ("cp.async.commit_group;", "cp.async.wait_group 1;")):  # fmt: skip
        found = fault(kernel(COPY.replace("{commit}", commit).replace("{wait}", wait), [".u64 x"]), ints(32))
        assert found.kind == "missing wait"
        assert "ld.shared" in str(found.text)


def test_waiting_is_not_enough_for_another_thread() -> None:
    """The wait covers the own copies; others see them after a barrier."""
    body = (
        ADDRESS
        + SHARED
        + NEIGHBOUR.format(mask=128)
        + ("cp.async.ca.shared.global [%r3], [%d2], 4; cp.async.wait_all; {} ld.shared.u32 %r5, [%r4];")
    )
    run(kernel(body.replace("{}", "bar.sync 0;"), [".u64 x"]), ints(64), block=64)
    assert fault(kernel(body.replace("{}", ""), [".u64 x"]), ints(64), block=64).kind == "race"


def test_trap() -> None:
    assert fault(kernel(ADDRESS + "setp.eq.u32 %p1, %r0, 7; @%p1 trap;", [".u64 x"]), ints(32)).thread == (7, 0, 0)


def test_block_coordinates_in_a_fault() -> None:
    text = kernel(
        "mov.u32 %r0, %ctaid.y; setp.eq.u32 %p1, %r0, 3; mov.u32 %r1, %tid.z; setp.eq.and.u32 %p1, %r1, 2, %p1; @%p1 trap;"
    )
    found = fault(text, grid=(2, 5, 1), block=(4, 2, 3))
    assert found.block is not None
    assert found.block[1] == 3
    assert found.thread == (0, 0, 2)


@pytest.mark.parametrize(("options", "part"), [
    ({"grid": (0, 1, 1)}, "grid"), ({"block": 1025}, "block"), ({"dynamic_shared": 300_000}, "shared memory"),
    ({"grid": 3, "cluster": 2}, "multiple of the cluster"), ({"block": 64}, "requires"),
])  # fmt: skip
def test_invalid_launches(options: dict[str, object], part: str) -> None:
    text = kernel("nop;", directives=".reqntid 32")
    run(text)
    found = fault(text, **options)
    assert found.kind == "invalid launch"
    assert part in found.detail


def test_wrong_parameters() -> None:
    module, memory = parse(kernel("nop;", [".u64 x", ".u32 y"])), Memory()
    with pytest.raises(EmulatorFault, match="2 parameters are declared, 1"):
        emulate(module, "k", (1, 1, 1), (32, 1, 1), parameters=[bytes(8)], memory=memory)
    with pytest.raises(EmulatorFault, match="parameter 1 has 4 bytes, 8"):
        emulate(module, "k", (1, 1, 1), (32, 1, 1), parameters=[bytes(8), bytes(8)], memory=memory)
    with pytest.raises(EmulatorFault, match=r"\['k'\]"):
        emulate(module, "other", (1, 1, 1), (32, 1, 1), memory=memory)


def test_unknown_instruction_is_an_error_with_name_and_line() -> None:
    text = kernel("nop;\nfrobnicate.sync.b32 %r1, %r2;")
    line = 1 + next(i for i, row in enumerate(text.split("\n")) if "frobnicate" in row)
    with pytest.raises(UnknownInstruction, match=rf"line {line}: frobnicate\.sync\.b32"):
        run(text)
    with pytest.raises(UnknownInstruction, match=r"add\.foo\.u32"):
        run(kernel("add.foo.u32 %r1, %r2, %r3;"))


@pytest.mark.parametrize("mask", [128, 4])
def test_race_on_global_memory_inside_a_block(mask: int) -> None:
    body = (
        ADDRESS
        + f"st.global.u32 [%d2], %r0; {{}} xor.b32 %r4, %r0, {mask // 4}; mul.wide.u32 %d3, %r4, 4; add.u64 %d3, %d0, %d3; ld.global.u32 %r5, [%d3];"
    )
    run(kernel(body.replace("{}", "bar.sync 0;"), [".u64 x"]), ints(64), block=64)
    found = fault(kernel(body.replace("{}", ""), [".u64 x"]), np.zeros(64, "i4"), block=64)
    assert found.kind == "race"
    assert "ld.global" in str(found.text)


def test_blocks_that_write_the_same_place() -> None:
    """Whoever comes last wins; if the last to count itself in writes, all is well."""
    body = ADDRESS + "{count} setp.eq.u32 %p1, %r0, 0; {late} @%p1 st.global.u32 [%d0], %r9;"
    spread = "setp.lt.u32 %p2, %r9, 4; @%p2 bra GO; nop; GO:"
    found = fault(
        kernel(body.replace("{count}", spread).replace("{late}", ""), [".u64 x"]), np.full(256, 99, "i4"), grid=8
    )
    assert found.kind == "race"
    count = "setp.eq.u32 %p1, %r0, 0; mov.u32 %r7, 0; @%p1 atom.global.add.u32 %r7, [%d0+1020], 1;"
    last = "setp.eq.and.u32 %p1, %r7, 7, %p1;"
    x = np.zeros(256, "i4")
    run(kernel(body.replace("{count}", count).replace("{late}", last), [".u64 x"]), x, grid=8)
