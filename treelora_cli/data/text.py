"""Text tasks: tables of prompts and answers, labelled sentences, chats or plain text, as examples not yet tokenised."""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from treelora_cli.backend.contract import Change, DataRequest
from treelora_cli.data.held_out import (
    OTHER_DATA,
    content_hash,
    find_recorded,
    set_aside,
    set_aside_by_position,
)
from treelora_cli.data.paths import existing
from treelora_cli.data.tables import TABLE_SUFFIXES, Row, read_table
from treelora_cli.data.text_scores import METRICS
from treelora_cli.errors import DataError, suggest

STYLES = ("plain", "labels", "chat", "text")
"""How examples become model input: prompt as it is; sentence with the label names; chat; free text."""

_TRAIN = ("train", "training")
_TEST = ("test", "eval", "val", "valid", "validation", "dev")
_ANSWERS = ("answer", "completion", "response")
_ROLES = ("system", "user", "assistant", "tool")
_IMAGES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
_NEED = "Need messages, prompt+answer, sentence+label or text."
_WRONG_KIND = (
    "This project's backend is causal-lm: give JSONL, JSON, CSV or parquet with messages, prompt+answer,"
    " sentence+label or text."
)
_CLOSED_ANSWERS, _CLOSED_LENGTH, _CLOSED_REPEATS = 32, 60, 5
_SHORT_WORDS = 5


@dataclass(frozen=True)
class Turn:
    """One message of a chat."""

    role: str
    content: str


