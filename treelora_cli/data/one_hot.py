"""Labels in a column for each class: 1 in that of a row's own class, 0 in the others."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import replace
from typing import Any

from treelora_cli.data.divided import names_parts
from treelora_cli.data.tables import Row
from treelora_cli.errors import DataError

_ONE, _ZERO = ("1", "1.0", "true"), ("0", "0.0", "false")
_SHOWN = 6
_UNCLEAR = 3
"""Where more than one row in so many has several classes or none, the columns are no classes of one another."""


def with_one_label(rows: list[Row], others: Container[str], notes: list[str]) -> list[Row]:
    """Return rows whose columns of classes are one column ``label``; the same rows where there are no such columns.

    A row of several classes gets a list of them, one of none ``None``, which is refused where labels are read.

    Args:
        rows: Of one table.
        others: Columns that are something else.
        notes: Takes a line on what was read.

    Raises:
        DataError: Many rows have several classes, or none.
    """
    columns = _columns_of_classes(rows, others)
    if len(columns) < 2:
        return rows
    own = [[str(name) for name in columns if _is_one(row.values[name])] for row in rows]
    seen = ", ".join(map(str, columns[:_SHOWN])) + (", ..." if len(columns) > _SHOWN else "")
    unclear = sum(len(names) != 1 for names in own)
    if unclear * _UNCLEAR > len(rows):
        raise DataError(
            f"{rows[0].where}: columns of 0 and 1 ({seen}) name several classes or none in {unclear} of {len(rows)}"
            f" rows; an example has one. Take one of them: --map {columns[0]}=label"
        )
    notes.append(f"The label is the column that holds 1: {seen}.")
    labels: list[Any] = [names[0] if len(names) == 1 else names or None for names in own]
    return [
        replace(row, values={**{name: one for name, one in row.values.items() if name not in columns}, "label": label})
        for row, label in zip(rows, labels, strict=True)
    ]


def _columns_of_classes(rows: Sequence[Row], others: Container[str]) -> list[str]:
    """Return the columns that hold both 0 and 1 and nothing else."""
    if not rows:
        return []
    names = [name for name in rows[0].values if name not in others and not names_parts(str(name))]
    return [name for name in names if _is_of_bits([row.values.get(name) for row in rows])]


def _is_of_bits(values: Sequence[Any]) -> bool:
    spelled = {_spelled(value) for value in values}
    return spelled <= {*_ONE, *_ZERO} and bool(spelled & {*_ONE}) and bool(spelled & {*_ZERO})


def _is_one(value: Any) -> bool:
    return _spelled(value) in _ONE


def _spelled(value: Any) -> str:
    return str(value).strip().lower()
