"""Compiles CuTe DSL kernels to device images, without a GPU.

The DSL makes an image together with a host launcher. This package launches every kernel itself, so a host function is
made here from the declaration, only to tell the DSL the parameter types; what is kept is the image, and the PTX that it
was assembled from.

The DSL takes its settings from the environment when it is imported, and compiles for one architecture in a process. So
the step that compiles the package starts one process for each architecture, which calls `prepare_process` before it
imports a kernel's module.
"""

from __future__ import annotations

import inspect
import os
import re
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from aot.declare import CompiledKernel, CuteKernel, KernelError, check_declaration, element_type, is_pointer

# The DSL reads variables of both names, and makes a cache folder for each.
_ENVIRONMENT_PREFIXES = ("CUTE_DSL_", "CUTE_EXPERIMENTAL_DSL_")

# Element type of a declared pointer to the DSL's name for it. What the DSL keeps in bytes anyway is passed as bytes.
_ELEMENT_TYPES = {
    "bf16": "BFloat16",
    "fp16": "Float16",
    "float32": "Float32",
    "int32": "Int32",
    "int64": "Int64",
    "uint32": "Uint32",
    "uint8": "Uint8",
    "fp8e4m3": "Uint8",
    "bool": "Uint8",
}

# Declared scalar type to the DSL's name for it, and to the type of the parameter in PTX.
_SCALAR_TYPES = {"int32": ("Int32", ".u32"), "int64": ("Int64", ".u64"), "float32": ("Float32", ".f32")}
_PTX_POINTER = ".u64 .ptr .global"

# The DSL's error texts carry them, whatever they are written to.
_TERMINAL_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


def prepare_process(arch: str) -> None:
    """Makes this process compile for `arch`, by its sources alone: settings of the user's environment are dropped.

    Call it before anything imports the DSL. It also keeps the DSL from making cache folders and files.
    """
    if "cutlass" in sys.modules:
        raise KernelError(f"{arch}: the CuTe DSL is imported already; call prepare_process before importing kernels")
    for variable in [name for name in os.environ if name.startswith(_ENVIRONMENT_PREFIXES)]:
        del os.environ[variable]
    for prefix in _ENVIRONMENT_PREFIXES:
        os.environ[prefix + "ARCH"] = arch
        os.environ[prefix + "DISABLE_FILE_CACHING"] = "1"
        # Without this the import makes a folder. Nothing is written here, as file caching is off.
        os.environ[prefix + "CACHE_DIR"] = os.devnull


def compile_kernel(kernel: CuteKernel, arch: str) -> CompiledKernel:
    """Compiles one kernel for the architecture that this process was prepared for, such as "sm_100a"."""
    prepared = os.environ.get("CUTE_DSL_ARCH")
    if prepared != arch:
        raise KernelError(f"{kernel.name}: cannot compile for {arch}: this process is prepared for {prepared}")
    check_declaration(kernel)
    cubin, ptx = _compile(kernel, arch)
    return CompiledKernel(
        name=kernel.name,
        symbol=_checked_symbol(kernel, arch, ptx),
        arch=arch,
        cubin=cubin,
        ptx=ptx,
        arguments=dict(kernel.arguments),
        threads=kernel.threads,
        dynamic_shared=kernel.dynamic_shared,
    )


def _compile(kernel: CuteKernel, arch: str) -> tuple[bytes, str]:
    import cutlass.cute as cute

    host_function, example_arguments = _host_function(kernel)
    with tempfile.TemporaryDirectory(prefix="cute_compiler_") as folder:
        # The DSL hands out image and PTX only by way of files. Line information, which would put this machine's paths
        # in the image, is off unless asked for.
        options = f"--keep-cubin --keep-ptx --dump-dir {shlex.quote(folder)}"
        try:
            with _no_command_line():
                compiled = cute.compile(host_function, *example_arguments, options=options)
            cubin, ptx = compiled.__cubin__, compiled.__ptx__
        except Exception as error:
            text = _TERMINAL_COLOURS.sub("", str(error)).strip()
            raise KernelError(f"{kernel.name}: does not compile for {arch}:\n{text}") from error
    if not cubin or not ptx:
        raise KernelError(f"{kernel.name}: the CuTe DSL made no image for {arch}")
    return bytes(cubin), str(ptx)