@dataclass(frozen=True)
class TextExample:
    """One input and its answer.

    Attributes:
        where: File and line, for messages.
        prompt: The input as text, without labels or chat markup; empty for free text.
        answer: What is learned; the whole text for free text.
        turns: The messages before the answer; chats only.
    """

    where: str
    prompt: str
    answer: str
    turns: tuple[Turn, ...] = ()

    @property
    def content(self) -> str:
        """Text by which an input's task can be told; of free text the first half, as prompts are beginnings."""
        return self.prompt or self.answer[: max(1, len(self.answer) // 2)]


@dataclass(frozen=True)
class TextListing:
    """A task's examples before tokenising.

    Attributes:
        style: One of ``STYLES``.
        labels: The closed set of answers; empty for open answers.
        metric: One of ``scores.METRICS``.
        train, test: Examples.
        notes: Lines for the user.
        change: What differs from the recorded held-out examples, if anything.
    """

    style: str
    labels: tuple[str, ...]
    metric: str
    train: list[TextExample]
    test: list[TextExample]
    notes: tuple[str, ...]
    change: Change | None = None

    @property
    def digest(self) -> str:
        """SHA-256 over the examples, hex."""
        content = hashlib.sha256(json.dumps([self.style, self.labels]).encode())
        for part in (self.train, self.test):
            for one in part:
                turns = [[turn.role, turn.content] for turn in one.turns]
                content.update(json.dumps([one.prompt, one.answer, turns]).encode() + b"\n")
            content.update(b"\0")
        return content.hexdigest()


def list_texts(request: DataRequest) -> TextListing:
    """Read and validate a task's examples.

    Raises:
        DataError: Missing or malformed data, or data of another kind; the message names file and line.
    """
    path = existing(request.path)
    notes: list[str] = []
    train_rows, test_rows = _tables(path, request)
    style = _style(train_rows or test_rows)
    labels = _named_labels(path if path.is_dir() else path.parent) if style == "labels" else None
    train = _examples(train_rows, style, labels, request, notes)
    test = _examples(test_rows, style, labels, request, notes)
    if labels is None:
        labels = _labels_of(train or test, style)
    if request.classes is not None:
        labels, train, test = _chosen(labels, train, test, request)
    if style == "labels" and len(labels) < 2:
        raise DataError(f"{path}: one label only ('{labels[0]}'); a task needs two or more.")
    metric = _metric(request.metric, style, labels, train or test)
    if request.recorded is not None and request.recorded.held_out is not None:
        test, change = find_recorded(test, train, request.recorded.held_out, hash_of_text)
        test = _limit(test, request.recorded.limit, f"test/{request.seed}")
        return TextListing(style, labels, metric, train, test, tuple(notes), change)
    if train and not test and request.held_out > 0:
        train, test = _split(train, request, bool(labels))
        notes.append(f"No held-out data given: {len(test)} of {len(train) + len(test)} examples kept for scoring.")
    train = _limit(train, request.train_limit, f"train/{request.seed}")
    test = _limit(test, request.test_limit, f"test/{request.seed}")
    listing = TextListing(style, labels, metric, train, test, tuple(notes))
    if request.recorded is None:
        return listing
    change = None if listing.digest == request.recorded.digest else OTHER_DATA
    return replace(listing, test=_limit(test, request.recorded.limit, f"test/{request.seed}"), change=change)


def hash_of_text(one: TextExample) -> str:
    """Return the hash of an example, by which a held-out one is known again."""
    turns = [part for turn in one.turns for part in (turn.role, turn.content)]
    return content_hash(one.prompt, one.answer, *turns)


# -- files ----------------------------------------------------------------------------------------


def _tables(path: Path, request: DataRequest) -> tuple[list[Row], list[Row]]:
    """Return training and held-out rows."""
    train, test = _table_files(path)
    if request.val is not None:
        outer = existing(request.val)
        inner = _table_files(outer)
        test = inner[1] or inner[0]
    train_rows = [] if train is None else read_table(train, request.data_format, request.columns)
    test_rows = [] if test is None else read_table(test, request.data_format, request.columns)
    return train_rows, test_rows


def _table_files(path: Path) -> tuple[Path | None, Path | None]:
    if path.is_file():
        if path.suffix.lower() in _IMAGES:
            raise DataError(f"{path.name}: an image. {_WRONG_KIND}")
        return path, None
    tables = {
        entry.stem.lower(): entry
        for entry in sorted(path.iterdir())
        if entry.is_file() and entry.suffix.lower() in TABLE_SUFFIXES and entry.name != "labels.json"
    }
    train = next((tables[name] for name in _TRAIN if name in tables), None)
    test = next((tables[name] for name in _TEST if name in tables), None)
    if train is not None:
        return train, test
    if len(tables) == 1:
        return next(iter(tables.values())), None
    if not tables:
        pictures = any(entry.suffix.lower() in _IMAGES for entry in path.glob("**/*"))
        raise DataError(f"{path} holds {'images' if pictures else 'no table'}. {_WRONG_KIND}")
    raise DataError(f"{path} holds several tables and no train.*: {', '.join(sorted(tables))}. Name one of them.")


def _named_labels(folder: Path) -> tuple[str, ...] | None:
    """Read ``labels.json`` beside the data: the label names in their order."""
    path = folder / "labels.json"
    if not path.is_file():
        return None
    try:
        names = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, OSError) as error:
        raise DataError(f"{path}: invalid JSON ({error}).") from error
    valid = isinstance(names, list) and len(names) > 0
    if not valid or not all(isinstance(name, str) and name.strip() for name in names) or len(set(names)) != len(names):
        raise DataError(f"{path}: expected a list of distinct label names.")
    return tuple(name.strip() for name in names)


# -- rows -----------------------------------------------------------------------------------------


def _style(rows: Sequence[Row]) -> str:
    """Tell the style by the first row's columns."""
    found = {str(name) for name in rows[0].values}
    if "messages" in found:
        return "chat"
    if "prompt" in found and found & set(_ANSWERS):
        return "plain"
    if "label" in found and found & {"sentence", "text"}:
        return "labels"
    if "text" in found:
        return "text"
    if any(isinstance(value, bytes | dict) for value in rows[0].values.values()):
        raise DataError(f"{rows[0].where}: Found {', '.join(sorted(found))}. {_WRONG_KIND}")
    names = ", ".join(map(str, rows[0].values))
    raise DataError(f"Found {names}. {_NEED}{_hint(rows[0])}")


def _hint(row: Row) -> str:
    """Guess which columns are question and answer."""
    names = [str(name) for name in row.values]
    if len(names) < 2:
        return "".join(f" Try --map {name}=text" for name in names)
    answer = next((name for name in names if name in ("label", *_ANSWERS, "output", "target")), names[1])
    question = next(name for name in names if name != answer)
    pairs = [f"--map {source}={wanted}" for source, wanted in ((question, "prompt"), (answer, "answer"))]
    return f" Try {' '.join(pairs)}"


def _examples(
    rows: Sequence[Row], style: str, labels: tuple[str, ...] | None, request: DataRequest, notes: list[str]
) -> list[TextExample]:
    kept, bad = [], []
    for row in rows:
        try:
            one = _READERS[style](row)
            if labels is not None and one.answer not in labels:
                raise DataError(
                    f"{row.where}: label '{one.answer}' is not in labels.json ({', '.join(labels)})"
                    f"{suggest(one.answer, labels)}."
                )
            kept.append(one)
        except DataError as error:
            if not request.skip_bad:
                raise
            bad.append(str(error))
    if bad:
        notes.append(f"{len(bad)} bad examples were skipped, such as {bad[0]}")
    if rows and not kept:
        raise DataError(f"No example is left: {bad[0]}")
    return kept


def _plain(row: Row) -> TextExample:
    column = next((name for name in _ANSWERS if name in row.values), "answer")
    return TextExample(row.where, _text(row, "prompt"), _text(row, column))


def _labelled(row: Row) -> TextExample:
    column = "sentence" if "sentence" in row.values else "text"
    return TextExample(row.where, _text(row, column).strip(), _text(row, "label").strip())


def _free(row: Row) -> TextExample:
    return TextExample(row.where, "", _text(row, "text"))


def _chat(row: Row) -> TextExample:
    messages = row.values.get("messages")
    if isinstance(messages, str):
        try:
            messages = json.loads(messages)
        except ValueError as error:
            raise DataError(f"{row.where}: 'messages' is invalid JSON.") from error
    if not isinstance(messages, list) or not all(isinstance(one, dict) for one in messages) or len(messages) < 2:
        raise DataError(f"{row.where}: 'messages' is a list of two or more records with role and content.")
    turns = []
    for one in messages:
        role, content = one.get("role"), one.get("content")
        if role not in _ROLES:
            raise DataError(f"{row.where}: role {role!r} is not one of {', '.join(_ROLES)}.")
        if not isinstance(content, str) or not content.strip():
            raise DataError(f"{row.where}: empty content of a message.")
        turns.append(Turn(role, content))
    if turns[-1].role != "assistant":
        raise DataError(f"{row.where}: the last message, the answer, is by '{turns[-1].role}' and not by 'assistant'.")
    prompt = "\n".join(turn.content for turn in turns[:-1])
    return TextExample(row.where, prompt, turns[-1].content, tuple(turns[:-1]))


_READERS = {"plain": _plain, "labels": _labelled, "text": _free, "chat": _chat}


def _text(row: Row, column: str) -> str:
    """Return a column's text; numbers are written out."""
    if column not in row.values:
        raise DataError(f"{row.where}: no '{column}'. Found {', '.join(map(str, row.values))}.")
    value = row.values[column]
    if isinstance(value, bool | int | float):
        value = str(value)
    if value is None or (isinstance(value, str) and not value.strip()):
        raise DataError(f"{row.where}: empty {column}. Mend it, or pass --skip-bad.")
    if not isinstance(value, str):
        raise DataError(f"{row.where}: '{column}' is not text but {type(value).__name__}.")
    return value


# -- labels, metric, parts ------------------------------------------------------------------------


def _labels_of(examples: Sequence[TextExample], style: str) -> tuple[str, ...]:
    """Return the label names found, or the answers where they form a small closed set."""
    counts = Counter(one.answer.strip() for one in examples)
    if style == "labels":
        return tuple(sorted(counts))
    if style == "text" or not 2 <= len(counts) <= _CLOSED_ANSWERS:
        return ()
    closed = min(counts.values()) >= _CLOSED_REPEATS and all(len(answer) <= _CLOSED_LENGTH for answer in counts)
    return tuple(sorted(counts)) if closed else ()


def _chosen(
    labels: tuple[str, ...], train: list[TextExample], test: list[TextExample], request: DataRequest
) -> tuple[tuple[str, ...], list[TextExample], list[TextExample]]:
    wanted = request.classes or ()
    for name in wanted:
        if name not in labels:
            raise DataError(f"{request.path}: no label '{name}' there{suggest(name, labels)}.")
    parts = [[one for one in part if one.answer.strip() in wanted] for part in (train, test)]
    return tuple(name for name in labels if name in wanted), parts[0], parts[1]


def _metric(named: str | None, style: str, labels: Sequence[str], examples: Sequence[TextExample]) -> str:
    if named is not None:
        if named not in METRICS:
            raise DataError(f"Unknown metric '{named}'{suggest(named, METRICS)}. Known: {', '.join(METRICS)}.")
        if (named == "token_accuracy") != (style == "text"):
            raise DataError(f"Metric '{named}' does not fit this data; free text, and only it, has token_accuracy.")
        return "exact_match" if named == "accuracy" and not labels else named
    if style == "text":
        return "token_accuracy"
    if labels:
        return "accuracy"
    lengths = sorted(len(one.answer.split()) for one in examples)
    return "exact_match" if lengths[len(lengths) // 2] <= _SHORT_WORDS else "rouge_l"


def _split(
    examples: Sequence[TextExample], request: DataRequest, by_answer: bool
) -> tuple[list[TextExample], list[TextExample]]:
    """Set aside ``request.held_out`` of the examples, of each label alike where there are labels."""
    groups: Mapping[str, list[TextExample]] = defaultdict(list)
    for one in examples:
        groups[one.answer.strip() if by_answer else ""].append(one)
    train: list[TextExample] = []
    test: list[TextExample] = []
    for key in sorted(groups):
        if request.split == "position":
            kept, aside = set_aside_by_position(groups[key], request.held_out, f"{request.seed}/{key}")
        else:
            kept, aside = set_aside(groups[key], request.held_out, str(request.seed), hash_of_text)
        train += kept
        test += aside
    return train, test


def _limit(examples: list[TextExample], limit: int | None, seed: str) -> list[TextExample]:
    if limit is None or len(examples) <= limit:
        return examples
    return random.Random(f"limit/{seed}").sample(examples, limit)


def message_fields(turns: Sequence[Turn]) -> list[dict[str, Any]]:
    """Return messages as chat templates take them."""
    return [{"role": turn.role, "content": turn.content} for turn in turns]
