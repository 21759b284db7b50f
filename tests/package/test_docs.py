"""What the documents name exists, what they show runs, and the reference holds everything that is public."""

from __future__ import annotations

import html
import importlib
import inspect
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import dsv4_kernels
import pytest
from dsv4_kernels import number_formats
from dsv4_kernels.cache import PAGE_LAYOUTS
from dsv4_kernels.ops import OPS

from docs.drawings import layer, page_layouts, weight_order
from docs.drawings.__main__ import DRAWINGS

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [
    path
    for pattern in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/**/*.md")
    for path in sorted(ROOT.glob(pattern))
    if path.parent != ROOT / "docs" / "ops"  # written by a build
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


def exists(path: str, beside: Path = ROOT) -> bool:
    """Whether a path is below the checkout, or below the folder of the document that names it."""
    return any(ROOT.glob(re.sub(r"<\w+>", "*", path))) or (beside / path).exists()


def blocks(document: Path, language: str) -> list[str]:
    return [code for of, code in BLOCK.findall(document.read_text()) if of == language]


def test_documents_are_there() -> None:
    assert {"README.md", "CONTRIBUTING.md", "CHANGELOG.md"} <= {path.name for path in DOCUMENTS}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_named_paths_exist(document: Path) -> None:
    assert sorted(path for path in named_paths(document.read_text()) if not exists(path, document.parent)) == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_named_files_exist(document: Path) -> None:
    skipped = (".git", ".venv", "build")
    known = {path.name for top in ROOT.iterdir() if not top.name.startswith(skipped) for path in (top, *top.rglob("*"))}
    assert sorted(named_files(document.read_text()) - known) == []


PARTS = ("**Status:**", "**Question.**", "**Decision.**", "**Evidence", "**Reopen when**")


def decision_faults(name: str, text: str) -> list[str]:
    """What a decision record lacks."""
    faults = [part for part in PARTS if part not in text]
    return faults if text.startswith(f"# {name[:4]} ") else [*faults, f"a title that starts with {name[:4]}"]


def test_decisions_say_what_a_decision_has_to_say() -> None:
    pages = sorted((ROOT / "docs" / "decisions").glob("0*.md"))
    assert [page.name[:4] for page in pages] == [f"{number:04}" for number in range(1, len(pages) + 1)]
    assert {page.name: faults for page in pages if (faults := decision_faults(page.name, page.read_text()))} == {}
    assert decision_faults("0001-x.md", pages[0].read_text().replace("**Reopen when**", "")) == ["**Reopen when**"]
    assert decision_faults("0002-x.md", pages[0].read_text()) == ["a title that starts with 0002"]


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


def build_pages(source: Path, out: Path) -> subprocess.CompletedProcess[str]:
    """Sphinx on the pages, from the installed package's docstrings; a warning is a failure."""
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", source, out]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pages")
    done = build_pages(ROOT / "docs", folder)
    assert done.returncode == 0, done.stderr
    return folder


def missing(pages: Path, names: set[str]) -> list[str]:
    """The names that no page describes."""
    shown = set(re.findall(r'id="(dsv4_kernels[\w.]+)"', "".join(page.read_text() for page in pages.rglob("*.html"))))
    return sorted(names - shown)


def test_reference_holds_every_public_function_and_class(pages: Path) -> None:
    families = [importlib.import_module(f"dsv4_kernels.{family}") for family in dsv4_kernels.FAMILIES]
    names = {
        f"{module.__name__}.{name}"
        for module in (dsv4_kernels, *families)
        for name in module.__all__
        if callable(getattr(module, name))
    }
    functions = inspect.getmembers(number_formats, inspect.isfunction)
    names |= {f"dsv4_kernels.number_formats.{name}" for name, _ in functions if not name.startswith("_")}
    assert len(names) > 80
    assert missing(pages, names) == []
    schemas = (pages / "package.html").read_text()
    assert [op for op in OPS if f"dsv4::{op}(" not in schemas] == []
    assert missing(pages, {"dsv4_kernels.router.no_such"}) == ["dsv4_kernels.router.no_such"]


def test_page_that_names_what_is_not_there_is_refused(tmp_path: Path) -> None:
    """One build for all: each takes seconds."""
    faults = {
        "no_such_function": "```{eval-rst}\n.. autofunction:: dsv4_kernels.router.no_such_function\n```",
        "no_such.h": "```{literalinclude} ../csrc/no_such.h\n```",
        "no_such_page": "{doc}`no_such_page`",
    }
    shutil.copy(ROOT / "docs" / "conf.py", tmp_path)
    shutil.copytree(ROOT / "docs" / "extensions", tmp_path / "extensions")
    (tmp_path / "index.md").write_text("\n\n".join(["# Title", *faults.values(), ""]))
    done = build_pages(tmp_path, tmp_path / "out")
    assert done.returncode != 0
    assert [name for name in faults if name not in done.stderr] == []


