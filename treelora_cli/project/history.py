"""Earlier states of a project, and states that were undone.

A state is its ``state.json``, verbatim: ``.treelora/history`` keeps the last ones by generation (and a copy of the
current one), ``.treelora/trash`` those that ``rollback`` left. The contents that they name lie under their fixed
names or in ``.treelora/objects``, where nothing is deleted that a state in either place still needs.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from treelora_cli.errors import DamagedError, ProjectError, UsageError
from treelora_cli.project.state import State, parse_state, seal, unseal
from treelora_cli.project.store import write_file

_UNSEALED = {"tasks", "since", "back_to", "states"}
"""Keys of an entry written before entries carried a checksum."""


@dataclass(frozen=True)
class Undone:
    """One entry of the trash.

    Attributes:
        path: Its file.
        tasks: Names of the tasks that were undone, in order of arrival.
        since: When, in seconds since 1970.
        back_to: SHA-256 of the ``state.json`` that the project was brought back to.
        states: The states that went, oldest first, verbatim; the last was the current one.
    """

    path: Path
    tasks: tuple[str, ...]
    since: int
    back_to: str
    states: tuple[bytes, ...]


class History:
    """Reads and writes ``.treelora/history`` and ``.treelora/trash``."""

    def __init__(self, root: Path) -> None:
        self.states = root / ".treelora" / "history"
        self.trash = root / ".treelora" / "trash"

    # -- earlier states -------------------------------------------------------------------------------

    def keep(self, data: bytes) -> None:
        """Keep a state, verbatim, under its generation."""
        path = self.states / f"{parse_state(data).generation:06d}.json"
        if not (path.is_file() and path.read_bytes() == data):
            write_file(path, data)

    def copies(self) -> list[bytes]:
        """Return every readable state that is kept, newest generation first."""
        found = [(path, path.read_bytes()) for path in sorted(self.states.glob("*.json"), reverse=True)]
        return [data for path, data in found if _parsed(data) is not None]

    def earlier(self, current: State) -> list[bytes]:
        """Return the kept states that ``current`` grew from, oldest first."""
        return [data for _, data in self._line(current)]

    def _line(self, current: State) -> list[tuple[Path, bytes]]:
        """Files of the states before ``current``; those of a line that was rolled back are not among them."""
        line = []
        for path in sorted(self.states.glob("*.json")):
            state = _parsed(data := path.read_bytes())
            if state is not None and state.generation < current.generation and _grew_from(current, state):
                line.append((path, data))
        return line

    def before(self, current: State, task: str) -> bytes:
        """Return the state just before ``task`` was learned.

        Raises:
            ProjectError: It is not kept any more; the message says how far back rollback reaches.
        """
        index = [entry.name for entry in current.tasks].index(task)
        found = [data for data in self.earlier(current) if len(parse_state(data).tasks) == index]
        if not found:
            reach = self.reach(current)
            how_far = f"Rollback reaches back to before '{reach[0]}'" if reach else "No earlier state is kept"
            raise ProjectError(f"The state before '{task}' is not kept any more. {how_far} ('history' in settings).")
        return found[-1]

    def reach(self, current: State) -> list[str]:
        """Return the tasks that can be rolled back, in order of arrival."""
        counts = {len(parse_state(data).tasks) for data in self.earlier(current)}
        return [entry.name for index, entry in enumerate(current.tasks) if index in counts]

    def prune(self, current: State, tasks: int) -> None:
        """Drop states that neither a rollback of the last ``tasks`` tasks nor a reader still needs."""
        line = self._line(current)
        by_count = {len(parse_state(data).tasks): path for path, data in line}
        first = len(current.tasks) - tasks
        kept = {path for count, path in by_count.items() if first <= count < len(current.tasks)}
        kept |= {path for path, _ in line[-1:]}
        kept.add(self.states / f"{current.generation:06d}.json")
        for path in self.states.glob("*.json"):
            if path not in kept:
                path.unlink(missing_ok=True)

    # -- trash ----------------------------------------------------------------------------------------

    def discard(self, tasks: Sequence[str], back_to: bytes, states: Sequence[bytes]) -> None:
        """Put states into the trash: an entry counts once the project is at ``back_to``."""
        numbers = [int(path.name[:6]) for path in self._entries() if path.name[:6].isdigit()]
        path = self.trash / f"{max(numbers, default=0) + 1:06d}-{tasks[0]}.json"
        record = {
            "tasks": list(tasks),
            "since": int(time.time()),
            "back_to": digest(back_to),
            "states": [data.decode() for data in states],
        }
        write_file(path, seal(record))

    def _entries(self) -> list[Path]:
        return sorted(self.trash.glob("*.json"))

    def undone(self, current: bytes) -> list[Undone]:
        """Return the readable entries of the trash, oldest first."""
        entries = [_read_entry(path) for path in self._entries()]
        # a rollback that died before it happened, or an undo that died after: nothing was lost by either
        return [entry for entry in entries if entry is not None and entry.states[-1] != current]

    def damage(self) -> list[str]:
        """Return the names of entries of the trash that cannot be read."""
        return [f".treelora/trash/{path.name}" for path in self._entries() if _read_entry(path) is None]

    def damaged_copies(self) -> list[str]:
        """Return the names of kept states that cannot be read."""
        found = sorted(self.states.glob("*.json"))
        return [f".treelora/history/{path.name}" for path in found if _parsed(path.read_bytes()) is None]

    def drop_void(self, current: bytes) -> None:
        """Delete entries of rollbacks that never happened or were undone."""
        for path in self._entries():
            entry = _read_entry(path)
            if entry is not None and entry.states[-1] == current:
                path.unlink(missing_ok=True)

    def to_undo(self, current: bytes, task: str | None) -> Undone:
        """Return the entry that ``rollback --undo`` brings back.

        Raises:
            UsageError: The trash holds none, or none of ``task``.
            ProjectError: The project has changed since.
        """
        entries = [entry for entry in self.undone(current) if task is None or task in entry.tasks]
        if not entries:
            raise UsageError(
                "Nothing was rolled back."
                if task is None
                else f"The trash holds no task '{task}'. Run treelora doctor."
            )
        fitting = [entry for entry in entries if entry.back_to == digest(current)]
        if not fitting:
            names = "', '".join(entries[-1].tasks)
            raise ProjectError(
                f"'{names}' can be brought back only to the state that was rolled back to, and the project has"
                " changed since. Roll back what came after, or undo that rollback first."
            )
        return fitting[-1]

    def empty(self) -> int:
        """Delete every entry of the trash; returns how many there were."""
        entries = self._entries()
        for path in entries:
            path.unlink(missing_ok=True)
        return len(entries)

    def kept_states(self, current: bytes) -> list[State]:
        """Return every state in history and trash.

        Raises:
            DamagedError: One of them cannot be read, so that nobody knows what it needs.
        """
        if self.damage():
            raise DamagedError(f"{self.damage()[0]} is damaged. Run treelora doctor.")
        return [parse_state(data) for data in self.readable_states(current)]

    def readable_states(self, current: bytes) -> list[bytes]:
        """Return the states in history and trash that can be read."""
        return [*self.copies(), *(data for entry in self.undone(current) for data in entry.states)]


def digest(data: bytes) -> str:
    """Return the SHA-256 of a ``state.json``."""
    return hashlib.sha256(data).hexdigest()


def _parsed(data: bytes) -> State | None:
    try:
        return parse_state(data)
    except ProjectError:
        return None


def _grew_from(later: State, earlier: State) -> bool:
    names = [task.directory for task in earlier.tasks]
    return [task.directory for task in later.tasks[: len(names)]] == names


def _read_entry(path: Path) -> Undone | None:
    try:
        record = json.loads(path.read_bytes())
        if set(record) != _UNSEALED:
            record = unseal(record)
        states = tuple(text.encode() for text in record["states"])
        for data in states:
            parse_state(data)
        tasks = tuple(str(name) for name in record["tasks"])
        if not (states and tasks):
            return None
        return Undone(path, tasks, int(record["since"]), str(record["back_to"]), states)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError, ProjectError):
        return None
