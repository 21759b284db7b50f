"""mbarrier, bulk copies, tensor maps and clusters, with the faults that belong to them."""
# ruff: noqa: E501 (PTX in strings)

from __future__ import annotations

import numpy as np
import pytest

from .. import EmulatorFault
from ..tensor_map import TensorMap
from .harness import Array, kernel, run

RANDOM = np.random.default_rng(9)

SETUP = """
    .shared .align 1024 .b8 s[8192]; .shared .align 8 .b64 bar[2];
    mov.u32 %r0, %tid.x; mov.u32 %r1, s; mov.u32 %r2, bar; setp.eq.u32 %p0, %r0, 0; ld.param.u64 %d0, [x]; ld.param.u64 %d1, [y];
    mul.wide.u32 %d9, %r0, 16; add.u64 %d2, %d1, %d9; shl.b32 %r3, %r0, 4; add.u32 %r3, %r1, %r3;
"""
INIT = "@%p0 mbarrier.init.shared::cta.b64 [%r2], 1; bar.sync 0;"
EXPECT = "@%p0 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r2], {};"
WAIT = "WAIT: mbarrier.try_wait.parity.shared::cta.b64 %p1, [%r2], 0; @!%p1 bra WAIT;"
OUT = "ld.shared.v4.u32 {%r4, %r5, %r6, %r7}, [%r3]; st.global.v4.u32 [%d2], {%r4, %r5, %r6, %r7};"
LOAD = "@%p0 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r1], [%d0], 512, [%r2];"


def fault(text: str, *arguments: object, **options: object) -> EmulatorFault:
    """The fault that running the kernel raises."""
    with pytest.raises(EmulatorFault) as caught:
        run(text, *arguments, **options)  # type: ignore[arg-type]
    return caught.value


def data() -> tuple[Array, Array]:
    """512 random bytes and a place for them."""
    return RANDOM.integers(0, 256, 512).astype(np.uint8), np.zeros(512, np.uint8)


def bulk_load(init: str = INIT, expect: str = EXPECT.format(512), load: str = LOAD, wait: str = WAIT) -> str:
    """A kernel that fetches 512 bytes."""
    return kernel(SETUP + init + expect + load + wait + OUT, [".u64 x", ".u64 y"])


def test_bulk_load() -> None:
    x, y = data()
    run(bulk_load(), x, y, poison=[1])
    assert (x == y).all()


def test_bulk_load_without_wait() -> None:
    found = fault(bulk_load(wait=""), *data())
    assert found.kind == "missing wait"
    assert "ld.shared" in str(found.text)


def test_bulk_load_expecting_more_than_comes() -> None:
    assert fault(bulk_load(expect=EXPECT.format(528)), *data()).kind == "deadlock"


def test_bulk_load_nobody_arrives() -> None:
    assert fault(bulk_load(expect=""), *data()).kind == "deadlock"


def test_waiting_for_the_wrong_phase() -> None:
    """Parity 1 is that of the phase before the first, so the wait ends at once."""
    assert fault(bulk_load(wait=WAIT.replace("], 0", "], 1")), *data()).kind == "missing wait"


def test_bulk_load_checks_addresses() -> None:
    assert fault(bulk_load(load=LOAD.replace("[%d0]", "[%d0+8]")), *data()).kind == "misaligned"
    found = fault(bulk_load(load=LOAD.replace("[%d0]", "[%d0+16]")), *data())
    assert found.kind == "out of bounds"
    assert "cp.async.bulk" in str(found.text)
    assert (
        fault(
            bulk_load(load=LOAD.replace("512", "9216"), expect=EXPECT.format(9216)), np.zeros(16384, "u1"), data()[1]
        ).kind
        == "out of bounds"
    )


def test_mbarrier_that_was_not_initialised() -> None:
    assert fault(bulk_load(init=""), *data()).kind == "uninitialised"


def test_too_many_arrivals() -> None:
    assert (
        fault(bulk_load(expect="@%p0 mbarrier.arrive.shared::cta.b64 %d5, [%r2], 2;"), *data()).kind
        == "invalid operand"
    )


