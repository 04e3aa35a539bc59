"""Score learned tasks without telling the model which task an example is from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from treelora_cli.backend import Base, DataRequest, Memory, Score, TaskData
from treelora_cli.errors import DataError


@dataclass(frozen=True)
class HeldOut:
    """A learned task's held-out data, or why there is none.

    Attributes:
        name: Task name.
        data: The examples; ``None`` when they cannot be had any more.
        problem: One line when ``data`` is ``None``.
    """

    name: str
    data: TaskData | None
    problem: str = ""


def read_held_out(base: Base, records: Mapping[str, Mapping[str, Any]], limit: int | None) -> list[HeldOut]:
    """Read the held-out data of each task from where it was when the task was learned.

    Args:
        base: The loaded base.
        records: ``task.json`` by task name.
        limit: Most examples per class or task; ``None`` keeps the recorded limit.
    """
    found = []
    for name, record in records.items():
        request = DataRequest.from_json({**record["data"], **({} if limit is None else {"test_limit": limit})})
        try:
            data = base.read_task(request)
        except DataError as error:
            found.append(HeldOut(name, None, str(error)))
            continue
        problem = "" if data.test_size else "no held-out examples"
        found.append(HeldOut(name, data if data.test_size else None, problem))
    return found


def score_tasks(base: Base, memory: Memory, inference: str, held_out: Sequence[HeldOut]) -> dict[str, Score]:
    """Return the score of every task that has held-out data, over everything in ``memory``."""
    predictor = base.predictor(memory, inference)
    return {one.name: predictor.evaluate(one.data) for one in held_out if one.data is not None}
