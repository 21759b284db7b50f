"""What an image is: read from the image itself, written beside it as JSON.

cuobjdump reads the images; nothing here trusts what a compiler said it made.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import re
import subprocess
import tempfile
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from aot.declare import CompiledKernel, argument_size


@dataclass(frozen=True)
class Sidecar:
    """One kernel in one image.

    op: the op that launches it: its source file's stem, unless the kernel names one. family: the folder of that file.
    name: of an aot kernel, its function in C++; of a CUDA C++ kernel, its symbol.
    arguments: of an aot kernel, name to type. parameters: [offset, bytes] of each, as the image itself declares them.
    stack, local: bytes of thread-private memory; both 0, or the kernel spills.
    compilers: name to version of what made the image.
    function: of an aot kernel, the Python function that it is a specialisation of. constants: of an aot kernel, what it
        was compiled with and what else its launch depends on, by name.
    """

    op: str
    family: str
    name: str
    symbol: str
    language: str
    architecture: str
    sha256: str
    bytes: int
    registers: int
    stack: int
    local: int
    static_shared: int
    dynamic_shared: int
    threads: int
    parameters: list[list[int]]
    arguments: dict[str, str]
    trailing_pointers: int
    compilers: dict[str, str]
    function: str = ""
    constants: dict[str, bool | int | str] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @staticmethod
    def read(path: Path) -> Sidecar:
        return Sidecar(**json.loads(path.read_text()))


CUOBJDUMP = "nvidia-cuda-cuobjdump"

# In each architecture's folder, beside the sidecars: module -> {"fingerprint", "kernels"}.
STAMPS = "stamps.json"


def cuobjdump(*arguments: str, cwd: Path | None = None) -> str:
    """What cuobjdump prints."""
    try:
        files = importlib.metadata.files(CUOBJDUMP) or []
    except importlib.metadata.PackageNotFoundError:
        raise SystemExit(f"aot: images are read with {CUOBJDUMP}, which is not installed; pip install it") from None
    program = next(str(file.locate()) for file in files if file.name == "cuobjdump")
    done = subprocess.run([program, *arguments], cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"aot: cuobjdump {' '.join(arguments)} failed: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


RESOURCES = re.compile(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
PARAMETER = re.compile(r"Ordinal : 0x([0-9a-f]+)\s+Offset\s+: 0x([0-9a-f]+)\s+Size\s+: 0x([0-9a-f]+)")
TARGET = re.compile(r"^64-?bit elf:.*\bsm=(\w+)", re.MULTILINE | re.IGNORECASE)
INFO_SECTION = re.compile(r"^\.nv\.info\.(\S+)", re.MULTILINE)


def inspect(image: Path, op: str, family: str, language: str, compilers: dict[str, str]) -> list[Sidecar]:
    """The kernels in a cubin file, in the order of their symbols."""
    data = image.read_bytes()
    text = cuobjdump("--dump-elf", str(image))
    target = TARGET.search(text)
    if target is None:
        raise SystemExit(f"aot: {image}: names no architecture that it was assembled for")
    sections = INFO_SECTION.split(text)  # [before, symbol, its section, symbol, its section, ...]
    parameters: dict[str, dict[int, list[int]]] = {}
    for symbol, section in zip(sections[1::2], sections[2::2], strict=True):
        found = parameters.setdefault(symbol, {})
        for ordinal, offset, size in PARAMETER.findall(section):
            found[int(ordinal, 16)] = [int(offset, 16), int(size, 16)]
    return [
        Sidecar(
            op=op,
            family=family,
            name=symbol,
            symbol=symbol,
            language=language,
            architecture=f"sm_{target[1]}",
            sha256=hashlib.sha256(data).hexdigest(),
            bytes=len(data),
            registers=int(registers),
            stack=int(stack),
            local=int(local),
            static_shared=int(shared),
            dynamic_shared=0,
            threads=0,
            parameters=[value for _, value in sorted(parameters.get(symbol, {}).items())],
            arguments={},
            trailing_pointers=0,
            compilers=compilers,
        )
        for symbol, registers, stack, shared, local in sorted(
            RESOURCES.findall(cuobjdump("--dump-resource-usage", str(image)))
        )
    ]


def check_no_spill(sidecar: Sidecar) -> None:
    """SystemExit if the kernel keeps anything in thread-private memory."""
    if sidecar.stack or sidecar.local:
        raise SystemExit(
            f"aot: {sidecar.op}: kernel {sidecar.symbol} spills on {sidecar.architecture}: {sidecar.stack} bytes of "
            f"stack, {sidecar.local} of local memory a thread at {sidecar.registers} registers; lower its tile sizes "
            "or unrolling"
        )


def describe(compiled: CompiledKernel, op: str, family: str, language: str, compilers: dict[str, str]) -> Sidecar:
    """The sidecar of a compiled aot kernel, after checking the image against the declaration."""
    with tempfile.TemporaryDirectory() as folder:
        image = Path(folder) / "image.cubin"
        image.write_bytes(compiled.cubin)
        kernels = inspect(image, op, family, language, compilers)
    if [kernel.symbol for kernel in kernels] != [compiled.symbol]:
        raise SystemExit(f"aot: {compiled.name}: expected one kernel {compiled.symbol}, image holds {kernels}")
    sidecar = replace(
        kernels[0],
        name=compiled.name,
        dynamic_shared=compiled.dynamic_shared,
        threads=compiled.threads,
        arguments=compiled.arguments,
        trailing_pointers=compiled.trailing_pointers,
    )
    if sidecar.architecture != compiled.arch:
        raise SystemExit(f"aot: {compiled.name}: asked for {compiled.arch}, image is for {sidecar.architecture}")
    check_no_spill(sidecar)
    check_parameters(sidecar)
    return sidecar


def check_parameters(sidecar: Sidecar) -> None:
    """SystemExit if the image's parameters are not the declared arguments, each at its natural alignment."""
    sizes = [argument_size(t) for t in sidecar.arguments.values()] + [8] * sidecar.trailing_pointers
    expected, offset = [], 0
    for size in sizes:
        offset += -offset % size
        expected.append([offset, size])
        offset += size
    if sidecar.parameters != expected:
        raise SystemExit(
            f"aot: {sidecar.name} on {sidecar.architecture}: declared parameters are [offset, bytes] {expected}, "
            f"the image's are {sidecar.parameters}"
        )