def test_mbarrier_orders_producer_and_consumer() -> None:
    """Warp 0 writes and arrives, warp 1 waits and reads; without the wait it is a race."""
    body = (
        SETUP + "@%p0 mbarrier.init.shared::cta.b64 [%r2], 32; bar.sync 0; setp.ge.u32 %p2, %r0, 32; @%p2 bra CONSUMER;"
    )
    body += "st.shared.u32 [%r3], %r0; mbarrier.arrive.shared::cta.b64 %d5, [%r2]; bra END; CONSUMER: {} sub.u32 %r3, %r3, 512; ld.shared.u32 %r4, [%r3]; st.global.u32 [%d2], %r4; END: nop;"
    x, y = np.zeros(4, np.uint32), np.zeros((64, 4), np.uint32)
    run(kernel(body.replace("{}", WAIT), [".u64 x", ".u64 y"]), x, y, block=64)
    assert y[32:, 0].tolist() == list(range(32))
    # The emulator runs the lower program counter first, so only the order of accesses tells.
    assert fault(kernel(body.replace("{}", ""), [".u64 x", ".u64 y"]), x, y, block=64).kind == "race"


def test_pipeline_of_several_phases() -> None:
    """One buffer filled eight times through two mbarriers, full and empty; parity flips each time."""
    body = (
        SETUP
        + """
        @%p0 mbarrier.init.shared::cta.b64 [%r2], 1; @%p0 mbarrier.init.shared::cta.b64 [%r2+8], 32; bar.sync 0;
        setp.ge.u32 %p2, %r0, 32; @%p2 bra CONSUMER; @!%p0 bra END; mov.u32 %r10, 0;
        FILL: xor.b32 %r11, %r10, 1; and.b32 %r11, %r11, 1;
        EMPTY: mbarrier.try_wait.parity.shared::cta.b64 %p1, [%r2+8], %r11; @!%p1 bra EMPTY;
        mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r2], 512; cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r1], [%d0], 512, [%r2];
        add.u64 %d0, %d0, 512; add.u32 %r10, %r10, 1; setp.lt.u32 %p3, %r10, 8; @%p3 bra FILL; bra END;
        CONSUMER: mov.u32 %r10, 0; sub.u32 %r3, %r3, 512; sub.u64 %d2, %d2, 512;
        FULL: and.b32 %r11, %r10, 1; TRY: mbarrier.try_wait.parity.shared::cta.b64 %p1, [%r2], %r11; @!%p1 bra TRY;
        ld.shared.v4.u32 {%r4, %r5, %r6, %r7}, [%r3]; st.global.v4.u32 [%d2], {%r4, %r5, %r6, %r7}; {release} add.u64 %d2, %d2, 512;
        add.u32 %r10, %r10, 1; setp.lt.u32 %p3, %r10, 8; @%p3 bra FULL; END: nop;"""
    )
    x, y = RANDOM.integers(0, 256, 4096).astype(np.uint8), np.zeros(4096, np.uint8)
    run(
        kernel(body.replace("{release}", "mbarrier.arrive.shared::cta.b64 _, [%r2+8];"), [".u64 x", ".u64 y"]),
        x,
        y,
        block=64,
    )
    assert (x == y).all()
    assert fault(kernel(body.replace("{release}", ""), [".u64 x", ".u64 y"]), x, y, block=64).kind == "deadlock"


def test_copies_that_signal_an_mbarrier() -> None:
    body = (
        SETUP
        + "@%p0 mbarrier.init.shared::cta.b64 [%r2], 32; bar.sync 0; add.u64 %d0, %d0, %d9; cp.async.cg.shared.global [%r3], [%d0], 16;"
    )
    body += "cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%r2]; {} xor.b32 %r3, %r3, 16;" + OUT
    x, y = data()
    run(kernel(body.replace("{}", WAIT), [".u64 x", ".u64 y"]), x, y)
    assert (y.reshape(-1, 16) == x.reshape(16, 2, 16)[:, ::-1].reshape(-1, 16)).all()
    assert fault(kernel(body.replace("{}", ""), [".u64 x", ".u64 y"]), x, y).kind == "missing wait"


