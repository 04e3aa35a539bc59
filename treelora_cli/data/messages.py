"""Messages of chats as people have them: OpenAI's, ShareGPT's, with calls of tools and parts."""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping, Sequence
from typing import Any

from treelora_cli.backend.values import Turn
from treelora_cli.data.columns import CHATS, in_known_names
from treelora_cli.data.examples import TextExample, chat_example
from treelora_cli.data.tables import Row
from treelora_cli.errors import SKIP_BAD, DataError

_ROLES = {
    "system": "system",
    "developer": "system",
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "ai", "bot", "chatbot", "chatgpt", "bing", "bard"), "assistant"),
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "function_response": "tool",
    "observation": "tool",
}
_OPENAI_ROLES = ("system", "user", "assistant", "tool")
_EXTRA = ("tool_calls", "tool_call_id", "name", "reasoning_content", "thinking")
"""What templates look for in a message beside role and content."""
_WHO, _WHAT = ("role", "from", "speaker", "type"), ("content", "value", "text", "parts")
"""What a message calls who speaks and what is said, the likeliest first."""
_WHAT_SAID = set(_WHAT)
_PAIRED = (
    ("human", "user", "input", "instruction", "question", "prompt", "query"),
    ("assistant", "gpt", "bot", "model", "output", "answer", "response"),
)
"""Keys of question and answer where a record holds both."""
_CALLS = "function_call"
_REASONING = "reasoning"
"""What some servers call ``reasoning_content``."""
_NOT_LEARNED = {"0", "0.0", "false", "no"}
_SWITCHES = ("train", "loss", "train_on_turn")
"""What other tools call the weight of a message."""
_READ = {*_WHO, *_WHAT, *_EXTRA, *_SWITCHES, _CALLS, _REASONING, "weight", "refusal", "id"}


def is_chat(value: Any) -> bool:
    """Return whether a value is a list of messages."""
    return isinstance(value, list) and bool(value) and all(isinstance(one, dict) for one in value)


def ends_with_answer(value: Any) -> bool:
    """Return whether a value is a list of messages whose last is the assistant's."""
    return is_chat(value) and all(_role(one) for one in value) and _role(value[-1]) == "assistant"


def waits_for_answer(value: Any) -> bool:
    """Return whether a value is a list of messages of which the last is not the assistant's."""
    return is_chat(value) and all(_role(one) for one in value) and _role(value[-1]) != "assistant"


def _speaker(message: Mapping[str, Any]) -> Any:
    """Return who speaks, as the message itself names it."""
    return next((message[key] for key in _WHO if key in message), None)


def _role(message: Mapping[str, Any]) -> str | None:
    named = _speaker(message)
    return _ROLES.get(named.strip().lower()) if isinstance(named, str) else None


def speakers(rows: Sequence[Row]) -> set[str]:
    """Return who speaks where each of many records is a single message, and not a chat; empty where they are not."""
    roles = [_role(row.values) for row in rows if _WHAT_SAID & set(row.values)]
    return {role for role in roles if role} if len(roles) == len(rows) and all(roles) else set()


