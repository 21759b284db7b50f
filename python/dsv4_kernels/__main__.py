"""python -m dsv4_kernels: what is installed, whether it works here, what it does, how fast it is."""

from __future__ import annotations

import argparse
import sys
from importlib.resources import files

from dsv4_kernels import __version__


def main(argv: list[str] | None = None) -> int:
    """Runs a command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m dsv4_kernels", description=__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    # Imported here: `import dsv4_kernels` must stay free of torch and rich.
    from dsv4_kernels.cli import bench, demo, info, selftest

    for module in (info, selftest, demo, bench):
        assert module.__doc__
        name = module.__name__.rpartition(".")[2]
        command = commands.add_parser(name, help=module.__doc__.splitlines()[0], description=module.__doc__)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    cmake_dir = commands.add_parser("cmake-dir", help="Print the folder for CMake's find_package: -Ddsv4_kernels_DIR=")
    cmake_dir.set_defaults(run=print_cmake_dir)
    options = parser.parse_args(argv)
    status: int = options.run(options)
    return status


def print_cmake_dir(_: argparse.Namespace) -> int:
    """The installed CMake package."""
    print(files("dsv4_kernels") / "lib" / "cmake" / "dsv4_kernels")
    return 0


if __name__ == "__main__":
    sys.exit(main())