STORE = (
    SETUP
    + """
    add.u64 %d0, %d0, %d9; ld.global.v4.u32 {%r4, %r5, %r6, %r7}, [%d0]; st.shared.v4.u32 [%r3], {%r4, %r5, %r6, %r7}; fence.proxy.async.shared::cta; bar.sync 0;
    @%p0 cp.async.bulk.global.shared::cta.bulk_group [%d1], [%r1], 512; @%p0 cp.async.bulk.commit_group; {wait} {after}"""
)


def test_bulk_store() -> None:
    for wait in ("cp.async.bulk.wait_group 0;", "cp.async.bulk.wait_group.read 0;"):
        x, y = data()
        run(
            kernel(STORE.replace("{wait}", "@%p0 " + wait).replace("{after}", ""), [".u64 x", ".u64 y"]),
            x,
            y,
            poison=[1],
        )
        assert (x == y).all()


def test_bulk_store_without_wait() -> None:
    assert (
        fault(kernel(STORE.replace("{wait}", "").replace("{after}", ""), [".u64 x", ".u64 y"]), *data()).kind
        == "missing wait"
    )


def test_bulk_store_whose_source_is_overwritten_too_early() -> None:
    """The copy reads as late as it may, so the result is wrong."""
    x, y = data()
    late = "bar.sync 0; @%p0 st.shared.u32 [%r1], 7; @%p0 cp.async.bulk.wait_group 0;"
    run(kernel(STORE.replace("{wait}", "").replace("{after}", late), [".u64 x", ".u64 y"]), x, y)
    assert y[:4].tolist() == [7, 0, 0, 0]


def test_bulk_store_of_what_another_thread_wrote_needs_a_barrier() -> None:
    text = (
        STORE.replace("bar.sync 0;\n    @%p0 cp", "@%p0 cp")
        .replace("{wait}", "@%p0 cp.async.bulk.wait_group 0;")
        .replace("{after}", "")
    )
    assert fault(kernel(text, [".u64 x", ".u64 y"]), *data()).kind == "race"


# ----------------------------------------------------------------------------------------------------- tensor maps


LOAD_BOX = (
    "@%p0 cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
    " [%r1], [%d0, {%r10, %r11}], [%r2];"
)


def map_of(tensor: Array, box: tuple[int, int], swizzle: int) -> TensorMap:
    """A map of a two-dimensional array; box as (rows, columns)."""
    return TensorMap(tensor.ctypes.data, tensor.itemsize, tensor.shape[::-1], tensor.strides[:1], box[::-1], swizzle)


def swizzle_by_hand(byte: int, width: int) -> int:
    """128: the 16-byte unit number (0 to 7) of a 128-byte row xor the row's number mod 8, and so on for narrower ones."""
    row, unit, rest = byte // 128, byte // 16 % 8, byte % 16
    flip = {0: 0, 32: row & 1, 64: row & 3, 128: row & 7}[width]
    return row * 128 + (unit ^ flip) * 16 + rest


@pytest.mark.parametrize("swizzle", [0, 32, 64, 128])
def test_tensor_load(swizzle: int) -> None:
    """A box that hangs over two edges: what is outside is zero."""
    tensor = RANDOM.integers(0, 65536, (40, 96)).astype(np.uint16)
    columns = (swizzle or 128) // 2
    rows = 512 // columns // 2
    body = (
        SETUP.replace("ld.param.u64 %d0, [x];", "mov.b32 %r30, x; cvt.u64.u32 %d0, %r30; cvta.param.u64 %d0, %d0;")
        + INIT
        + EXPECT.format(512)
    )
    body += (
        "mov.u32 %r10, 80; mov.u32 %r11, -2; @%p0 cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%r1], [%d0, {%r10, %r11}], [%r2];"
        + WAIT
        + OUT
    )
    text = kernel(body, [".align 64 .b8 x[128]", ".u64 y", ".u64 tensor"])
    y = np.zeros(512, np.uint8)
    run(text, map_of(tensor, (rows, columns), swizzle).pack(), y, tensor)
    box = np.zeros((rows, columns), np.uint16)
    box[2:, : min(16, columns)] = tensor[: rows - 2, 80 : 80 + min(16, columns)]
    flat = box.view(np.uint8).reshape(-1)
    expected = np.zeros(512, np.uint8)
    for byte in range(512):
        expected[swizzle_by_hand(byte, swizzle)] = flat[byte]
    assert (y == expected).all()