def unread_keys(messages: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return what messages hold as text that is not read."""
    return list(dict.fromkeys(key for one in messages for key in one if key not in _READ and _is_text(one[key])))


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def system_text(value: Any, where: str) -> str:
    """Return a system prompt that stands beside messages: text, or parts of text; empty for none.

    Raises:
        DataError: It is something else.
    """
    if isinstance(value, dict):
        value = value.get("parts", value)
    if value is None or isinstance(value, str | list):
        text = _content(value, where)
        return text if text.strip() else ""
    raise DataError(f"{where}: 'system' is not text but {type(value).__name__}.")


def prompt_chat(row: Row, answer: str, asked: str = "prompt") -> TextExample:
    """Return a chat whose last messages are in a column of their own.

    Raises:
        DataError: They are no messages; names file and line.
    """
    given, wanted = row.values.get(asked), row.values.get(answer)
    if isinstance(wanted, str):
        wanted = [{"role": "assistant", "content": wanted}]
    if isinstance(wanted, dict):
        wanted = [wanted]
    if not is_chat(given) or not is_chat(wanted):
        raise DataError(f"{row.where}: '{asked}' and '{answer}' are lists of messages with role and content.")
    return chat_of(row, [*list(given or ()), *list(wanted or ())], asked)


def chat_of(row: Row, messages: Any, column: str) -> TextExample:
    """Return a chat as an example.

    Raises:
        DataError: The column holds no messages, or they do not end with the assistant's; names file and line.
    """
    messages = _turned(from_json(messages, row, column))
    if not isinstance(messages, list) or not all(isinstance(one, dict) for one in messages) or len(messages) < 2:
        raise DataError(f"{row.where}: '{column}' is a list of two or more records with role and content.{SKIP_BAD}")
    try:
        turns = _turns(messages, row.where)
    except DataError as error:
        raise DataError(f"{error}{SKIP_BAD}") from error
    system = system_text(row.values.get("system"), row.where)
    if system and turns[0].role != "system":
        turns.insert(0, Turn("system", system))
    if turns[-1].role != "assistant":
        raise DataError(
            f"{row.where}: the last message, the answer, is by '{turns[-1].role}' and not by 'assistant'.{SKIP_BAD}"
        )
    learned = [place for place, turn in enumerate(turns) if turn.role == "assistant" and turn.learned]
    if not learned or learned[-1] == 0:
        raise DataError(f"{row.where}: every answer of the assistant has weight 0; there is nothing to learn.")
    turns = turns[: learned[-1] + 1]  # what follows the last learned answer is never read
    return chat_example(row.where, turns[:-1], turns[-1], _tools(row))


def _turned(messages: Any) -> Any:
    """Return messages as a list of records; what is none of these as it is.

    ``datasets`` writes a record of lists. Others write a record for each pair of question and answer, or texts of the
    user and the assistant by turns.
    """
    if isinstance(messages, list) and messages and all(isinstance(one, str) for one in messages):
        return messages if len(messages) % 2 else _by_turns(messages)
    if isinstance(messages, list) and messages and all(_pair(one) for one in messages):
        return _by_turns([one[key] for one in messages for key in _pair(one)])
    if not isinstance(messages, dict) or not messages or not all(isinstance(one, list) for one in messages.values()):
        return messages
    columns = list(messages.values())
    if any(len(column) != len(columns[0]) for column in columns):
        return messages
    return [dict(zip(messages, values, strict=True)) for values in zip(*columns, strict=True)]


def _pair(one: Any) -> tuple[str, ...]:
    """Return the keys of question and answer in a record of both; nothing where it is a message or something else."""
    if not isinstance(one, dict) or set(_WHO) & set(one):
        return ()
    keys = (next((key for key in wanted if key in one), "") for wanted in _PAIRED)
    found = tuple(key for key in keys if key)
    return found if len(found) == len(_PAIRED) else ()


def _by_turns(texts: Sequence[Any]) -> list[dict[str, Any]]:
    roles = ("user", "assistant")
    return [{"role": roles[place % 2], "content": text} for place, text in enumerate(texts)]


def read_messages(messages: Any, where: str) -> list[Turn]:
    """Read messages that wait for an answer: a list of them, or a record that holds it, beside ``system`` or not.

    Raises:
        DataError: They are no messages, or end with the assistant's.
    """
    system = ""
    if isinstance(messages, dict):
        (row,) = in_known_names([Row(messages, where)])
        waiting = [name for name, value in row.values.items() if waits_for_answer(value)]
        column = next((name for name in (*CHATS, *waiting) if name in row.values), None)
        system = system_text(row.values.get("system"), where)
        messages = messages if column is None else _turned(from_json(row.values[column], row, column))
    if not is_chat(messages):
        raise DataError(f"{where}: expected a list of messages with role and content.")
    turns = _turns(messages, where)
    if system and turns[0].role != "system":
        turns.insert(0, Turn("system", system))
    if turns[-1].role in ("assistant", "system"):
        raise DataError(f"{where}: the last message is by '{turns[-1].role}'; there is nothing to answer.")
    return turns


def _turns(messages: Sequence[Mapping[str, Any]], where: str) -> list[Turn]:
    """Read messages; a system prompt that says nothing is none.

    Raises:
        DataError: One is none, or empty, or there are no others.
    """
    turns = [turn for one in messages if (turn := _turn(one, where)).role != "system" or turn.content.strip()]
    if not turns:
        raise DataError(f"{where}: no message but an empty system prompt.")
    return turns


def _turn(message: Mapping[str, Any], where: str) -> Turn:
    role = _role(message)
    if role is None and _speaker(message) is None:
        raise DataError(f"{where}: a message names no role. Found {', '.join(map(str, message))}.")
    if role is None:
        raise DataError(f"{where}: role {_speaker(message)!r} is not one of {', '.join(_OPENAI_ROLES)}.")
    content = _content(next((message[key] for key in _WHAT if key in message), None), where)
    if not content.strip() and isinstance(message.get("refusal"), str):
        content = message["refusal"]
    more = {key: message[key] for key in _EXTRA if message.get(key) not in (None, "", [])}
    if "reasoning_content" not in more and isinstance(message.get(_REASONING), str):
        more["reasoning_content"] = message[_REASONING]
    if "tool_calls" not in more and isinstance(message.get(_CALLS), dict):
        more["tool_calls"] = [{"type": "function", "function": message[_CALLS]}]
    if _CALLS in (message.get("role"), message.get("from")) and (calls := _written_calls(content)):
        content, more["tool_calls"] = "", calls
    if "tool_calls" in more:
        more["tool_calls"] = _calls(more["tool_calls"], where)
    if not content.strip() and "tool_calls" not in more and role not in ("tool", "system"):
        raise DataError(f"{where}: empty content of a message.")
    written = json.dumps(more, ensure_ascii=False) if more else ""
    return Turn(role, content, written, learned=_is_learned(message))


def _written_calls(content: str) -> list[dict[str, Any]]:
    """Return the calls of tools that a message of role ``function_call`` holds as JSON; none where it does not."""
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        return []
    calls = found if isinstance(found, list) else [found]
    known = all(isinstance(one, dict) and isinstance(one.get("name"), str) for one in calls)
    return [{"type": "function", "function": one} for one in calls] if known else []


def _is_learned(message: Mapping[str, Any]) -> bool:
    """Return whether a message is to be learned: a weight of 0, ``train: false`` and ``loss: false`` say no."""
    return not any(str(message.get(key)).strip().lower() in _NOT_LEARNED for key in ("weight", *_SWITCHES))


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
    text = part.get("text", part.get("refusal")) if isinstance(part, dict) else part
    if kind not in ("text", "str", "refusal", "input_text", "output_text") or not isinstance(text, str):
        raise DataError(f"{where}: a message holds {kind}; only text can be read.")
    return text


def _calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """Return calls of tools as templates take them: arguments as a record, not as its JSON."""
    if not isinstance(calls, list) or not all(isinstance(one, dict) for one in calls):
        raise DataError(f"{where}: 'tool_calls' is a list of records.")
    read = []
    for call in calls:
        inner = call.get("function", call)
        if not isinstance(inner, dict):
            raise DataError(f"{where}: a call of a tool is a record with name and arguments.")
        inner = dict(inner)
        if isinstance(inner.get("arguments"), str):
            try:
                inner["arguments"] = json.loads(inner["arguments"].strip() or "{}")
            except ValueError as error:
                raise DataError(f"{where}: the arguments of a call are invalid JSON.") from error
        read.append({**call, "function": inner} if "function" in call else inner)
    return read


def _tools(row: Row) -> str:
    old = [{"type": "function", "function": one} for one in _list(row.values.get("functions"), row, "functions")]
    tools = _list(row.values.get("tools"), row, "tools") or old
    return json.dumps(tools, ensure_ascii=False) if tools else ""


def _list(value: Any, row: Row, column: str) -> list[Any]:
    tools = from_json(value or [], row, column)
    if not isinstance(tools, list):
        raise DataError(f"{row.where}: '{column}' is a list of records.")
    return tools


def from_json(value: Any, row: Row, column: str) -> Any:
    """Return what a text holds as JSON, or as pandas writes a list; other values as they are.

    Raises:
        DataError: It is neither; names file and line.
    """
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        try:
            return ast.literal_eval(value)  # what pandas writes of a list
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            raise DataError(f"{row.where}: '{column}' is invalid JSON.{SKIP_BAD}") from error
