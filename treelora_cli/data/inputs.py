"""What ``predict`` is given: files, folders, patterns, tables and standard input, written out one by one."""

from __future__ import annotations

import atexit
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from treelora_cli.backend.values import Turn
from treelora_cli.data.columns import ASKED, TEXTS, in_known_names
from treelora_cli.data.files import decode, lines_of
from treelora_cli.data.folders import Passed, scan
from treelora_cli.data.messages import system_text
from treelora_cli.data.paths import existing, expanded, is_address, is_pattern, named_file, without_scheme
from treelora_cli.data.pixels import is_image, looks_like_image
from treelora_cli.data.records import prompt_of
from treelora_cli.data.table_folders import ABOUT as ABOUT_TABLES
from treelora_cli.data.tables import TEXT_SUFFIXES, Row, check_text, column_called, is_table, read_table, table_suffix
from treelora_cli.data.text_files import ABOUT
from treelora_cli.errors import DataError

PICTURES = (
    *("path", "image", "file", "file_name", "filename", "img", "filepath", "file_path", "image_path"),
    *(
        "image_id",
        "image_name",
        "image_file",
        "image_file_name",
        "img_path",
        "img_name",
        "image_bytes",
        "img_bytes",
        "image_data",
    ),
    *("jpg", "jpeg", "png", "webp", "images"),
)
"""Columns that name an image file, the likeliest first."""
PROMPTS = (
    *("prompt", "sentence", "question", "text", "input", "instruction", *(one for one, _ in ASKED if one != "input")),
    *TEXTS[2:],
)
"""Columns that hold a prompt, the likeliest first."""
STANDARD_INPUT = "-"
_LONGEST_NAME = 255
"""Bytes of a file's name on common systems, which refuse even to look for a longer one."""


def image_inputs(inputs: Sequence[str], standard_input: Callable[[], bytes]) -> list[str]:
    """Return the image files that inputs mean: files, folders (with all below), patterns, tables of paths, ``-``.

    ``-`` reads one image, or paths or JSONL, one a line.

    Raises:
        DataError: One does not exist, holds no image, or is an address.
    """
    return [path for one in inputs for path in _images(one, standard_input)]


def _images(one: str, standard_input: Callable[[], bytes]) -> Iterator[str]:
    if one == STANDARD_INPUT:
        data = standard_input()
        if looks_like_image(data[:32]):
            yield _kept_until_exit(data)
            return
        if not data.strip():
            raise DataError("Standard input is empty: give an image, or paths, one a line.")
        for name, where in _rows_or_lines(data, PICTURES):
            yield str(named_file(Path(), name, where, "the current directory"))
        return
    if not one.strip():
        raise DataError("An INPUT is empty: give images, folders, patterns or tables.")
    if is_address(one):
        raise DataError(f"{one} is an address; predict reads local files. Download it first.")
    one = without_scheme(one)
    for path in as_typed(one) if is_pattern(one) else [Path(one)]:
        existing(path)
        if path.is_dir():
            files = scan(path, is_image, Passed()).all_files()
            if not files:
                raise DataError(f"{path} holds no images.")
            yield from map(str, files)
        elif is_table(path):
            for row in read_table(path, None, {}):
                yield str(named_file(path.parent, _text_of(row, PICTURES, "path"), row.where))
        elif table_suffix(path) in TEXT_SUFFIXES and not is_image(path):
            raise DataError(f"{path} is a text and no image. To answer the paths in it: treelora predict - < {path}")
        else:
            yield str(path)


def as_typed(pattern: str) -> list[Path]:
    """Return the paths that fit a pattern, relative where it is.

    Raises:
        DataError: There is none.
    """
    found = expanded(Path(pattern))
    return found if Path(pattern).is_absolute() else [Path(os.path.relpath(path)) for path in found]


def text_inputs(inputs: Sequence[str], standard_input: Callable[[], bytes]) -> list[str | list[Turn]]:
    """Return the prompts that inputs mean: texts as typed, tables and text files that exist, folders of texts, ``-``.

    A text file holds a prompt a line; in a folder without tables it is one prompt. ``-`` reads one prompt, or JSONL. A
    record with a system prompt is a chat.

    Raises:
        DataError: A table without prompts, an empty folder, or text that cannot be read.
    """
    found = [text for one in inputs for text in _texts(one, standard_input)]
    if not all(text.strip() for text in found if isinstance(text, str)):
        raise DataError("A prompt is empty: give a text, a table of prompts, or a folder of texts.")
    return found


