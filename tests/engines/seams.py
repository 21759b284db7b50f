"""Writes the digests of the engines' sources that the plugins were written for.

    python -m tests.engines.seams MODULE ...

For whoever ports a plugin to another release of its engine: read the differences first, the digests are the last step.
MODULE is a plugin's module with SEAMS, such as dsv4_kernels.integrations.vllm.mhc; in the environment of ci/engines.sh.
"""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

from dsv4_kernels.integrations.seams import source_digest

from tests.engines import cpu  # noqa: F401


def main(modules: list[str]) -> None:
    for name in modules:
        module = importlib.import_module(name)
        path = Path(module.__file__)
        text = path.read_text()
        for seam in module.SEAMS:
            digest = source_digest(seam.resolve())
            text, count = re.subn(rf'("{re.escape(seam.name)}", )"\w*"', rf'\1"{digest}"', text)
            assert count == 1, f"{name}: {seam.name} is there {count} times"
        path.write_text(text)


if __name__ == "__main__":
    main(sys.argv[1:])
