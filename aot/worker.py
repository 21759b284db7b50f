"""One process of the step: compiles kernel modules of one language for one architecture.

    python -m aot.worker LANGUAGE ARCHITECTURE FOLDER MODULE...

Writes FOLDER/<name>.cubin, .ptx and .json for each kernel, and prints each kernel's name and module when it is done.
The sidecar (.json) comes last, so an image without one is unfinished.
"""

from __future__ import annotations

import importlib
import sys
from dataclasses import replace
from pathlib import Path

from aot.declare import KernelError, exported
from aot.sidecar import describe
from aot.sources import compiler_versions


def main(language: str, arch: str, folder: Path, modules: list[str]) -> None:
    compilers = compiler_versions(language)
    if language == "triton":
        from aot.triton_compiler import compile_kernel
    else:
        from aot.cute_compiler import compile_kernel, prepare_process  # type: ignore[assignment]

        prepare_process(arch)
    for module in modules:
        _, family, op = module.split(".")
        for kernel in importlib.import_module(module).KERNELS:
            try:
                compiled, constants = compile_kernel(kernel, arch), exported(kernel, arch)
            except KernelError as error:
                raise SystemExit(f"aot: {error}") from None
            function = getattr(kernel.function, "fn", kernel.function).__name__  # Triton wraps it
            sidecar = replace(
                describe(compiled, kernel.op or op, family, language, compilers), function=function, constants=constants
            )
            (folder / f"{kernel.name}.cubin").write_bytes(compiled.cubin)
            (folder / f"{kernel.name}.ptx").write_text(compiled.ptx)
            sidecar.write(folder / f"{kernel.name}.json")
            print(kernel.name, module, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), sys.argv[4:])
