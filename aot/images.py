"""The table of every image in the library: those of the aot step, and those that nvcc put into the CUDA C++ objects.

    python -m aot.images --aot DIR --nvcc-dir DIR --nvcc-version V --out DIR OBJECT...

Writes images.cpp (compiled into the library), images.json (installed beside it; what `info` prints), and ptx/: what
each image was assembled from, which the tests' emulator runs and no wheel holds. Runs in the build after the CUDA
sources are compiled and before the library is linked. A kernel that spills, or that does not wait for the one before
it, fails the build here.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from dataclasses import asdict
from pathlib import Path

from aot.generate import NOTICE, write_if_changed
from aot.sidecar import STAMPS, Sidecar, check_no_spill, cuobjdump, inspect


def aot_sidecars(folder: Path, architectures: set[str]) -> list[Sidecar]:
    """Of these architectures: the folder may hold more than the library embeds."""
    folders = [folder / architecture for architecture in sorted(architectures)]
    return [Sidecar.read(path) for one in folders for path in sorted(one.glob("*.json")) if path.name != STAMPS]


def object_sidecars(path: Path, nvcc_version: str) -> list[Sidecar]:
    """The kernels in one object file; .../csrc/<family>/<op>.cu.o."""
    op, family = path.name.partition(".")[0], path.parent.name
    with tempfile.TemporaryDirectory() as folder:
        cuobjdump("--extract-elf", "all", str(path), cwd=Path(folder))
        sidecars = [
            sidecar
            for image in sorted(Path(folder).glob("*.cubin"))
            for sidecar in inspect(image, op, family, "cuda", {"nvcc": nvcc_version})
        ]
    for sidecar in sidecars:
        check_no_spill(sidecar)
    return sidecars


def collect_ptx(aot: Path, nvcc_dir: Path, out: Path, sidecars: list[Sidecar]) -> None:
    """Writes ARCHITECTURE/OP.ptx for each CUDA C++ source and ARCHITECTURE/NAME.ptx for each aot kernel."""
    sources: dict[Path, Path] = {}
    for sidecar in sidecars:
        if sidecar.language == "cuda":
            name = sidecar.op
            source = nvcc_dir / name / f"{name}.{sidecar.architecture.replace('sm', 'compute')}.ptx"
            if not source.exists():  # nvcc names the architecture only where there are several
                source = nvcc_dir / name / f"{name}.ptx"
        else:
            name = sidecar.name
            source = aot / sidecar.architecture / f"{name}.ptx"
        sources[out / sidecar.architecture / f"{name}.ptx"] = source
    for target, source in sources.items():
        target.parent.mkdir(parents=True, exist_ok=True)
        write_if_changed(target, source.read_text())
        check_waits(target)


ENTRY = re.compile(r"\.entry\s+(\w+)")
WAIT = "griddepcontrol.wait"
# What may not come before the wait: jumps, calls, and whatever touches memory, but for the kernel's own parameters, its
# block's shared memory (sm_100a passes the address of tensor memory through that) and prefetches into L2, which is
# coherent.
TOO_EARLY = re.compile(
    r"^\s*(?:@\S+\s+)?(?:(?:bra|call|cp|prefetch(?!\.global\.L2))\b|(?:st|atom|red|ld)\b(?!\.param|\.shared)).*",
    re.MULTILINE,
)


def check_waits(path: Path) -> None:
    """SystemExit if a kernel in this PTX does not begin by waiting for the kernel before it in the stream.

    They are launched so that they may start before it is complete (csrc/core/launch.h).
    """
    pieces = ENTRY.split(path.read_text())
    for symbol, body in zip(pieces[1::2], pieces[2::2], strict=True):
        before, found, _ = body.partition(WAIT)
        early = TOO_EARLY.search(before)
        if not found or early:
            what = f"comes after `{early[0].strip()}`" if found and early else "is missing"
            raise SystemExit(
                f"aot: kernel {symbol} ({path}) may start before the kernel ahead of it in the stream is complete: "
                f"{WAIT} {what}; call await_previous_grid() first in it"
            )


def cpp_table(sidecars: list[Sidecar]) -> str:
    rows = "\n".join(
        f'    {{sizeof(dsv4_image), "{s.op}", "{s.symbol}", "{s.language}", "{s.architecture}", "{s.sha256}"}},'
        for s in sidecars
    )
    return f"""{NOTICE}#include "core/images.h"

namespace dsv4 {{

const dsv4_image images[] = {{
{rows}
}};
const size_t image_count = {len(sidecars)};

}}  // namespace dsv4
"""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m aot.images", description=__doc__)
    parser.add_argument("--aot", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--nvcc-dir", type=Path, required=True, help="where nvcc kept its intermediate files, by op")
    parser.add_argument("--nvcc-version", required=True)
    parser.add_argument("objects", type=Path, nargs="+")
    options = parser.parse_args()
    sidecars = [sidecar for path in options.objects for sidecar in object_sidecars(path, options.nvcc_version)]
    sidecars += aot_sidecars(options.aot, {sidecar.architecture for sidecar in sidecars})
    sidecars.sort(key=lambda s: (s.family, s.op, s.symbol, int(re.sub(r"\D", "", s.architecture))))
    options.out.mkdir(parents=True, exist_ok=True)
    write_if_changed(options.out / "images.cpp", cpp_table(sidecars))
    collect_ptx(options.aot, options.nvcc_dir, options.out / "ptx", sidecars)
    write_if_changed(options.out / "images.json", json.dumps([asdict(s) for s in sidecars], indent=1) + "\n")


if __name__ == "__main__":
    main()
