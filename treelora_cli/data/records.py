"""Records as people have them: which columns are the input and which the answer, by the names they go by.

==================================================  ==================================================
columns                                             what the model reads, and learns to write
==================================================  ==================================================
``messages``, ``conversations``, ``conversation``   a chat: ``role`` and ``content``, or ``from`` and ``value``;
                                                    also the one other column that holds chats
``prompt`` and ``completion`` as lists of messages  the same
``prompt`` and ``answer|completion|response``       the one, the other
``prompt`` and ``chosen``, ``rejected``             the prompt; the chosen answer
``messages`` and ``answer|...|chosen`` apart        a chat that ends with the one answer
``instruction``, ``input``, ``output|response``     instruction, empty line, input; the output
``context|passage``, ``question``, ``answers``      passage, empty line, question; the first answer
``question``, ``choices``, ``answerKey|answer``     question and lettered choices; the letter
``question``, ``A``, ``B``, ... ``answer``          the same
``question``, ``answer``                            the question; the answer
``premise``, ``hypothesis``, ``label``              both sentences, then the label names; the label
``sentence|text|review|...``, ``label|class|...``   the sentence, then the label names; the label
``input``, ``output`` and the like                  the one, the other
``text``                                            (nothing); the text
==================================================  ==================================================
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from shlex import quote
from typing import Any

from treelora_cli.backend.values import Turn
from treelora_cli.data.choices import with_choices
from treelora_cli.data.columns import (
    ANSWERS,
    ASKED,
    CHATS,
    CHOICES,
    LABELS,
    PAIRS,
    PASSAGES,
    PREFERRED,
    REFUSED,
    TEXTS,
    in_known_names,
)
from treelora_cli.data.examples import TextExample, chat_example
from treelora_cli.data.labels import is_written_gap
from treelora_cli.data.messages import (
    chat_of,
    ends_with_answer,
    from_json,
    is_chat,
    prompt_chat,
    system_text,
    unread_keys,
    waits_for_answer,
)
from treelora_cli.data.tables import Row, texts_in
from treelora_cli.errors import SKIP_BAD, DataError

_FEW, _SHORT, _RECURRING = 64, 60, 4
NEED = "Need messages, prompt+answer, sentence+label or text."
_LOOKED_AT = 200
"""Rows that are searched for text which is not used."""
_MEDIA = re.compile(r"(image|img|picture|photo|audio|video|sound)s?(_?(path|file|url)s?)?", re.IGNORECASE)
_MARK = re.compile(r"<\|?(image|audio|video|image_pad|img)(_?\d+)?\|?>", re.IGNORECASE)
"""What stands in a text for a picture or sound beside it."""
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Shape:
    """How a table's records become examples.

    Attributes:
        style: One of ``STYLES``.
        used: Columns that are read.
        read: Turns a record into an example.
        label: The column of labels; of style ``labels`` only.
    """

    style: str
    used: frozenset[str]
    read: Callable[[Row], TextExample]
    label: str = ""


def shape_of(rows: Sequence[Row]) -> Shape | None:
    """Return the shape that records have by the names of all their columns; ``None`` for none that is known."""
    names = {name for row in rows for name in row.values}
    for find in (_as_chat, _as_prompt, _as_instruction, _as_question, _as_labelled, _as_asked, _as_text):
        if (found := find(names, rows)) is not None:
            return _with_system(found, rows)
    return None


def _with_system(shape: Shape, rows: Sequence[Row]) -> Shape:
    """Return a shape of prompts as one of chats where a column holds their system prompts."""
    if shape.style != "plain" or not any(row.values.get("system") for row in rows):
        return shape

    def read(row: Row) -> TextExample:
        one, said = shape.read(row), system_text(row.values.get("system"), row.where)
        turns = [*([Turn("system", said)] if said else []), Turn("user", one.prompt)]
        return replace(chat_example(row.where, turns, Turn("assistant", one.answer)), others=one.others)

    return Shape("chat", shape.used | {"system"}, read)


def prompt_of(row: Row) -> str | None:
    """Return the prompt that a record without its answer makes; ``None`` where its columns are of no such shape.

    Raises:
        DataError: A column holds something else than text; names file and line.
    """
    row = with_choices(in_known_names([row]))[0]
    names = set(row.values)
    if "prompt" in names:
        return None
    if "instruction" in names:
        return _instruction_text(row)
    if "question" in names and not (names >= {"question", "sentence"} and not names & {*CHOICES, *PASSAGES}):
        choices, passage = _first(names, CHOICES), _first(names, PASSAGES)
        return _question(row, passage) if choices is None else _with_choices(row, passage, *_choices(row, choices))
    pair = next((pair for pair in PAIRS if names >= set(pair)), None)
    return None if pair is None else _marked(row, pair)


def unfolded(rows: Sequence[Row]) -> list[Row]:
    """Return a row for each question where records are SQuAD's documents of paragraphs; others as they are."""
    if not rows or not all(isinstance(row.values.get("paragraphs"), list) for row in rows):
        return list(rows)
    found: list[Row] = []
    for row in rows:
        for paragraph in row.values["paragraphs"]:
            questions = paragraph.get("qas") if isinstance(paragraph, dict) else None
            if not isinstance(questions, list) or not all(isinstance(one, dict) for one in questions):
                raise DataError(f"{row.where}: 'paragraphs' is a list of records with context and qas.")
            for one in questions:
                values = {"context": paragraph.get("context"), **{key: one.get(key) for key in ("question", "answers")}}
                found.append(Row(values, f"{row.where} question {one.get('id', len(found) + 1)}"))
    return found


