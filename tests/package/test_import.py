"""Importing the package is instant, and touches nothing: no framework, no compiler, no driver, no file."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import dsv4_kernels
import pytest
from dsv4_kernels.ops import OPS

LIMIT_MS = 50.0
FAMILY_LIMIT_MS = 70  # moe, the largest, takes 40 to 50 on two cores
RUNS = 7
HEAVY = ("torch", "triton", "cutlass", "numpy", "jax", "cupy")

TIMED_IMPORT = """
import json, sys, time
start = time.perf_counter()
import dsv4_kernels
elapsed = time.perf_counter() - start
print(json.dumps({"ms": elapsed * 1e3, "modules": list(sys.modules), "version": dsv4_kernels.__version__}))
"""

TIMED_REGISTRATION = """
import importlib, json, time
import torch, dsv4_kernels
start = time.perf_counter()
importlib.import_module("dsv4_kernels.FAMILY")
elapsed = time.perf_counter() - start
print(json.dumps({"ms": elapsed * 1e3, "registered": torch._C._dispatch_get_all_op_names()}))
"""


def run(program: str, folder: Path, **environment: str) -> dict[str, Any]:
    """The JSON that a program prints in a fresh process with an otherwise plain environment."""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=folder,
        env={"PATH": os.environ["PATH"], "HOME": str(folder), **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def test_tests_run_against_the_installed_package(root: Path) -> None:
    assert not Path(dsv4_kernels.__file__).is_relative_to(root / "python")


def import_faults(folder: Path, **environment: str) -> list[str]:
    """What is wrong with importing the package in a fresh process: time, what it drags in."""
    run(TIMED_IMPORT, folder, **environment)  # what follows is measured with a warm disk
    runs = [run(TIMED_IMPORT, folder, **environment) for _ in range(RUNS)]
    times = [one["ms"] for one in runs]
    heavy = {name.partition(".")[0] for name in runs[0]["modules"]} & set(HEAVY)
    return [f"imports {name}" for name in sorted(heavy)] + (
        [f"takes {times} ms"] if statistics.median(times) >= LIMIT_MS else []
    )


def test_import_is_instant_and_loads_no_framework_and_no_compiler(tmp_path: Path) -> None:
    assert import_faults(tmp_path) == []


def test_slow_import_is_refused(package: Path, tmp_path: Path) -> None:
    shutil.copytree(package, tmp_path / "dsv4_kernels")
    (tmp_path / "triton.py").write_text("")
    with (tmp_path / "dsv4_kernels" / "__init__.py").open("a") as file:
        file.write(f"import time, triton\ntime.sleep({LIMIT_MS / 1e3})\n")
    first, second = import_faults(tmp_path, PYTHONPATH=str(tmp_path))
    assert first == "imports triton"
    assert second.startswith("takes ")


@pytest.mark.torch
@pytest.mark.parametrize("family", dsv4_kernels.FAMILIES)
def test_first_use_of_a_family_is_instant(family: str, tmp_path: Path) -> None:
    """Its modules are imported, and its ops registered with torch, which is there already."""
    program = TIMED_REGISTRATION.replace("FAMILY", family)
    runs = [run(program, tmp_path) for _ in range(4)][1:]
    ops = {f"dsv4::{name}" for name, op in OPS.items() if op.family == family}
    assert all(ops <= set(one["registered"]) for one in runs)
    assert min(one["ms"] for one in runs) < FAMILY_LIMIT_MS, [one["ms"] for one in runs]


def test_import_works_without_a_driver(tmp_path: Path) -> None:
    """Also where a driver is installed: no device is visible."""
    assert run(TIMED_IMPORT, tmp_path, CUDA_VISIBLE_DEVICES="")["version"] == dsv4_kernels.__version__


def files_of(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


@pytest.mark.parametrize("program", [TIMED_IMPORT, TIMED_IMPORT + "dsv4_kernels.info()"], ids=["import", "info"])
def test_no_file_is_made(tmp_path: Path, package: Path, program: str) -> None:
    home, temporary = tmp_path / "home", tmp_path / "tmp"
    for folder in (home, temporary):
        folder.mkdir()
        folder.chmod(0o555)
    before = files_of(package)
    run(program, home, TMPDIR=str(temporary), XDG_CACHE_HOME=str(home / "cache"))
    # Running as root, the folders' modes stop nothing: so look.
    assert not files_of(home)
    assert not files_of(temporary)
    assert {path for path in files_of(package) - before if "__pycache__" not in path.parts} == set()


def test_compilers_are_not_importable() -> None:
    """The tests prove that nothing needs them at run time only where they are absent."""
    for name in ("triton", "cutlass"):
        with pytest.raises(ModuleNotFoundError):
            __import__(name)