def test_tensor_store_leaves_the_outside_alone() -> None:
    tensor = np.full((10, 24), 9, np.uint16)
    source = RANDOM.integers(0, 65536, (16, 16)).astype(np.uint16)
    body = (
        STORE.replace("ld.param.u64 %d1, [y];", "mov.b64 %d1, y; cvta.param.u64 %d1, %d1;")
        .replace("{after}", "")
        .replace("{wait}", "@%p0 cp.async.bulk.wait_group 0;")
    )
    body = body.replace(
        "cp.async.bulk.global.shared::cta.bulk_group [%d1], [%r1], 512",
        "cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%d1, {%r20, %r21}], [%r1]",
    )
    text = kernel("mov.u32 %r20, 16; mov.u32 %r21, 4;" + body, [".u64 x", ".align 64 .b8 y[128]", ".u64 tensor"])
    run(text, source, map_of(tensor, (16, 16), 0).pack(), tensor)
    expected = np.full((10, 24), 9, np.uint16)
    expected[4:10, 16:24] = source[:6, :8]
    assert (tensor == expected).all()


def test_tensor_map_of_four_bit_elements() -> None:
    """Coordinates count elements, two to a byte."""
    tensor = RANDOM.integers(0, 256, (16, 64)).astype(np.uint8)
    map_ = TensorMap(tensor.ctypes.data, 0, (128, 16), (64,), (64, 16), 0)
    body = SETUP.replace("ld.param.u64 %d0, [x];", "mov.b64 %d0, x; cvta.param.u64 %d0, %d0;") + INIT
    body += EXPECT.format(512) + "mov.u32 %r10, 64; mov.u32 %r11, 0;"
    body += LOAD_BOX + WAIT + OUT
    text = kernel(body, [".align 64 .b8 x[128]", ".u64 y", ".u64 tensor"])
    y = np.zeros((16, 32), np.uint8)
    run(text, map_.pack(), y, tensor)
    assert (y == tensor[:, 32:]).all()
    assert TensorMap.unpack(map_.pack()) == map_ or TensorMap.unpack(map_.pack()).element_strides == (1, 1)


def test_tensor_map_that_the_kernel_writes() -> None:
    """Fields set one by one in shared memory, copied to global memory and used."""
    tensor = RANDOM.integers(0, 65536, (40, 96)).astype(np.uint16)
    scratch = np.zeros(384, np.uint8)
    start = -scratch.ctypes.data % 128
    fields = [("global_address.shared::cta.b1024.b64", "", "%d6"), ("rank.shared::cta.b1024.b32", "", "1")]
    for index, (box, size) in enumerate(((32, 96), (8, 40))):
        fields.append(("box_dim.shared::cta.b1024.b32", f"{index},", str(box)))
        fields.append(("global_dim.shared::cta.b1024.b32", f"{index},", str(size)))
        fields.append(("element_stride.shared::cta.b1024.b32", f"{index},", "1"))
    fields.append(("global_stride.shared::cta.b1024.b64", "0,", "192"))
    fields.append(("elemtype.shared::cta.b1024.b32", "", "1"))
    fields.append(("swizzle_mode.shared::cta.b1024.b32", "", "0"))
    make = ".shared .align 128 .b8 map[128]; ld.param.u64 %d6, [tensor]; mov.u64 %d7, map; mov.u32 %r30, map;"
    make += "shl.b32 %r31, %r0, 2; add.u32 %r31, %r31, %r30; mov.u32 %r32, 0; st.shared.u32 [%r31], %r32; bar.sync 0;"
    make += "".join(f"@%p0 tensormap.replace.tile.{name} [%d7], {index} {value};" for name, index, value in fields)
    make += f"bar.sync 0; add.u64 %d0, %d0, {start};"
    make += "tensormap.cp_fenceproxy.global.shared::cta.tensormap::generic.release.gpu.sync.aligned [%d0], [%d7], 128;"
    make += "fence.proxy.tensormap::generic.acquire.gpu [%d0], 128;"
    body = SETUP + make + INIT + EXPECT.format(512) + "mov.u32 %r10, 64; mov.u32 %r11, 4;" + LOAD_BOX + WAIT + OUT
    y = np.zeros((8, 32), np.uint16)
    run(kernel(body, [".u64 x", ".u64 y", ".u64 tensor"]), scratch, y, tensor)
    assert (y == tensor[4:12, 64:]).all()


