"""The C interface is the recorded one: engines are compiled against it."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import dsv4_kernels
import pytest

from tests.package import abi

WAY_OUT = (
    "the C interface is not the recorded one: give the package another version if this one is released, then run "
    "python -m tests.package.abi"
)


def test_interface_is_the_recorded_one(package: Path) -> None:
    version, lines = abi.recorded()
    current = abi.describe(package / "include")
    assert (version, sorted(set(lines) ^ set(current))) == (dsv4_kernels.__version__, []), WAY_OUT
    assert lines == current, WAY_OUT


def test_record_covers_everything_that_headers_declare() -> None:
    _, lines = abi.recorded()
    for line in (
        "struct dsv4_tensor: 88 bytes",
        "  shape: 32 bytes at 24",
        "enum dsv4_status: DSV4_ERROR_CUDA = 5",
        "constant DSV4_MAX_RANK = 4",
        "type struct CUstream_st* dsv4_stream",
        "function const char* dsv4_last_error(void)",
    ):
        assert line in lines
    # However the headers are laid out, nothing that they name may be missing.
    text = "".join(header.read_text() for header in (abi.HEADERS / "dsv4").glob("*.h"))
    names = re.findall(r"^} (dsv4_\w+);|^DSV4_API\b[^(;]*?(\w+)\(", text, re.MULTILINE)
    assert len(names) > 80
    assert [name for pair in names for name in pair if name and name not in "\n".join(lines)] == []


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("  int32_t rank;     /* 0 for a scalar */\n", ""),  # a field goes
        ("  int32_t device;", "  int64_t device;"),  # a field grows
        ("DSV4_ERROR_CUDA = 5", "DSV4_ERROR_CUDA = 6"),
        ("dsv4_preload(int32_t device)", "dsv4_preload(int64_t device)"),
        ("#define DSV4_MAX_RANK 4", "#define DSV4_MAX_RANK 5"),
        ("typedef struct CUstream_st* dsv4_stream;", "typedef void* dsv4_stream;"),
    ],
)
def test_change_is_seen(old: str, new: str, tmp_path: Path) -> None:
    shutil.copytree(abi.HEADERS, tmp_path / "include")
    header = tmp_path / "include" / "dsv4" / "dsv4.h"
    text = header.read_text()
    assert text.count(old) == 1
    header.write_text(text.replace(old, new))
    assert abi.describe(tmp_path / "include") != abi.recorded()[1]


def test_released_interface_cannot_be_rewritten(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    record = tmp_path / "abi.txt"
    record.write_text(f"version {abi.version()}\nstruct gone: 8 bytes\n")
    monkeypatch.setattr(abi, "RECORD", record)
    monkeypatch.setattr(abi, "is_released", lambda version: True)
    assert abi.main() == 1
    assert "gone" in record.read_text()
    monkeypatch.setattr(abi, "is_released", lambda version: False)
    assert abi.main() == 0
    assert abi.recorded()[1] == abi.describe(abi.HEADERS)
