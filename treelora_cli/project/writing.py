"""From one state of a project to the next: contents first, then ``state.json``; a death between does no harm."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from treelora_cli.config import DEFAULTS, load_config
from treelora_cli.errors import ConfigError, ProjectError, ResourceError
from treelora_cli.project.history import History
from treelora_cli.project.lock import signals_held
from treelora_cli.project.state import CONFIG, STATE, State, TaskEntry, parse_state, read_state
from treelora_cli.project.store import Content, FileRecord, Store, as_user_error, write_file
from treelora_cli.project.unfinished import Pending
from treelora_cli.version import __version__

WRITTEN = ("history", "trash", "run", "pending")
"""Folders of ``.treelora`` that are written by name; ``objects`` is written by content."""


class Writer:
    """Replaces a project's state; the caller holds the lock.

    Args:
        root: The project's directory.
        state: The state it is in.
    """

    def __init__(self, root: Path, state: State) -> None:
        self.root = root
        self.state = state
        self.store = Store(root)
        self.history = History(root)
        self.pending = Pending(root / ".treelora" / "pending")

    def advance(
        self, tasks: tuple[TaskEntry, ...], kept: Mapping[str, FileRecord], contents: Mapping[str, Content]
    ) -> State:
        """Write new contents, then the state that names them, then bring them to their places.

        Args:
            tasks: Tasks of the new state.
            kept: Files that stay as they are.
            contents: New files, by name.
        """
        current = self.prepare()
        try:
            state = self.next_state(tasks, kept, contents)
            self.history.keep(current)
            return self.enter(state.to_json())
        except ResourceError:
            with suppress(OSError, ProjectError):  # nothing was committed: what was written takes room that is wanted
                self.drop_unneeded(self.state)
            raise

    def next_state(
        self, tasks: tuple[TaskEntry, ...], kept: Mapping[str, FileRecord], contents: Mapping[str, Content]
    ) -> State:
        """Write new contents aside and return the state that names them."""
        records = {name: self.store.put(data) for name, data in contents.items()}
        return dataclasses.replace(
            self.state,
            tasks=tasks,
            files={**kept, **records},
            generation=self.state.generation + 1,
            written_by=__version__,
        )

    def prepare(self) -> bytes:
        """Finish what a killed process left undone; returns ``state.json``, verbatim.

        Raises:
            ProjectError: Another process wrote the project since it was opened.
        """
        current = read_state(self.root)
        if parse_state(current).to_json() != self.state.to_json():
            raise ProjectError(f"{self.root} was changed by another process. Run the command again.")
        self.history.drop_void(current)
        others = [parse_state(data).files for data in self.history.readable_states(current)]
        try:
            self.store.publish(self.state.files, {}, others)
        except OSError as error:
            raise as_user_error(error, self.root) from error
        return current

    def enter(self, data: bytes) -> State:
        """Replace ``state.json`` (the commit point) and bring its files to their places."""
        state = parse_state(data)
        with signals_held("the change was made"):
            self._publish(state, data)
        return state

    def _publish(self, state: State, data: bytes) -> None:
        self._replace_state(data)
        # committed: whatever fails from here on is made good by the next commit, and readers look in objects
        with suppress(OSError, ProjectError, ResourceError):
            self.store.publish(state.files, self.state.files)
            self.history.keep(data)
            self.history.drop_void(data)
            self.clean_up(state)

    def _replace_state(self, data: bytes) -> None:
        """Write ``state.json``; an error after the file was replaced (flushing its directory) is no failure."""
        try:
            write_file(self.root / STATE, data)
        except (ProjectError, ResourceError):
            if read_state(self.root) != data:
                raise

    def clean_up(self, state: State) -> None:
        """Delete what no state that is kept needs, and what half-done writes left."""
        self.history.prune(state, self._tasks_kept())
        self.drop_unneeded(state)
        self.store.sweep([*state.files, STATE, *(f".treelora/{name}/x" for name in WRITTEN)])

    def drop_unneeded(self, state: State) -> None:
        """Delete the objects of no state that is kept, and a task that waited on an earlier state."""
        kept = self.history.kept_states(read_state(self.root))
        waiting = self.pending.of(state)
        if waiting is not None:
            kept.append(parse_state(waiting.state))
        elif self.pending.exists():
            self.pending.clear()
        self.store.keep_only(self.store.needed(state.files, (one.files for one in kept)))

    def _tasks_kept(self) -> int:
        """Return the setting ``history``; a file that is being edited must not stop a commit."""
        try:
            given = load_config(self.root / CONFIG).history
        except ConfigError:
            given = None
        return DEFAULTS.history if given is None else given  # type: ignore[return-value]
