"""Cells of a table as class names: numbers, missing values, names kept elsewhere."""

from __future__ import annotations

import ast
import math
import re
from collections import Counter
from collections.abc import Container, Sequence
from datetime import date
from decimal import Decimal
from typing import Any

from treelora_cli.data.names import tidy_label
from treelora_cli.data.tables import Row, plain_name
from treelora_cli.errors import SKIP_BAD, DataError

_WRITTEN_GAPS = {
    *("nan", "-nan", "<na>", "nat", "1.#ind", "-1.#ind", "1.#qnan", "-1.#qnan", "#n/a", "#n/a n/a", "#na", "#null!"),
    *("#name?", "#ref!", "#value!", "#div/0!", "#num!"),
}
"""What libraries and spreadsheets write for nothing, and nobody as a text."""
_MISSING = {"", "null", "(null)", "\\n", *_WRITTEN_GAPS}
_PERHAPS_MISSING = {"none", "na", "n/a", "-", "?"}
"""Missing among numbers; otherwise somebody's class."""
_WHOLE_FLOAT = re.compile(r"-?\d+(\.0+|,0)")
_NUMBER = re.compile(r"-?\d+(\.\d+|,\d)?")
_FRACTION = re.compile(r"-?\d+[.,]0*[1-9]\d*")
_DECIMAL = re.compile(r"[-+]?\d+(\.\d+)?([eE][-+]?\d{1,3})?")
_SHORTENED = re.compile(r"-?\d([.,]\d+)?E\+\d+")
_MONTHS = "Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec"
_DATED = re.compile(rf"\d{{1,2}}-({_MONTHS})|({_MONTHS})-\d{{2}}")
"""Numbers and dates that a spreadsheet writes in place of ``123456789012`` and ``MARCH1``."""
_PYTHONS = re.compile(r"((tensor|array|np\.\w+|numpy\.\w+)\(.*\)|b'.*'|b\".*\")", re.DOTALL)
"""What Python writes for values that are no plain text or number."""
_SEVERAL = 2
_KIND = "(label|class|target|category|cat|species|breed|diagnosis|labelclass|classlabel)"
_NAMES = re.compile(f"{_KIND}?names?|{_KIND}(text|str|string|title|description)|{_KIND}{{1,2}}s?")
"""What columns that may hold the names of a column of numbers are called, without signs."""
_BETWEEN = (",", ";", "|")
_LONGEST = 500
"""Characters of a class name; what is longer is a text in the wrong column."""
_QUANTITIES = 20
"""More numbers with fractions than this are quantities; fewer may be grades."""
_FEW_EACH = 10
"""From so many classes on it is said that most have one example."""


class Several(str):
    """A label that names several classes."""

    __slots__ = ()


def is_missing(value: Any) -> bool:
    """Return whether a cell holds nothing: null, NaN, infinity, or a text that spells one of these."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return True
    return isinstance(value, str) and value.strip().lower() in _MISSING


def is_written_gap(text: str) -> bool:
    """Return whether a whole text is what a library or a spreadsheet writes for nothing, as ``nan`` or ``#N/A``."""
    return text.strip().lower() in _WRITTEN_GAPS


def label_texts(rows: Sequence[Row], column: str) -> list[str | None]:
    """Return the class name in each row; ``None`` where it is missing.

    Whole numbers that were read as floats, as pandas writes a column with gaps, are whole numbers: ``1.0`` is ``1``.

    A label of several names is a ``Several``.

    Raises:
        DataError: A label that is no text, number or truth value.
    """
    texts = [_label_text(row, column) for row in rows]
    numeric = all(text is None or _NUMBER.fullmatch(text) or text.lower() in _PERHAPS_MISSING for text in texts)
    if not numeric or not any(text is not None and _NUMBER.fullmatch(text) for text in texts):
        return texts
    texts = [None if text is None or text.lower() in _PERHAPS_MISSING else text for text in texts]
    if all(text is None or re.fullmatch(r"-?\d+(\.0+|,0)?", text) for text in texts):
        return [
            re.split("[.,]", text)[0] if text is not None and _WHOLE_FLOAT.fullmatch(text) else text for text in texts
        ]
    return texts


def _label_text(row: Row, column: str) -> str | None:
    value = _listed(row.values.get(column))
    if isinstance(value, list) and len(value) > 1 and all(isinstance(one, str | int | float) for one in value):
        return Several(", ".join(map(str, value)))
    if isinstance(value, list) and len(value) < _SEVERAL:
        value = value[0] if value else None
    if is_missing(value):
        return None
    if isinstance(value, float | Decimal) and value == value // 1:
        value = int(value)
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError as error:
            raise DataError(f"{row.where}: a label of bytes that are no text (UTF-8).") from error
    if isinstance(value, date):
        value = value.isoformat()
    if not isinstance(value, str | int | float | Decimal):
        fields = [name for name, one in value.items() if isinstance(one, str)] if isinstance(value, dict) else []
        inside = f" To take a name in it: --map {column}.{fields[0]}=label" if fields else ""
        raise DataError(f"{row.where}: label is not a name but {type(value).__name__}.{inside}")
    text = tidy_label(str(value))
    if len(text) > _LONGEST:
        raise DataError(f"{row.where}: a label of {len(text)} characters; is '{column}' the column of labels?")
    return text


def _listed(value: Any) -> Any:
    """Return the list that a text spells, as pandas writes ``['cat']``; other values as they are."""
    if not (isinstance(value, str) and value.lstrip().startswith("[") and value.rstrip().endswith("]")):
        return value
    try:
        found = ast.literal_eval(value.strip())
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return value
    return found if isinstance(found, list) else value