# --------------------------------------------------------------------------------------------------------- clusters

CLUSTER = """
    .shared .align 16 .b8 s[256]; mov.u32 %r0, %tid.x; mov.u32 %r1, s; shl.b32 %r2, %r0, 2; add.u32 %r2, %r1, %r2; mov.u32 %r3, %cluster_ctarank; mov.u32 %r4, %ctaid.x;
    mad.lo.u32 %r5, %r4, 100, %r0; st.shared.u32 [%r2], %r5; {barrier}
    xor.b32 %r6, %r3, 1; mapa.shared::cluster.u32 %r7, %r2, %r6; ld.shared::cluster.u32 %r8, [%r7];
    ld.param.u64 %d0, [y]; mad.lo.u32 %r9, %r4, 32, %r0; mul.wide.u32 %d1, %r9, 4; add.u64 %d0, %d0, %d1; st.global.u32 [%d0], %r8; {end}
"""
CLUSTER_BARRIER = "barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;"


def test_distributed_shared_memory() -> None:
    y = np.zeros((6, 32), np.uint32)
    run(
        kernel(CLUSTER.replace("{barrier}", CLUSTER_BARRIER).replace("{end}", CLUSTER_BARRIER), [".u64 y"]),
        y,
        grid=6,
        cluster=2,
    )
    assert (y == (np.arange(6)[:, None] ^ 1) * 100 + np.arange(32)).all()


def test_distributed_shared_memory_needs_a_cluster_barrier() -> None:
    y = np.zeros((6, 32), np.uint32)
    found = fault(
        kernel(CLUSTER.replace("{barrier}", "bar.sync 0;").replace("{end}", ""), [".u64 y"]), y, grid=6, cluster=2
    )
    assert found.kind == "lifetime"


def test_arriving_at_the_cluster_barrier_is_not_waiting() -> None:
    """A thread that reads between its arrival and its wait may be too early."""
    text = CLUSTER.replace("{barrier}", "barrier.cluster.arrive.aligned;").replace(
        "{end}", "barrier.cluster.wait.aligned;"
    )
    found = fault(kernel(text, [".u64 y"]), np.zeros((6, 32), np.uint32), grid=6, cluster=2)
    assert found.kind == "lifetime"


def test_a_block_outside_the_cluster() -> None:
    text = (
        CLUSTER.replace("{barrier}", CLUSTER_BARRIER)
        .replace("{end}", "")
        .replace("xor.b32 %r6, %r3, 1", "add.u32 %r6, %r3, 2")
    )
    assert fault(kernel(text, [".u64 y"]), np.zeros((6, 32), np.uint32), grid=6, cluster=2).kind == "out of bounds"


def test_cluster_barrier_that_not_all_reach() -> None:
    text = kernel(
        "mov.u32 %r0, %tid.x; barrier.cluster.arrive; setp.lt.u32 %p0, %r0, 5; @%p0 exit; barrier.cluster.wait;"
    )
    run(text, grid=2, cluster=2)  # exited threads count as arrived
    text = kernel("mov.u32 %r0, %cluster_ctarank; setp.eq.u32 %p0, %r0, 1; @%p0 bra SPIN; barrier.cluster.arrive; barrier.cluster.wait; exit;"
                  "SPIN: ld.param.u64 %d0, [y]; AGAIN: ld.acquire.gpu.global.u32 %r1, [%d0]; setp.eq.u32 %p1, %r1, 0; @%p1 bra AGAIN;", [".u64 y"])  # fmt: skip
    assert fault(text, np.zeros(1, np.uint32), grid=2, cluster=2).kind == "deadlock"


