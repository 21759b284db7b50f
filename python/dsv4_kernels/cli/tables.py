"""Tables of ops for people: whole names on 80 columns, family by family."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from rich.table import Table

from dsv4_kernels import FAMILIES


def op_table(title: str, left: Iterable[str], right: Iterable[str]) -> Table:
    """A table whose first column holds the names of ops, which are never cut.

    Args:
        title: of the table.
        left: further columns of words, which wrap.
        right: columns of numbers, behind those.
    """
    table = Table(title=title, box=None, padding=(0, 1, 0, 0))
    table.add_column("op", no_wrap=True)
    for name in left:
        table.add_column(name, overflow="fold")
    for name in right:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def add_ops(table: Table, families: Mapping[str, str], cells: Callable[[str], Iterable[str]]) -> None:
    """A row per op, under the name of its family.

    Args:
        table: made by op_table.
        families: of each op by its name.
        cells: from an op's name to what stands behind it.
    """
    for family in FAMILIES:
        members = [op for op, its_family in families.items() if its_family == family]
        if members:
            table.add_row(f"[bold]{family}")
        for op in members:
            table.add_row(f" {op}", *cells(op))
