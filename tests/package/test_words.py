from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def words(root: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("words", root / "ci" / "words.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# Texts that stood in this repository.
BAD = {
    "m: tokens a block, 1 or more": "tokens a block",
    "/* tokens a block, 1 or more */": "tokens a block",
    "// A group of lanes a token: the row is in registers": "lanes a token",
    "// the tables of the tiles, a thread a tile; then the padding": "a thread a tile",
    "E4M3 with a float32 scale for each row: a block a row.": "a block a row",
    '"row_to_slot: expected 16, 64 or 128 rows a tile"': "rows a tile",
    "// one launch,\n// four values a\n// thread.": "four values a thread",
    "`libdsv4_kernels.so`: a C interface, one function an op, with": "one function an op",
    "| 4 launches a step |": "4 launches a step",
    "int tokens_a_request = 1;": "tokens_a_request",
    "constexpr int kFoursALane = 8;": "sALane",
    "torch.compile, the rival, needs it": "rival",
    "MOST_RIVAL_BYTES = 1 << 30": "RIVAL",
    "verdict = case.yardstick.verdict(given)": "yardstick",
    "Asks for a pass's rows of x": "Asks for",
    "auto ask_for_row = [&] {": "ask_for",
    "widen<T>(&channels->kv);": "widen",
    "the first product widens them in registers": "widens",
    "the kernel before it runs out, which hides": "kernel before it runs out",
    "the last one gives it back, once it has run out.": "it has run out",
    "launched with programmatic stream serialization": "programmatic stream serialization",
    "The host's half of a launch: the stream": "'s half of a launch",
    "0 for a layout that there is not": "that there is not",
    "What nobody calls is gone": "What nobody",
    "limit: the largest that is right; what": "largest that is right",
    "leave few for a second turn, and": "second turn",
    "0 / x takes a division's slow way": "slow way",
}

GOOD = [
    "the columns that a block handles; which elements a block copies, and how many rows a token takes",
    "how many parts an expert is cut into",
    "In each of the first three steps a lane exchanges half of its values",
    "k results a row is divided for",
    "a tile of 13 rows; one row of a tile; the first row in a tile",
    "Functions return 0, or -1 with a Python error",
    "the arrival of a cluster; it was asked for by name; memory runs out of space; the pool runs out",
    "a widening multiplication; wider inside",
    "cudaLaunchAttributeProgrammaticStreamSerialization",
    "tokens per block, rows per tile; one thread per row",
    "the images that there are",
    "a thread that calls an op on another device, loads a row, stores a tile in shared memory, launches a kernel",
    "between the ARRIVALS of two blocks",
]


@pytest.mark.parametrize("text", BAD)
def test_private_wordings_are_refused(text: str, words: ModuleType) -> None:
    assert [wording for _, wording, _ in words.faults(text)] == [BAD[text]]


@pytest.mark.parametrize("text", GOOD)
def test_english_is_not(text: str, words: ModuleType) -> None:
    assert words.faults(text) == []


def test_lines_are_those_of_the_file(words: ModuleType) -> None:
    assert words.faults("a\n\n  // b rows a\n  // tile, c\nd\n* e rival") == [
        (3, "rows a tile", "per"),
        (6, "rival", "baseline, peer"),
    ]


def test_a_bad_file_fails_the_check(words: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.md").write_text("fine\nfour values a thread\n")
    (tmp_path / "good.md").write_text("four values per thread\n")
    assert words.main([str(tmp_path / "good.md")]) == 0
    assert words.main([str(tmp_path / "good.md"), str(tmp_path / "bad.md")]) == 1
    assert capsys.readouterr().out == f"{tmp_path}/bad.md:2: 'four values a thread': write per\n"
