"""Makes a process refuse what a package that compiles at run time would do. For the programs of test_no_jit.py."""

from __future__ import annotations

import os
import sys
from typing import Any

COMPILERS = ("triton", "cutlass")
PROCESSES = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork")
FILES = ("os.mkdir", "os.rename", "os.remove", "os.link", "os.symlink", "os.truncate", "shutil.copyfile")
TO_WRITE = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def _refuse(event: str, arguments: tuple[Any, ...]) -> None:
    if (
        event in PROCESSES
        or event in FILES
        or event.startswith("socket.")
        or (event == "open" and isinstance(arguments[2], int) and arguments[2] & TO_WRITE)
        or (event == "import" and arguments[0].partition(".")[0] in COMPILERS)
    ):
        raise PermissionError(f"no_jit: {event} {arguments}")


def install() -> None:
    """From now on: no process, no connection, no file that is written, no compiler that is imported."""
    sys.addaudithook(_refuse)
