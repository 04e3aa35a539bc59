"""Text tasks: tables of prompts and answers, labelled sentences, chats or plain text, as examples not yet tokenised."""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from treelora_cli.backend.values import Change, DataRequest
from treelora_cli.data.choices import with_choices
from treelora_cli.data.columns import without_unwanted
from treelora_cli.data.examples import TextExample, learned_answers
from treelora_cli.data.held_out import (
    OTHER_DATA,
    content_hash,
    find_recorded,
    same_examples,
    set_aside,
    set_aside_by_position,
)
from treelora_cli.data.hints import refuse_answers_beside, refuse_single_messages, refuse_unknown
from treelora_cli.data.label_files import Names, label_names, named, names_beside
from treelora_cli.data.labels import (
    Several,
    column_of_names,
    label_notes,
    label_texts,
    refuse_quantities,
    refuse_several,
)
from treelora_cli.data.names import one_spelling
from treelora_cli.data.paths import paths_of
from treelora_cli.data.records import Shape, refuse_unseen, shape_of, unfolded, unused_media, unused_text
from treelora_cli.data.tables import Row, check_text
from treelora_cli.data.text_files import read_parts
from treelora_cli.data.text_scores import METRICS
from treelora_cli.errors import DataError, skipped, suggest

_CLOSED_ANSWERS, _CLOSED_LENGTH, _CLOSED_REPEATS = 32, 60, 5
_SHORT_WORDS = 5
_WEIGHTS = ("weight", "weights", "sample_weight", "loss_mask")


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
                turns = [[turn.role, turn.content, *([turn.more] if turn.more else [])] for turn in one.turns]
                last = [] if one.last is None or not one.last.more else [one.last.more]
                given = "\n".join(turn.content for turn in one.turns) or one.prompt
                content.update(json.dumps([given, one.answer, turns, *last]).encode() + b"\n")
            content.update(b"\0")
        return content.hexdigest()


def list_texts(request: DataRequest, learn: str = "all") -> TextListing:
    """Read and validate a task's examples.

    Args:
        request: Where they lie.
        learn: Which turns of the assistant in a chat are learned, ``all`` or the ``last``; where several are, answers
            are no closed set.

    Raises:
        DataError: Missing or malformed data, or data of another kind; the message names file and line.
    """
    path = paths_of(request)[0]
    notes: list[str] = []
    train_rows, test_rows = (
        with_choices(without_unwanted(unfolded(rows), notes)) for rows in read_parts(request, notes)
    )
    if not train_rows and not test_rows:  # documents without questions
        raise DataError(f"{path.name} holds no examples.")
    shape = _shape(train_rows or test_rows, request.columns)
    style = shape.style
    names = label_names(request.label_names, path) if style == "labels" else None
    if style == "labels":
        column = shape.label if names else column_of_names(train_rows or test_rows, shape.label)
        train_rows, test_rows = (_with_labels(rows, request, names, shape, column) for rows in (train_rows, test_rows))
        if names is None:
            train_rows, test_rows = _in_one_spelling(train_rows, test_rows, shape.label, notes)
    notes += _unused(train_rows or test_rows, shape, request.columns)
    notes += _weights(train_rows or test_rows, shape)
    notes += unused_media(train_rows or test_rows)
    if style != "labels":
        given = (("--label-names", request.label_names), ("--label-prefix", request.label_prefix))
        notes += [f"{flag} is not used: no column of labels is read here." for flag, one in given if one is not None]
    prefix = request.label_prefix or ""
    labels = None if names is None else tuple(prefix + name for _, name in sorted(names[1].items()))
    train = _examples(train_rows, shape, labels, request, notes)
    test = _examples(test_rows, shape, labels, request, notes)
    if labels is None:
        labels = _labels_of(train or test, style, learn)
    if request.classes is not None:
        labels, train, test = _chosen(labels, train, test, request)
    if style == "labels":
        notes += label_notes([one.answer for one in train])
        notes += names_beside(labels, path) if names is None else []
        _check_labels(labels, train, test)
    notes += _shared(train, test)
    metric = _metric(request.metric, style, labels, train or test)
    return _held_out(TextListing(style, labels, metric, train, test, tuple(notes)), request)


