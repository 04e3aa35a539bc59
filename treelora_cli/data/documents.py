"""The records in one JSON document: a list, lists of parts, or a table written by columns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from treelora_cli.data.names import part_of

_WHO, _WHAT = {"role", "from"}, {"content", "value", "tool_calls", "function_call"}
_BESIDE = {"name", "weight", "tool_call_id", "reasoning_content", "thinking", "refusal", "id", "train", "loss"}
_MESSAGE = _WHO | _WHAT | _BESIDE
_SPLIT = {"columns", "data"}
"""Keys of ``pandas.DataFrame.to_json(orient="split")``; ``index`` may be there, too."""


def is_message_list(value: Any) -> bool:
    """Return whether a value is one chat: a list of records that hold a message each and nothing beside."""
    return isinstance(value, list) and bool(value) and all(map(_is_message, value))


def _is_message(one: Any) -> bool:
    return isinstance(one, dict) and bool(_WHO & set(one)) and bool(_WHAT & set(one)) and set(one) <= _MESSAGE


def records_in(content: Mapping[str, Any]) -> Any:
    """Return the list of records in a document, whatever it holds beside; the document where there is none.

    It may be the one list in it, the lists of its parts (as one with a column ``split``), columns of equal length, or
    what pandas writes by columns, by index or as ``split``. One with a chat, or with nothing but plain values, is a
    record itself.
    """
    lists = {name: value for name, value in content.items() if isinstance(value, list)}
    if any(map(is_message_list, lists.values())) or (content and not any(map(_nested, content.values()))):
        return [content]  # one record
    if set(content) >= _SPLIT and set(content) <= {*_SPLIT, "index"} and len(lists) == len(content):
        return _from_split(content)
    records = {name: value for name, value in lists.items() if value and all(isinstance(one, dict) for one in value)}
    for found in (lists, records):
        if len(found) == 1:
            return next(iter(found.values()))
    if len(lists) > 1 and all(part_of(name) is not None for name in lists):
        return [{**one, "split": name} if isinstance(one, dict) else one for name in lists for one in lists[name]]
    return _from_columns(content)


def _nested(value: Any) -> bool:
    return isinstance(value, list | dict)


def _from_split(content: Mapping[str, Any]) -> Any:
    names = content["columns"]
    if not all(isinstance(row, list) and len(row) == len(names) for row in content["data"]):
        return content
    return [dict(zip(map(str, names), row, strict=True)) for row in content["data"]]


def _from_columns(content: Mapping[str, Any]) -> Any:
    """Return records of columns: equally long lists, or values by row number; records by row number as they are."""
    columns = list(content.values())
    if len(columns) < 2 or not columns[0]:  # one column is the list of a document
        return content
    if all(isinstance(one, list) and len(one) == len(columns[0]) for one in columns):
        return [dict(zip(content, values, strict=True)) for values in zip(*columns, strict=True)]
    if not all(isinstance(one, dict) and set(one) == set(columns[0]) for one in columns):
        return content
    if all(name.isdecimal() for name in content):
        return columns
    if all(name.isdecimal() for name in columns[0]):
        return [{name: column[number] for name, column in content.items()} for number in columns[0]]
    return content
