"""Call sites of device functions."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class CallSite:
    """A call: where it returns to, and which parameter variables to copy back, as (callee's, caller's)."""

    return_pc: int
    results: list[tuple[tuple[str, str], tuple[str, str]]]
