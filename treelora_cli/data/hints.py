"""What the columns of a table may be that is of no known shape: advice for its user."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from shlex import quote
from typing import Any, NoReturn

from treelora_cli.data.columns import ANSWERS, LABELS, PREFERRED, in_known_names
from treelora_cli.data.delimited import lacks_head, recurring
from treelora_cli.data.messages import ends_with_answer, is_chat, speakers
from treelora_cli.data.records import NEED, shape_of
from treelora_cli.data.tables import Row
from treelora_cli.data.text_files import WRONG_KIND
from treelora_cli.errors import DataError

_PERHAPS_ANSWERS = (*ANSWERS, "output", "target", *LABELS, "summary", "solution", "translation", "answers", "ideal")
_PERHAPS_ASKED = ("prompt", "question", "query", "input", "problem", "ctx")
_PERHAPS_RIGHT = (
    "label",
    "target",
    *ANSWERS,
    "gold",
    "correct",
    "correct_answer",
    "correct_option",
    "answer_idx",
    "cop",
)
"""Names of columns that say which choice is right, the likeliest first."""
_ENDS_OF_ANSWERS = ("answer", "solution", "response", "completion", "output")
_WRONG = re.compile(r"(distractor|incorrect|wrong|false|bad|worst|negative|rejected)", re.IGNORECASE)
"""How names of columns begin that hold what is not to be learned."""
_FEW, _HEADS = 2, 3
_ID = re.compile(
    r"(.*[_ -])?(id|idx|index|uuid|guid|hash|number|no|nr)|[a-z]?id|#|unnamed: ?\d+"
    r"|source|url|split|topic|path|file|filename|repo|license|language|timestamp|date"
)
"""Names of columns that say which example it is, or where it is from."""
_SPEAKERS = tuple(
    re.compile(rf"(^|[\n\[<#|>])\s*\W*({names})\b\s*\W", re.IGNORECASE)
    for names in ("user|human|instruction|question", "assistant|gpt|ai|bot|response|answer")
)
"""What stands before what the user and the assistant say in a text of both."""


def refuse_single_messages(rows: Sequence[Row]) -> None:
    """Raise ``DataError`` when each record is a message, so that one alone is no example."""
    tree = any(isinstance(value, dict) and "replies" in value for value in rows[0].values.values())
    if tree or {"user", "assistant"} <= speakers(rows):
        raise DataError(
            f"{rows[0].where}: each record holds single messages and not a chat. Write one record for each chat:"
            ' {"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]}'
        )


def refuse_answers_beside(rows: Sequence[Row]) -> None:
    """Raise ``DataError`` when texts that would be learned alone stand beside what may be their answers."""
    wanted = (*ANSWERS, "output", "target", "solution", "translation", "code")
    answer = next((name for name in wanted if isinstance(one := rows[0].values.get(name), str) and one.strip()), None)
    if answer is not None:
        raise DataError(
            f"{rows[0].where}: 'text' beside '{answer}': to learn the one as the answer to the other pass --map"
            f" text=prompt{_answer_map(answer)}; to learn the texts alone, --map text=text"
        )


def _answer_map(name: str) -> str:
    return "" if name in ANSWERS else f" --map {quote(f'{name}=answer')}"


def refuse_unknown(rows: Sequence[Row]) -> NoReturn:
    """Raise ``DataError`` that says what was found, and what to try.

    Raises:
        DataError: Always.
    """
    values = rows[0].values
    names = ", ".join(map(str, values))
    if hint := _hint_of_preference(values):
        raise DataError(f"Found {names}. {NEED}{hint}")
    if chats := [name for name, value in values.items() if is_chat(value) and {"role", "from"} & set(value[0])]:
        raise DataError(f"Found {names}. {NEED}{_hint_of_chats(values, list(map(str, chats)))}")
    records = [(str(name), value) for name, value in values.items() if isinstance(value, dict)]
    if records or any(isinstance(value, bytes) for value in values.values()):
        advice = "".join(_hint_of_records(value, name) for name, value in records[:1])
        raise DataError(f"{rows[0].where}: Found {names}. {WRONG_KIND}{advice}")
    if below := _head_below(rows):
        raise DataError(f"{below} names the columns; remove what stands above it.")
    if lacks_head([row.values for row in rows]):
        raise DataError(
            f"{rows[0].where.partition(':')[0]}: its first line seems to be a record ({names}). Where no line names the"
            f" columns, count them: {_counted(rows)}"
        )
    raise DataError(f"Found {names}. {NEED}{_hint(rows)}")


def _head_below(rows: Sequence[Row]) -> str:
    """Return which of the first records names columns that are known, below a title; empty where none does."""
    for place, row in enumerate(rows[:_HEADS]):
        names = [str(value).strip() for value in row.values.values()]
        below = [replace(one, values=dict(zip(names, one.values.values(), strict=False))) for one in rows[place + 1 :]]
        if below and len(names) > 1 and shape_of(in_known_names(below)) is not None:
            return f"{row.where} ({', '.join(names)})"
    return ""


def _counted(rows: Sequence[Row]) -> str:
    """Guess what the columns of a table without a head are: one whose values come back holds labels."""
    if len(rows[0].values) == 1:
        return "--map 1=text"
    label = recurring([row.values for row in rows])
    if label is None:
        return "--map 1=prompt --map 2=answer"
    return f"--map {2 if label == 0 else 1}=text --map {label + 1}=label"


def _hint(rows: Sequence[Row]) -> str:
    """Guess which columns are question and answer, or text and label; empty where none can be."""
    values = rows[0].values
    names = [name for name in map(str, values) if name.strip()]
    if whole := next((name for name in names if _is_dialogue(values.get(name))), None):
        return f" '{whole}' holds whole dialogues; learn them as they stand with {_mapped(whole, 'text')}"
    choices = next((name for name in names if _is_texts(values.get(name)) and not _WRONG.match(name)), None)
    if choices is not None and (hint := _hint_of_choices(rows, names, choices)):
        return hint
    texts = [name for name in names if _length(rows, name)]
    if len(names) < _FEW:
        return "".join(f" Try {_mapped(name, 'text')}" for name in names if _is_plain(values.get(name)))
    if PREFERRED in names and not {"prompt", *_PERHAPS_ASKED} & set(names):
        return f" Try {_mapped(PREFERRED, 'text')}"
    answer = next((name for name in ("label", *_PERHAPS_ANSWERS) if name in names and _is_plain(values[name])), None)
    label = None
    if answer in (None, "label", *LABELS):
        label = _of_fewest_values(rows, [name for name in names if answer in (None, name)])
    likely = [name for name in texts if name not in (answer, label) and not _is_id(name) and not _WRONG.match(name)]
    begun = next((name for name in likely if _is_called_answer(name.lower())), None)
    answer = answer or label or begun or next(iter(likely[1:]), None)
    question = _question(rows, [name for name in likely if name != answer])
    if question is None:
        return ""
    if answer is None:
        return f" Try {_mapped(question, 'text')}"
    wanted = ("text", "label") if label else ("prompt", "answer")
    pairs = [(source, name) for source, name in zip((question, answer), wanted, strict=True) if source != name]
    return " Try " + " ".join(_mapped(*pair) for pair in pairs)


def _question(rows: Sequence[Row], others: Sequence[str]) -> str | None:
    """Return which of some columns of texts is the question: one with such a name, unless another is far longer."""
    longest = max((_length(rows, name) for name in others), default=0)
    named = [name for name in _PERHAPS_ASKED if name in others] or list(others)
    return next((name for name in named if _length(rows, name) * _FEW >= longest), next(iter(named), None))


def _hint_of_choices(rows: Sequence[Row], names: Sequence[str], choices: str) -> str:
    """Guess what the columns of a question with a list of choices are; empty where nothing says which is right."""
    right = next((name for name in _PERHAPS_RIGHT if name in names), None)
    question = _question(rows, [name for name in names if _length(rows, name) and name != right and not _is_id(name)])
    if right is None or question is None:
        return ""
    pairs = ((question, "question"), (choices, "choices"), (right, "answer"))
    return " Try " + " ".join(_mapped(*pair) for pair in pairs if pair[0] != pair[1])


def _mapped(source: str, name: str) -> str:
    return f"--map {quote(f'{source}={name}')}"


def _is_called_answer(name: str) -> bool:
    return name.startswith(ANSWERS) or name.endswith(_ENDS_OF_ANSWERS)


def _is_id(name: str) -> bool:
    return _ID.fullmatch(name.strip().lower()) is not None


def _is_plain(value: Any) -> bool:
    """Return whether a value can be an answer: a text, a number, or texts that are as right."""
    return isinstance(value, str | int | float) or _is_texts(value)


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and len(value) >= _FEW and all(isinstance(one, str) for one in value)


def _is_dialogue(value: Any) -> bool:
    """Return whether a text holds what both the user and the assistant say."""
    return isinstance(value, str) and all(mark.search(value) for mark in _SPEAKERS)


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


def _hint_of_preference(values: Mapping[Any, Any]) -> str:
    """Guess where asked and preferred messages are in OpenAI's records of preferences; empty for others."""
    asked = values.get("input")
    if not isinstance(asked, dict) or not is_chat(asked.get("messages")) or "preferred_output" not in values:
        return ""
    return " Try --map input.messages=prompt --map preferred_output=completion"


def _hint_of_records(value: dict[Any, Any], column: str) -> str:
    """Guess which of the texts in a column of records, such as ``translation``, are question and answer."""
    texts = [str(name) for name, one in value.items() if isinstance(one, str) and not _is_id(str(name))]
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
