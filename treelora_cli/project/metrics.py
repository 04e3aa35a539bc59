"""What is kept of scores beside their matrix: what was answered for what, and the watch sets. Counts, no example."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from treelora_cli.errors import DamagedError, UsageError

ANSWERS = "metrics/answers.json"
"""The file's name in a project."""
_SPREAD = 200
"""Familiarities kept of a task."""
_FAMILIAR = "familiarity"
"""Where they are kept; under ``familiar`` older versions kept values on another scale, which are left alone."""
_KEPT = 10
"""Given answers kept for each right one, the most frequent."""

Counts = Mapping[tuple[str, str], int]


@dataclass(frozen=True)
class TaskAnswers:
    """Of one task's held-out examples.

    Attributes:
        confusion: Examples by (right answer, given answer).
        routes: Examples by the task that answered.
        familiar: How familiar examples were, in order; empty where the backend does not say, and in older projects.
    """

    confusion: Counts
    routes: Mapping[str, int]
    familiar: tuple[float, ...] = ()

    def routed_to(self, task: str) -> float | None:
        """Return the share of the examples that this task answered; ``None`` where nothing routes."""
        total = sum(self.routes.values())
        return self.routes.get(task, 0) / total if total else None


def answers_document(answers: Mapping[str, TaskAnswers]) -> dict[str, Any]:
    """Return what the file holds: of each right answer the most frequent given ones."""
    found: dict[str, dict[str, Any]] = {}
    for task, one in answers.items():
        by_right: dict[str, list[tuple[int, str]]] = {}
        for (right, given), count in one.confusion.items():
            by_right.setdefault(right, []).append((-count, given))
        kept = [[right, given, -n] for right, pairs in by_right.items() for n, given in sorted(pairs)[:_KEPT]]
        found[task] = {"confusion": kept, "routes": sorted(([*pair] for pair in one.routes.items()), key=str)}
        if one.familiar:
            found[task][_FAMILIAR] = [float(f"{value:.6g}") for value in _spread(sorted(one.familiar))]
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
            routes = {_text(name): _count(n) for name, n in one["routes"]}
            found[task] = TaskAnswers(confusion, routes, tuple(map(_finite, one.get(_FAMILIAR, ()))))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedError(f"{ANSWERS} is malformed ({type(error).__name__}). Run treelora doctor.") from error
    return found


def _spread(values: Sequence[float]) -> Sequence[float]:
    """Return some of the values, as many from each part of their range."""
    if len(values) <= _SPREAD:
        return values
    return [values[(2 * place + 1) * len(values) // (2 * _SPREAD)] for place in range(_SPREAD)]


def _finite(value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError("number expected")
    return float(value)


def _text(value: Any) -> str:
    if type(value) is not str:
        raise TypeError("text expected")
    return value


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError("count")
    return value


WATCH = "metrics/watch.json"
"""The file's name in a project."""


@dataclass(frozen=True)
class WatchSet:
    """One registered set and its scores.

    Attributes:
        name: As the user gave it.
        record: Where its data lies and what it was: ``data``, ``data_sha256`` and ``held_out``, as in ``task.json``.
        metric: Its score's name.
        examples: How many there are.
        untouched: Score of the untouched base, in [0, 1]; ``None`` where that cannot answer.
        scores: Score after a task, by the task's name in order of arrival.
    """

    name: str
    record: Mapping[str, Any]
    metric: str
    examples: int
    untouched: float | None
    scores: Mapping[str, float]

    @property
    def reference(self) -> float | None:
        """What later scores are measured against: the untouched base's, else the first there is."""
        return self.untouched if self.untouched is not None else next(iter(self.scores.values()), None)

    @property
    def now(self) -> float | None:
        """The newest score."""
        return next(reversed(tuple(self.scores.values())), None)

    def after(self, task: str, score: float | None) -> WatchSet:
        """Return the set after one more task; ``None`` where it could not be scored."""
        return self if score is None else dataclasses.replace(self, scores={**self.scores, task: score})


def check_new(sets: Sequence[WatchSet], name: str) -> None:
    """Raise ``UsageError`` when there is a set of this name."""
    if name in {one.name for one in sets}:
        raise UsageError(f"Watch set '{name}' exists. Choose another name, or: treelora watch remove {name}")


def without(sets: Sequence[WatchSet], name: str) -> tuple[WatchSet, ...]:
    """Return the sets but one.

    Raises:
        UsageError: There is none of this name.
    """
    if name not in {one.name for one in sets}:
        known = ", ".join(one.name for one in sets) or "none yet"
        raise UsageError(f"No watch set '{name}' in this project. Known: {known}.")
    return tuple(one for one in sets if one.name != name)


def watch_document(sets: Sequence[WatchSet]) -> dict[str, Any]:
    """Return what the file holds; lists keep the order of tasks, which sorted keys would not."""
    return {"sets": [{**vars(one), "scores": [[*pair] for pair in one.scores.items()]} for one in sets]}


def parse_watch(data: bytes) -> tuple[WatchSet, ...]:
    """Read the file.

    Raises:
        DamagedError: It is not what this program writes.
    """
    from treelora_cli.backend.values import DataRequest, Recorded

    try:
        found = []
        for one in json.loads(data)["sets"]:
            scores = {_text(task): _score(score) for task, score in one["scores"]}
            untouched = None if one["untouched"] is None else _score(one["untouched"])
            record = dict(one["record"])
            DataRequest.from_json(record["data"])
            Recorded.from_task(record)
            count = one["examples"]
            if type(count) is not int or count < 1:
                raise ValueError("examples")
            found.append(WatchSet(_text(one["name"]), record, _text(one["metric"]), count, untouched, scores))
        if len({one.name for one in found}) != len(found):
            raise ValueError("names")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedError(f"{WATCH} is malformed ({type(error).__name__}). Run treelora doctor.") from error
    return tuple(found)


def _score(value: Any) -> float:
    if type(value) not in (int, float) or not 0 <= value <= 1:
        raise ValueError("score")
    return float(value)
