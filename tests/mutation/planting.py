"""Faults as data, and a copy of the checkout to plant them in."""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
FAULTS = Path(__file__).with_name("faults.toml")
COMPILED = ("lib", "include", "images.json")  # of the package, beside its extension module
SELECTION = "not sm_100a and not sm_103a and not sm_120a and not sm_121a"  # builds are for sm_90a alone


@dataclass(frozen=True)
class Fault:
    """One fault: in which file, what text becomes what, and the tests that should notice it."""

    name: str
    file: str
    kind: str
    what: str
    edits: tuple[tuple[str, str], ...]
    tests: tuple[str, ...]
    may_survive: str

    @property
    def is_compiled(self) -> bool:
        """Whether the library must be built anew."""
        return not self.file.startswith("python/")

    @property
    def family_tests(self) -> str:
        """The folder of the tests of the file's family."""
        names = [part for part in Path(self.file).parts if (ROOT / "tests" / part).is_dir()]
        return f"tests/{names[-1]}" if names else "tests/package"

    def planted_in(self, text: str) -> str:
        """The file's text with the fault. Every text that is replaced must occur once."""
        for before, after in self.edits:
            if text.count(before) != 1:
                raise ValueError(f"{self.name}: {self.file}: expected once, found {text.count(before)} times: {before}")
            text = text.replace(before, after)
        return text


def read_faults() -> list[Fault]:
    """All faults, in the order of the file."""
    rows = tomllib.loads(FAULTS.read_text())["fault"]
    return [
        Fault(
            row["name"],
            row["file"],
            row["class"],
            row["what"],
            tuple((edit["before"], edit["after"]) for edit in row["edits"]),
            tuple(row["tests"]),
            row.get("may_survive", ""),
        )
        for row in rows
    ]


def copied(source: Path, target: Path) -> None:
    """A file or a folder, over what is there."""
    if source.is_dir():
        shutil.copytree(source, target, dirs_exist_ok=True)
    else:
        shutil.copy2(source, target)


class Copy:
    """A copy of the checkout, with the compiled parts of the package that is imported here."""

    def __init__(self, folder: Path, build: Path, build_python: str) -> None:
        self.folder, self.build, self.build_python = folder, build, build_python
        tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True)
        for name in filter(None, tracked.stdout.split("\0")):
            if (ROOT / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, folder / name)
        found = importlib.util.find_spec("dsv4_kernels._native")
        assert found is not None
        assert found.origin is not None
        self.package = folder / "python" / "dsv4_kernels"
        self.sound = folder.with_name("sound")  # the compiled parts without a fault
        self.ptx = os.environ.get("DSV4_TEST_PTX")
        self._keep(Path(found.origin).parent)
        self.restore()

    def _keep(self, package: Path) -> None:
        self.sound.mkdir(exist_ok=True)
        for source in (*package.glob("_native*.so"), *(package / part for part in COMPILED)):
            copied(source, self.sound / source.name)
        self.sound_ptx = self.ptx

    def restore(self) -> None:
        """Lays the compiled parts without a fault over the package."""
        copied(self.sound, self.package)
        self.ptx = self.sound_ptx

    def build_without_fault(self) -> str | None:
        """Builds the library of the sources as they are; returns what failed."""
        failure = self.built()
        if failure is None:
            if self.ptx:  # that of the build folder changes with every fault
                copied(Path(self.ptx), self.folder.with_name("ptx"))
                self.ptx = str(self.folder.with_name("ptx"))
            self._keep(self.package)
        return failure

    def built(self) -> str | None:
        """Builds the library of the copy and lays it over the package; returns what failed."""
        project = (self.folder / "pyproject.toml").read_text()
        version = tomllib.loads(project)["project"]["version"]
        environment = os.environ | {"PATH": f"{Path(self.build_python).parent}:{os.environ['PATH']}"}

        def run(*command: str) -> subprocess.CompletedProcess[str]:
            return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)

        pybind11 = run(self.build_python, "-m", "pybind11", "--cmakedir").stdout.strip()
        configure = (
            *("cmake", "-S", str(self.folder), "-B", str(self.build), "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release"),
            *(f"-DPython_EXECUTABLE={self.build_python}", f"-Dpybind11_DIR={pybind11}"),
            *(f"-DSKBUILD_PROJECT_VERSION={version}", f"-DSKBUILD_METADATA_DIR={self.build}/metadata"),
            "-DDSV4_ARCHITECTURES=sm_90a",
        )
        install = ("cmake", "--install", str(self.build), "--prefix", str(self.package))
        for command in (configure, ("cmake", "--build", str(self.build)), install):
            done = run(*command)
            if done.returncode:
                return (done.stdout + done.stderr)[-4000:]
        self.ptx = str(self.build / "images" / "ptx")
        return None

    def test(self, tests: str, timeout: float, emulated: bool = True) -> tuple[str, str]:
        """Runs tests on the copy until one fails: ("passed", "failed" or "broken", the first failure).

        emulated: those of the kernels too.
        """
        path, *options = shlex.split(tests)
        selection = SELECTION if emulated else f"{SELECTION} and not sm_90a"
        if options[:1] == ["-k"]:
            selection = f"({options[1]}) and {selection}"
        return self.run("-k", selection, path, timeout=timeout)

    def run(self, *arguments: str, timeout: float) -> tuple[str, str]:
        """Runs pytest on the copy until the first failure; see test()."""
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *arguments]
        environment = os.environ | {"PYTHONPATH": str(self.folder / "python"), "PYTHONDONTWRITEBYTECODE": "1"}
        environment["DSV4_CHECKOUT"] = str(self.folder)
        if self.ptx:
            environment["DSV4_TEST_PTX"] = self.ptx
        try:
            done = subprocess.run(
                command, cwd=self.folder, capture_output=True, text=True, env=environment, timeout=timeout, check=False
            )
        except subprocess.TimeoutExpired:
            return "broken", f"{arguments[-1]}: not done after {timeout:.0f} s"
        if done.returncode == 0:
            return "passed", ""
        failures = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
        if done.returncode == 1:
            return "failed", failures[0] if failures else done.stdout[-200:]
        return "broken", failures[0] if failures else (done.stdout + done.stderr)[-400:]
