"""The C interface without Python in between: refusals, struct sizes, and a machine without a driver."""

from __future__ import annotations

import ctypes
import threading
from typing import Any

import dsv4_kernels
import pytest

from tests.launches import OBSERVER, LaunchRecord
from tests.package import c_abi
from tests.package.c_abi import HashRouterArgs, HashRouterScoredArgs, Memory


def last_error(library: ctypes.CDLL) -> str:
    text: bytes = library.dsv4_last_error()
    return text.decode()


def hash_router(library: ctypes.CDLL, args: HashRouterArgs | None) -> int:
    status: int = library.dsv4_hash_router(None if args is None else ctypes.byref(args), None)
    return status


def test_version_is_the_packages(library: ctypes.CDLL) -> None:
    assert library.dsv4_version().decode() == dsv4_kernels.__version__


# A machine without a driver.


@pytest.mark.usefixtures("without_driver")
@pytest.mark.parametrize("ordinal", [-1, 0, 7])
@pytest.mark.parametrize("function", ["preload", "device_status"])
def test_no_driver_is_said_so(library: ctypes.CDLL, function: str, ordinal: int) -> None:
    assert getattr(library, "dsv4_" + function)(ordinal) == c_abi.NO_DRIVER
    text = last_error(library)
    assert text.startswith(f"{function}: needs a CUDA "), text
    assert "found no" in text, text


@pytest.mark.usefixtures("without_driver")
def test_op_on_a_device_says_that_there_is_no_driver(library: ctypes.CDLL) -> None:
    """The tensors claim to be on device 0; their memory is the host's, and must not be touched."""
    assert hash_router(library, c_abi.hash_router_args(Memory(), device=0)) == c_abi.NO_DRIVER
    assert last_error(library).startswith("hash_router: needs a CUDA ")


@pytest.mark.usefixtures("without_driver")
def test_python_raises_no_driver_error() -> None:
    with pytest.raises(dsv4_kernels.NoDriverError, match=r"^preload: needs a CUDA .*found no"):
        dsv4_kernels.preload()
    assert "needs a CUDA" in str(dsv4_kernels.info()["device_error"])


# Images.


def test_missing_image_is_said_so(library: ctypes.CDLL) -> None:
    observer = OBSERVER(lambda launch, user: c_abi.OK)
    assert library.dsv4_observe_launches(b"sm_80", 1, observer, None) == c_abi.NO_IMAGE
    assert last_error(library) == "observe_launches: architecture: this library holds no images for sm_80"


# Arguments.


def test_valid_host_tensors_are_referred_to_the_cpu_implementation(library: ctypes.CDLL) -> None:
    assert hash_router(library, c_abi.hash_router_args(Memory())) == c_abi.HOST_TENSOR
    assert last_error(library).startswith("hash_router: token_ids: expected a CUDA tensor, got cpu")


def test_tensors_on_two_devices_are_refused(library: ctypes.CDLL) -> None:
    memory = Memory()
    args = c_abi.hash_router_args(memory, device=0)
    args.hash_lut = memory.tensor(c_abi.INT32, (5, 2), device=1)
    assert hash_router(library, args) == c_abi.INVALID_ARGUMENT
    assert last_error(library) == "hash_router: hash_lut: expected device cuda:0 (where token_ids is), got cuda:1"


@pytest.mark.parametrize(("first", "second"), [(0, c_abi.HOST), (c_abi.HOST, 0)])
def test_host_tensor_among_cuda_tensors_is_refused(library: ctypes.CDLL, first: int, second: int) -> None:
    names = {0: "cuda:0", c_abi.HOST: "cpu"}
    for argument in ("hash_lut", "out_ids"):
        memory = Memory()
        args = c_abi.hash_router_args(memory, device=first)
        shape, dtype = ((5, 2), c_abi.INT32) if argument == "hash_lut" else ((3, 2), c_abi.INT32)
        setattr(args, argument, memory.tensor(dtype, shape, device=second))
        assert hash_router(library, args) == c_abi.INVALID_ARGUMENT
        assert last_error(library) == (
            f"hash_router: {argument}: expected device {names[first]} (where token_ids is), got {names[second]}"
        )


def test_extents_whose_products_overflow_are_refused(library: ctypes.CDLL) -> None:
    args: Any = c_abi.hash_router_scored_args(Memory())
    args.logits.stride[0] = 2**62
    assert library.dsv4_hash_router_scored(ctypes.byref(args), None) == c_abi.INVALID_ARGUMENT
    assert last_error(library).startswith("hash_router_scored: logits: expected contiguous rows that do not overlap")
    args = c_abi.hash_router_args(Memory())
    args.hash_lut.shape[0] = 2**62
    assert hash_router(library, args) == c_abi.INVALID_ARGUMENT
    assert last_error(library).startswith("hash_router: hash_lut: expected a contiguous tensor, got strides ")


@pytest.mark.parametrize("dtype", [-1, 0, 13, 31, 32, 2**31 - 1])
def test_value_that_is_no_dtype_is_refused(library: ctypes.CDLL, dtype: int) -> None:
    args = c_abi.hash_router_args(Memory())
    args.token_ids.dtype = dtype
    assert hash_router(library, args) == c_abi.INVALID_ARGUMENT
    assert last_error(library).startswith("hash_router: token_ids: expected ")


