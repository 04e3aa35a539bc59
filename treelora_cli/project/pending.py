"""A learned task that its gate refused: it waits beside the project until it is accepted or dropped.

One file, ``.treelora/pending/pending.json``, holds the ``state.json`` that accepting enters, verbatim; what that state
names lies in ``.treelora/objects`` already. It belongs to the state it grew from: any other commit voids it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from treelora_cli.errors import DamagedError, ProjectError
from treelora_cli.project.state import State, parse_state, seal, unseal
from treelora_cli.project.store import write_file

_FILE = "pending.json"
PENDING = f".treelora/pending/{_FILE}"
"""The file's name in a project."""


@dataclass(frozen=True)
class Waiting:
    """A task that waits for a decision.

    Attributes:
        task: Its name.
        reason: Which figure failed, one line without its end.
        grown_from: Digest of the state it was learned on.
        state: The ``state.json`` that accepting it enters.
    """

    task: str
    reason: str
    grown_from: str
    state: bytes


class Pending:
    """Reads and writes a project's ``.treelora/pending``."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def save(self, waiting: Waiting) -> None:
        """Put a task in the waiting place, in place of any before."""
        record = {
            "task": waiting.task,
            "reason": waiting.reason,
            "grown_from": waiting.grown_from,
            "state": waiting.state.decode(),
        }
        write_file(self.directory / _FILE, seal(record))

    def read(self) -> Waiting | None:
        """Return the task that waits, ``None`` when none does.

        Raises:
            DamagedError: The file is not what this program writes.
        """
        try:
            record = unseal(json.loads((self.directory / _FILE).read_text(encoding="utf-8")))
            texts = [record[key] for key in ("task", "reason", "grown_from", "state")]
            if not all(type(text) is str for text in texts):
                raise TypeError("text expected")
            task, reason, grown_from, state = texts
            if parse_state(state.encode()).tasks[-1].name != task:
                raise ValueError("task")
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
            raise DamagedError(f"{PENDING} is damaged. Drop it with: treelora train-task --drop") from error
        except ProjectError as error:
            raise DamagedError(f"{PENDING} is damaged. Drop it with: treelora train-task --drop") from error
        return Waiting(task, reason, grown_from, state.encode())

    def of(self, current: State) -> Waiting | None:
        """Return the task that waits on ``current``; a void or damaged one is none."""
        try:
            found = self.read()
        except DamagedError:
            return None
        return found if found is not None and found.grown_from == current.digest() else None

    def exists(self) -> bool:
        """Return whether there is a file, whatever it holds."""
        return (self.directory / _FILE).exists()

    def clear(self) -> None:
        """Delete the file."""
        (self.directory / _FILE).unlink(missing_ok=True)
