"""Records as people have them: which columns are the input and which the answer, by the names they go by.

==================================================  ==================================================
columns                                             what the model reads, and learns to write
==================================================  ==================================================
``messages``, ``conversations``, ``conversation``   a chat: ``role`` and ``content``, or ``from`` and ``value``
``prompt`` and ``completion`` as lists of messages  the same
``prompt`` and ``answer|completion|response``       the one, the other
``instruction``, ``input``, ``output|response``     instruction, empty line, input; the output
``context|passage``, ``question``, ``answers``      passage, empty line, question; the first answer
``question``, ``choices``, ``answerKey|answer``     question and lettered choices; the letter
``question``, ``answer``                            the question; the answer
``premise``, ``hypothesis``, ``label``              both sentences, then the label names; the label
``sentence|text``, ``label``                        the sentence, then the label names; the label
``text``                                            (nothing); the text
==================================================  ==================================================
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from treelora_cli.backend.values import Turn
from treelora_cli.data.examples import TextExample, chat_example
from treelora_cli.data.tables import Row
from treelora_cli.errors import DataError

ANSWERS = ("answer", "completion", "response")
NEED = "Need messages, prompt+answer, sentence+label or text."
_CHATS = ("messages", "conversations", "conversation")
_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "function_response": "tool",
    "observation": "tool",
}
_OPENAI_ROLES = ("system", "user", "assistant", "tool")
_EXTRA = ("tool_calls", "tool_call_id", "name", "reasoning_content", "thinking")
"""What templates look for in a message beside role and content."""
_PASSAGES = ("context", "passage")
_PAIRS = (("premise", "hypothesis"), ("sentence1", "sentence2"), ("question1", "question2"))
_LOOKED_AT = 200
"""Rows that are searched for text which is not used."""
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Shape:
    """How a table's records become examples.

    Attributes:
        style: One of ``STYLES``.
        used: Columns that are read.
        read: Turns a record into an example.
    """

    style: str
    used: frozenset[str]
    read: Callable[[Row], TextExample]


def shape_of(row: Row) -> Shape | None:
    """Return the shape that a record's columns have by name; ``None`` for none that is known."""
    names = set(row.values)
    for find in (_as_chat, _as_prompt, _as_instruction, _as_question, _as_labelled, _as_text):
        if (found := find(names, row)) is not None:
            return found
    return None


def unused_text(rows: Sequence[Row], shape: Shape) -> list[str]:
    """Return the columns that hold text and are not used."""
    found: dict[str, None] = {}
    for row in rows[:_LOOKED_AT]:
        for name, value in row.values.items():
            if name not in shape.used and isinstance(value, str) and value.strip():
                found[str(name)] = None
    return list(found)


def _first(names: set[Any], wanted: Sequence[str]) -> str | None:
    return next((name for name in wanted if name in names), None)


def _is_chat(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(one, dict) for one in value)


# -- chats ----------------------------------------------------------------------------------------


def _as_chat(names: set[Any], row: Row) -> Shape | None:
    column = _first(names, _CHATS)
    if column is not None:
        return Shape(
            "chat", frozenset({column, "tools", "system"}), lambda row: _chat(row, row.values.get(column), column)
        )
    answer = _first(names, ANSWERS)
    if "prompt" in names and answer is not None and _is_chat(row.values["prompt"]):
        return Shape("chat", frozenset({"prompt", answer, "tools", "system"}), lambda row: _prompt_chat(row, answer))
    return None


def _prompt_chat(row: Row, answer: str) -> TextExample:
    given, wanted = row.values.get("prompt"), row.values.get(answer)
    if isinstance(wanted, str):
        wanted = [{"role": "assistant", "content": wanted}]
    if not _is_chat(given) or not _is_chat(wanted):
        raise DataError(f"{row.where}: 'prompt' and '{answer}' are lists of messages with role and content.")
    return _chat(row, [*list(given or ()), *list(wanted or ())], "prompt")


def _chat(row: Row, messages: Any, column: str) -> TextExample:
    messages = _from_json(messages, row, column)
    if not isinstance(messages, list) or not all(isinstance(one, dict) for one in messages) or len(messages) < 2:
        raise DataError(f"{row.where}: '{column}' is a list of two or more records with role and content.")
    turns = [_turn(one, row.where) for one in messages]
    system = row.values.get("system")
    if isinstance(system, str) and system.strip() and turns[0].role != "system":
        turns.insert(0, Turn("system", system))
    if turns[-1].role != "assistant":
        raise DataError(f"{row.where}: the last message, the answer, is by '{turns[-1].role}' and not by 'assistant'.")
    return chat_example(row.where, turns[:-1], turns[-1], _tools(row))