def _shared(train: Sequence[TextExample], test: Sequence[TextExample]) -> list[str]:
    """Return a line on held-out examples that are learned, too."""
    learned = set(map(hash_of_text, train)) if test else set()
    count = sum(hash_of_text(one) in learned for one in test)
    return [same_examples(count, len(test), "examples")] if count else []


def _held_out(listing: TextListing, request: DataRequest) -> TextListing:
    """Return a listing with its held-out examples: the recorded ones, those of its own part, or some set aside.

    Raises:
        DataError: There is nothing to learn.
    """
    train, test, recorded = listing.train, listing.test, request.recorded
    if recorded is not None and recorded.held_out is not None:
        drawn = None if request.test_limit is None else _limit(test, request.test_limit, f"test/{request.seed}")
        test, change = find_recorded(test, train, recorded.held_out, hash_of_text, drawn)
        return replace(listing, test=_limit(test, recorded.limit, f"test/{request.seed}"), change=change)
    if not train and recorded is None and not request.test_only:
        raise DataError(
            f"{paths_of(request)[0]} holds no training examples, but {len(test)} held-out ones. To learn those, rename"
            " them."
        )
    notes = listing.notes
    if not test and request.held_out > 0:
        train, test = _split(train, request, bool(listing.labels))
        notes = (*notes, f"No held-out data given: {len(test)} of {len(train) + len(test)} examples kept for scoring.")
    train = _limit(train, request.train_limit, f"train/{request.seed}")
    test = _limit(test, request.test_limit, f"test/{request.seed}")
    listing = replace(listing, train=train, test=test, notes=notes)
    if recorded is None:
        return listing
    change = None if listing.digest == recorded.digest else OTHER_DATA
    return replace(listing, test=_limit(test, recorded.limit, f"test/{request.seed}"), change=change)


def hash_of_text(one: TextExample) -> str:
    """Return the hash of an example, by which a held-out one is known again."""
    turns = [part for turn in one.turns for part in (turn.role, turn.content)]
    return content_hash(one.prompt, one.answer, *turns)


# -- labels kept elsewhere ------------------------------------------------------------------------


def _with_labels(
    rows: list[Row], request: DataRequest, names: tuple[Path, Names] | None, shape: Shape, column: str
) -> list[Row]:
    """Return rows whose labels are names: numbers are looked up, or written without ``.0``."""
    labels = label_texts(rows, column)
    if names is not None:
        labels = named(labels, rows, names[1], names[0])
    elif request.label_prefix is None and rows:
        refuse_quantities(labels, rows[0].where)
    prefix = request.label_prefix or ""

    def prefixed(label: str | None) -> str | None:
        return label if label is None or isinstance(label, Several) else prefix + label

    return [
        replace(row, values={**_without(row.values, column), shape.label: prefixed(label)})
        for row, label in zip(rows, labels, strict=True)
    ]


def _in_one_spelling(train: list[Row], test: list[Row], label: str, notes: list[str]) -> tuple[list[Row], list[Row]]:
    """Give labels that differ in case or Unicode form only one spelling, and say so."""
    spelling = one_spelling(str(row.values[label]) for row in [*train, *test] if row.values.get(label) is not None)
    changed = sorted(name for name, kept in spelling.items() if name != kept)
    if not changed:
        return train, test
    shown = ", ".join(f"'{name}' as '{spelling[name]}'" for name in changed[:6])
    notes.append(f"Labels that differ only in case or Unicode form are one label: {shown}.")
    first, second = (
        [replace(row, values={**row.values, label: spelling.get(row.values[label], row.values[label])}) for row in rows]
        for rows in (train, test)
    )
    return first, second


def _without(values: Mapping[str, object], column: str) -> dict[str, object]:
    return {name: value for name, value in values.items() if name != column}


# -- rows -----------------------------------------------------------------------------------------


