"""What the columns of a table may be that is of no known shape: advice for its user."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from shlex import quote
from typing import Any, NoReturn

from treelora_cli.data.columns import ANSWERS, LABELS, PREFERRED
from treelora_cli.data.delimited import lacks_head, recurring
from treelora_cli.data.messages import ends_with_answer, is_chat
from treelora_cli.data.records import NEED
from treelora_cli.data.tables import Row
from treelora_cli.data.text_files import WRONG_KIND
from treelora_cli.errors import DataError

_PERHAPS_ANSWERS = (*ANSWERS, "output", "target", *LABELS, "summary", "solution", "translation", "answers", "ideal")
_PERHAPS_ASKED = ("prompt", "question", "query", "input", "problem")
_FEW = 2


def refuse_unknown(rows: Sequence[Row]) -> NoReturn:
    """Raise ``DataError`` that says what was found, and what to try.

    Raises:
        DataError: Always.
    """
    values = rows[0].values
    names = ", ".join(map(str, values))
    if chats := [name for name, value in values.items() if is_chat(value) and {"role", "from"} & set(value[0])]:
        raise DataError(f"Found {names}. {NEED}{_hint_of_chats(values, list(map(str, chats)))}")
    records = [(str(name), value) for name, value in values.items() if isinstance(value, dict)]
    if records or any(isinstance(value, bytes) for value in values.values()):
        advice = "".join(_hint_of_records(value, name) for name, value in records[:1])
        raise DataError(f"{rows[0].where}: Found {names}. {WRONG_KIND}{advice}")
    if lacks_head([row.values for row in rows]):
        raise DataError(
            f"{rows[0].where.partition(':')[0]}: its first line seems to be a record ({names}). Where no line names the"
            f" columns, count them: {_counted(rows)}"
        )
    raise DataError(f"Found {names}. {NEED}{_hint(rows)}")


def _counted(rows: Sequence[Row]) -> str:
    """Guess what the columns of a table without a head are: one whose values come back holds labels."""
    if len(rows[0].values) == 1:
        return "--map 1=text"
    label = recurring([row.values for row in rows])
    if label is None:
        return "--map 1=prompt --map 2=answer"
    return f"--map {2 if label == 0 else 1}=text --map {label + 1}=label"


def _hint(rows: Sequence[Row]) -> str:
    """Guess which columns are question and answer, or text and label."""
    names = [str(name) for name in rows[0].values]
    if len(names) < _FEW:
        return "".join(f" Try --map {quote(f'{name}=text')}" for name in names)
    if PREFERRED in names and "prompt" not in names:
        return f" Try --map {PREFERRED}=text"
    answer = next((name for name in ("label", *_PERHAPS_ANSWERS) if name in names), None)
    label = None
    if answer in (None, "label", *LABELS):
        label = _of_fewest_values(rows, names if answer is None else [answer])
    answer = answer or label or names[1]
    others = [name for name in names if name != answer]
    longest = max(_length(rows, name) for name in others)
    likely = [name for name in _PERHAPS_ASKED if name in others] or others
    question = next((name for name in likely if _length(rows, name) * _FEW >= longest), likely[0])
    wanted = ("text", "label") if label else ("prompt", "answer")
    pairs = zip((question, answer), wanted, strict=True)
    return " Try " + " ".join(f"--map {quote(f'{source}={name}')}" for source, name in pairs)


def _hint_of_chats(values: Mapping[Any, Any], chats: Sequence[str]) -> str:
    """Guess what the columns are of which some hold messages; empty where that cannot be told."""
    whole = next((name for name in chats if len(values[name]) > 1 and ends_with_answer(values[name])), None)
    if whole is not None:
        return f" Try --map {quote(f'{whole}=messages')}"
    answer = next((name for name in _PERHAPS_ANSWERS if name in values), None)
    asked = next((name for name in chats if name != answer and not ends_with_answer(values[name])), None)
    if asked is None or answer is None:
        return ""
    return f" Try --map {quote(f'{asked}=prompt')} --map {quote(f'{answer}=completion')}"


def _hint_of_records(value: dict[Any, Any], column: str) -> str:
    """Guess which of the texts in a column of records, such as ``translation``, are question and answer."""
    texts = [str(name) for name, one in value.items() if isinstance(one, str)]
    if len(texts) < _FEW:
        return ""
    pairs = zip(texts, ("prompt", "answer"), strict=False)
    return " Try " + " ".join(f"--map {quote(f'{column}.{name}={wanted}')}" for name, wanted in pairs)


def _length(rows: Sequence[Row], name: str) -> int:
    texts = [value for row in rows if isinstance(value := row.values.get(name), str)]
    return sum(map(len, texts)) // len(rows)


def _of_fewest_values(rows: Sequence[Row], names: Sequence[str]) -> str | None:
    """Return the column whose values are the fewest, where they come back."""
    counted = {name: len({str(row.values.get(name)) for row in rows}) for name in names}
    several = {name: count for name, count in counted.items() if _FEW <= count <= len(rows) // _FEW}
    return min(several, key=lambda name: several[name]) if several else None
