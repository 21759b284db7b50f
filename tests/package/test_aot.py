"""The aot step itself: deterministic, incremental, and loud about what is wrong.

Works on copies of the step's sources, with the compilers of the build environment.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ARCH = "sm_90a"
OTHER_ARCH = "sm_100a"
TRITON_MODULE = "padded_activations"
TRITON_OPS = ("padded_squared_relu", "padded_swiglu", "squared_relu_and_quantize_mxfp8", "swiglu_and_quantize_mxfp8")
TRITON_KERNELS = {f"{op}_{kind}" for op in TRITON_OPS for kind in ("aligned", "any")}
CUTE_MODULE = "dense_router_decode"
KERNELS = f"aot/moe/{TRITON_MODULE}.py"


class Tree:
    """A copy of the aot step that a test may spoil."""

    def __init__(self, source: Path, folder: Path, python: Path) -> None:
        self.folder = folder
        self.python = python
        shutil.copytree(source / "aot", folder / "aot", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(source / "pyproject.toml", folder)

    def replace(self, path: str, old: str, new: str) -> None:
        text = (self.folder / path).read_text()
        assert old in text
        (self.folder / path).write_text(text.replace(old, new))

    def run(
        self, out: Path, *arguments: str, arch: tuple[str, ...] = (ARCH,), python: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        command = [python or self.python, "-m", "aot", "--out", out, "--arch", *arch, *arguments]
        return subprocess.run(command, cwd=self.folder, capture_output=True, text=True, check=False, timeout=300)

    def build(self, out: Path, *arguments: str, arch: tuple[str, ...] = (ARCH,)) -> str:
        """What it printed; it must succeed."""
        done = self.run(out, *arguments, arch=arch)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def refusal(self, out: Path, *arguments: str, arch: tuple[str, ...] = (ARCH,), python: Path | None = None) -> str:
        """The error text; it must fail, with words and not with a traceback."""
        done = self.run(out, *arguments, arch=arch, python=python)
        assert done.returncode != 0, done.stdout
        assert not (out / "kernels.cpp").exists()
        return done.stderr


@pytest.fixture
def tree(root: Path, tmp_path: Path, build_python: Path) -> Tree:
    return Tree(root, tmp_path / "tree", build_python)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def differing(one: dict[str, bytes], two: dict[str, bytes]) -> list[str]:
    """The files that only one of them has, or that differ."""
    return sorted(name for name in one.keys() | two.keys() if one.get(name) != two.get(name))


def times(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def built(
    root: Path, tmp_path_factory: pytest.TempPathFactory, build_python: Path, aot_output: Path
) -> tuple[Tree, Path]:
    """A whole output for two architectures, for tests that only look at it or copy it: that of the wheel's build."""
    tree = Tree(root, tmp_path_factory.mktemp("a_tree") / "tree", build_python)
    out = tmp_path_factory.mktemp("an_output")
    for architecture in (ARCH, OTHER_ARCH):
        shutil.copytree(aot_output / architecture, out / architecture)
    tree.build(out, arch=(ARCH, OTHER_ARCH))
    return tree, out


# Deterministic. (tests/package/test_build.py does the same with every kernel of an architecture.)


@pytest.mark.thorough
def test_two_runs_in_two_folders_are_identical(root: Path, tmp_path: Path, built: tuple[Tree, Path]) -> None:
    _, first = built
    other = tmp_path / "somewhere" / "else, with a longer name"
    other.mkdir(parents=True)
    tree = Tree(root, other / "tree", built[0].python)
    tree.build(other / "out", "--jobs", "1", "--only", TRITON_MODULE, CUTE_MODULE, arch=(ARCH, OTHER_ARCH))
    one, two = contents(first), contents(other / "out")
    images = [name for name in two if name.endswith((".cubin", ".ptx", ".json")) and "stamps" not in name]
    assert len([name for name in images if name.endswith(".cubin")]) >= 2 * (8 + 9)
    assert [name for name in images if one[name] != two[name]] == []


# Incremental.


def test_second_run_compiles_nothing(built: tuple[Tree, Path]) -> None:
    tree, out = built
    before = times(out)
    printed = tree.build(out, arch=(ARCH, OTHER_ARCH))
    assert printed.startswith("aot: 0 compiler processes to run; ")
    stamps = {name for name in before if name.endswith("stamps.json")}
    after = times(out)
    assert {name for name in before if before[name] != after[name]} <= stamps


