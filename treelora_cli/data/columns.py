"""Names of columns that people give: the known ones in any case, what is wanted of rated answers, and a guess."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from treelora_cli.data.tables import Row, plain_name
from treelora_cli.errors import DataError

ANSWERS = ("answer", "completion", "response")
CHATS = ("messages", "conversations", "conversation")
PASSAGES = ("context", "passage", "article", "paragraph", "story", "premise")
CHOICES = ("choices", "options")
PAIRS = (
    *(("premise", "hypothesis"), ("sentence1", "sentence2"), ("question1", "question2"), ("question", "sentence")),
    *(("text1", "text2"), ("text", "text_pair"), ("sentence_A", "sentence_B"), ("claim", "evidence")),
)
TEXTS = (
    *("sentence", "text", "review", "comment", "tweet", "message", "content", "utterance", "headline"),
    *("question_text", "comment_text", "review_text"),
)
"""Columns of a text that has a label, the likeliest first."""
LABELS = ("labels", "class", "target", "sentiment", "intent", "emotion", "category", "rating", "stars")
"""Columns of labels beside ``label``, where they hold few short values; otherwise something else."""
ASKED = (
    *(("input", "output"), ("query", "response"), ("query", "answer"), ("inputs", "targets"), ("source", "target")),
    *(("document", "summary"), ("dialogue", "summary"), ("article", "summary"), ("article", "highlights")),
    ("text", "summary"),
)
"""Columns of a prompt and its answer that go by other names."""
PREFERRED, REFUSED = "chosen", "rejected"
"""Columns of the better and the worse of two answers."""
_ASKING = {"prompt", "instruction", "question", "query", "input"}
_TRUTHS = {"true", "false", "0", "1"}
_OTHERS = ("prompt", "instruction", "system", "history", "tools", "functions", "question", "answers", "answerKey")
_KNOWN = dict.fromkeys(
    [
        *(*CHATS, *ANSWERS, *PASSAGES, *CHOICES, *TEXTS, "label", *LABELS, *_OTHERS, PREFERRED, REFUSED, "split"),
        *(name for pair in (*PAIRS, *ASKED) for name in pair),
    ]
)
_SPELLED = {
    **dict.fromkeys(("systemprompt", "systeminstruction", "systemmessage"), "system"),
    "questionstem": "question",
    **{plain_name(known): known for known in reversed(_KNOWN)},
}
"""The known name of a column by its own without case and signs."""


def in_known_names(rows: Sequence[Row]) -> list[Row]:
    """Return rows whose columns that are known but for case and signs, such as ``Text``, go by the known name."""
    names = dict.fromkeys(name for row in rows for name in row.values)
    found = {name: known for name in names if (known := _SPELLED.get(plain_name(str(name)))) is not None}
    chosen = list(found.values())
    new = {name: known for name, known in found.items() if known not in names and chosen.count(known) == 1}
    if set(PASSAGES) & set(chosen) and not {"question", "prompt"} & set(chosen):  # asked about a passage
        new |= {name: "question" for name, known in found.items() if known == "query" and chosen.count(known) == 1}
    if not new:
        return list(rows)
    return [replace(row, values={new.get(name, name): value for name, value in row.values.items()}) for row in rows]


def has_text_alone(rows: Sequence[Row]) -> bool:
    """Return whether a table has a column of texts, and none of the known ones that hold what is to be learned."""
    names = set(rows[0].values) if rows else set()
    learned = {"label", *LABELS, *ANSWERS, *CHATS, "answers", "answerKey", PREFERRED, *(answer for _, answer in ASKED)}
    return bool(names & set(TEXTS)) and not names & learned


def without_unwanted(rows: Sequence[Row], notes: list[str]) -> list[Row]:
    """Leave out answers that are marked as unwanted ones by a truth value in ``label`` or ``kto_tag``, and say so.

    Raises:
        DataError: There are no others, or ``label`` is 0 or 1 beside answers, which may mean that.
    """
    names = {name for row in rows for name in row.values}
    answered = bool(names & _ASKING) and bool(names & {*ANSWERS, "output"})
    mark = next((name for name in ("kto_tag", "label") if name in names), None)
    if mark is None or not (answered or names & set(CHATS)):
        return list(rows)
    labels = [str(row.values.get(mark)).lower() for row in rows]
    known = {label for label, row in zip(labels, rows, strict=True) if row.values.get(mark) is not None}
    if known == {"0", "1"} and mark == "label":
        raise DataError(
            f"{rows[0].where}: 'label' is 0 or 1 beside answers. If 0 marks those that are not to be learned, pass"
            " --map label=kto_tag; if all are to be learned, --map label=other"
        )
    if not known or not known <= ({"true", "false"} if mark == "label" else _TRUTHS):
        return list(rows)
    kept = [row for row, label in zip(rows, labels, strict=True) if label not in ("false", "0")]
    if not kept:
        raise DataError(f"{rows[0].where}: by {mark} all answers are unwanted; there is nothing to learn.")
    if len(kept) < len(rows):
        notes.append(f"{len(rows) - len(kept)} answers with {mark} false are unwanted ones and were left out.")
    return kept
