"""What the emulator raises: faults of the emulated program, and gaps of the emulator itself."""

from __future__ import annotations

from typing import Any


class UnknownInstruction(NotImplementedError):  # noqa: N818
    """A PTX instruction, qualifier or directive that the emulator does not implement."""


class PtxSyntaxError(ValueError):
    """Text that the parser cannot read as PTX."""


class LaneFault(Exception):  # noqa: N818
    """A fault as an instruction sees it: what happened, in which lane of the wave, at which address.

    The wave that executes the instruction adds kernel, line, block and thread, and raises `EmulatorFault`.
    """

    def __init__(self, kind: str, detail: str, lane: int | None = None, address: int | None = None) -> None:
        super().__init__(detail)
        self.kind = kind
        self.detail = detail
        self.lane = lane
        self.address = address


class EmulatorFault(Exception):  # noqa: N818
    """A fault of the emulated kernel.

    kind is one of: 'out of bounds', 'misaligned', 'uninitialised', 'race', 'divergent barrier', 'deadlock',
    'missing wait', 'lifetime', 'divergent warp', 'invalid operand', 'invalid launch', 'leak', 'trap'.
    """

    def __init__(
        self,
        kind: str,
        detail: str,
        *,
        kernel: str,
        line: int | None = None,
        text: str | None = None,
        block: tuple[int, int, int] | None = None,
        thread: tuple[int, int, int] | None = None,
        address: int | None = None,
    ) -> None:
        self.kind = kind
        self.detail = detail
        self.kernel = kernel
        self.line = line
        self.text = text
        self.block = block
        self.thread = thread
        self.address = address
        super().__init__(self._message())

    def _message(self) -> str:
        where: list[str] = [f"{self.kernel}: {self.kind}: {self.detail}"]
        if self.line is not None:
            where.append(f"line {self.line}: {self.text}")
        if self.block is not None:
            where.append(f"block {self.block}, thread {self.thread}")
        if self.address is not None:
            where.append(f"address {self.address:#x}")
        return "\n  ".join(where)

    def __reduce__(self) -> tuple[Any, ...]:
        return (
            _rebuild,
            (
                self.kind,
                self.detail,
                {
                    "kernel": self.kernel,
                    "line": self.line,
                    "text": self.text,
                    "block": self.block,
                    "thread": self.thread,
                    "address": self.address,
                },
            ),
        )


def _rebuild(kind: str, detail: str, where: dict[str, Any]) -> EmulatorFault:
    return EmulatorFault(kind, detail, **where)
