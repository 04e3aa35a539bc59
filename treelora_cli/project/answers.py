"""What was answered for what when tasks were last scored: ``metrics/answers.json``. Counts, no example."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from treelora_cli.errors import DamagedError

ANSWERS = "metrics/answers.json"
"""The file's name in a project."""
_KEPT = 10
"""Given answers kept for each right one, the most frequent."""

Counts = Mapping[tuple[str, str], int]


@dataclass(frozen=True)
class TaskAnswers:
    """Of one task's held-out examples.

    Attributes:
        confusion: Examples by (right answer, given answer).
        routes: Examples by the task that answered.
    """

    confusion: Counts
    routes: Mapping[str, int]


def answers_document(answers: Mapping[str, TaskAnswers]) -> dict[str, Any]:
    """Return what the file holds: of each right answer the most frequent given ones."""
    found = {}
    for task, one in answers.items():
        by_right: dict[str, list[tuple[int, str]]] = {}
        for (right, given), count in one.confusion.items():
            by_right.setdefault(right, []).append((-count, given))
        kept = [[right, given, -n] for right, pairs in by_right.items() for n, given in sorted(pairs)[:_KEPT]]
        found[task] = {"confusion": kept, "routes": sorted(([*pair] for pair in one.routes.items()), key=str)}
    return {"tasks": found}


def parse_answers(data: bytes) -> dict[str, TaskAnswers]:
    """Read the file.

    Raises:
        DamagedError: It is not what this program writes.
    """
    try:
        found = {}
        for task, one in json.loads(data)["tasks"].items():
            confusion = {(_text(right), _text(given)): _count(n) for right, given, n in one["confusion"]}
            found[task] = TaskAnswers(confusion, {_text(name): _count(n) for name, n in one["routes"]})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedError(f"{ANSWERS} is malformed ({type(error).__name__}). Run treelora doctor.") from error
    return found


def _text(value: Any) -> str:
    if type(value) is not str:
        raise TypeError("text expected")
    return value


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError("count")
    return value
