"""Score learned tasks without telling the model which task an example is from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from treelora_cli.backend.contract import Base, DataRequest, Memory, Score, TaskData
from treelora_cli.errors import DataError, ProjectError, is_out_of_memory


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


def read_held_out(base: Base, records: Mapping[str, Mapping[str, Any]], limit: int | None) -> Iterator[HeldOut]:
    """Read the held-out data of each task from where it was when the task was learned, one after the other.

    Args:
        base: The loaded base.
        records: ``task.json`` by task name.
        limit: Most examples per class or task; ``None`` keeps the recorded limit.
    """
    for name, record in records.items():
        request = DataRequest.from_json({**record["data"], **({} if limit is None else {"test_limit": limit})})
        try:
            data = base.read_task(request)
        except DataError as error:
            yield HeldOut(name, None, str(error))
            continue
        problem = "" if data.test_size else "no held-out examples"
        yield HeldOut(name, data if data.test_size else None, problem)


def score_tasks(base: Base, memory: Memory, inference: str, held_out: Iterable[HeldOut]) -> dict[str, Score]:
    """Return the score of every task that has held-out data, over everything in ``memory``."""
    with stored_fits():
        predictor = base.predictor(memory, inference)
    scores = {}
    for one in held_out:
        if one.data is not None:
            with stored_fits():
                scores[one.name] = predictor.evaluate(one.data)
    return scores


@contextmanager
def stored_fits() -> Iterator[None]:
    """Refuse a project whose stored tensors are missing, or do not fit its model or each other.

    Their hashes are right, so treelora did not lose them: somebody else wrote them, or treelora has a fault. A backend
    notices only where it computes with them, hence the kinds of errors that tensors raise there.

    Raises:
        ProjectError: One of those.
    """
    try:
        yield
    except (RuntimeError, KeyError, IndexError, ValueError, TypeError) as error:
        if is_out_of_memory(error):
            raise
        detail = (str(error).splitlines() or [""])[0]
        raise ProjectError(
            f"What this project stores does not fit its model: {type(error).__name__}: {detail}."
            " If nobody else wrote its files, run again with --debug and report it."
        ) from error
