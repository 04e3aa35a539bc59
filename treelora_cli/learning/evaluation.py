"""Score learned tasks without telling the model which task an example is from."""

from __future__ import annotations

import dataclasses
import traceback
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from treelora_cli.backend.contract import Base, TaskData
from treelora_cli.backend.values import DataRequest, Memory, Recorded, Score, layout_of
from treelora_cli.errors import BackendError, DataError, ProjectError, first_line, is_out_of_memory
from treelora_cli.learning.relocating import moved


class Scored(StrEnum):
    """What is scored once a task is learned."""

    ALL = "all"
    OWN = "own"
    NONE = "none"


@dataclass(frozen=True)
class HeldOut:
    """A learned task's held-out data, or why there is none.

    Attributes:
        name: Task name.
        data: The examples; ``None`` when they cannot be had any more.
        problem: One line when ``data`` is ``None``.
        changed: What differs from the examples that the task was learned with, one line; empty when nothing does.
    """

    name: str
    data: TaskData | None
    problem: str = ""
    changed: str = ""


_ASK = "Score what is there now with: treelora eval --changed-data"


def read_held_out(
    base: Base,
    records: Mapping[str, Mapping[str, Any]],
    limit: int | None,
    *,
    changed_data: bool = False,
    places: Mapping[str, Path] | None = None,
) -> Iterator[HeldOut]:
    """Read the held-out data of each task, the very examples of when it was learned, one task after the other.

    Args:
        base: The loaded base.
        records: ``task.json`` by task name.
        limit: Most examples per class or task; ``None`` takes all.
        changed_data: Where examples are gone or different, take what is there now; otherwise such a task has no data.
        places: Where the data of some tasks lies now.
    """
    for name, record in records.items():
        request = dataclasses.replace(DataRequest.from_json(record["data"]), recorded=Recorded.from_task(record, limit))
        if places and name in places:
            request = moved(request, [places[name]])
        try:
            data = base.read_task(request)
            change = data.change
            if change is not None and changed_data:
                now = request.test_limit if limit is None else limit
                data = base.read_task(dataclasses.replace(request, recorded=None, test_limit=now))
        except DataError as error:
            gone = [path for path in (request.path, request.val) if path is not None and not path.exists()]
            elsewhere = f" If it lies elsewhere now: treelora data {name} PATH" if gone else ""
            yield HeldOut(name, None, f"{error}{elsewhere}")
            continue
        changed = "" if change is None else change.text
        if change is not None and not change.scorable and not changed_data:
            yield HeldOut(name, None, f"{changed}. {_ASK}", changed)
        elif not data.test_size:
            yield HeldOut(name, None, "no held-out examples", changed)
        else:
            yield HeldOut(name, data, "", changed)


def measured_alike(one: HeldOut, record: Mapping[str, Any], inference: str | None, *, changed_data: bool) -> bool:
    """Return whether a fresh score stands beside the recorded ones: the same examples, answered in the same way.

    Args:
        one: What is scored now.
        record: The task's ``task.json``.
        inference: How answers are given now; ``None`` for the untouched model, whose point is the difference.
        changed_data: Whether examples that changed since are scored.
    """
    if one.data is None or (one.changed and changed_data):
        return False
    then = record.get("settings", {}).get("inference", inference)
    return one.data.test_size == record.get("test_examples") and inference in (None, then)


def score_tasks(base: Base, memory: Memory, inference: str, held_out: Iterable[HeldOut]) -> dict[str, Score]:
    """Return the score of every task that has held-out data, over everything in ``memory``."""
    with blamed(memory):
        predictor = base.predictor(memory, inference)
    scores = {}
    for one in held_out:
        if one.data is not None:
            with blamed(memory):
                scores[one.name] = predictor.evaluate(one.data)
    return scores


_TENSOR_ERRORS = (RuntimeError, KeyError, IndexError, ValueError, TypeError, AttributeError, AssertionError)
"""What code raises that computes with tensors that do not fit, and what any other fault of it looks like, too."""
_LIBRARIES = {"torch", "numpy", "scipy", "safetensors", "sklearn", "peft"}


@contextmanager
def blamed(memory: Memory) -> Iterator[None]:
    """Say whose fault it is when a backend fails on what a project stores.

    Every commit records which tensors it wrote. Where the stored ones differ, somebody else wrote them: hashes are
    right, or they would not have been read. Where they are the same, the backend is at fault.

    Args:
        memory: What the backend computes with.

    Raises:
        ProjectError: The stored tensors are not those that were committed.
        BackendError: They are.
    """
    try:
        yield
    except _TENSOR_ERRORS as error:
        if is_out_of_memory(error):
            raise
        odd, known = _misfit(memory)
        if odd:
            raise ProjectError(
                f"What this project stores does not fit its model: {odd}. Restore its files from a copy."
            ) from error
        told = f"{type(error).__name__}: {first_line(error)} ({_place(error)})."
        if known:
            raise BackendError(
                f"The backend failed: {told} What the project stores is as it was committed."
                " Run again with --debug and report it to the backend's authors."
            ) from error
        raise ProjectError(
            f"What this project stores does not fit its model, or the backend failed: {told}"
            " If nobody else wrote its files, run again with --debug and report it."
        ) from error


def _misfit(memory: Memory) -> tuple[str, bool]:
    """Return the first stored tensor that is not as it was committed, or nothing, and whether all commits are known."""
    parts = [(f"task '{task.name}'", task.stored, task.layout()) for task in memory.tasks]
    if memory.tasks:
        parts.append(("the shared statistics", memory.shared, memory.layout()))
    for where, read, layout in parts:
        if layout is None:
            continue
        found = layout_of(read())
        for name in sorted(found.keys() | layout.keys()):
            if found.get(name) != layout.get(name):
                now, then = (_shown(one.get(name)) for one in (found, layout))
                return f"{where}: '{name}' is {now}, was {then} when committed", True
    return "", all(layout is not None for _, _, layout in parts)


def _shown(kind: tuple[str, tuple[int, ...]] | None) -> str:
    return "missing" if kind is None else f"{kind[0]} {list(kind[1])}"


def _place(error: BaseException) -> str:
    """Return file and line of the innermost code that is not a library's."""
    own = [
        (frame.f_code.co_filename, line)
        for frame, line in traceback.walk_tb(error.__traceback__)
        if str(frame.f_globals.get("__name__")).partition(".")[0] not in _LIBRARIES
    ]
    name, line = own[-1]
    return f"{Path(name).name}:{line}"
