"""What is checked before a learned task is committed: thresholds on scores; watch sets, which are only scored."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from treelora_cli.backend.contract import Base
from treelora_cli.backend.runtime import Reporter
from treelora_cli.backend.values import DataRequest, Memory, Score
from treelora_cli.config import GateConfig
from treelora_cli.errors import DataError, UsageError
from treelora_cli.learning.evaluation import HeldOut, Scored, read_held_out, score_tasks
from treelora_cli.project.metrics import WatchSet
from treelora_cli.score_matrix import ScoreMatrix


@dataclass(frozen=True)
class WatchScore:
    """Score of a watch set now, and what it is measured against.

    Attributes:
        now: In [0, 1].
        reference: Of the untouched base, else of the first task after which it was scored; ``None`` for the first.
    """

    now: float
    reference: float | None


def check_gate(gate: GateConfig, evaluate: Scored) -> None:
    """Raise ``UsageError`` when there is a gate and not every task is scored."""
    if evaluate is not Scored.ALL and gate != GateConfig():
        what, left = ("--no-eval", "nothing") if evaluate is Scored.NONE else ("--score-ends", "too little")
        raise UsageError(f"{what} leaves the gate {left} to check. Leave one of them out.")


def refusal(gate: GateConfig, matrix: ScoreMatrix, watched: Mapping[str, WatchScore]) -> str | None:
    """Return which figure fails the gate, in words; ``None`` when the gate holds.

    Figures are those of the tasks that could be scored. A watch set counts towards ``max_forgetting`` by what it lost
    against its reference, and towards ``task_under`` like a task.
    """
    standing = matrix.standing()
    overall, forgetting = standing.overall(), standing.forgetting()
    if gate.fail_under is not None and (overall is None or _percent(overall) < gate.fail_under):
        return f"OP {_shown(overall)} is below fail_under {gate.fail_under:g}"
    if gate.max_forgetting is not None:
        if forgetting is None or _percent(forgetting) > gate.max_forgetting:
            return f"forgetting {_shown(forgetting)} is above max_forgetting {gate.max_forgetting:g}"
        for name, one in watched.items():
            lost = None if one.reference is None else one.reference - one.now
            if lost is not None and _percent(lost) > gate.max_forgetting:
                return f"watch set '{name}' lost {_shown(lost)}, above max_forgetting {gate.max_forgetting:g}"
    if gate.task_under is not None:
        scores = {f"task '{task}'": now for task, now in zip(standing.tasks, standing.now, strict=True)}
        scores |= {f"watch set '{name}'": one.now for name, one in watched.items()}
        for who, score in scores.items():
            newest = who == f"task '{standing.tasks[-1]}'"
            if (score is None and newest) or (score is not None and _percent(score) < gate.task_under):
                return f"{who} scores {_shown(score)}, below task_under {gate.task_under:g}"
    return None


def _percent(value: float) -> float:
    """Return percent without the last bits, which sums of decimal fractions leave."""
    return round(100 * value, 6)


def _shown(value: float | None) -> str:
    return "unknown" if value is None else f"{100 * value:.2f}"


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
    request = watch_request(request)
    data = base.read_task(request)
    if not data.test_size:
        raise DataError(f"{request.path} holds no examples to watch.")
    held_out = HeldOut(name, data)
    untouched = untouched_score(base, memory, held_out)
    if untouched is None:
        _check_labels(name, data.labels, memory)
    scores = {}
    if memory.tasks:
        scores[memory.tasks[-1].name] = score_tasks(base, memory, inference, [held_out])[name].value
    record = {"data": request.to_json(), "data_sha256": data.digest, "held_out": "".join(data.held_out)}
    return WatchSet(name, record, data.metric, data.test_size, untouched, scores)


def _check_labels(name: str, labels: Sequence[str], memory: Memory) -> None:
    """Raise ``DataError`` where labels can only be answered once a task had them, and none has."""
    known = {label for task in memory.tasks for label in task.labels}
    strange = [label for label in labels if label not in known]
    if strange:
        told = ", ".join(f"'{label}'" for label in strange[:5]) + (", ..." if len(strange) > 5 else "")
        raise DataError(f"Watch set '{name}' has labels that no task has: {told}. Learn a task with them first.")


def watch_request(request: DataRequest) -> DataRequest:
    """Return the request that reads every example of a set, none split off to learn from."""
    return dataclasses.replace(request, val=request.path, test_only=True)


def untouched_score(base: Base, memory: Memory, held_out: HeldOut) -> float | None:
    """Return the score of the model without any adapter; ``None`` where it cannot answer."""
    try:
        return score_tasks(base, memory, "base", [held_out])[held_out.name].value
    except UsageError:
        return None


def watched(base: Base, sets: Sequence[WatchSet], reporter: Reporter, limit: int | None = None) -> Iterator[HeldOut]:
    """Read the examples of every set, at most ``limit`` per class or set; what cannot be scored is said."""
    for one in read_held_out(base, {set_.name: set_.record for set_ in sets}, limit):
        if one.data is None:
            reporter.note(f"Watch set '{one.name}' is not scored: {one.problem.partition('. Score what')[0]}")
        elif one.changed:
            reporter.note(f"Watch set '{one.name}': {one.changed}.")
        yield dataclasses.replace(one, name=f"{_PREFIX}{one.name}")


def after_task(sets: Sequence[WatchSet], task: str, scores: Mapping[str, Score]) -> tuple[WatchSet, ...]:
    """Return the sets with their scores after a task."""
    found = of_sets(scores)
    return tuple(one.after(task, found[one.name].value if one.name in found else None) for one in sets)


def of_sets(scores: Mapping[str, Score]) -> dict[str, Score]:
    """Return the scores that are watch sets', by their own names."""
    return {name.removeprefix(_PREFIX): one for name, one in scores.items() if name.startswith(_PREFIX)}


def of_tasks(scores: Mapping[str, Score]) -> dict[str, Score]:
    """Return the scores that are tasks'."""
    return {name: one for name, one in scores.items() if not name.startswith(_PREFIX)}


def for_gate(before: Sequence[WatchSet], now: Sequence[WatchSet], task: str) -> dict[str, WatchScore]:
    """Return what the gate looks at: sets that were scored after ``task``, and what they had before."""
    pairs = zip(before, now, strict=True)
    return {new.name: WatchScore(new.scores[task], old.reference) for old, new in pairs if task in new.scores}
