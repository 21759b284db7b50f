"""Versions that pyproject.toml names, for the scripts of this folder, so that no script names one.

    python ci/pins.py build          the build requirements, one a line, CMake and Ninja among them
    python ci/pins.py binding        those that the binding alone needs (DSV4_NATIVE_DIR): no compilers of kernels
    python ci/pins.py extra EXTRA    the requirements of an extra, one per line
    python ci/pins.py check EXTRA    fails unless this environment holds exactly what the extra pins

Needs nothing but an environment with pip: its copies of `tomli` and `packaging` serve where Python has none.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
from pathlib import Path
from typing import Any

from pip._vendor.packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    from pip._vendor import tomli as tomllib

PYPROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"


def build_requirements(pyproject: dict[str, Any]) -> list[str]:
    """What the build needs; scikit-build-core requires CMake and Ninja itself only where pip isolates the build."""
    tools = [f"{tool}{pyproject['tool']['scikit-build'][tool]['version']}" for tool in ("cmake", "ninja")]
    return [*pyproject["build-system"]["requires"], *tools]


def wrong_versions(requirements: list[str]) -> list[str]:
    """What is missing from this environment or of a version other than required, in words."""
    wrong = []
    for requirement in map(Requirement, requirements):
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{requirement} is not installed")
            continue
        if version not in requirement.specifier:
            wrong.append(f"{requirement} is needed, found {version}")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("build")
    commands.add_parser("binding")
    commands.add_parser("extra").add_argument("extra")
    commands.add_parser("check").add_argument("extra")
    options = parser.parse_args()
    pyproject = tomllib.loads(PYPROJECT.read_text())
    if options.command in ("build", "binding"):
        requirements = build_requirements(pyproject)
        compilers = [r for r in requirements if Requirement(r).name.startswith(("nvidia-", "triton"))]
        print("\n".join(r for r in requirements if options.command == "build" or r not in compilers))
        return 0
    extra = pyproject["project"]["optional-dependencies"][options.extra]
    if options.command == "extra":
        print("\n".join(extra))
        return 0
    wrong = wrong_versions(extra)
    for text in wrong:
        print(f"{options.extra}: {text}; pip install '.[{options.extra}]'", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