@pytest.mark.parametrize("rank", [-1, 0, 2, 4, 5, 2**31 - 1])
def test_rank_is_checked_before_it_is_used(library: ctypes.CDLL, rank: int) -> None:
    args = c_abi.hash_router_args(Memory())
    args.token_ids.rank = rank
    assert hash_router(library, args) == c_abi.INVALID_ARGUMENT
    assert last_error(library).startswith("hash_router: token_ids: expected ")


def test_null_data_is_refused_unless_empty(library: ctypes.CDLL) -> None:
    args = c_abi.hash_router_args(Memory())
    args.hash_lut.data = None
    assert hash_router(library, args) == c_abi.INVALID_ARGUMENT
    assert last_error(library) == "hash_router: hash_lut: expected a pointer to data, got NULL"
    empty = c_abi.hash_router_args(Memory(), tokens=0)
    empty.token_ids.data = empty.out_ids.data = empty.out_weights.data = None
    assert hash_router(library, empty) == c_abi.HOST_TENSOR


def test_misaligned_data_is_refused(library: ctypes.CDLL) -> None:
    args = c_abi.hash_router_args(Memory())
    args.token_ids.data += 4
    assert hash_router(library, args) == c_abi.INVALID_ARGUMENT
    assert last_error(library) == ("hash_router: token_ids: expected data aligned to 8 bytes, got an address 4 beyond")


# struct_size: fields can be added without breaking who was built before.


@pytest.mark.parametrize("size", [0, 7, ctypes.sizeof(HashRouterArgs) + 1, 2**64 - 1])
def test_struct_size_that_cannot_be_is_refused(library: ctypes.CDLL, size: int) -> None:
    args = c_abi.hash_router_args(Memory())
    args.struct_size = size
    assert hash_router(library, args) == c_abi.INVALID_ARGUMENT
    expected = ctypes.sizeof(HashRouterArgs)
    assert last_error(library).startswith(f"hash_router: struct_size: expected up to {expected}, got {size}; set it to")


def test_results_keep_to_the_callers_struct(library: ctypes.CDLL) -> None:
    """What lies behind the fields that the caller knows is not written; a struct that the library does not know is
    refused."""
    size = ctypes.sizeof(c_abi.PageLayoutInfo)
    buffer = (c_abi.PageLayoutInfo * 2)()
    ctypes.memset(buffer, 0xA5, 2 * size)
    buffer[0].struct_size = size
    assert library.dsv4_page_layout_at(2, ctypes.byref(buffer)) == c_abi.OK
    assert (buffer[0].struct_size, buffer[0].name, buffer[0].head_dim) == (size, b"fp8_ds_mla", 512)
    assert bytes(buffer)[size:] == b"\xa5" * size
    buffer[0].struct_size = 1000
    assert library.dsv4_page_layout_at(2, ctypes.byref(buffer)) == c_abi.INVALID_ARGUMENT
    assert last_error(library).startswith("page_layout_at: struct_size: expected up to ")


def test_null_struct_is_refused(library: ctypes.CDLL) -> None:
    assert hash_router(library, None) == c_abi.INVALID_ARGUMENT
    assert last_error(library).startswith("hash_router: args: expected a pointer to the argument struct, got NULL")


def test_fields_beyond_struct_size_are_absent(library: ctypes.CDLL) -> None:
    args = c_abi.hash_router_args(Memory())
    args.struct_size = HashRouterArgs.out_ids.offset
    assert hash_router(library, args) == c_abi.INVALID_ARGUMENT
    assert last_error(library) == "hash_router: out_ids: expected a tensor, got none"


def test_caller_with_an_older_struct_gets_the_default_of_a_new_field(library: ctypes.CDLL) -> None:
    """As if epsilon had been added later: what lies behind the caller's struct is not read."""
    seen: list[float] = []

    @OBSERVER
    def observe(launch: ctypes._Pointer[LaunchRecord], user: int) -> int:
        record = launch.contents
        last = record.parameter_count - 1
        assert record.parameter_sizes[last] == ctypes.sizeof(ctypes.c_float)
        seen.append(ctypes.c_float.from_address(record.parameters[last]).value)
        return c_abi.OK

    args = c_abi.hash_router_scored_args(Memory())
    args.epsilon = 0.25
    library.dsv4_observe_launches(b"sm_90a", 132, observe, None)
    try:
        for size in (ctypes.sizeof(args), HashRouterScoredArgs.epsilon.offset):
            args.struct_size = size
            assert library.dsv4_hash_router_scored(ctypes.byref(args), None) == c_abi.OK, last_error(library)
    finally:
        library.dsv4_observe_launches(None, 0, None, None)
    assert seen == [0.25, 0.0]


# Threads.


def test_last_error_is_the_threads_own(library: ctypes.CDLL) -> None:
    hash_router(library, None)
    text = last_error(library)
    others: list[str] = []

    def other() -> None:
        others.append(last_error(library))
        library.dsv4_image_at(10**6, None)
        others.append(last_error(library))

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert others[0] == ""
    assert others[1].startswith("image_at: image: ")
    assert last_error(library) == text
