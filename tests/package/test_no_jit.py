"""Every op runs where nothing can be compiled, fetched or cached: as in production, so in the first call."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

NOWHERE = "/nonexistent"

EVERY_OP = """
from dsv4_kernels.cases import all_cases  # with the benchmark's baselines, for which torch looks for Triton
from dsv4_kernels.images import read_images
from dsv4_kernels.ops import OPS
from tests.launches import observed
from tests.package import no_jit

cases = {case.op: case for case in all_cases() if not case.large}
assert cases.keys() == OPS.keys()
no_jit.install()
for case in cases.values():
    case.run(case.arguments("cpu"))
launched = set()
architectures = {image["architecture"] for image in read_images()}
for architecture in architectures:
    for op, case in cases.items():
        arguments = case.arguments("cpu")
        with observed(architecture) as launches:
            OPS[op](arguments, OPS[op].allocate(arguments))
        launched.add((op, architecture, len(launches) == case.launches))
assert launched == {(op, architecture, True) for op in OPS for architecture in architectures}
print(len(OPS), "ops on", len(architectures))
"""


def run(program: str, root: Path) -> subprocess.CompletedProcess[str]:
    """In a process without HOME, temporary folder, and programs to call."""
    environment = dict.fromkeys(("HOME", "TMPDIR", "XDG_CACHE_HOME", "PATH"), NOWHERE)
    environment["PYTHONPATH"] = ":".join([str(root), *(path for path in sys.path if path)])
    command = [sys.executable, "-B", "-c", program]
    return subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True, check=False, timeout=300)


@pytest.mark.torch
def test_every_op_runs_without_compilers_network_and_files(root: Path) -> None:
    done = run(EVERY_OP, root)
    assert re.fullmatch(r"\d+ ops on \d", done.stdout.strip()), done.stderr


@pytest.mark.parametrize(
    "program",
    [
        "import triton",
        "import subprocess, sys; subprocess.run([sys.executable, '-V'])",
        "import os; os.system('true')",
        "open('/dev/shm/dsv4_no_jit', 'w')",
        "import pathlib; pathlib.Path('/dev/shm/dsv4_no_jit').mkdir()",
        "import socket; socket.create_connection(('127.0.0.1', 9))",
    ],
)
def test_what_compiles_or_fetches_or_caches_is_refused(program: str, root: Path) -> None:
    done = run(f"from tests.package import no_jit\nno_jit.install()\n{program}", root)
    assert "PermissionError: no_jit: " in done.stderr
    assert done.returncode != 0