@contextmanager
def _no_command_line() -> Iterator[None]:
    """Hides the program's own arguments from the DSL, which looks for its options (-diagnostic, -h) among them."""
    arguments = sys.argv
    sys.argv = arguments[:1]
    try:
        yield
    finally:
        sys.argv = arguments


def _host_function(kernel: CuteKernel) -> tuple[Callable[..., Any], list[Any]]:
    """A host function that launches the kernel, and example arguments that tell its parameter types."""
    import cutlass.cute as cute

    # The grid stays a run-time value: of a constant one, the compiler could conclude what block_idx is.
    host_arguments = {**kernel.arguments, "grid_x": "int32", "grid_y": "int32", "grid_z": "int32"}
    examples = [_example(argument_type) for argument_type in host_arguments.values()]
    argument_count = len(kernel.arguments)

    def host_function(*values: Any) -> None:
        # Unless told that one block a multiprocessor will do, ptxas may spill to fit more.
        kernel.function(*values[:argument_count], **kernel.constants).launch(
            grid=values[argument_count:],
            block=(kernel.threads, 1, 1),
            smem=kernel.dynamic_shared,
            min_blocks_per_mp=1,
        )

    host_function.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            inspect.Parameter(name, inspect.Parameter.POSITIONAL_ONLY, annotation=parameter_type)
            for name, (parameter_type, _) in zip(host_arguments, examples, strict=True)
        ]
    )
    # Names that the DSL makes up hold all arguments and run to hundreds of characters.
    short_name: dict[str, bool] = {"remove_cutlass_symbol": True, "keep_mangled_name": False}
    kernel.function.set_name_prefix(kernel.name, **short_name)  # type: ignore[attr-defined]
    compilable = cute.jit(preprocess=False)(host_function)
    compilable.set_name_prefix("launch_" + kernel.name, **short_name)
    return compilable, [example for _, example in examples]


def _example(argument_type: str) -> tuple[Any, Any]:
    """The DSL's type for a declared argument type, and a value of it."""
    import cutlass
    import cutlass.cute as cute

    if is_pointer(argument_type):
        pointee = getattr(cutlass, _ELEMENT_TYPES[element_type(argument_type)])
        # Aligned to an element and no further, which is all that a declaration promises.
        return cute.Pointer, cute.runtime.make_ptr(pointee, 0, cute.AddressSpace.gmem)
    scalar = getattr(cutlass, _SCALAR_TYPES[argument_type][0])
    return scalar, scalar(0)


def _checked_symbol(kernel: CuteKernel, arch: str, ptx: str) -> str:
    """The kernel's symbol, once its parameters and its block size are known to be the declared ones."""
    entries = re.findall(r"\.entry\s+(\w+)\s*\((.*?)\)\s*\.reqntid\s+(\d+), 1, 1\s", ptx, flags=re.DOTALL)
    if len(entries) != 1:
        raise KernelError(f"{kernel.name}: expected one kernel of fixed block size in the PTX, got {len(entries)}")
    symbol, parameter_list, threads = entries[0]
    # "  .param .u64 .ptr .global .align 1 kernel_0_param_0" to ".u64 .ptr .global"
    parameters = [
        re.sub(r"\s*\.param\s+|(\s+\.align\s+\d+)?\s+\w+\s*$", "", parameter) for parameter in parameter_list.split(",")
    ]
    declared = [
        _PTX_POINTER if is_pointer(argument_type) else _SCALAR_TYPES[argument_type][1]
        for argument_type in kernel.arguments.values()
    ]
    if parameters != declared:
        raise KernelError(f"{kernel.name}: {arch}: parameters in PTX: expected {declared}, got {parameters}")
    if int(threads) != kernel.threads:
        raise KernelError(f"{kernel.name}: {arch}: threads in a block: expected {kernel.threads}, got {threads}")
    return str(symbol)