def read_messages(messages: Any, where: str) -> list[Turn]:
    """Read messages that wait for an answer.

    Raises:
        DataError: They are no messages, or end with the assistant's.
    """
    if isinstance(messages, dict):
        column = _first(set(messages), _CHATS)
        messages = messages if column is None else messages[column]
    if not _is_chat(messages):
        raise DataError(f"{where}: expected a list of messages with role and content.")
    turns = [_turn(one, where) for one in messages]
    if turns[-1].role in ("assistant", "system"):
        raise DataError(f"{where}: the last message is by '{turns[-1].role}'; there is nothing to answer.")
    return turns


def _turn(message: Mapping[str, Any], where: str) -> Turn:
    by_value = "role" not in message and "from" in message
    named = message.get("from") if by_value else message.get("role")
    role = _ROLES.get(named) if isinstance(named, str) else None
    if role is None:
        raise DataError(f"{where}: role {named!r} is not one of {', '.join(_OPENAI_ROLES)}.")
    content = _content(message.get("value" if by_value else "content"), where)
    more = {key: message[key] for key in _EXTRA if message.get(key) not in (None, "", [])}
    if "tool_calls" in more:
        more["tool_calls"] = _calls(more["tool_calls"], where)
    if not content.strip() and "tool_calls" not in more and role != "tool":
        raise DataError(f"{where}: empty content of a message.")
    written = json.dumps(more, ensure_ascii=False) if more else ""
    return Turn(role, content, written, learned=message.get("weight") != 0)


def _content(value: Any, where: str) -> str:
    """Return a message's text; parts of a list are joined."""
    if value is None:
        return ""
    if isinstance(value, list):
        return "".join(_part(part, where) for part in value)
    if not isinstance(value, str):
        raise DataError(f"{where}: the content of a message is not text but {type(value).__name__}.")
    return value


def _part(part: Any, where: str) -> str:
    kind = part.get("type", "text") if isinstance(part, dict) else type(part).__name__
    text = part.get("text") if isinstance(part, dict) else part
    if kind not in ("text", "str") or not isinstance(text, str):
        raise DataError(f"{where}: a message holds {kind}; only text can be read.")
    return text


def _calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """Return calls of tools as templates take them: arguments as a record, not as its JSON."""
    if not isinstance(calls, list) or not all(isinstance(one, dict) for one in calls):
        raise DataError(f"{where}: 'tool_calls' is a list of records.")
    read = []
    for call in calls:
        inner = dict(call.get("function", call))
        if isinstance(inner.get("arguments"), str):
            try:
                inner["arguments"] = json.loads(inner["arguments"])
            except ValueError as error:
                raise DataError(f"{where}: the arguments of a call are invalid JSON.") from error
        read.append({**call, "function": inner} if "function" in call else inner)
    return read


def _tools(row: Row) -> str:
    tools = _from_json(row.values.get("tools") or [], row, "tools")
    if not isinstance(tools, list):
        raise DataError(f"{row.where}: 'tools' is a list of records.")
    return json.dumps(tools, ensure_ascii=False) if tools else ""


def _from_json(value: Any, row: Row, column: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{row.where}: '{column}' is invalid JSON.") from error


# -- prompts and answers --------------------------------------------------------------------------


def _as_prompt(names: set[Any], _row: Row) -> Shape | None:
    answer = _first(names, ANSWERS)
    if "prompt" not in names or answer is None:
        return None
    return Shape("plain", frozenset({"prompt", answer}), lambda row: _answered(row, text_of(row, "prompt"), answer))


def _as_instruction(names: set[Any], row: Row) -> Shape | None:
    answer = _first(names, ("output", *ANSWERS))
    if "instruction" not in names or answer is None:
        return None
    used = {"instruction", "input", "context", "system", "history", answer}
    chat = any(row.values.get(name) for name in ("system", "history"))
    read = _instruction_chat if chat else _instruction
    return Shape("chat" if chat else "plain", frozenset(used), lambda row: read(row, answer))


def _instruction_text(row: Row) -> str:
    parts = [text_of(row, "instruction"), *(row.values.get(name) for name in ("input", "context"))]
    for name, part in zip(("input", "context"), parts[1:], strict=True):
        if part is not None and not isinstance(part, str):
            raise DataError(f"{row.where}: '{name}' is not text but {type(part).__name__}.")
    return "\n\n".join(part for part in parts if part is not None and part.strip())


def _instruction(row: Row, answer: str) -> TextExample:
    return _answered(row, _instruction_text(row), answer)


def _instruction_chat(row: Row, answer: str) -> TextExample:
    turns = []
    system, history = row.values.get("system"), row.values.get("history") or []
    if isinstance(system, str) and system.strip():
        turns.append(Turn("system", system))
    for pair in history:
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) and text for text in pair):
            raise DataError(f"{row.where}: 'history' is a list of pairs of texts.")
        turns += [Turn("user", pair[0]), Turn("assistant", pair[1])]
    turns.append(Turn("user", _instruction_text(row)))
    return chat_example(row.where, turns, Turn("assistant", text_of(row, answer)))


