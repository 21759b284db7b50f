"""python -m dsv4_kernels: what is installed, whether it works here, what it does, how fast it is."""

from __future__ import annotations

import argparse
import sys
from functools import partial
from importlib.resources import files
from typing import Any

from dsv4_kernels import __version__

# Commands that print where something was installed, for builds that link the library.
FOLDERS = {
    "cmake-dir": ("lib/cmake/dsv4_kernels", "Print the folder for CMake's find_package: -Ddsv4_kernels_DIR="),
    "pkgconfig-dir": ("lib/pkgconfig", "Print the folder for pkg-config: PKG_CONFIG_PATH="),
}


def main(argv: list[str] | None = None) -> int:
    """Runs a command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m dsv4_kernels", description=__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (folder, text) in FOLDERS.items():
        commands.add_parser(name, help=text).set_defaults(run=partial(print_folder, folder))
    argv = sys.argv[1:] if argv is None else argv
    if not (argv and argv[0] in FOLDERS):
        add_commands(commands)
    options = parser.parse_args(argv)
    status: int = options.run(options)
    return status


def add_commands(commands: Any) -> None:
    """Adds the commands that need torch; a build that only needs a folder must not wait for it."""
    from dsv4_kernels.cli import bench, demo, info, selftest

    for module in (info, selftest, demo, bench):
        assert module.__doc__
        name = module.__name__.rpartition(".")[2]
        command = commands.add_parser(name, help=module.__doc__.splitlines()[0], description=module.__doc__)
        module.add_arguments(command)
        command.set_defaults(run=module.run)


def print_folder(folder: str, _: argparse.Namespace) -> int:
    """Prints a folder of the installed package."""
    print(files("dsv4_kernels") / folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
