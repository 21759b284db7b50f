"""Fetches the wheels of ci/engine_wheels.txt with pip, which checks their hashes, and unpacks what the tests import.

python ci/unpack_engines.py FOLDER: each wheel becomes FOLDER/<distribution>. Compiled libraries and programs, which
are nine tenths of the wheels and need other libraries and a GPU, stay behind, and so do the wheels once they are
unpacked. A folder whose wheels are those of the list is left as it is.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEELS = Path(__file__).with_name("engine_wheels.txt")

LARGEST = 4 << 20  # bytes of a file; programs are larger

# Which wheels are taken, on whatever machine and Python this runs.
TARGET = (
    "--python-version=3.12",
    "--implementation=cp",
    "--abi=cp312",
    "--abi=abi3",
    "--platform=manylinux_2_34_x86_64",
    "--platform=manylinux_2_28_x86_64",
)


def main(folder: Path) -> None:
    stamp = folder / "wheels.txt"
    if stamp.exists() and stamp.read_text() == WHEELS.read_text():
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with tempfile.TemporaryDirectory(dir=folder) as download:
        options = (
            "--quiet",
            "--no-deps",
            "--only-binary=:all:",
            "--require-hashes",
            "--no-cache-dir",
            "--dest",
            download,
        )
        subprocess.run([sys.executable, "-m", "pip", "download", *options, *TARGET, "-r", str(WHEELS)], check=True)
        for wheel in sorted(Path(download).glob("*.whl")):
            with zipfile.ZipFile(wheel) as archive:
                names = [
                    found.filename
                    for found in archive.infolist()
                    if not found.filename.endswith(".so") and found.file_size < LARGEST
                ]
                archive.extractall(folder / wheel.name.partition("-")[0], names)
            print(f"engines: {wheel.name}: {len(names)} files of {wheel.stat().st_size >> 20} MiB")
    stamp.write_text(WHEELS.read_text())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