def unused_text(rows: Sequence[Row], shape: Shape) -> list[str]:
    """Return the columns that hold text, or lists of texts, and are not used; of free text every other column."""
    found: dict[str, None] = {}
    worse = REFUSED if PREFERRED in shape.used else None  # left out on purpose
    for row in rows[:_LOOKED_AT]:
        for name, value in row.values.items():
            if name in shape.used:
                found |= dict.fromkeys(_unread_in(name, value) if shape.style == "chat" else ())
            elif name != worse and (_holds_text(value) or (shape.style == "text" and value is not None)):
                found[str(name)] = None
    return list(found)


def unused_media(rows: Sequence[Row]) -> list[str]:
    """Return a line that names columns of pictures or sounds."""
    found = dict.fromkeys(str(name) for row in rows[:_LOOKED_AT] for name, value in row.values.items() if _bytes(value))
    return [f"Not used: {', '.join(found)}. There are pictures or sounds in it; only text is read."] if found else []


def _bytes(value: Any) -> bool:
    """Return whether a value holds a file, as parquet has them, or a list of some."""
    if isinstance(value, list):
        return bool(value) and _bytes(value[0])
    return isinstance(value.get("bytes") if isinstance(value, dict) else value, bytes)


def refuse_unseen(row: Row) -> None:
    """Raise ``DataError`` when a record's text names a picture or sound that stands beside it: nobody reads that."""
    beside = next((name for name, value in row.values.items() if value and _MEDIA.fullmatch(str(name))), None)
    if beside is not None and any(_MARK.search(text) for text in texts_in(row.values, keys=False)):
        raise DataError(f"{row.where}: the text is about what '{beside}' shows; only text can be read.{SKIP_BAD}")


def _unread_in(name: Any, value: Any) -> list[str]:
    """Return what of a column's messages is not read, as ``messages.context``."""
    return [f"{name}.{key}" for key in unread_keys(value)] if is_chat(value) else []


def _holds_text(value: Any) -> bool:
    return any(text.strip() for text in texts_in(value, keys=False))


def _first(names: set[Any], wanted: Sequence[str]) -> str | None:
    return next((name for name in wanted if name in names), None)


# -- chats ----------------------------------------------------------------------------------------


def _as_chat(names: set[Any], rows: Sequence[Row]) -> Shape | None:
    column = _first(names, CHATS) or _chat_column(rows)
    beside = {"tools", "functions", "system"}
    apart = _first(names, (*ANSWERS, PREFERRED))
    if column is not None and apart is not None and waits_for_answer(rows[0].values.get(column)):
        return Shape("chat", frozenset({column, apart, *beside}), lambda row: prompt_chat(row, apart, column))
    if column is not None:
        return Shape("chat", frozenset({column, *beside}), lambda row: chat_of(row, row.values.get(column), column))
    answer = _first(names, (*ANSWERS, PREFERRED))
    if "prompt" in names and answer is not None and is_chat(rows[0].values.get("prompt")):
        return Shape("chat", frozenset({"prompt", answer, *beside}), lambda row: prompt_chat(row, answer))
    return None


def _chat_column(rows: Sequence[Row]) -> str | None:
    """Return the one column that holds chats with their answer; the preferred of two."""
    found = [str(name) for name, value in rows[0].values.items() if ends_with_answer(value)]
    if set(found) == {PREFERRED, REFUSED}:
        found = [PREFERRED]
    prompted = any(name == "prompt" or len(rows[0].values[name]) == 1 for name in found)
    return found[0] if len(found) == 1 and not prompted else None


# -- prompts and answers --------------------------------------------------------------------------


