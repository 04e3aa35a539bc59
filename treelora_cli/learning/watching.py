"""Score watch sets: read them as they were when they were registered, and say what changed."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

from treelora_cli.backend.contract import Base
from treelora_cli.backend.runtime import Reporter
from treelora_cli.backend.values import DataRequest, Memory, Score
from treelora_cli.errors import DataError, UsageError
from treelora_cli.learning.evaluation import HeldOut, read_held_out, score_tasks
from treelora_cli.learning.gate import WatchScore
from treelora_cli.project.watch import WatchSet

_PREFIX = "watch:"
"""Sets watch sets apart from tasks, whose names hold no colon."""


def register(base: Base, memory: Memory, name: str, request: DataRequest, inference: str) -> WatchSet:
    """Read a watch set and score it: by the untouched base where it can answer, and by what is learned so far.

    Args:
        base: The loaded base.
        memory: Everything learned.
        name: The set's name.
        request: Where its data lies; every example counts, none is split off.
        inference: How is answered.

    Raises:
        DataError: Bad data, or labels that no task has.
    """
    request = dataclasses.replace(request, val=request.path, test_only=True)
    data = base.read_task(request)
    if not data.test_size:
        raise DataError(f"{request.path} holds no examples to watch.")
    known = {label for task in memory.tasks for label in task.labels}
    strange = [label for label in data.labels if label not in known]
    if strange:
        told = ", ".join(f"'{label}'" for label in strange[:5]) + (", ..." if len(strange) > 5 else "")
        raise DataError(f"Watch set '{name}' has labels that no task has: {told}. Learn a task with them first.")
    held_out = [HeldOut(name, data)]
    scores = {}
    if memory.tasks:
        scores[memory.tasks[-1].name] = score_tasks(base, memory, inference, held_out)[name].value
    record = {"data": request.to_json(), "data_sha256": data.digest, "held_out": "".join(data.held_out)}
    return WatchSet(name, record, data.metric, data.test_size, _untouched(base, memory, held_out), scores)


def _untouched(base: Base, memory: Memory, held_out: Sequence[HeldOut]) -> float | None:
    """Return the score of the model without any adapter; ``None`` where it cannot answer."""
    try:
        return score_tasks(base, memory, "base", held_out)[held_out[0].name].value
    except UsageError:
        return None


def watched(base: Base, sets: Sequence[WatchSet], reporter: Reporter) -> Iterator[HeldOut]:
    """Read the examples of every set; what cannot be scored is said."""
    for one in read_held_out(base, {set_.name: set_.record for set_ in sets}, None):
        if one.data is None:
            reporter.note(f"Watch set '{one.name}' is not scored: {one.problem.partition('. Score what')[0]}")
        elif one.changed:
            reporter.note(f"Watch set '{one.name}': {one.changed}.")
        yield dataclasses.replace(one, name=f"{_PREFIX}{one.name}")


def after_task(sets: Sequence[WatchSet], task: str, scores: Mapping[str, Score]) -> tuple[WatchSet, ...]:
    """Return the sets with their scores after a task."""
    found = {name.removeprefix(_PREFIX): one.value for name, one in scores.items() if name.startswith(_PREFIX)}
    return tuple(one.after(task, found.get(one.name)) for one in sets)


def of_tasks(scores: Mapping[str, Score]) -> dict[str, Score]:
    """Return the scores that are tasks'."""
    return {name: one for name, one in scores.items() if not name.startswith(_PREFIX)}


def for_gate(before: Sequence[WatchSet], now: Sequence[WatchSet], task: str) -> dict[str, WatchScore]:
    """Return what the gate looks at: sets that were scored after ``task``, and what they had before."""
    pairs = zip(before, now, strict=True)
    return {new.name: WatchScore(new.scores[task], old.reference) for old, new in pairs if task in new.scores}