def test_changed_kernel_is_compiled_alone(tmp_path: Path, root: Path, built: tuple[Tree, Path]) -> None:
    tree = Tree(root, tmp_path / "tree", built[0].python)
    out = tmp_path / "out"
    shutil.copytree(built[1], out)
    tree.replace(KERNELS, "activation(gate, up, limit, SWIGLU)", "activation(gate * 2.0, up, limit, SWIGLU)")
    before, old = times(out), contents(out)
    printed = tree.build(out, arch=(ARCH, OTHER_ARCH))
    assert printed.startswith("aot: 2 compiler processes to run; ")
    after, new = times(out), contents(out)
    rewritten = {Path(name).stem for name in after if after[name] != before[name] and name.endswith(".cubin")}
    assert rewritten == TRITON_KERNELS
    changed = {Path(name).stem for name in new if name.endswith(".cubin") and old[name] != new[name]}
    assert changed == TRITON_KERNELS


def test_removed_kernel_leaves_nothing_behind(tmp_path: Path, root: Path, built: tuple[Tree, Path]) -> None:
    tree = Tree(root, tmp_path / "tree", built[0].python)
    out = tmp_path / "out"
    shutil.copytree(built[1], out)
    (tree.folder / KERNELS).unlink()
    tree.build(out, arch=(ARCH, OTHER_ARCH))
    assert [name for name in contents(out) if name.split("/")[-1].startswith(TRITON_OPS)] == []
    generated = (out / "kernels.h").read_text() + (out / "kernels.cpp").read_text()
    assert [op for op in TRITON_OPS if op in generated] == []


def test_lost_image_is_made_again(tmp_path: Path, root: Path, built: tuple[Tree, Path]) -> None:
    out = tmp_path / "out"
    shutil.copytree(built[1], out)
    wanted = contents(out)
    lost = out / ARCH / "padded_swiglu_any.cubin"
    lost.unlink()
    built[0].build(out, arch=(ARCH, OTHER_ARCH))
    assert differing(contents(out), wanted) == []


# Loud.


def test_unknown_architecture(tree: Tree, tmp_path: Path) -> None:
    text = tree.refusal(tmp_path / "out", arch=("sm_80",))
    assert text.startswith("aot: unknown architecture 'sm_80'; known: sm_90a, ")


def test_unknown_op(tree: Tree, tmp_path: Path) -> None:
    text = tree.refusal(tmp_path / "out", "--only", "no_such_op")
    assert text.startswith("aot: --only: no kernels for no_such_op; there are kernels for ")


def test_missing_compiler(tree: Tree, tmp_path: Path) -> None:
    """The environment of the tests has none."""
    text = tree.refusal(tmp_path / "out", "--only", TRITON_MODULE, python=Path(sys.executable))
    assert re.search(r"aot: the triton kernels need triton==[\d.]+, which is not installed; pip install", text), text
    assert "Traceback" not in text


@pytest.mark.parametrize(
    ("distribution", "op", "language"),
    [("triton", TRITON_MODULE, "triton"), ("nvidia-cutlass-dsl", CUTE_MODULE, "cute")],
)
def test_compiler_of_another_version(tree: Tree, tmp_path: Path, distribution: str, op: str, language: str) -> None:
    tree.replace("pyproject.toml", f'"{distribution}==', f'"{distribution}==0.0.')
    text = tree.refusal(tmp_path / "out", "--only", op)
    needs = rf"aot: the {language} kernels need {distribution}==0\.0\.[\d.]+, found [\d.]+; pip install"
    assert re.search(needs, text), text
    assert "Traceback" not in text


SPILLING = '''
import triton
import triton.language as tl

from aot.declare import TritonKernel


@triton.jit
def spilling_kernel(x, COUNT: tl.constexpr):
    """Every thread holds 512 values across a reduction, and has 255 registers."""
    index = tl.arange(0, COUNT)
    value = tl.load(x + index)
    tl.store(x + index, value * tl.sum(value * value))


KERNELS = [TritonKernel(spilling_kernel, "spilling", {"x": "float32*"}, {"COUNT": 32 * 512}, num_warps=1)]
'''


@pytest.mark.thorough
def test_kernel_that_spills(tree: Tree, tmp_path: Path) -> None:
    (tree.folder / "aot" / "moe" / "spilling.py").write_text(SPILLING)
    text = tree.refusal(tmp_path / "out", "--only", "spilling")
    assert re.search(r"aot: spilling: kernel \w+ spills on sm_90a: [1-9]\d* bytes of stack", text), text
    assert "Traceback" not in text
    assert tree.refusal(tmp_path / "out", "--only", "spilling") == text, "the failure must not be remembered as success"


def test_two_kernels_of_one_name(tree: Tree, tmp_path: Path) -> None:
    shutil.copy(tree.folder / KERNELS, tree.folder / "aot" / "moe" / "another.py")
    for _ in range(2):
        text = tree.refusal(tmp_path / "out", "--only", TRITON_MODULE, "another")
        assert "aot: two kernels are named padded_squared_relu_a" in text
        assert "Traceback" not in text


