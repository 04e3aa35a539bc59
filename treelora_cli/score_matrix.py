"""The accuracy matrix and what is read off it.

``a[i][j]`` is the score on task ``j`` of the model after task ``i`` (both from 0), over everything seen by
then. ``None`` where a task was not scored, for instance because its held-out data is gone.

Source: TreeLoRA section 4.1 (OP, BWT). The paper's BWT is positive when the model forgets; here that figure
is called forgetting, and BWT keeps the field's usual sign.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Row = tuple[float | None, ...]


@dataclass(frozen=True)
class Standing:
    """Scores of some tasks at one moment, and what they were.

    The figures are means over the tasks whose scores are known.

    Attributes:
        tasks: Names in order of arrival.
        learned: Score just after each was learned, ``a[j][j]``.
        before: Score after the last task but one.
        now: Score now.
    """

    tasks: tuple[str, ...]
    learned: Row
    before: Row
    now: Row

    def overall(self) -> float | None:
        """OP: mean score now."""
        return _mean(self.now)

    def forgetting(self) -> float | None:
        """Mean of ``a[j][j] - now``; lower is better (the paper's BWT)."""
        return _mean([None if a is None or b is None else a - b for a, b in zip(self.learned, self.now, strict=True)])

    def backward_transfer(self) -> float | None:
        """BWT with the field's sign: mean of ``now - a[j][j]`` over all but the last task."""
        pairs = list(zip(self.learned, self.now, strict=True))[:-1]
        return _mean([None if a is None or b is None else b - a for a, b in pairs])


@dataclass(frozen=True)
class ScoreMatrix:
    """Scores in [0, 1]; row ``i`` has ``i + 1`` entries.

    Attributes:
        tasks: Task names in order of arrival.
        rows: One row per learned task.
    """

    tasks: tuple[str, ...] = ()
    rows: tuple[Row, ...] = ()

    def with_row(self, task: str, scores: Sequence[float | None]) -> ScoreMatrix:
        """Return the matrix after one more task; ``scores`` covers all tasks, the new one last."""
        if len(scores) != len(self.tasks) + 1:
            raise ValueError(f"a row for task {len(self.tasks)} needs {len(self.tasks) + 1} scores")
        return ScoreMatrix((*self.tasks, task), (*self.rows, tuple(scores)))

    def standing(
        self,
        now: Mapping[str, float] | None = None,
        tasks: Sequence[str] | None = None,
        compared: Container[str] | None = None,
    ) -> Standing:
        """Return where tasks stand: by the last row, or by scores measured ``now``.

        Args:
            now: Fresh scores by task name, in place of the last row.
            tasks: Only these, in this order of arrival; all when ``None``.
            compared: Tasks whose fresh score was measured as the recorded ones were; the others' are left out, so
                that no difference is read off figures of two kinds. All when ``None``.
        """
        chosen = [index for index, task in enumerate(self.tasks) if tasks is None or task in tasks]
        before = (*self.rows[-2], None) if len(self.rows) > 1 else (None,) * len(self.rows)
        current = self.rows[-1] if now is None and self.rows else tuple((now or {}).get(t) for t in self.tasks)

        def recorded(index: int, score: float | None) -> float | None:
            return score if compared is None or self.tasks[index] in compared else None

        return Standing(
            tuple(self.tasks[index] for index in chosen),
            tuple(recorded(index, self.rows[index][-1]) for index in chosen),
            tuple(recorded(index, before[index]) for index in chosen),
            tuple(current[index] for index in chosen),
        )

    def overall(self) -> float | None:
        """OP of the last row; ``None`` while it is not complete."""
        return self.standing().overall() if self._complete() else None

    def forgetting(self) -> float | None:
        """Forgetting by the last row; ``None`` while it is not complete."""
        return self.standing().forgetting() if self._complete() else None

    def backward_transfer(self) -> float | None:
        """BWT by the last row; ``None`` while it is not complete."""
        return self.standing().backward_transfer() if self._complete() else None

    def _complete(self) -> bool:
        return bool(self.rows) and None not in self.rows[-1]

    def to_json(self) -> dict[str, Any]:
        """Return tasks, rows and the figures read off them."""
        return {
            "tasks": list(self.tasks),
            "rows": [list(row) for row in self.rows],
            "op": self.overall(),
            "forgetting": self.forgetting(),
            "bwt": self.backward_transfer(),
        }

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> ScoreMatrix:
        """Read what ``to_json`` wrote.

        Raises:
            ValueError: Not a lower triangle of scores in [0, 1].
        """
        try:
            tasks, rows = tuple(record["tasks"]), tuple(tuple(row) for row in record["rows"])
        except (KeyError, TypeError) as error:
            raise ValueError("malformed score matrix") from error
        sound = [len(row) for row in rows] == list(range(1, len(tasks) + 1))
        sound = sound and all(isinstance(task, str) for task in tasks)
        sound = sound and all(
            score is None or (isinstance(score, int | float) and 0 <= score <= 1) for row in rows for score in row
        )
        if not sound:
            raise ValueError("malformed score matrix")
        return cls(tasks, rows)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
