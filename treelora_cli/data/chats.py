"""Chats that wait for an answer, read from a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from treelora_cli.backend.values import Turn
from treelora_cli.data.files import lines_of
from treelora_cli.data.messages import is_chat, read_messages
from treelora_cli.data.paths import existing
from treelora_cli.errors import DataError


def read_chats(path: Path) -> list[list[Turn]]:
    """Read one chat from JSON (a list of messages, or a record with ``messages``), or several from JSONL or a list.

    Raises:
        DataError: No such file, or no messages that wait for an answer; names file and line.
    """
    try:
        data = existing(path).read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error
    return chats_in(data, str(path))


def chats_in(data: bytes, name: str) -> list[list[Turn]]:
    """As ``read_chats``, of a file's content; ``name`` is for messages."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{name}: not UTF-8 text (byte {error.start}).") from error
    found = [read_messages(chat, where) for chat, where in _chats(text, Path(name).name)]
    if not found:
        raise DataError(f"{name} holds no messages.")
    return found


def _chats(text: str, name: str) -> list[tuple[Any, str]]:
    """Return each chat and where it stands."""
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError):
        lines = [(line, f"{name}:{number}") for number, line in enumerate(lines_of(text), start=1) if line.strip()]
        return [(_parsed(line, where), where) for line, where in lines]
    if isinstance(whole, list) and whole and all(_holds_messages(one) for one in whole):
        return [(one, f"{name} chat {number}") for number, one in enumerate(whole, start=1)]
    return [(whole, name)]


def _parsed(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise DataError(f"{where}: invalid JSON ({error}).") from error
    except RecursionError as error:
        raise DataError(f"{where}: JSON nested too deeply.") from error


def _holds_messages(one: Any) -> bool:
    return isinstance(one, list) or (isinstance(one, dict) and ("messages" in one or any(map(is_chat, one.values()))))
