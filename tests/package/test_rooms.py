"""The package's modules import each other as its layout says: no circle, and the CPU backend by the dispatcher alone.

Imports are read from the source, those inside functions and those for type checkers included.
"""

from __future__ import annotations

import ast
from pathlib import Path

import dsv4_kernels
import pytest

NAME = "dsv4_kernels"
PACKAGE = Path(dsv4_kernels.__file__).parent
DISPATCHER = f"{NAME}.op"


def sources() -> dict[str, str]:
    """Text of each module, by its name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = (NAME, *path.relative_to(PACKAGE).with_suffix("").parts)
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path.read_text()
    return found


def imports(texts: dict[str, str]) -> dict[str, set[str]]:
    """Of each module, the modules of the package that it imports by a statement."""
    graph: dict[str, set[str]] = {}
    for name, text in texts.items():
        found = set()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{name}: relative imports hide where a name is from"
                for alias in node.names:
                    module = f"{node.module}.{alias.name}"
                    found.add(module if module in texts else str(node.module))
        graph[name] = {module for module in found if module in texts and module != name}
    return graph


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in turn, the first again at the end; none if there is no circle."""
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module not in done:
            for imported in sorted(graph[module]):
                if found := visit(imported, [*path, module]):
                    return found
            done.add(module)
        return []

    return next((found for module in graph if (found := visit(module, []))), [])


def room(module: str) -> str:
    """The package's first level: "cpu", "cases", "cli", a family, or a module of its own."""
    return module.removeprefix(NAME).strip(".").partition(".")[0]


def strangers(graph: dict[str, set[str]], of: str, allowed: set[str]) -> list[str]:
    """Imports of a room's modules from outside of it and of the rooms that may."""
    return [
        f"{module} imports {imported}"
        for module, found in graph.items()
        for imported in found
        if room(imported) == of and room(module) not in {of, *allowed}
    ]


@pytest.fixture(scope="module")
def texts() -> dict[str, str]:
    return sources()


def test_no_circle(texts: dict[str, str]) -> None:
    assert circle(imports(texts)) == []


def test_nothing_imports_the_cpu_backend_but_the_dispatcher(texts: dict[str, str]) -> None:
    assert strangers(imports(texts), "cpu", set()) == []
    naming = {
        name
        for name, text in texts.items()
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Constant) and f"{NAME}.cpu." in str(node.value) and "\n" not in str(node.value)
    }
    assert naming == {DISPATCHER}


def test_what_engines_call_needs_no_cases(texts: dict[str, str]) -> None:
    assert strangers(imports(texts), "cases", {"cli"}) == []
    assert strangers(imports(texts), "cli", {"__main__"}) == []


@pytest.mark.parametrize(
    ("module", "line"),
    [
        (f"{NAME}.moe.quantize", f"from {NAME}.cpu.moe import quantize"),
        (f"{NAME}.moe.quantize", f"def late():\n    from {NAME}.cpu.moe.quantize import quantize_mx"),
        (f"{NAME}.cases.router.functions", f"import {NAME}.cpu.router.functions"),
    ],
)
def test_an_import_of_the_cpu_backend_is_seen(texts: dict[str, str], module: str, line: str) -> None:
    changed = texts | {module: f"{texts[module]}\n{line}\n"}
    assert len(strangers(imports(changed), "cpu", set())) == 1


@pytest.mark.parametrize(
    "line",
    [
        f"from {NAME}.cpu.cache.functions import append",
        f"def late():\n    from {NAME}.cpu.cache import functions",
        f"if TYPE_CHECKING:\n    from {NAME}.cpu.cache.functions import append",
    ],
)
def test_a_circle_is_seen(texts: dict[str, str], line: str) -> None:
    module = f"{NAME}.cpu.cache.pooling"
    found = circle(imports(texts | {module: f"{texts[module]}\n{line}\n"}))
    assert set(found) == {module, f"{NAME}.cpu.cache.functions"}
