"""Predictions as a table, CSV or JSON lines."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.table import Table

from treelora_cli.views.scores import percent

if TYPE_CHECKING:
    from treelora_cli.algorithm.tree import Tree
    from treelora_cli.backend.values import Prediction

FORMATS = ("table", "csv", "jsonl")


@dataclass(frozen=True)
class Shape:
    """What is shown of each prediction.

    Attributes:
        top: Answers named, the chosen one included.
        explain: Also show how sure the choice is and where in the tree the task stands.
        beside: Tasks in the same leaf of the tree, by task; asked for by ``explain``.
        known: Also say, in JSON, whether an input is known: there is a threshold.
    """

    top: int = 1
    explain: bool = False
    beside: dict[str, list[str]] | None = None
    known: bool = False

    @property
    def columns(self) -> list[str]:
        """Headings, in order."""
        columns = ["input", "output", "task", "confidence"]
        columns += ["others"] if self.top > 1 else []
        return [*columns, "margin", "branch"] if self.explain else columns

    def record(self, given: str, answer: Prediction) -> dict[str, Any]:
        """Return one prediction for ``--json`` and JSON lines."""
        found: dict[str, Any] = {
            "input": given,
            "output": answer.output,
            "task": answer.task,
            "confidence": answer.confidence,
        }
        if answer.task_confidence is not None:
            found |= {"task_confidence": answer.task_confidence, "task_margin": answer.task_margin}
        if self.known:
            found["known"] = answer.known
        if self.top > 1:
            others = answer.others[: self.top - 1]
            found["others"] = [{"output": output, "confidence": sure} for output, sure in others]
        if self.explain:
            found["margin"] = answer.margin
            found["branch"] = None if answer.task is None else (self.beside or {}).get(answer.task)
        return found

    def cells(self, given: str, answer: Prediction) -> list[str]:
        """Return one prediction as text, in the order of ``columns``."""
        cells = [given, answer.output, answer.task or "-", percent(answer.confidence)]
        if self.top > 1:
            others = answer.others[: self.top - 1]
            cells.append(", ".join(f"{output} {percent(sure)}" for output, sure in others) or "-")
        if self.explain:
            branch = [] if answer.task is None else (self.beside or {}).get(answer.task, [])
            cells += [percent(answer.margin), ", ".join(branch) or "-"]
        return cells


def leaves(tree: Tree, names: Sequence[str]) -> dict[str, list[str]]:
    """Return the tasks of each task's leaf, itself included."""
    return {
        names[task]: [names[one] for one in node.members]
        for node in tree.nodes
        if not node.children
        for task in node.members
    }


def prediction_table(rows: Sequence[Sequence[str]], shape: Shape) -> Table:
    """All predictions as one table."""
    table = Table()
    for heading in shape.columns:
        table.add_column(heading, justify="right" if heading in ("confidence", "margin") else "left")
    for row in rows:
        table.add_row(*row)
    return table


def json_line(record: dict[str, Any]) -> str:
    """Return one line of JSON."""
    return json.dumps(record, ensure_ascii=False)