def test_bulk_load_to_all_blocks_of_a_cluster() -> None:
    x = RANDOM.integers(0, 256, 512).astype(np.uint8)
    y = np.zeros((2, 512), np.uint8)
    body = (
        SETUP
        + INIT
        + CLUSTER_BARRIER
        + EXPECT.format(512)
        + """
        mov.u32 %r10, %cluster_ctarank; setp.eq.and.u32 %p3, %r10, 0, %p0; mov.u16 %h1, 3;
        @%p3 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%r1], [%d0], 512, [%r2], %h1;
    """
        + WAIT
        + "mul.wide.u32 %d5, %r10, 512; add.u64 %d2, %d2, %d5;"
        + OUT
    )
    run(kernel(body, [".u64 x", ".u64 y"]), x, y, grid=2, cluster=2)
    assert (y == x).all()


def test_arrival_at_another_blocks_mbarrier() -> None:
    """Block 1 arrives at block 0's mbarrier after writing into its shared memory."""
    body = (
        SETUP
        + INIT
        + CLUSTER_BARRIER
        + """
        mov.u32 %r10, %cluster_ctarank; setp.eq.u32 %p3, %r10, 0; @%p3 bra CONSUMER; @!%p0 bra END;
        mov.u32 %r11, 0; mapa.shared::cluster.u32 %r12, %r1, %r11; mapa.shared::cluster.u32 %r13, %r2, %r11; st.shared::cluster.u32 [%r12], 77;
        mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r13]; bra END; CONSUMER:
    """
        + WAIT
        + "ld.shared.u32 %r4, [%r1]; @%p0 st.global.u32 [%d1], %r4; END:"
        + CLUSTER_BARRIER
    )
    y = np.zeros(4, np.uint32)
    run(kernel(body, [".u64 x", ".u64 y"]), np.zeros(4, np.uint32), y, grid=2, cluster=2)
    assert y[0] == 77


STORE_ASYNC = (
    SETUP
    + INIT
    + "@%p0 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r2], 128;"
    + CLUSTER_BARRIER
    + """
    mov.u32 %r10, %cluster_ctarank; xor.b32 %r11, %r10, 1; shl.b32 %r12, %r0, 2; add.u32 %r13, %r1, %r12;
    mapa.shared::cluster.u32 %r14, %r13, %r11; mapa.shared::cluster.u32 %r15, %r2, %r11; mad.lo.u32 %r16, %r10, 100, %r0;
    st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.u32 [%r14], %r16, [%r15]; {wait}
    ld.shared.u32 %r17, [%r13]; mad.lo.u32 %r18, %r10, 32, %r0; mul.wide.u32 %d5, %r18, 4; add.u64 %d1, %d1, %d5;
    st.global.u32 [%d1], %r17;
    """
    + CLUSTER_BARRIER
)


def test_asynchronous_stores_to_another_block() -> None:
    """Each block sends 32 words to the other, whose mbarrier counts 128 bytes."""
    y = np.zeros((2, 32), np.uint32)
    text = kernel(STORE_ASYNC.replace("{wait}", WAIT), [".u64 x", ".u64 y"])
    run(text, np.zeros(4, np.uint32), y, grid=2, cluster=2)
    assert (y == np.array([[100], [0]]) + np.arange(32)).all()


def test_asynchronous_stores_without_wait() -> None:
    text = kernel(STORE_ASYNC.replace("{wait}", ""), [".u64 x", ".u64 y"])
    found = fault(text, np.zeros(4, np.uint32), np.zeros((2, 32), np.uint32), grid=2, cluster=2)
    assert found.kind == "missing wait"
    assert "ld.shared" in str(found.text)
