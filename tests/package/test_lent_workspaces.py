"""The book-keeping of lent workspaces, compiled with a CUDA runtime made for the test."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCE = Path(__file__).with_name("lent_workspaces.cpp")
FIND_HEADERS = (
    "import importlib.metadata as m; "
    "print(next(f.locate() for f in m.files('nvidia-cuda-runtime') if f.name == 'cuda_runtime_api.h').parent)"
)


def build_and_run(build_python: Path, folder: Path, source: Path) -> subprocess.CompletedProcess[str]:
    """With `source` in the place of csrc/core/workspace.cpp."""
    headers = subprocess.run([build_python, "-c", FIND_HEADERS], capture_output=True, text=True, check=True).stdout
    copy = folder / "core" / "workspace.cpp"
    copy.parent.mkdir(exist_ok=True)
    copy.write_text(source.read_text())
    generate = [build_python, "-m", "aot.generate", "--architectures-header", folder / "architectures.h"]
    subprocess.run(generate, cwd=ROOT, check=True)
    include = [f"-I{path}" for path in (folder, ROOT / "csrc", ROOT / "csrc" / "include", headers.strip())]
    program = folder / "program"
    subprocess.run(["c++", "-std=c++17", "-g", *include, SOURCE, "-o", program, "-pthread"], check=True)
    return subprocess.run([program], capture_output=True, text=True, check=False)


def test_blocks_are_lent_and_given_back(build_python: Path, tmp_path: Path) -> None:
    done = build_and_run(build_python, tmp_path, ROOT / "csrc" / "core" / "workspace.cpp")
    assert done.returncode == 0, done.stderr


# What is changed, and what the program then says.
FAULTS = {
    "if (status == cudaStreamCaptureStatusNone)\n": ("if (true)\n", "not lent"),  # its id while capturing
    "block->stream == stream && block->size": ("block->size", "two streams share a block"),
    "block->stream == stream && block->capture": ("block->capture", "streams of a graph share"),
    "taken.store(false, std::memory_order_release)": ("taken.load()", "blocks do not come back"),
    "if (block->size < size) continue;": ("", "too small"),
    "cudaMemsetAsync(data, 0, size, pool.zeroing)": ("cudaSuccess", "not zeroed"),
    "block->last_use = ++pool.clock;": ("", "a busy stream loses its block"),
    "  evict(pool);": ("", "more blocks than there may be"),
}


@pytest.mark.parametrize("found", FAULTS)
def test_faults_are_seen(found: str, build_python: Path, tmp_path: Path) -> None:
    text = (ROOT / "csrc" / "core" / "workspace.cpp").read_text()
    changed, said = FAULTS[found]
    assert found in text
    source = tmp_path / "changed.cpp"
    source.write_text(text.replace(found, changed))
    done = build_and_run(build_python, tmp_path, source)
    assert said in done.stderr, done.stderr
