"""What the documents name exists, and what they show runs."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [
    path
    for pattern in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/**/*.md")
    for path in sorted(ROOT.glob(pattern))
]
FOLDERS = ("aot", "ci", r"\.ci", "csrc", "docs", "python", "tests")

# A path below one of the project's folders; <name> and * stand for any name.
PATH = re.compile(rf"(?<![\w./-])(?:{'|'.join(FOLDERS)})/[\w./<>*-]*")
# The name of a file, without its folder.
FILE = re.compile(r"(?<![\w./<>*-])[\w-]+\.(?:cmake|cpp|cu|cuh|h|in|json|md|py|sh|toml|txt|yaml)\b(?!/)")
LINK = re.compile(r"\]\((?!\w+://|#)([^)#]+)")
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def named_paths(text: str) -> set[str]:
    return {path.rstrip("./") for path in PATH.findall(text)} | {link.strip() for link in LINK.findall(text)}


def named_files(text: str) -> set[str]:
    return set(FILE.findall(text))


def exists(path: str) -> bool:
    return any(ROOT.glob(re.sub(r"<\w+>", "*", path)))


def blocks(document: Path, language: str) -> list[str]:
    return [code for of, code in BLOCK.findall(document.read_text()) if of == language]


def test_documents_are_there() -> None:
    assert {"README.md", "CONTRIBUTING.md", "CHANGELOG.md"} <= {path.name for path in DOCUMENTS}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_named_paths_exist(document: Path) -> None:
    assert sorted(path for path in named_paths(document.read_text()) if not exists(path)) == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_named_files_exist(document: Path) -> None:
    skipped = (".git", ".venv", "build")
    known = {path.name for top in ROOT.iterdir() if not top.name.startswith(skipped) for path in (top, *top.rglob("*"))}
    assert sorted(named_files(document.read_text()) - known) == []


def test_naming_is_found() -> None:
    """The patterns find what they are for."""
    text = "see `csrc/core/no_such.cpp`, ci/demo.sh. [rules](CONTRIBUTING.md), pyproject.toml and aot/<family>/<op>.py"
    assert named_paths(text) == {"csrc/core/no_such.cpp", "ci/demo.sh", "CONTRIBUTING.md", "aot/<family>/<op>.py"}
    assert named_files(text) == {"CONTRIBUTING.md", "pyproject.toml"}
    assert not exists("csrc/core/no_such.cpp")
    assert exists("aot/<family>/<op>.py")


def test_python_examples_run(tmp_path: Path) -> None:
    """As a user would: in a file of their own, on whatever device there is."""
    examples = blocks(ROOT / "README.md", "python")
    assert examples, "README.md shows no Python"
    for number, code in enumerate(examples):
        script = tmp_path / f"example{number}.py"
        script.write_text(code)
        done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{code}\n{done.stderr}"


# What an example in C++ may take as given: it is shown as the body of a function of the reader's engine.
CPP_GIVEN = "int64_t* token_ids, int32_t* table, float* weights, int32_t* ids, int64_t tokens, int64_t vocab, int64_t k"


def test_cpp_examples_compile(tmp_path: Path, package: Path) -> None:
    examples = blocks(ROOT / "README.md", "cpp")
    assert examples, "README.md shows no C++"
    compiler = shutil.which("c++")
    assert compiler, "no C++ compiler"
    for number, code in enumerate(examples):
        includes = [line for line in code.splitlines() if line.startswith("#include")]
        body = [line for line in code.splitlines() if not line.startswith("#include")]
        function = [f"void example({CPP_GIVEN}, dsv4_stream stream) {{", *body, "}", ""]
        source = tmp_path / f"example{number}.cpp"
        source.write_text("\n".join(["#include <stdexcept>", *includes, *function]))
        command = [compiler, "-std=c++17", "-Wall", "-Werror", "-fsyntax-only", f"-I{package / 'include'}", source]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{code}\n{done.stderr}"
