"""Compiles every Triton and CuTe DSL kernel ahead of time. Run by CMake; usable by hand:

    python -m aot --out DIR [--arch sm_100a ...] [--only OP ...] [--jobs N]

DIR then holds, for each architecture, images with their PTX and sidecars, and kernels.h / kernels.cpp, through which
C++ launches them. What is unchanged since the last run into the same DIR is not compiled again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from aot import architectures
from aot.generate import kernel_sources, write_if_changed
from aot.sidecar import STAMPS, Sidecar
from aot.sources import ROOT, KernelModule, compiler_versions, fingerprint, kernel_modules

SUFFIXES = (".cubin", ".ptx", ".json")  # of the files of a kernel


class Target:
    """The folder of one architecture."""

    def __init__(self, out: Path, arch: str) -> None:
        self.arch = arch
        self.folder = out / arch
        path = self.folder / STAMPS
        self.stamps: dict[str, dict[str, object]] = json.loads(path.read_text()) if path.exists() else {}

    def is_current(self, module: KernelModule) -> bool:
        stamp = self.stamps.get(module.import_name)
        return (
            stamp is not None
            and stamp["fingerprint"] == fingerprint(module, self.arch)
            and all((self.folder / f"{name}{suffix}").exists() for name in stamp["kernels"] for suffix in SUFFIXES)  # type: ignore[attr-defined]
        )

    def record(self, module: KernelModule, kernels: list[str]) -> None:
        self.stamps[module.import_name] = {"fingerprint": fingerprint(module, self.arch), "kernels": kernels}
        self._write()

    def remove_leftovers(self, modules: list[KernelModule]) -> None:
        """Deletes the images of modules and kernels that are no more."""
        present = {module.import_name for module in modules}
        self.stamps = {name: stamp for name, stamp in sorted(self.stamps.items()) if name in present}
        self._write()
        kept = set(self.kernels())
        for path in self.folder.iterdir():
            if path.name != STAMPS and path.stem not in kept:
                path.unlink()

    def kernels(self) -> list[str]:
        return [name for stamp in self.stamps.values() for name in stamp["kernels"]]  # type: ignore[attr-defined]

    def sidecars(self) -> list[Sidecar]:
        return [Sidecar.read(self.folder / f"{name}.json") for name in self.kernels()]

    def _write(self) -> None:
        (self.folder / STAMPS).write_text(json.dumps(dict(sorted(self.stamps.items())), indent=1) + "\n")


def compile_batch(target: Target, language: str, modules: list[KernelModule]) -> None:
    """One worker process. SystemExit with what it printed if it fails."""
    target.folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "aot.worker", language, target.arch, str(target.folder)]
    started = time.monotonic()
    with subprocess.Popen(
        command + [m.import_name for m in modules],
        cwd=ROOT,
        env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        output, errors = process.communicate()
    if process.returncode:
        names = ", ".join(module.op for module in modules)
        raise SystemExit(
            f"aot: compiling {names} ({language}, {target.arch}) failed:\n{errors.strip() or output.strip()}"
        )
    done = [line.split() for line in output.splitlines() if line.count(" ") == 1]
    for module in modules:
        target.record(module, [name for name, made_of in done if made_of == module.import_name])
    print(f"aot: {target.arch} {language}: {len(done)} images in {time.monotonic() - started:.1f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m aot", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="folder to write to")
    parser.add_argument("--arch", nargs="+", metavar="SM", help="architectures (default: all)")
    parser.add_argument("--only", nargs="+", metavar="OP", help="compile the kernels of these ops only")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="compiler processes at a time")
    parser.add_argument("--check", action="store_true", help="compile nothing; fail unless DIR is what would be made")
    options = parser.parse_args()
    targets = architectures.select(options.arch)
    if not options.out:
        parser.error("--out is needed")
    if options.check:
        check(options.out.resolve(), targets)
    else:
        build(options.out.resolve(), targets, options.only, options.jobs)


def build(out: Path, targets: list[architectures.Architecture], only: list[str] | None, jobs: int) -> None:
    modules = kernel_modules()
    unknown = set(only or ()) - {module.op for module in modules}
    if unknown:
        known = ", ".join(module.op for module in modules)
        raise SystemExit(f"aot: --only: no kernels for {', '.join(sorted(unknown))}; there are kernels for {known}")
    wanted = [module for module in modules if not only or module.op in only]
    folders = [Target(out, target.name) for target in targets]
    batches = []
    for folder in folders:
        for language in sorted({module.language for module in wanted}):
            stale = [m for m in wanted if m.language == language and not folder.is_current(m)]
            if stale:
                compiler_versions(language)
                batches.append((folder, language, stale))
    current = sum(len(wanted) for _ in folders) - sum(len(batch[2]) for batch in batches)
    print(
        f"aot: {len(batches)} compiler processes to run; {current} of {len(wanted) * len(folders)} modules are current"
    )
    with ThreadPoolExecutor(jobs) as pool:
        for future in [pool.submit(compile_batch, *batch) for batch in batches]:
            future.result()
    for folder in folders:
        folder.remove_leftovers(modules)
    for name, text in kernel_sources(targets, {folder.arch: folder.sidecars() for folder in folders}).items():
        write_if_changed(out / name, text)


def check(out: Path, targets: list[architectures.Architecture]) -> None:
    """SystemExit unless the folder holds the images of today's sources for exactly these architectures."""
    folders = [Target(out, target.name) for target in targets]
    way_out = f"run python -m aot --out {out} --arch {' '.join(target.name for target in targets)}"
    for folder in folders:
        for module in kernel_modules():
            if not folder.is_current(module):
                raise SystemExit(f"aot: {out}: {module.op} for {folder.arch} is missing or of other sources; {way_out}")
    for name, text in kernel_sources(targets, {folder.arch: folder.sidecars() for folder in folders}).items():
        if not (out / name).exists() or (out / name).read_text() != text:
            raise SystemExit(f"aot: {out}/{name} is missing or for other architectures; {way_out}")


if __name__ == "__main__":
    main()
