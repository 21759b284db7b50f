"""Which kernel modules there are, in which language, and what each depends on. Reads sources; imports none of them.

python -m aot.sources FILE        writes the fingerprint of the library's sources
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import sys
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent

# The package that a kernel's module imports, the language that makes it, the distribution that holds the compiler.
LANGUAGES = {"triton": ("triton", "triton"), "cutlass": ("cute", "nvidia-cutlass-dsl")}


@dataclass(frozen=True)
class KernelModule:
    """aot/<family>/<op>.py"""

    path: Path
    language: str

    @property
    def op(self) -> str:
        return self.path.stem

    @property
    def family(self) -> str:
        return self.path.parent.name

    @property
    def import_name(self) -> str:
        return f"aot.{self.family}.{self.op}"


def imported_modules(path: Path) -> set[str]:
    """The dotted names that a source file imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def kernel_modules(root: Path = ROOT) -> list[KernelModule]:
    """Every file under aot/<family>/ that imports a kernel language, in a fixed order."""
    found = []
    for path in sorted((root / "aot").glob("*/*.py")):
        packages = {name.partition(".")[0] for name in imported_modules(path)}
        languages = [LANGUAGES[package][0] for package in sorted(packages & LANGUAGES.keys())]
        if len(languages) > 1:
            raise SystemExit(f"aot: {path.relative_to(root)} imports several kernel languages: {languages}")
        if languages:
            found.append(KernelModule(path, languages[0]))
    return found


def source_closure(path: Path, root: Path = ROOT) -> list[Path]:
    """The file and every file of the aot package that it imports, directly or not."""
    seen: set[Path] = set()
    pending = [path]
    while pending:
        current = pending.pop()
        if current in seen:
            continue
        seen.add(current)
        for name in imported_modules(current):
            candidate = root.joinpath(*name.split(".")).with_suffix(".py")
            if name.startswith("aot.") and candidate.is_file():
                pending.append(candidate)
    return sorted(seen)


def fingerprint(module: KernelModule, arch: str, root: Path = ROOT) -> str:
    """Changes when an image could.

    That is with any source that the module or its compiler driver is made of, the compilers, and the architecture.
    """
    digest = hashlib.sha256()
    files = {*source_closure(module.path, root), *source_closure(root / "aot" / "worker.py", root)}
    for path in sorted(files):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes() + b"\0")
    digest.update(f"{arch}\0{pinned(module.language)}".encode())
    return digest.hexdigest()


def library_fingerprint(root: Path = ROOT) -> str:
    """Changes with any source of libdsv4_kernels.so: a library of another build may be reused only if it has not."""
    digest = hashlib.sha256()
    files = [path for folder in ("aot", "csrc") for path in (root / folder).rglob("*.*") if path.suffix != ".pyc"]
    for path in sorted({*files, root / "pyproject.toml"}):
        if root / "csrc" / "python" not in path.parents:
            digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


def build_requirements() -> list[Requirement]:
    """What pyproject.toml requires to build, compilers among them."""
    return [*map(Requirement, tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"])]


def pinned(language: str) -> Requirement:
    """The compiler of a language as pyproject.toml pins it."""
    distribution = next(d for name, d in LANGUAGES.values() if name == language)
    return next(requirement for requirement in build_requirements() if requirement.name == distribution)


def compiler_versions(language: str) -> dict[str, str]:
    """The installed compiler of a language, after checking it against the pin.

    SystemExit if it is missing or of another version: images must depend on the sources and the pins alone.
    """
    pin = pinned(language)
    need = f"aot: the {language} kernels need {pin.name}{pin.specifier}"
    try:
        version = importlib.metadata.version(pin.name)
    except importlib.metadata.PackageNotFoundError:
        if pin.marker is not None and not pin.marker.evaluate():
            raise SystemExit(
                f"{need}, which this Python has no build of: build with another, or with the images that "
                "another has made (DSV4_AOT_DIR)"
            ) from None
        raise SystemExit(f"{need}, which is not installed; pip install '{pin.name}{pin.specifier}'") from None
    if version not in pin.specifier:
        raise SystemExit(f"{need}, found {version}; pip install '{pin.name}{pin.specifier}'")
    return {pin.name: version}


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(library_fingerprint() + "\n")
