"""Rows of one table divided into parts by a column: ``split``, ``Usage``, ``is_valid``."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from treelora_cli.data.columns import ANSWERS, LABELS
from treelora_cli.data.layout import val_unused
from treelora_cli.data.names import TEST, TRAIN, VAL, part_of, says_unlabelled
from treelora_cli.data.tables import Row
from treelora_cli.errors import DataError

_NAMED = ("split", "partition", "subset", "part", "set", "dataset", "phase", "usage", "fold")
_LEARNED = (
    *("label", *LABELS),
    *("answers", "answerKey", "output", *ANSWERS),
)
"""Columns of what is learned."""
_LOOKED_AT = 200
_FEW, _SHOWN = 20, 4
"""A column of parts has no more different values; so many are shown."""
_FLAGS = {
    **dict.fromkeys(("istrain", "istraining"), (TRAIN, TEST)),
    **dict.fromkeys(("istest", "istesting"), (TEST, TRAIN)),
    **dict.fromkeys(("isval", "isvalid", "isvalidation", "iseval", "isdev", "isholdout", "isheldout"), (VAL, TRAIN)),
}
"""Columns of truth values: the parts of those that hold, and of the others."""
_WRAPPED = re.compile(r"(is(?!valid(?!ation))[a-z]*?)(image|img|set|split|data|sample|example)|(is[a-z]+)")
"""A column of truth values, and what may stand behind its name: ``is_training_image``."""
_TRUE, _FALSE = {"true", "1", "1.0", "yes"}, {"false", "0", "0.0", "no"}

PartOf = Callable[[Any], "str | None"]


def divide_rows(rows: list[Row], notes: list[str], kind: str) -> tuple[list[Row], list[Row]]:
    """Divide rows by a column of parts into training and held-out ones.

    The validation part is held out where there is no test part; where there is one, it is left out, and said.

    Raises:
        DataError: A value of ``split`` that names no part.
    """
    column, meaning = _column_of_parts(rows)
    if column is None:
        notes += _undivided(rows)
        return rows, []
    found: dict[str, list[Row]] = {TRAIN: [], TEST: [], VAL: []}
    for row in rows:
        value = row.values.get(column)
        part = TRAIN if value is None or value == "" else meaning(value)
        if part is not None:
            others = {name: one for name, one in row.values.items() if name != column}
            found[part].append(replace(row, values=others))
        elif not says_unlabelled(str(value)):
            raise DataError(f"{row.where}: {column} '{value}' is none of train, test, validation.")
    if not any(found.values()):
        raise DataError(f"{rows[0].where}: {column} says of all rows that they have no labels; nothing can be learned.")
    if column != "split" and (found[TEST] or found[VAL]):
        notes.append(f"Column '{column}' tells which {kind} are held out.")
    return found[TRAIN], answered_part(found[TRAIN], found[TEST], found[VAL], notes, kind)


def _undivided(rows: Sequence[Row]) -> list[str]:
    """Return a line on a column that is called as those of parts are and holds a few numbers, which name none."""
    for name in (name for name in (rows[0].values if rows else ()) if _plain(str(name)) in _NAMED):
        values = sorted({str(row.values.get(name)) for row in rows if not _empty(row.values.get(name))})
        if 1 < len(values) <= _FEW and len(rows) > len(values) and all(value.isdecimal() for value in values):
            seen = ", ".join(values[:_SHOWN])
            return [f"Column '{name}' ({seen}) is not used: its numbers name no parts. Write train and test in it."]
    return []


def names_parts(column: str) -> bool:
    """Return whether a column is called as those that tell parts are: ``split``, ``is_valid``."""
    return _plain(column) in (*_NAMED, *_FLAGS)


def answered_part(train: Sequence[Row], test: list[Row], val: list[Row], notes: list[str], kind: str) -> list[Row]:
    """Return the part that is scored: the test part, where there is none with answers the validation part."""
    answered = []
    for name, part in (("test", test), ("validation", val)):
        if part and _lacks_answers(part, train):
            notes.append(f"The {name} part has no answers: its {len(part)} {kind} were left out.")
        elif part:
            answered.append(part)
    if len(answered) > 1:
        notes.append(val_unused(len(val), kind))
    return answered[0] if answered else []


def _lacks_answers(part: Sequence[Row], train: Sequence[Row]) -> bool:
    """Return whether no row of a part has what all of the first training rows have to be learned, as at contests.

    -1 stands for no answer where the training part has none.
    """
    known = [row.values for row in train[:_LOOKED_AT]]
    columns = [name for name in _LEARNED if known and all(not _empty(values.get(name)) for values in known)]
    nothing = {"-1"} - {str(row.values.get(name)) for row in train for name in columns}
    return bool(columns) and all(
        _empty(row.values.get(name)) or str(row.values.get(name)) in nothing for row in part for name in columns
    )


def _empty(value: Any) -> bool:
    return value is None or value in ("", [], {}) or value != value


def _column_of_parts(rows: Sequence[Row]) -> tuple[str | None, PartOf]:
    """Return the column of parts and what its values mean.

    ``split``, and the usual other names where all their values are parts; any column that has several parts and
    nothing else; truth values in columns such as ``is_valid``.
    """
    names = list(dict.fromkeys(str(name) for row in rows for name in row.values))
    for name in sorted(names, key=lambda name: _rank(_plain(name))):
        values = {str(row.values[name]) for row in rows if row.values.get(name) not in (None, "")}
        flag = _flag(name, values, rows)
        if flag is not None:
            return name, flag
        if values and (name == "split" or _are_parts(name, values)):
            return name, _named_part
    return None, _named_part


def _are_parts(name: str, values: set[str]) -> bool:
    if len(values) > 20 or not all(re.fullmatch(r"[\w -]+", value) for value in values):  # paths name parts, too
        return False
    parts = {part_of(value) for value in values}
    if None in parts:
        return False
    return _plain(name) in _NAMED or (_plain(name) not in _LEARNED and TRAIN in parts and len(parts) > 1)


def _flag(name: str, values: set[str], rows: Sequence[Row]) -> PartOf | None:
    """Return what truth values mean; ``is_valid`` that holds for most rows says that they are right, not held out."""
    wrapped = _WRAPPED.fullmatch(_plain(name))
    parts = None if wrapped is None else _FLAGS.get(wrapped[1] or wrapped[3])
    if parts is None or not all(value.lower() in _TRUE | _FALSE for value in values):
        return None
    held, other = parts
    true = sum(_holds(row.values.get(name)) for row in rows)
    held_out = len(rows) - true if held == TRAIN else true
    if not 0 < held_out <= len(rows) / 2:
        return None
    return lambda value: held if _holds(value) else other


def _holds(value: Any) -> bool:
    return str(value).lower() in _TRUE


def _named_part(value: Any) -> str | None:
    return part_of(str(value))


def _plain(name: str) -> str:
    return re.sub(r"[^a-z]", "", name.lower())


def _rank(name: str) -> int:
    return _NAMED.index(name) if name in _NAMED else len(_NAMED)