def _as_prompt(names: set[Any], _rows: Sequence[Row]) -> Shape | None:
    answer = _first(names, (*ANSWERS, PREFERRED))
    if "prompt" not in names or answer is None:
        return None
    return Shape("plain", frozenset({"prompt", answer}), lambda row: _answered(row, text_of(row, "prompt"), answer))


def _as_asked(names: set[Any], rows: Sequence[Row]) -> Shape | None:
    pair = next((pair for pair in ASKED if names >= set(pair)), None)
    if pair is None or not isinstance(rows[0].values.get(pair[0]), str):
        return None
    asked, answer = pair
    return Shape("plain", frozenset(pair), lambda row: _answered(row, text_of(row, asked), answer))


def _as_instruction(names: set[Any], rows: Sequence[Row]) -> Shape | None:
    answer = _first(names, ("output", *ANSWERS, PREFERRED))
    if "instruction" not in names or answer is None:
        return None
    used = {"instruction", "input", "context", "system", "history", answer}
    chat = any(row.values.get(name) for row in rows for name in ("system", "history"))
    read = _instruction_chat if chat else _instruction
    return Shape("chat" if chat else "plain", frozenset(used), lambda row: read(row, answer))


def _instruction_text(row: Row) -> str:
    parts = [text_of(row, "instruction"), *(_text_beside(row, name) for name in ("input", "context"))]
    return "\n\n".join(part for part in parts if part.strip())


def _text_beside(row: Row, column: str) -> str:
    """Return the text of a column that may be empty or missing."""
    value = row.values.get(column)
    if value is not None and not isinstance(value, str):
        raise DataError(_no_text(row, column))
    return value or ""


def _no_text(row: Row, column: str) -> str:
    """Return what to say of a column that holds something else than text, and how to name what is read of it."""
    value = row.values[column]
    line = f"{row.where}: '{column}' is not text but {type(value).__name__}"
    if not isinstance(value, dict):
        return f"{line}."
    text = next((str(key) for key, one in value.items() if isinstance(one, str)), None)
    inner = "" if text is None else f" Read one with --map {quote(f'{column}.{text}={column}')}"
    return f"{line} of {', '.join(map(str, value))}.{inner or f' Leave it out with --map {column}=other'}"


def _instruction(row: Row, answer: str) -> TextExample:
    return _answered(row, _instruction_text(row), answer)


def _instruction_chat(row: Row, answer: str) -> TextExample:
    turns = []
    system, history = row.values.get("system"), row.values.get("history") or []
    if not isinstance(history, list):
        raise DataError(f"{row.where}: 'history' is a list of pairs of texts.")
    if said := system_text(system, row.where):
        turns.append(Turn("system", said))
    for pair in history:
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) and text for text in pair):
            raise DataError(f"{row.where}: 'history' is a list of pairs of texts.")
        turns += [Turn("user", pair[0]), Turn("assistant", pair[1])]
    turns.append(Turn("user", _instruction_text(row)))
    return chat_example(row.where, turns, Turn("assistant", text_of(row, answer)))


def _as_question(names: set[Any], _rows: Sequence[Row]) -> Shape | None:
    choices = _first(names, CHOICES)
    answer = _first(names, ("answers", *(["answerKey"] if choices else []), *ANSWERS, PREFERRED))
    if "question" not in names or answer is None:
        return None
    passage = _first(names, PASSAGES)
    used = frozenset({"question", answer, *([passage] if passage else [])})
    if choices is not None:
        return Shape("plain", used | {choices}, lambda row: _choice(row, passage, choices, answer))
    return Shape("plain", used, lambda row: _asked(row, passage, answer))


def _asked(row: Row, passage: str | None, answer: str) -> TextExample:
    return _answered(row, _question(row, passage), answer)


def _question(row: Row, passage: str | None) -> str:
    question = text_of(row, "question")
    given = _text_beside(row, passage) if passage else ""
    return f"{given}\n\n{question}" if given.strip() else question


def _choice(row: Row, passage: str | None, column: str, answer: str) -> TextExample:
    texts, letters = _choices(row, column)
    given = row.values.get(answer)
    if isinstance(given, int) and not isinstance(given, bool) and 0 <= given < len(texts):
        given = letters[given]
    if isinstance(given, str) and given.isdecimal() and given not in (*texts, *letters) and int(given) < len(texts):
        given = letters[int(given)]
    if given in texts and given not in letters:
        given = letters[texts.index(given)]
    if given not in letters:
        raise DataError(f"{row.where}: {answer} {given!r} is none of the choices {', '.join(letters)}.")
    return TextExample(row.where, _with_choices(row, passage, texts, letters), str(given))