def _shape(rows: Sequence[Row], columns: Mapping[str, str]) -> Shape:
    """Tell how records are read by the first one's columns."""
    found = shape_of(rows)
    if found is None or (found.style == "text" and "text" not in columns.values()):
        refuse_single_messages(rows)
    if found is None:
        refuse_unknown(rows)
    if found.style == "text" and "text" not in columns.values():
        refuse_answers_beside(rows)
    return found


def _unused(rows: Sequence[Row], shape: Shape, columns: Mapping[str, str]) -> list[str]:
    """Return a line that names columns of text which are not used, and whether they would be without ``--map``."""
    names = unused_text(rows, shape)
    used = [str(name) for name in rows[0].values if name in shape.used]
    if not names:
        return []
    own = {name: source for source, name in columns.items()}
    plain = [
        replace(row, values={own.get(name, name): value for name, value in row.values.items()}) for row in rows[:1]
    ]
    better = shape_of(plain) if columns else None
    more = ""
    if better is not None and better.used & set(names):
        read = ", ".join(str(name) for name in plain[0].values if name in better.used)
        more = f" Without --map these are read: {read}."
    return [f"Read: {', '.join(used)}. Not used, though there is text in it: {', '.join(names)}.{more}"]


def _weights(rows: Sequence[Row], shape: Shape) -> list[str]:
    """Return a line on a column by which other tools weigh examples."""
    found = [name for name in _WEIGHTS if name in rows[0].values and name not in shape.used]
    return [f"Column '{found[0]}' is not used: every example counts alike."] if found else []


def _read(row: Row, shape: Shape) -> TextExample:
    """Return a record as an example.

    Raises:
        DataError: It cannot be read, whatever is in it; names file and line.
    """
    try:
        return shape.read(row)
    except (DataError, MemoryError):
        raise
    except Exception as error:  # a record may hold anything at any place
        raise DataError(f"{row.where}: a record that cannot be read ({type(error).__name__}: {error}).") from error


def _examples(
    rows: Sequence[Row], shape: Shape, labels: tuple[str, ...] | None, request: DataRequest, notes: list[str]
) -> list[TextExample]:
    kept, bad = [], []
    for row in rows:
        try:
            check_text(row)
            if len(row.values) > 1 and all(name == value for name, value in row.values.items()):
                raise DataError(f"{row.where}: repeats the head of the table; were several joined? Remove it.")
            if isinstance(label := row.values.get(shape.label), Several):
                refuse_several(label, (), row.where)
            refuse_unseen(row)
            one = _read(row, shape)
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
        notes.append(skipped(bad, "examples"))
    if rows and not kept:
        raise DataError(f"No example is left: {bad[0]}")
    return kept


# -- labels, metric, parts ------------------------------------------------------------------------


def _labels_of(examples: Sequence[TextExample], style: str, learn: str) -> tuple[str, ...]:
    """Return the label names found, or the answers where they form a small closed set."""
    counts = Counter(one.answer.strip() for one in examples)
    if style == "labels":
        return tuple(sorted(counts))
    if style == "text" or not 2 <= len(counts) <= _CLOSED_ANSWERS:
        return ()
    if any(len(learned_answers(one, learn)) > 1 for one in examples):  # a choice among last answers is none for others
        return ()
    closed = min(counts.values()) >= _CLOSED_REPEATS and all(len(answer) <= _CLOSED_LENGTH for answer in counts)
    indented = any(one.answer[:2].isspace() and len(one.answer) > 1 for one in examples)  # one space divides
    return tuple(sorted(counts)) if closed and not indented else ()


def _check_labels(labels: Sequence[str], train: Sequence[TextExample], test: Sequence[TextExample]) -> None:
    if list(labels) == ["-1"]:
        one = (train or test)[0]
        raise DataError(f"{one.where}: every label is -1, which says that none is known; there is nothing to learn.")
    strange = next((one for one in test if one.answer not in labels), None)
    if strange is not None:
        raise DataError(f"{strange.where}: held-out label '{strange.answer}' has no training examples.")


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