def test_declared_type_that_is_not_the_kernels(tree: Tree, tmp_path: Path) -> None:
    """A declaration in another order than the function's parameters: a launch would pass one as the other."""
    tree.replace(
        KERNELS,
        '"permutation_map": "const int32*",\n            "n_used": "const int32*",\n',
        '"n_used": "const int32*",\n            "permutation_map": "const int32*",\n',
    )
    text = tree.refusal(tmp_path / "out", "--only", TRITON_MODULE)
    assert "permutation_map" in text
    assert "Traceback" not in text


def test_declared_argument_that_the_kernel_lacks(tree: Tree, tmp_path: Path) -> None:
    tree.replace(KERNELS, '"columns": "int32",\n', '"columns": "int32",\n            "colour": "int32",\n')
    text = tree.refusal(tmp_path / "out", "--only", TRITON_MODULE)
    assert "colour" in text
    assert "Traceback" not in text


def test_declared_type_that_is_none(tree: Tree, tmp_path: Path) -> None:
    tree.replace(KERNELS, '"columns": "int32"', '"columns": "int33"')
    text = tree.refusal(tmp_path / "out", "--only", TRITON_MODULE)
    assert "int33" in text
    assert "Traceback" not in text


def test_kernel_that_does_not_compile(tree: Tree, tmp_path: Path) -> None:
    tree.replace(KERNELS, "tl.num_programs(1)", "tl.no_such_function(1)")
    text = tree.refusal(tmp_path / "out", "--only", TRITON_MODULE)
    assert text.startswith(f"aot: compiling {TRITON_MODULE} (triton, {ARCH}) failed:")
    assert "no_such_function" in text


@pytest.mark.thorough
def test_interrupted_run_is_finished_by_the_next(tmp_path: Path, built: tuple[Tree, Path]) -> None:
    """Stamps are written when a batch is done: without them, whatever lies there is made again."""
    images = {name: data for name, data in contents(built[1] / ARCH).items() if name.startswith(TRITON_OPS)}
    folder = tmp_path / "out" / ARCH
    folder.mkdir(parents=True)
    for name, data in images.items():
        (folder / name).write_bytes(data)
    (folder / "padded_swiglu_any.cubin").write_bytes(b"half")
    built[0].build(tmp_path / "out", "--only", TRITON_MODULE)
    assert differing(contents(folder), images) == ["stamps.json"]


# Launch order.

WAITING = """
.visible .entry one(.param .u64 one_param_0)
{
    ld.param.b64 %rd1, [one_param_0];
    mov.u32 %r1, %tid.x;
    ld.shared.b32 %r2, [scratch];
    griddepcontrol.wait;
    ld.global.b32 %r2, [%rd1];
}
"""
OWN_MEMORY = WAITING.replace("    mov.u32 %r1, %tid.x;", "    ld.shared.b32 %r1, [global_smem];")
EARLY_LOAD = WAITING.replace("    mov.u32 %r1, %tid.x;", "    @%p1 ld.global.b32 %r3, [%rd1];")
EARLY_PREFETCH = WAITING.replace("    mov.u32 %r1, %tid.x;", "    @%p1 prefetch.global.L2 [%rd1];")
EARLY_L1_PREFETCH = EARLY_PREFETCH.replace("L2", "L1")
NO_WAIT = WAITING.replace("    griddepcontrol.wait;\n", "")


@pytest.mark.parametrize(
    ("ptx", "text"),
    [
        (WAITING, None),
        (OWN_MEMORY, None),
        (EARLY_PREFETCH, None),
        (EARLY_L1_PREFETCH, "aot: kernel one .*griddepcontrol.wait comes after `@%p1 prefetch.global.L1 .%rd1.;`"),
        (WAITING + NO_WAIT.replace("one", "two"), "aot: kernel two .*griddepcontrol.wait is missing"),
        (EARLY_LOAD, "aot: kernel one .*griddepcontrol.wait comes after `@%p1 ld.global.b32 %r3, .%rd1.;`"),
    ],
    ids=["waits", "own memory", "prefetch", "prefetch into L1", "missing", "early load"],
)
def test_kernel_that_does_not_wait_for_the_one_before_it(
    ptx: str, text: str | None, tmp_path: Path, root: Path, build_python: Path
) -> None:
    (tmp_path / "kernel.ptx").write_text(ptx)
    program = "import sys; from pathlib import Path; from aot.images import check_waits; check_waits(Path(sys.argv[1]))"
    command = [build_python, "-c", program, tmp_path / "kernel.ptx"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode == 0) == (text is None)
    assert text is None or re.search(text, done.stderr)
