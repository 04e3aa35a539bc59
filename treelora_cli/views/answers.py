"""What was answered for what: per class, as a confusion matrix, and the likeliest few of a prediction."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.table import Table

from treelora_cli.views.delimited import csv_line
from treelora_cli.views.scores import percent

if TYPE_CHECKING:
    from treelora_cli.backend.values import Answers


@dataclass(frozen=True)
class ClassScore:
    """One class over all scored tasks.

    Attributes:
        label: The class.
        count: Its held-out examples.
        right: Those answered with it.
        confused_with: The wrong answer given most; ``None`` when all were right.
        confused: How often that was.
    """

    label: str
    count: int
    right: int
    confused_with: str | None
    confused: int

    @property
    def accuracy(self) -> float:
        """Share answered right."""
        return self.right / self.count

    def to_json(self) -> dict[str, Any]:
        """Return it as ``eval --json`` shows it."""
        wrong = {"confused_with": self.confused_with, "confused": self.confused}
        return {"label": self.label, "accuracy": self.accuracy, "examples": self.count, **wrong}


def summed(answers: Iterable[Answers | None]) -> Counter[tuple[str, str]]:
    """Return the confusion of all tasks together."""
    total: Counter[tuple[str, str]] = Counter()
    for one in answers:
        total.update({} if one is None else dict(one.confusion))
    return total


def class_scores(confusion: Mapping[tuple[str, str], int]) -> list[ClassScore]:
    """Return each class, the least accurate first."""
    by_class: dict[str, Counter[str]] = {}
    for (label, answer), times in confusion.items():
        by_class.setdefault(label, Counter())[answer] += times
    found = []
    for label, given in by_class.items():
        wrong = sorted((-times, other) for other, times in given.items() if other != label and times)
        worst = wrong[0][1] if wrong else None
        found.append(ClassScore(label, given.total(), given[label], worst, -wrong[0][0] if wrong else 0))
    return sorted(found, key=lambda one: (one.accuracy, one.label))


def class_table(scores: list[ClassScore]) -> Table:
    """Accuracy, count and main confusion of each class."""
    table = Table(title="Classes, the least accurate first")
    for heading in ("class", "accuracy", "examples", "confused most with", "times"):
        table.add_column(heading, justify="left" if heading in ("class", "confused most with") else "right")
    for one in scores:
        times = str(one.confused) if one.confused else "-"
        table.add_row(one.label, percent(one.accuracy), str(one.count), one.confused_with or "-", times)
    return table


def confusion_csv(confusion: Mapping[tuple[str, str], int]) -> str:
    """Return the confusion matrix as CSV: a row for each right answer, a column for each given one, counts."""
    rows = list(dict.fromkeys(right for right, _ in confusion))
    columns = list(dict.fromkeys([*rows, *(given for _, given in confusion)]))
    lines = [csv_line(["right answer", *columns])]
    lines += [csv_line([right, *(confusion.get((right, given), 0) for given in columns)]) for right in rows]
    return "".join(f"{line}\n" for line in lines)


def within(top: int, answers: Iterable[Answers | None]) -> tuple[float | None, int]:
    """Return the share of examples whose right answer is among the ``top`` likeliest, and of how many that is known."""
    seen = [one for one in answers if one is not None and len(one.places) >= top]
    count = sum(sum(one.confusion.values()) for one in seen)
    return (sum(sum(one.places[:top]) for one in seen) / count if count else None), count


def within_line(top: int, share: float | None, count: int) -> str:
    """One line of ``within``."""
    if share is None:
        return f"How often the right answer is among the {top} likeliest is not known here."
    return f"The right answer is among the {top} likeliest for {percent(share)} percent of {count} examples."
