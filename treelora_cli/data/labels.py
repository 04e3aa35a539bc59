"""Cells of a table as class names: numbers, missing values, names kept elsewhere."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from treelora_cli.data.names import tidy_label
from treelora_cli.data.tables import Row
from treelora_cli.errors import DataError

_MISSING = {"", "nan", "<na>", "null", "nat", "#n/a"}
_PERHAPS_MISSING = {"none", "na", "n/a", "-", "?"}
"""Missing among numbers; otherwise somebody's class."""
_WHOLE_FLOAT = re.compile(r"-?\d+\.0+")
_NUMBER = re.compile(r"-?\d+(\.\d+)?")


def is_missing(value: Any) -> bool:
    """Return whether a cell holds nothing: null, NaN, or a text that spells one of these."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return True
    return isinstance(value, str) and value.strip().lower() in _MISSING


def label_texts(rows: Sequence[Row], column: str) -> list[str | None]:
    """Return the class name in each row; ``None`` where it is missing.

    Whole numbers that were read as floats, as pandas writes a column with gaps, are whole numbers: ``1.0`` is ``1``.

    Raises:
        DataError: A label that is no text, number or truth value.
    """
    texts = [_label_text(row, column) for row in rows]
    numeric = all(text is None or _NUMBER.fullmatch(text) or text.lower() in _PERHAPS_MISSING for text in texts)
    if not numeric or not any(text is not None and _NUMBER.fullmatch(text) for text in texts):
        return texts
    texts = [None if text is None or text.lower() in _PERHAPS_MISSING else text for text in texts]
    if all(text is None or re.fullmatch(r"-?\d+(\.0+)?", text) for text in texts):
        return [text.split(".")[0] if text is not None and _WHOLE_FLOAT.fullmatch(text) else text for text in texts]
    return texts


def _label_text(row: Row, column: str) -> str | None:
    value = row.values.get(column)
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if is_missing(value):
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, str | int | float):
        raise DataError(f"{row.where}: label is not a name but {type(value).__name__}.")
    return tidy_label(str(value))


def are_numbers(labels: Sequence[str]) -> bool:
    """Return whether all labels are whole numbers, which mean something in their own file only."""
    return bool(labels) and all(re.fullmatch(r"-?\d+", label) for label in labels)


def read_label_names(path: Path) -> tuple[str, ...]:
    """Read class names in their order: a JSON list, or one a line.

    Raises:
        DataError: No such file, or no list of distinct names.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        names = json.loads(text) if path.suffix.lower() == ".json" else text.splitlines()
    except (ValueError, OSError, RecursionError) as error:
        raise DataError(f"{path}: no list of label names ({error}).") from error
    valid = isinstance(names, list) and len(names) > 0
    if not valid or not all(isinstance(name, str) and name.strip() for name in names) or len(set(names)) != len(names):
        raise DataError(f"{path}: expected a list of distinct label names.")
    return tuple(tidy_label(name) for name in names)


def named(labels: Sequence[str | None], rows: Sequence[Row], names: Sequence[str], source: Path) -> list[str | None]:
    """Replace whole numbers by the names at these places, counted from 0; names stay.

    Raises:
        DataError: A number beyond the names.
    """
    result: list[str | None] = []
    for label, row in zip(labels, rows, strict=True):
        if label is None or label in names or not re.fullmatch(r"-?\d{1,9}", label):
            result.append(label)
        elif 0 <= int(label) < len(names):
            result.append(names[int(label)])
        else:
            raise DataError(f"{row.where}: label {label} is not among the {len(names)} names in {source}.")
    return result