# What a page would fetch from elsewhere: scripts, styles, images. Links that a reader follows are no part of it.
FETCHED = re.compile(r"""<(?:script|link|img|iframe|source)\b[^>]*?\b(?:src|href)\s*=\s*["'](?:https?:)?//[^"']*""")


def test_pages_need_no_network(pages: Path) -> None:
    written = {page: page.read_text() for page in pages.rglob("*.html")}
    assert {page.name: found for page, text in written.items() if (found := FETCHED.findall(text))} == {}
    assert FETCHED.search('<script defer="defer" src="https://cdn.example/mathjax.js">')
    assert FETCHED.search('<link rel="stylesheet" href="//cdn.example/katex.css">')
    assert not FETCHED.search('<a href="https://github.com/">')


def test_formulas_are_mathml(pages: Path) -> None:
    """Every formula of the sources is MathML in the pages, and no TeX is left to be read as text."""
    for name in ("formats", "families/router", "families/cache", "families/moe", "families/stash"):
        source = BLOCK.sub("", (ROOT / "docs" / f"{name}.md").read_text())
        formulas = re.findall(r"\$\$.+?\$\$|\$[^$\n]+\$", source, re.DOTALL)
        page = (pages / f"{name}.html").read_text()
        assert formulas
        assert page.count("<math ") >= len(formulas)
        assert re.findall(r"\\(?:mathrm|frac|lfloor|cdot|sum)\b", page) == []


def test_drawings_are_those_of_their_sources() -> None:
    folder = ROOT / "docs" / "drawings"
    assert {path.stem for path in folder.glob("*.svg")} == set(DRAWINGS)
    assert [name for name, of in DRAWINGS.items() if (folder / f"{name}.svg").read_text() != str(of.draw())] == [], (
        "run python -m docs.drawings"
    )


def test_drawings_show_what_there_is() -> None:
    """Ops by their names; interleaved positions by the formula of csrc/include/dsv4/moe.h."""
    assert {*layer.COMPRESSION, *layer.ROUTING, *layer.EXPERTS, *layer.STASH, *layer.SEAM} <= set(OPS)
    for word, bits in enumerate(weight_order.positions_of_bits()):
        w, g, h = word // 4, word // 2 % 2, word % 2
        wanted = {64 * h + 32 * g + 8 * p + 2 * w + c for p in range(4) for c in (0, 1)}
        assert sorted(bits) == sorted(4 * [*wanted])
    for layout in PAGE_LAYOUTS.values():
        assert sum(size for _, size, _ in page_layouts.parts(layout)) == layout.entry_bytes


def test_every_op_has_a_page(pages: Path) -> None:
    """With its docstring, schema, C struct, and what was measured of it."""
    assert {page.stem for page in (pages / "ops").glob("*.html")} == set(OPS)
    text = (pages / "ops" / "compress_flush.html").read_text()
    for part in ("dsv4::compress_flush(", "dsv4_compress_flush_args", "CSA, decode, 64 requests", "slot_mapping"):
        assert part in html.unescape(re.sub(r"<[^>]+>", "", text))


def test_page_layouts_are_those_of_the_library() -> None:
    text = (ROOT / "docs" / "families" / "cache.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| (\d+) \| (\d+) \| (\d+)(, apart)? \|", text, re.MULTILINE)
    wanted = [
        (one.name, one.head_dim, one.entry_bytes, one.page_alignment, one.separate) for one in PAGE_LAYOUTS.values()
    ]
    assert [(name, *map(int, numbers), apart != "") for name, *numbers, apart in rows] == wanted


def test_table_of_ops_is_of_the_images(images: list[dict[str, Any]], root: Path) -> None:
    header, *rows = re.findall(r"^\| (`?\w+`?.*) \|$", (root / "docs" / "ops.md").read_text(), re.MULTILINE)
    _, _, *architectures, _ = header.split(" | ")
    assert set(architectures) == {i["architecture"] for i in images}
    names = {"cuda": "CUDA C++", "triton": "Triton", "cute": "CuTe DSL"}
    expected = []
    for name, op in OPS.items():
        mine = [i for i in images if i["op"] == name]
        languages = sorted({names[i["language"]] for i in mine})
        native = ["native" if any(i["architecture"] == on for i in mine) else "none" for on in architectures]
        expected.append(" | ".join([f"`{op.family}.{name}`", ", ".join(languages), *native, "yes"]))
    assert sorted(rows) == sorted(expected)
