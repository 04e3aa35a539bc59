"""Tables that fit the terminal: text wraps, numbers never do, and columns that are too many go below each other."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from rich.console import Console
from rich.measure import Measurement
from rich.table import Column, Table

_LEAST_TEXT = 16
"""Narrowest a column of text is made before columns go below."""


def fitted(table: Table, console: Console) -> list[Table]:
    """Return a table as one or more that are no wider than the console.

    Columns of numbers (right-justified) keep their width. The first column comes back in each part.
    """
    if _width(table, console) <= console.width:
        return [table]
    table = copy.copy(table)
    table.columns = [_foldable(column) for column in table.columns]
    if sum(_least(column, console) for column in table.columns) + _borders(len(table.columns)) <= console.width:
        return [table]
    parts = [_part(table, group) for group in _groups(table, console)]
    for part in parts[1:]:
        part.title = None
    for part in parts[:-1]:
        part.caption = None
    return parts


def _foldable(column: Column) -> Column:
    column = copy.copy(column)
    column.overflow = "fold"  # a long word goes on in the next line instead of losing its end
    column.no_wrap = column.justify == "right"
    return column


def _width(table: Table, console: Console) -> int:
    bare = copy.copy(table)
    bare.title = bare.caption = None
    return Measurement.get(console, console.options.update(width=10_000), bare).maximum


def _least(column: Column, console: Console) -> int:
    widest = max(
        (Measurement.get(console, console.options, cell).maximum for cell in [column.header, *column._cells]), default=0
    )
    return widest if column.justify == "right" else min(widest, _LEAST_TEXT)


def _borders(columns: int) -> int:
    return 3 * columns + 1


def _groups(table: Table, console: Console) -> list[list[int]]:
    """Divide the columns after the first into groups that fit beside it."""
    least = [_least(column, console) for column in table.columns]
    groups: list[list[int]] = [[]]
    for index in range(1, len(least)):
        chosen = [0, *groups[-1], index]
        if groups[-1] and sum(least[one] for one in chosen) + _borders(len(chosen)) > console.width:
            groups.append([])
        groups[-1].append(index)
    return groups


def _part(table: Table, group: Sequence[int]) -> Table:
    part = copy.copy(table)
    part.columns = []
    for place, index in enumerate([0, *group]):
        column = copy.copy(table.columns[index])
        column._index = place
        part.columns.append(column)
    return part
