"""Compiles Triton kernels to images, without a GPU and without torch."""

from __future__ import annotations

import os
import tempfile

# Before triton is imported: with line information, images carry the source's path and differ from folder to folder.
os.environ["TRITON_DISABLE_LINE_INFO"] = "1"

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from aot.architectures import find
from aot.declare import CompiledKernel, KernelError, TritonKernel, check_declaration, element_type, is_pointer

WARP = 32

TRITON_TYPES = {
    "bf16": "bf16",
    "fp16": "fp16",
    "fp8e4m3": "fp8e4nv",
    "float32": "fp32",
    "int32": "i32",
    "int64": "i64",
    "uint32": "u32",
    "uint8": "u8",
    "bool": "u1",
}


def triton_type(argument_type: str) -> str:
    """The "*bf16" that Triton calls "const bf16*"."""
    if is_pointer(argument_type):
        return "*" + TRITON_TYPES[element_type(argument_type)]
    return TRITON_TYPES[argument_type]


def compile_kernel(kernel: TritonKernel, arch: str) -> CompiledKernel:
    """The kernel's image for one architecture. KernelError if it needs what the launcher does not provide."""
    check_declaration(kernel)
    names = list(kernel.arguments)
    signature = {name: triton_type(argument_type) for name, argument_type in kernel.arguments.items()}
    signature |= dict.fromkeys(kernel.constants, "constexpr")
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in kernel.aligned}
    source = ASTSource(kernel.function, signature, kernel.constants_for(arch), attributes)
    options = {
        "num_warps": kernel.warps_on.get(arch, kernel.num_warps),
        "num_stages": kernel.stages_on.get(arch, kernel.num_stages),
        "maxnreg": kernel.registers_on.get(arch),
        "enable_fp_fusion": True,  # explicit: the default differs between Triton versions
    }
    # The symbol: specialisations of one function must be told apart in profiles and tests.
    kernel.function._repr = lambda _: kernel.name
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        target = GPUTarget("cuda", find(arch).compute_capability, WARP)
        compiled = triton.compile(source, target=target, options=options)
    metadata = compiled.metadata
    unsupported = {
        "global scratch memory": metadata.global_scratch_size,
        "profile scratch memory": metadata.profile_scratch_size,
        "several blocks in a cluster": metadata.num_ctas - 1,
        "a cooperative launch": metadata.launch_cooperative_grid,
        "programmatic dependent launch": metadata.launch_pdl,
        "host-made tensor descriptors": metadata.tensordesc_meta,
    }
    needed = [what for what, value in unsupported.items() if value]
    if needed:
        raise KernelError(f"{kernel.name}: needs {', '.join(needed)}, which csrc/core/launch.h does not provide")
    return CompiledKernel(
        name=kernel.name,
        symbol=metadata.name,
        arch=arch,
        cubin=compiled.asm["cubin"],
        ptx=compiled.asm["ptx"],
        arguments=kernel.arguments,
        threads=metadata.num_warps * WARP,
        dynamic_shared=metadata.shared,
        trailing_pointers=2,  # global and profile scratch
    )