def _as_question(names: set[Any], row: Row) -> Shape | None:
    answer = _first(names, ("answers", "answerKey", *ANSWERS))
    if "question" not in names or answer is None:
        return None
    passage = _first(names, _PASSAGES)
    used = frozenset({"question", answer, *([passage] if passage else [])})
    if "choices" in names:
        return Shape("plain", used | {"choices"}, lambda row: _choice(row, answer))
    return Shape("plain", used, lambda row: _asked(row, passage, answer))


def _asked(row: Row, passage: str | None, answer: str) -> TextExample:
    question = text_of(row, "question")
    given = row.values.get(passage) if passage else None
    if given is not None and not isinstance(given, str):
        raise DataError(f"{row.where}: '{passage}' is not text but {type(given).__name__}.")
    return _answered(row, f"{given}\n\n{question}" if given and given.strip() else question, answer)


def _choice(row: Row, answer: str) -> TextExample:
    texts, letters = _choices(row)
    given = row.values.get(answer)
    if isinstance(given, int) and not isinstance(given, bool) and 0 <= given < len(texts):
        given = letters[given]
    if given in texts:
        given = letters[texts.index(given)]
    if given not in letters:
        raise DataError(f"{row.where}: {answer} {given!r} is none of the choices {', '.join(letters)}.")
    lines = [f"{letter}. {text}" for letter, text in zip(letters, texts, strict=True)]
    return TextExample(row.where, "\n".join([text_of(row, "question"), *lines]), str(given))


def _choices(row: Row) -> tuple[list[str], list[str]]:
    """Return the choices' texts and letters."""
    choices = row.values.get("choices")
    texts, named = (choices.get("text"), choices.get("label")) if isinstance(choices, dict) else (choices, None)
    if not isinstance(texts, list) or not 2 <= len(texts) <= len(_LETTERS):
        raise DataError(f"{row.where}: 'choices' is a list of two or more texts.")
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
            raise DataError(f"{row.where}: '{column}' holds no answer. Mend it, or pass --skip-bad.")
        first, *others = dict.fromkeys(known)
        return TextExample(row.where, prompt, first, others=tuple(others))
    return TextExample(row.where, prompt, text_of(row, column))


# -- labels and free text -------------------------------------------------------------------------


def _as_labelled(names: set[Any], _row: Row) -> Shape | None:
    if "label" not in names:
        return None
    column = _first(names, ("sentence", "text"))
    if column is not None:
        return Shape("labels", frozenset({column, "label"}), lambda row: _labelled(row, (column,)))
    pair = next((pair for pair in _PAIRS if names >= set(pair)), None)
    return None if pair is None else Shape("labels", frozenset({*pair, "label"}), lambda row: _labelled(row, pair))


def _labelled(row: Row, columns: Sequence[str]) -> TextExample:
    texts = [text_of(row, name).strip() for name in columns]
    marked = texts if len(columns) == 1 else [f"{name}: {text}" for name, text in zip(columns, texts, strict=True)]
    return TextExample(row.where, "\n".join(marked), text_of(row, "label").strip())


def _as_text(names: set[Any], _row: Row) -> Shape | None:
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
    if isinstance(value, float) and (math.isnan(value) or value.is_integer()):
        value = None if math.isnan(value) else int(value)  # a column with gaps makes whole numbers floats
    if isinstance(value, bool | int | float):
        value = str(value)
    if value is None or (isinstance(value, str) and not value.strip()):
        raise DataError(f"{row.where}: empty {column}. Mend it, or pass --skip-bad.")
    if not isinstance(value, str):
        raise DataError(f"{row.where}: '{column}' is not text but {type(value).__name__}.")
    return value
