"""Checks of what a caller gives on the host: counts, slots, ids, scales."""

from __future__ import annotations

from collections.abc import Iterable
from operator import index

from dsv4_kernels.errors import InvalidArgumentError

LEAST_SCALE = 2.0**-126
LARGEST_FLOAT32 = (2 - 2.0**-23) * 2.0**127


def integer(where: str, name: str, value: object, low: int, high: int | None = None) -> int:
    """The value as an int.

    Args:
        where: the function that was called, for the text of the error.
        name: of its argument.
        value: an int, or what converts to one without loss (numpy's integers, an integer tensor of one element).
        low: the least value that is right.
        high: the largest one; None for any.

    Raises:
        InvalidArgumentError: no integer, or out of range.
    """
    try:
        number = index(value)  # type: ignore[arg-type]  # what has no index raises
    except (TypeError, ValueError, RuntimeError):
        number = None
    if number is None or number < low or (high is not None and number > high):
        need = f"an int, {low} or more" if high is None else f"an int from {low} to {high}"
        raise InvalidArgumentError(f"{where}: {name}: expected {need}, got {value!r}")
    return number


def integers(where: str, name: str, values: Iterable[object], low: int, high: int | None = None) -> list[int]:
    """integer() of each, without a call for each where all are ints in range."""
    given = list(values)
    if set(map(type, given)) <= {int} and (not given or (min(given) >= low and (high is None or max(given) <= high))):  # type: ignore[type-var, operator]
        return given  # type: ignore[return-value]
    return [integer(where, name, value, low, high) for value in given]


def scale(where: str, name: str, value: object) -> float:
    """A scale as a float that float32 holds as a normal number, so that its reciprocal is one too.

    Args:
        where: the function that was called, for the text of the error.
        name: of its argument.
        value: a number (Python's, numpy's, a tensor of one element on the host).

    Raises:
        InvalidArgumentError: 0, negative, NaN, infinite, below 2^-126, or no number.
    """
    try:
        number = float(value)  # type: ignore[arg-type]  # what is no number raises
    except (TypeError, ValueError):
        number = 0.0
    if not LEAST_SCALE <= number <= LARGEST_FLOAT32:
        raise InvalidArgumentError(f"{where}: {name}: expected a finite float32 of at least 2^-126, got {value!r}")
    return number
