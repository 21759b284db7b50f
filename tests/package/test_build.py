"""Other ways to the same wheel: from the sdist, and for a second Python from a library that is there already."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest

SECOND_BUILD_SECONDS = 60
SDIST_ARCHITECTURE = "sm_100a"
OTHER_PYTHONS = ("python3.13", "python3.12", "python3.11", "python3.10")
VERSION = "import sys; print('cp%d%d' % sys.version_info[:2])"
HAS_HEADERS = "import pathlib, pip, sysconfig; assert pathlib.Path(sysconfig.get_path('include'), 'Python.h').exists()"


def output(python: Path, program: str) -> str | None:
    """What a program prints, or None if it fails."""
    done = subprocess.run([python, "-c", program], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def build_wheel(source: Path, build_python: Path, out: Path, *options: str, python: Path | None = None) -> Path:
    """A wheel of the source by pip, in the environment of the build requirements; with another Python if given."""
    packages = output(build_python, "import sysconfig; print(sysconfig.get_path('purelib'))")
    assert packages
    environment = os.environ | {"PATH": f"{build_python.parent}{os.pathsep}{os.environ['PATH']}"}
    if python:
        environment |= {"PYTHONPATH": packages}  # what the build uses of it is of no one Python version
    build = ["-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-v", *options]
    command = [python or build_python, *build, "-w", out, source]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    (out / "log").write_text(done.stdout + done.stderr)
    (wheel,) = out.glob("*.whl")
    return wheel


def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def differing(wheel: Path, other: Path, names: list[str]) -> list[str]:
    """The files that are not the same in both."""
    with zipfile.ZipFile(wheel) as one, zipfile.ZipFile(other) as two:
        return [name for name in names if one.read(name) != two.read(name)]


def images(wheel: Path) -> Any:
    with zipfile.ZipFile(wheel) as archive:
        return json.loads(archive.read("dsv4_kernels/images.json"))


@pytest.mark.thorough
def test_sdist_builds_the_same_wheel(
    sdist: Path, wheel: Path, aot_output: Path, build_python: Path, tmp_path: Path
) -> None:
    """For one architecture, to take a fifth of the time: every image of it, and the binding, to the byte.

    The folder is another one: what is built depends on the sources and the pinned compilers alone. The images of Triton
    and the CuTe DSL are the wheel's, which the aot step takes for current only if it finds the same sources in the
    sdist; test_aot shows that a second run makes the same.
    """
    folder = tmp_path / "build"
    shutil.copytree(aot_output / SDIST_ARCHITECTURE, folder / "aot" / SDIST_ARCHITECTURE)
    options = (f"cmake.define.DSV4_ARCHITECTURES={SDIST_ARCHITECTURE}", f"build-dir={folder}")
    other = build_wheel(
        sdist, build_python, tmp_path, *(part for option in options for part in ("--config-settings", option))
    )
    assert "aot: 0 compiler processes to run" in (tmp_path / "log").read_text()
    assert other.name == wheel.name
    assert names(other) == names(wheel)
    expected = [image for image in images(wheel) if image["architecture"] == SDIST_ARCHITECTURE]
    assert len(expected) > 100
    assert images(other) == expected
    (module,) = (name for name in names(wheel) if name.startswith("dsv4_kernels/_native.cpython"))
    assert differing(wheel, other, [module]) == []


def test_cuda_sources_have_no_unnamed_namespace(root: Path) -> None:
    """nvcc names it after the file's path, so the library would depend on the folder; static functions do the same."""
    sources = [path for suffix in ("cu", "cuh") for path in (root / "csrc").rglob(f"*.{suffix}")]
    assert sources
    assert [path.name for path in sources if "\nnamespace {" in path.read_text()] == []


def second_python(build_python: Path) -> Path | None:
    """A Python of another version than the build's, able to build a module; or None."""
    first = output(build_python, VERSION)
    for name in OTHER_PYTHONS:
        found = shutil.which(name)
        if found and output(Path(found), VERSION) not in (None, first) and output(Path(found), HAS_HEADERS) is not None:
            return Path(found)
    return None


def test_second_python_reuses_the_library(root: Path, wheel: Path, build_python: Path, tmp_path: Path) -> None:
    """With DSV4_NATIVE_DIR only the binding is compiled. Without a second Python, for the same one again."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "first")
    python = second_python(build_python)
    options = (
        "--config-settings",
        f"build-dir={tmp_path / 'build'}",
        "--config-settings",
        f"cmake.define.DSV4_NATIVE_DIR={tmp_path / 'first' / 'dsv4_kernels'}",
    )
    started = time.monotonic()
    other = build_wheel(root, build_python, tmp_path / "out", *options, python=python)
    assert time.monotonic() - started < SECOND_BUILD_SECONDS
    assert "compiler processes" not in (tmp_path / "out" / "log").read_text()
    assert images(other) == images(wheel)
    if python is None:
        assert other.name == wheel.name
        return
    assert other.name != wheel.name
    with zipfile.ZipFile(other) as archive:
        archive.extractall(tmp_path / "installed")
    done = subprocess.run(
        [python, "-c", "import dsv4_kernels; print(len(dsv4_kernels.info()['images']))"],
        cwd=tmp_path / "installed",
        env=os.environ | {"PYTHONPATH": str(tmp_path / "installed")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == str(len(images(wheel))), done.stderr
