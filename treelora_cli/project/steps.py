"""What every training step showed, as JSON lines: in ``.treelora/run`` while a task is learned, then with the task."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from treelora_cli.errors import DamagedError
from treelora_cli.project.store import make_directory

STEPS = "steps.jsonl"
"""The file's name, in ``.treelora/run`` and in a task's directory."""


@dataclass(frozen=True)
class Step:
    """One optimizer step.

    Attributes:
        step: From 1.
        loss: The task's own loss.
        pull: The method's term beside it; ``None`` without one.
        lr: Learning rate.
        seconds: Time of the step.
        examples_per_second: Examples of a full batch by that time.
        selected: Index of the earlier task selected for each layer, (D,); empty without a search.
    """

    step: int
    loss: float
    pull: float | None
    lr: float
    seconds: float
    examples_per_second: float
    selected: tuple[int, ...] = ()


class StepLog:
    """Writes the steps of the task in training.

    Args:
        path: The file; absent before the first step.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def begin(self, taken: int) -> None:
        """Keep the lines of the first ``taken`` steps, which are continued, and no other."""
        try:
            kept = self.path.read_bytes().splitlines(keepends=True)[:taken]
        except OSError:
            kept = []
        make_directory(self.path.parent)
        self.path.write_bytes(b"".join(kept) if len(kept) == taken else b"")

    def add(self, steps: Iterable[Step]) -> None:
        """Write some more steps."""
        lines = "".join(json.dumps(vars(one), separators=(",", ":")) + "\n" for one in steps)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(lines)

    def read(self) -> bytes:
        """Return all lines; nothing before the first step."""
        return self.path.read_bytes() if self.path.is_file() else b""

    def clear(self) -> None:
        """Delete the file."""
        self.path.unlink(missing_ok=True)


def parse_steps(data: bytes) -> tuple[Step, ...]:
    """Read a task's steps.

    Raises:
        DamagedError: They are not what this program writes.
    """
    try:
        return tuple(_step(json.loads(line)) for line in data.splitlines())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise DamagedError(f"{STEPS} is malformed ({type(error).__name__}). Run treelora doctor.") from error


def _step(record: Mapping[str, Any]) -> Step:
    selected = tuple(record["selected"])
    if type(record["step"]) is not int or not all(type(one) is int and one >= 0 for one in selected):
        raise TypeError("step")
    pull = None if record["pull"] is None else float(record["pull"])
    loss, lr, seconds, rate = (float(record[key]) for key in ("loss", "lr", "seconds", "examples_per_second"))
    return Step(record["step"], loss, pull, lr, seconds, rate, selected)
