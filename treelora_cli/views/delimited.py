"""Lines of CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable

_END = "\r\n"
"""Python quotes a line feed or carriage return in a cell only where it is one of the line's end."""


def csv_line(cells: Iterable[object]) -> str:
    """Return one line of CSV without its end; a cell may hold lines of its own."""
    sink = io.StringIO()
    csv.writer(sink, lineterminator=_END).writerow(cells)
    return sink.getvalue().removesuffix(_END)
