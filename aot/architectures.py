"""The GPU architectures that the package is built for: the only list of them.

Every image is arch-specific ("a"), so a device runs exactly the image of its own compute capability.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Architecture:
    """name: as the compilers spell it. major, minor: the compute capability that it serves. shared_per_block: bytes of
    shared memory that a block can opt in to. devices: for people.
    """

    name: str
    major: int
    minor: int
    shared_per_block: int
    devices: str

    @property
    def compute_capability(self) -> int:
        return self.major * 10 + self.minor

    @property
    def cmake_name(self) -> str:
        """For CMAKE_CUDA_ARCHITECTURES; -real keeps PTX out of the library."""
        return self.name.removeprefix("sm_") + "-real"


ARCHITECTURES = (
    Architecture("sm_90a", 9, 0, 227 << 10, "H100, H200, GH200"),
    Architecture("sm_100a", 10, 0, 227 << 10, "B200, GB200"),
    Architecture("sm_103a", 10, 3, 227 << 10, "B300, GB300"),
    Architecture("sm_120a", 12, 0, 99 << 10, "RTX PRO 6000 Blackwell, RTX 50 series"),
    Architecture("sm_121a", 12, 1, 99 << 10, "GB10 (DGX Spark)"),
)


def find(name: str) -> Architecture:
    """The architecture of that name; SystemExit with the known names if there is none."""
    for architecture in ARCHITECTURES:
        if architecture.name == name:
            return architecture
    known = ", ".join(a.name for a in ARCHITECTURES)
    raise SystemExit(f"aot: unknown architecture {name!r}; known: {known}")


def select(names: Sequence[str] | None) -> list[Architecture]:
    """The architectures of these names, or all of them."""
    return [find(name) for name in names] if names else list(ARCHITECTURES)