def _texts(one: str, standard_input: Callable[[], bytes]) -> Iterator[str | list[Turn]]:
    if one == STANDARD_INPUT:
        text = decode(standard_input(), Path("standard input"), [], western=True)
        records = _records_in(text)
        yield from map(_prompt_of, records) if records else [text.strip()]
        return
    named = _named_texts(one)
    if not named:
        yield one
    for path in named:
        tables = [path]
        if path.is_dir():
            files = [file for file in sorted(path.iterdir()) if file.is_file()]
            tables = [file for file in files if is_table(file) and file.name.lower() not in ABOUT_TABLES]
            texts = [file for file in files if table_suffix(file) in TEXT_SUFFIXES and not ABOUT.fullmatch(file.stem)]
            if not tables and not texts:
                raise DataError(f"{path} holds no prompts: give a folder of .txt files or tables, a table, or a text.")
            if not tables:
                yield from (decode(file.read_bytes(), file, [], western=True).strip() for file in texts)
        for row in (row for table in tables for row in read_table(table, None, {})):
            yield _prompt_of(row)


def _named_texts(one: str) -> list[Path]:
    """Return the files or folders a text names, if it is no prompt: it must look like a path and exist."""
    if len(one) > 1024 or "\n" in one or "\0" in one or not one.strip():
        return []
    path = Path(one)
    if any(len(part.encode(errors="replace")) > _LONGEST_NAME for part in path.parts):
        return []
    looks = is_table(path) or table_suffix(path) in TEXT_SUFFIXES
    if is_pattern(one):
        return expanded(path) if looks and " " not in one else []
    if looks and not any(sign.isspace() for sign in one):
        existing(path)
    if path.is_file() and not looks:
        raise DataError(f"{one} is a file, and neither a table nor a text file (.txt) of prompts.")
    return [path] if path.is_dir() or (looks and path.is_file()) else []


def _prompt_of(row: Row) -> str | list[Turn]:
    """Return the prompt in a record, as it is learned from a record with an answer; a chat where it has a system's."""
    check_text(row)
    prompt = prompt_of(row) or _text_of(row, PROMPTS, "prompt")
    system = system_text(in_known_names([row])[0].values.get("system"), row.where)
    return [Turn("system", system), Turn("user", prompt)] if system else prompt


def _text_of(row: Row, columns: Sequence[str], wanted: str) -> str:
    column = column_called(columns, list(row.values))
    if column is None:
        found = ", ".join(map(str, row.values))
        chat = " A file of chats is given as --messages." if "messages" in row.values else ""
        raise DataError(f"{row.where}: Found {found}; need '{wanted}'.{chat}")
    value = row.values[column]
    if isinstance(value, bytes) or (isinstance(value, dict) and isinstance(value.get("bytes"), bytes)):
        raise DataError(f"{row.where}: '{column}' holds the image itself; predict reads files. Write it to one.")
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{row.where}: '{column}' is no text.")
    check_text(row)
    return value


def _records_in(text: str) -> list[Row]:
    """Return the records on the lines of standard input; none unless each line that is not empty holds one."""
    found = []
    for number, line in enumerate(lines_of(text), start=1):
        record = _parsed(line)
        if isinstance(record, dict):
            found.append(Row(record, f"standard input:{number}"))
        elif line.strip():
            return []
    return found


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _rows_or_lines(data: bytes, columns: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield each line of standard input, or the text in a record on it, and where it stands."""
    text = decode(data, Path("standard input"), [], western=True)
    lines = text.split("\0") if "\0" in text else lines_of(text)  # what find -print0 writes
    for number, line in enumerate(lines, start=1):
        record, where = _parsed(line), f"standard input:{number}"
        if isinstance(record, dict):
            yield _text_of(Row(record, where), columns, columns[0]), where
        elif line.strip():
            yield line.strip(), where


def _kept_until_exit(data: bytes) -> str:
    """Write an image from standard input to a file that goes when the process ends."""
    folder = tempfile.TemporaryDirectory(prefix="treelora-")
    atexit.register(folder.cleanup)
    path = Path(folder.name) / "standard-input"
    path.write_bytes(data)
    return str(path)