def _with_choices(row: Row, passage: str | None, texts: Sequence[str], letters: Sequence[str]) -> str:
    lines = [f"{letter}. {text}" for letter, text in zip(letters, texts, strict=True)]
    return "\n".join([_question(row, passage), *lines])


def _choices(row: Row, column: str) -> tuple[list[str], list[str]]:
    """Return the choices' texts and letters: of a list, of texts beside labels, or of texts by letter."""
    choices = from_json(row.values.get(column), row, column)
    if isinstance(choices, list) and all(isinstance(one, dict) and {"text", "label"} <= set(one) for one in choices):
        choices = {key: [one[key] for one in choices] for key in ("text", "label")}
    texts, named = (choices.get("text"), choices.get("label")) if isinstance(choices, dict) else (choices, None)
    if isinstance(choices, dict) and texts is None:
        texts, named = list(choices.values()), list(choices)
    known = isinstance(texts, list) and all(isinstance(one, str | int | float) for one in texts)
    if not isinstance(texts, list) or not known or not 2 <= len(texts) <= len(_LETTERS):
        raise DataError(f"{row.where}: '{column}' is a list of two or more texts.")
    letters = [str(one) for one in named] if isinstance(named, list) and len(named) == len(texts) else []
    return [str(one) for one in texts], letters or list(_LETTERS[: len(texts)])


def _answered(row: Row, prompt: str, column: str) -> TextExample:
    """Return an example with the first of the answers in ``column``; the others are as right."""
    value = row.values.get(column)
    if isinstance(value, dict) and isinstance(value.get("text"), list):
        value = value["text"]
    if isinstance(value, list):
        texts = [one.get("text") if isinstance(one, dict) else one for one in value]
        known = [one for one in texts if isinstance(one, str) and one.strip()]
        if not known or len(known) < len(texts):
            raise DataError(f"{row.where}: '{column}' holds no answer.{SKIP_BAD}")
        first, *others = dict.fromkeys(known)
        return TextExample(row.where, prompt, first, others=tuple(others))
    return TextExample(row.where, prompt, text_of(row, column))


# -- labels and free text -------------------------------------------------------------------------


def _as_labelled(names: set[Any], rows: Sequence[Row]) -> Shape | None:
    label = "label" if "label" in names else next((name for name in LABELS if _holds_labels(name, rows)), None)
    if label is None:
        return None
    columns: tuple[str, ...] | None = next((pair for pair in PAIRS if names >= set(pair)), None)
    if columns is None:
        columns = next(((name,) for name in TEXTS if name in names and _holds_text(rows[0].values.get(name))), None)
    if columns is None:
        return None
    return Shape("labels", frozenset({*columns, label}), lambda row: _labelled(row, columns, label), label)


def _holds_labels(name: str, rows: Sequence[Row]) -> bool:
    given = [str(row.values[name]) for row in rows if row.values.get(name) is not None]
    values = set(given)
    recur = len(values) <= _FEW or len(values) * _RECURRING <= len(given)
    return len(values) > 1 and recur and all(len(value) <= _SHORT for value in values)


def _labelled(row: Row, columns: Sequence[str], label: str) -> TextExample:
    return TextExample(row.where, _marked(row, columns), text_of(row, label).strip())


def _marked(row: Row, columns: Sequence[str]) -> str:
    texts = [text_of(row, name).strip() for name in columns]
    marked = texts if len(columns) == 1 else [f"{name}: {text}" for name, text in zip(columns, texts, strict=True)]
    return "\n".join(marked)


def _as_text(names: set[Any], _rows: Sequence[Row]) -> Shape | None:
    if "text" not in names:
        return None
    return Shape("text", frozenset({"text"}), lambda row: TextExample(row.where, "", text_of(row, "text")))


def text_of(row: Row, column: str) -> str:
    """Return a column's text; numbers are written out.

    Raises:
        DataError: It is missing, empty or something else.
    """
    if column not in row.values:
        raise DataError(f"{row.where}: no '{column}'. Found {', '.join(map(str, row.values))}.")
    value = row.values[column]
    if isinstance(value, float) and (not math.isfinite(value) or value.is_integer()):
        value = int(value) if math.isfinite(value) else None  # a column with gaps makes whole numbers floats
    if isinstance(value, bool | int | float):
        value = str(value)
    if value is None or (isinstance(value, str) and (not value.strip() or is_written_gap(value))):
        raise DataError(f"{row.where}: empty {column}.{SKIP_BAD}")
    if not isinstance(value, str):
        raise DataError(_no_text(row, column))
    return value
