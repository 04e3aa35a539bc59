"""Questions whose choices stand in a column each, as ``A``, ``B``, ``C`` or ``option1``, ``option2``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from shlex import quote
from typing import Any

from treelora_cli.data.columns import CHOICES
from treelora_cli.data.tables import Row
from treelora_cli.errors import DataError

_ONE = re.compile(r"(?:(option|opt|op|choice|ending|sol|candidate)[ _-]?([a-h]|\d)|(answer)[ _-]?([a-h])|()([A-H]))")
"""The name of a column of one choice: what several have in common, and a letter or digit."""
_NUMBER = re.compile(r"[-+]?[\d.,]+(e[-+]?\d+)?", re.IGNORECASE)
_ASKED = ("prompt", "sentence", "goal", "ctx", "query", "text", "premise", "input")
"""Columns of the question by other names, the likeliest first."""
_KEYS = (
    *("answer", "answerKey", "correct_answer", "correct_option", "correct", "correctanswer", "label", "cop"),
    *("answer_idx", "target", "gold"),
)
"""Columns of the right choice, the likeliest first."""
_FEW = 2


def with_choices(rows: Sequence[Row]) -> list[Row]:
    """Return rows whose columns of one choice each are one column of them; others as they are.

    The right choice is from then on in the column ``answerKey``.

    Raises:
        DataError: There are choices and no ``question``, or the right one is a number that may count from 0 or 1.
    """
    columns = _columns(rows)
    if not columns:
        return list(rows)
    names = list(dict.fromkeys(name for row in rows for name in row.values))
    key = next((name for name in _KEYS if name in names and name not in columns.values()), None)
    if "question" not in names:
        raise DataError(_advice(list(columns.values()), names, key))
    first = _counts_from(rows, columns, key)
    return [_joined(row, columns, key, first) for row in rows]


def _columns(rows: Sequence[Row]) -> dict[str, str]:
    """Return the columns of one choice each by letter or digit; empty where there are no two with texts."""
    found: dict[str, dict[str, str]] = {}
    names = dict.fromkeys(name for row in rows for name in row.values)
    if set(names) & set(CHOICES):
        return {}
    for name in names:
        one = _ONE.fullmatch(name) or _ONE.fullmatch(name.lower()) if isinstance(name, str) else None
        if one is not None:
            stem, sign = next(pair for pair in (one.group(1, 2), one.group(3, 4), one.group(5, 6)) if pair[1])
            found.setdefault(stem, {})[sign.upper()] = name
    asked = "question" in names
    several = [one for one in found.values() if len(one) >= _FEW and {"A", "1", "0"} & set(one)]
    fitting = [one for one in several if all(_is_choice(rows[0].values.get(name), asked) for name in one.values())]
    return dict(sorted(fitting[0].items())) if fitting else {}


def _is_choice(value: Any, asked: bool) -> bool:
    """Return whether a value can be a choice: beside a question also a number or, for those with fewer, nothing."""
    if asked:
        return value is None or isinstance(value, str | int | float)
    return isinstance(value, str) and bool(value.strip()) and not _NUMBER.fullmatch(value.strip())


def _advice(columns: Sequence[str], names: Sequence[str], key: str | None) -> str:
    asked = next((name for name in _ASKED if name in names), None)
    pairs = [f"{asked}=question"] if asked else []
    hint = "".join(f" --map {quote(pair)}" for pair in pairs)
    found = f"Found {', '.join(map(str, names))}: {', '.join(columns)} look like choices of a question"
    return f"{found}, which is called 'question'" + (f". Try{hint}" if hint and key else ".")


def _counts_from(rows: Sequence[Row], columns: dict[str, str], key: str | None) -> int | None:
    """Return from where numbers of the right choice count, whatever the choices are called; ``None`` for no numbers.

    Raises:
        DataError: That cannot be told.
    """
    numbers = {number for row in rows if key and (number := _whole(row.values.get(key))) is not None}
    if not numbers:
        return None
    if 0 in numbers or "0" in columns:
        return 0
    if len(columns) in numbers:
        return 1
    raise DataError(
        f"{rows[0].where}: do the numbers in '{key}' count choices from 0 or from 1? Write {', '.join(columns)} or the"
        " choice's text in their place."
    )


def _whole(value: Any) -> int | None:
    if isinstance(value, int | float) and not isinstance(value, bool) and value == value // 1:
        return int(value)
    return int(value) if isinstance(value, str) and re.fullmatch(r"\d{1,2}", value.strip()) else None


def _joined(row: Row, columns: dict[str, str], key: str | None, first: int | None) -> Row:
    left = {name: value for name, value in row.values.items() if name not in columns.values() and name != key}
    given = {sign: row.values.get(name) for sign, name in columns.items()}
    texts = {sign: text for sign, text in given.items() if text is not None and str(text).strip()}
    values = {**left, "choices": {"text": list(texts.values()), "label": list(texts)}}
    if key is not None:
        right = row.values.get(key)
        place = None if first is None else _whole(right)
        if place is not None and first is not None and 0 <= place - first < len(columns):
            right = list(columns)[place - first]
        elif isinstance(right, str) and right not in texts.values():
            right = _sign(right, columns)
        values["answerKey"] = right
    return replace(row, values=values)


def _sign(right: str, columns: dict[str, str]) -> str:
    """Return the letter or digit that ``a``, ``(B)`` or ``option_c`` means; other texts as they are."""
    plain = right.strip().strip("().: ").upper()
    by_column = {name.upper(): sign for sign, name in columns.items()}
    return plain if plain in columns else by_column.get(plain, right)