def refuse_quantities(labels: Sequence[str | None], where: str) -> None:
    """Raise ``DataError`` when labels are many numbers with fractions: measures, and no classes."""
    known = {label for label in labels if label is not None}
    fractions = sorted(label for label in known if _FRACTION.fullmatch(label))
    if len(known) > _QUANTITIES and fractions and all(_NUMBER.fullmatch(label) for label in known):
        raise DataError(
            f"{where}: labels are {len(known)} different numbers such as {fractions[0]}: a quantity, and no classes."
            " Round them to a few, or, if they are names, pass --label-prefix NAME"
        )


def column_of_names(rows: Sequence[Row], column: str) -> str:
    """Return the column that names the numbers in ``column``, each by one name; ``column`` where there is none."""
    numbers = label_texts(rows, column)
    if not all(text is None or re.fullmatch(r"-?\d+", text) for text in numbers):
        return column
    for name in (name for name in rows[0].values if name != column and _NAMES.fullmatch(plain_name(str(name)))):
        values = [row.values.get(name) for row in rows]
        if not all(isinstance(value, str) and not is_missing(value) for value in values):
            continue
        pairs, each = set(zip(numbers, values, strict=True)), len(set(numbers))
        of_rows = plain_name(str(name)) in ("name", "names") and each == len(rows)  # names of what is shown, perhaps
        if not are_numbers([str(value) for value in values]) and len(pairs) == each == len(set(values)) and not of_rows:
            return name
    return column


def label_notes(labels: Sequence[str]) -> list[str]:
    """Return what to tell of class names that may not be classes of their own, or none at all."""
    return [*_single_notes(labels), *_number_notes(labels), *_missing_notes(labels), *_several_notes(labels)]


def _single_notes(labels: Sequence[str]) -> list[str]:
    counts = Counter(labels)
    single = sorted(label for label, count in counts.items() if count == 1)
    if len(counts) <= _FEW_EACH or len(single) * 2 <= len(counts):
        return []
    return [f"{len(single)} of {len(counts)} labels, such as '{single[0]}', have one example each."]


def _number_notes(labels: Sequence[str]) -> list[str]:
    """Return lines where one number is spelled in two ways, as 7 and 007, or a spreadsheet spelled it."""
    by_value: dict[Decimal, list[str]] = {}
    for label in sorted(set(labels)):
        if _DECIMAL.fullmatch(label):
            by_value.setdefault(Decimal(label), []).append(label)
    twice = next((names for names in by_value.values() if len(names) > 1), None)
    short = next((label for label in sorted(set(labels)) if _SHORTENED.fullmatch(label)), None)
    dated = sorted({label for label in labels if _DATED.fullmatch(label)})
    lines = []
    truths = sorted({label for label in labels if label.lower() in ("true", "false")})
    bits = sorted({"0", "1"} & set(labels))
    if pythons := sorted(label for label in set(labels) if _PYTHONS.fullmatch(label)):
        lines.append(
            f"Label {pythons[0]} is how Python shows a value, not the value; a later task may spell it otherwise."
        )
    if truths and bits:
        lines.append(f"Labels '{truths[0]}' and '{bits[0]}' may mean the same, and are two classes here.")
    if twice is not None:
        lines.append(f"Labels '{twice[0]}' and '{twice[1]}' are the same number, and two classes here.")
    if short is not None:
        lines.append(f"Label '{short}' is a number as a spreadsheet shortens it: several may have become one class.")
    if dated and len(dated) < len(set(labels)):
        lines.append(f"Label '{dated[0]}' beside labels of other kinds: a spreadsheet may have made a date of a name.")
    return lines


def _missing_notes(labels: Sequence[str]) -> list[str]:
    odd = sorted({label for label in labels if label.lower() in _PERHAPS_MISSING})
    if odd:
        return [f"Label '{odd[0]}' is a class of that name here ({labels.count(odd[0])} times), no missing label."]
    if "-1" in labels and "0" in labels and are_numbers(labels):
        return [f"Label -1 is a class like the others here ({labels.count('-1')} times), no missing label."]
    return []


def refuse_several(label: str, labels: Container[str | None], where: str) -> None:
    """Refuse a label that names several classes which others have alone, as ``cat, dog`` beside ``cat`` and ``dog``.

    Raises:
        DataError: It does; names the line.
    """
    if isinstance(label, Several):
        raise DataError(f"{where}: label names several classes ({label}), not one.{SKIP_BAD}")
    for sign in _BETWEEN:
        parts = [part.strip() for part in label.split(sign)]
        if len(parts) > 1 and all(part in labels for part in parts):
            raise DataError(f"{where}: label '{label}' names {len(parts)} classes; an image has one.{SKIP_BAD}")


def _several_notes(labels: Sequence[str]) -> list[str]:
    """Return a line where a label looks like several others in a row, as ``scab rust`` beside ``scab`` and ``rust``."""
    known = set(labels)
    joined = sorted(
        label
        for label in known
        if len(parts := [part.strip() for part in re.split(r"[ +&/]+", label) if part.strip()]) > 1
        and all(part in known for part in parts)
    )
    if not joined:
        return []
    count = sum(label in joined for label in labels)
    return [f"Label '{joined[0]}' is a class of its own here, beside those it names ({count} examples so labelled)."]


def are_numbers(labels: Sequence[str]) -> bool:
    """Return whether all labels are whole numbers, which mean something in their own file only."""
    return bool(labels) and all(re.fullmatch(r"-?\d+", label) for label in labels)
