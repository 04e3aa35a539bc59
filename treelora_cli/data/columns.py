"""Names of columns that people give: the known ones in any case, what is wanted of rated answers, and a guess."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from shlex import quote
from typing import Any

from treelora_cli.data.tables import Row, plain_name
from treelora_cli.errors import DataError

ANSWERS = ("answer", "completion", "response")
CHATS = ("messages", "conversations", "conversation")
PASSAGES = ("context", "passage", "article", "paragraph", "story")
CHOICES = ("choices", "options")
PAIRS = (("premise", "hypothesis"), ("sentence1", "sentence2"), ("question1", "question2"))
TEXTS = (
    *("sentence", "text", "review", "comment", "tweet", "message", "content", "utterance", "headline"),
    *("question_text", "comment_text", "review_text"),
)
"""Columns of a text that has a label, the likeliest first."""
LABELS = ("labels", "class", "target", "sentiment", "intent", "emotion", "category")
"""Columns of labels beside ``label``, where they hold few short values; otherwise something else."""
ASKED = (
    *(("input", "output"), ("query", "response"), ("query", "answer"), ("inputs", "targets"), ("source", "target")),
    *(("document", "summary"), ("dialogue", "summary"), ("article", "summary"), ("article", "highlights")),
)
"""Columns of a prompt and its answer that go by other names."""
PREFERRED, REFUSED = "chosen", "rejected"
"""Columns of the better and the worse of two answers."""
_OTHERS = ("prompt", "instruction", "system", "history", "tools", "functions", "question", "answers", "answerKey")
_KNOWN = dict.fromkeys(
    [
        *(*CHATS, *ANSWERS, *PASSAGES, *CHOICES, *TEXTS, "label", *LABELS, *_OTHERS, PREFERRED, REFUSED, "split"),
        *(name for pair in (*PAIRS, *ASKED) for name in pair),
    ]
)
_SPELLED = {
    **dict.fromkeys(("systemprompt", "systeminstruction", "systemmessage"), "system"),
    **{plain_name(known): known for known in reversed(_KNOWN)},
}
"""The known name of a column by its own without case and signs."""
_FEW = 2


def in_known_names(rows: Sequence[Row]) -> list[Row]:
    """Return rows whose columns that are known but for case and signs, such as ``Text``, go by the known name."""
    names = dict.fromkeys(name for row in rows for name in row.values)
    found = {name: known for name in names if (known := _SPELLED.get(plain_name(str(name)))) is not None}
    chosen = list(found.values())
    new = {name: known for name, known in found.items() if known not in names and chosen.count(known) == 1}
    if not new:
        return list(rows)
    return [replace(row, values={new.get(name, name): value for name, value in row.values.items()}) for row in rows]


def has_text_alone(rows: Sequence[Row]) -> bool:
    """Return whether a table has a column of texts, and none of the known ones that hold what is to be learned."""
    names = set(rows[0].values) if rows else set()
    learned = {"label", *LABELS, *ANSWERS, *CHATS, "answers", "answerKey", PREFERRED, *(answer for _, answer in ASKED)}
    return bool(names & set(TEXTS)) and not names & learned


def without_unwanted(rows: Sequence[Row], notes: list[str]) -> list[Row]:
    """Leave out prompts whose answer is marked as unwanted by a truth value in ``label``, and say so.

    Raises:
        DataError: There are no others.
    """
    names = {name for row in rows for name in row.values}
    if not ({"prompt", "label"} <= names and names & set(ANSWERS)):
        return list(rows)
    labels = [row.values.get("label") for row in rows]
    known = [label for label in labels if label is not None]
    if not known or not all(isinstance(label, bool) or str(label).lower() in ("true", "false") for label in known):
        return list(rows)
    kept = [row for row, label in zip(rows, labels, strict=True) if str(label).lower() != "false"]
    if not kept:
        raise DataError(f"{rows[0].where}: by label all answers are unwanted; there is nothing to learn.")
    if len(kept) < len(rows):
        notes.append(f"{len(rows) - len(kept)} answers with label false are unwanted ones and were left out.")
    return kept


def hint(rows: Sequence[Row]) -> str:
    """Guess which columns are question and answer, or text and label."""
    names = [str(name) for name in rows[0].values]
    if len(names) < _FEW:
        return "".join(f" Try --map {quote(f'{name}=text')}" for name in names)
    if PREFERRED in names and "prompt" not in names:
        return f" Try --map {PREFERRED}=text"
    answers = ("label", *ANSWERS, "output", "target", *LABELS, "summary", "solution", "translation")
    answer = next((name for name in answers if name in names), None)
    recurring = _recurring(rows, names if answer is None else [answer])
    label = recurring if answer in (None, "label", *LABELS) else None
    answer = answer or label or names[1]
    others = [name for name in names if name != answer]
    longest = max(_length(rows, name) for name in others)
    question = next((name for name in others if _length(rows, name) * _FEW >= longest), others[0])
    wanted = ("text", "label") if label else ("prompt", "answer")
    pairs = zip((question, answer), wanted, strict=True)
    return " Try " + " ".join(f"--map {quote(f'{source}={name}')}" for source, name in pairs)


def hint_of_records(value: dict[Any, Any], column: str) -> str:
    """Guess which of the texts in a column of records, such as ``translation``, are question and answer."""
    texts = [str(name) for name, one in value.items() if isinstance(one, str)]
    if len(texts) < _FEW:
        return ""
    pairs = zip(texts, ("prompt", "answer"), strict=False)
    return " Try " + " ".join(f"--map {quote(f'{column}.{name}={wanted}')}" for name, wanted in pairs)


def _length(rows: Sequence[Row], name: str) -> int:
    texts = [value for row in rows if isinstance(value := row.values.get(name), str)]
    return sum(map(len, texts)) // len(rows)


def _recurring(rows: Sequence[Row], names: Sequence[str]) -> str | None:
    """Return the column whose values are the fewest, where they come back."""
    counted = {name: len({str(row.values.get(name)) for row in rows}) for name in names}
    several = {name: count for name, count in counted.items() if _FEW <= count <= len(rows) // _FEW}
    return min(several, key=lambda name: several[name]) if several else None
