"""A project directory: made, opened, changed.

``Contents`` reads what is there, ``Writer`` brings a directory from one state to the next; here is what can be done.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from treelora_cli.config import Config, load_config
from treelora_cli.errors import CheckError, ConfigError, DamagedError, ProjectError, ResourceError, UsageError
from treelora_cli.project.commit import Commit, check_finite, contents_of, place_merged, to_json
from treelora_cli.project.contents import Contents
from treelora_cli.project.lock import exclusive_lock, lock_holder, signals_held
from treelora_cli.project.metrics import WATCH, WatchSet, watch_document
from treelora_cli.project.state import CONFIG, STATE, State, TaskEntry, parse_state, read_state
from treelora_cli.project.store import Content, FileRecord, refuse_links, write_file
from treelora_cli.project.unfinished import STEPS, Checkpoint, StepLog, Waiting
from treelora_cli.project.writing import WRITTEN, Writer
from treelora_cli.version import __version__

_OWN = (STATE, *(f".treelora/{name}" for name in ("objects", "tracking", *WRITTEN)))


class Project(Contents):
    """One project directory at one state: what it holds, and every way to change it."""

    def __init__(self, root: Path, state: State) -> None:
        super().__init__(root, state)
        self.checkpoint = Checkpoint(root / ".treelora" / "run")
        self.step_log = StepLog(root / ".treelora" / "run" / STEPS)
        self._writer = Writer(root, state)
        self.history, self.pending = self._writer.history, self._writer.pending

    @property
    def tracking(self) -> Path:
        """Where local experiment trackers write; nothing here is read again."""
        return self.root / ".treelora" / "tracking"

    # -- open and create --------------------------------------------------------------------------------

    @staticmethod
    def locate(start: Path) -> Path:
        """Return the nearest directory at or above ``start`` that is a project.

        Raises:
            ProjectError: There is none.
        """
        start = start.absolute()
        for directory in (start, *start.parents):
            if (directory / STATE).is_file():
                return directory
        raise ProjectError("No treelora project here or above. Run: treelora init DIR --model ...")

    @classmethod
    def open(cls, root: Path) -> Project:
        """Open the project at ``root`` at its last commit.

        Raises:
            ProjectError: No project, a newer schema, damaged state, or a directory that is a symbolic link.
        """
        state = parse_state(read_state(root))
        # a file that is a link holds no recorded content, and is never written through
        refuse_links(root, {*(name.rpartition("/")[0] or STATE for name in state.files), *_OWN})
        return cls(root, state)

    @classmethod
    def create(
        cls, root: Path, config_text: str, *, backend: str, base: dict[str, Any], fixed: dict[str, Any]
    ) -> Project:
        """Make a new project in an absent or empty directory.

        Raises:
            UsageError: The directory is a project already, or holds other files.
        """
        check_new_directory(root)
        state = State(backend=backend, base=base, fixed=fixed, written_by=__version__)
        absent = [one for one in (root, *root.parents) if not one.exists()]
        try:
            write_file(root / CONFIG, config_text.encode())
            write_file(root / STATE, state.to_json())
        except BaseException:
            # also Ctrl-C: what is left of a project that was not made would only be in the way of the next try
            (root / STATE).unlink(missing_ok=True)
            (root / CONFIG).unlink(missing_ok=True)
            with suppress(OSError):
                for one in absent:
                    one.rmdir()
            raise
        return cls(root, state)

    @contextmanager
    def lock(self, purpose: str) -> Iterator[Project]:
        """Hold the writer's lock; yields the project as it is once the lock is held."""
        with exclusive_lock(self.root / ".treelora", purpose):
            yield Project.open(self.root)

    @contextmanager
    def logging_steps(self) -> Iterator[None]:
        """While a task is learned: the log of its steps goes with a failure that no checkpoint continues."""
        done = False
        try:
            yield
            done = True
        finally:
            if not done and not self.checkpoint.exists():
                self.step_log.clear()

    # -- look and check ---------------------------------------------------------------------------------

    def config(self) -> Config:
        """Read ``treelora.yaml`` and check that what is fixed was not edited.

        Raises:
            ConfigError: A malformed file, or an edited setting that stored adapters depend on.
        """
        config = load_config(self.root / CONFIG)
        for key, value in self.fixed.items():
            section, _, name = key.rpartition(".")
            part = getattr(config, section) if section else config
            given = part.get(name) if isinstance(part, dict) else getattr(part, name)
            if given is not None and given != value:
                raise ConfigError(
                    f"{CONFIG}: '{name}' is {given} but this project was made with {value}."
                    " Set it back, or make a new project."
                )
        return config

    def check_learned(self) -> None:
        """Raise ``UsageError`` before the first task."""
        if not self.state.tasks:
            raise UsageError("Nothing is learned yet. Run: treelora train-task DATA")

    def check_free(self, name: str) -> None:
        """Raise ``UsageError`` when a task of this name exists."""
        for number, task in enumerate(self.state.tasks, start=1):
            if task.name.lower() == name.lower():  # folders of some systems do not tell case apart
                raise UsageError(
                    f"Task '{task.name}' exists ({number:03d})."
                    f" Choose another --name, or treelora rollback {task.name}."
                )

    def check_decided(self) -> None:
        """Raise ``CheckError`` while a task that failed its gate waits: another commit would void it."""
        waiting = self.pending.of(self.state)
        if waiting is not None:
            raise CheckError(
                f"Task '{waiting.task}' is learned and waits, for {waiting.reason}."
                " First accept it with treelora train-task --accept, or drop it with --drop."
            )

    def check_uninterrupted(self) -> None:
        """Raise ``ProjectError`` while a task can be resumed: whatever is learned now would drop its checkpoint."""
        if not self.checkpoint.fits(self.state):
            return
        facts = self.checkpoint.facts()
        if facts is not None:
            raise ProjectError(
                f"Task '{facts['task']}' was interrupted after step {facts['step']} and would be lost."
                " Continue it: treelora train-task --resume. Or give it up: train-task --abandon."
            )

    def lock_holder(self) -> str | None:
        """Return who is writing this project, ``None`` when nobody is."""
        return lock_holder(self.root / ".treelora")

    # -- change; the caller holds the lock --------------------------------------------------------------

    def commit(self, change: Commit) -> Project:
        """Add one task and drop the checkpoint; the caller holds the lock.

        Until ``state.json`` is replaced, nothing has changed.

        Raises:
            TreeLoraError: A value is not finite; stored, it would make the project unreadable.
            Interrupted: A signal came meanwhile; the task is committed.
        """
        parts = self._parts(change)
        with signals_held(f"task '{change.name}' is committed"):
            project = self.advance(*parts)
            with suppress(OSError):  # it does not fit the new state
                self.checkpoint.clear()
                self.step_log.clear()
        return project

    def _parts(self, change: Commit) -> tuple[tuple[TaskEntry, ...], dict[str, FileRecord], dict[str, Content]]:
        """Return tasks, kept files and new contents of the state after ``change``."""
        check_finite(change)
        directory = f"tasks/{len(self.state.tasks) + 1:03d}-{change.name}"
        home = directory if change.home is None else self.entry(change.home).adapter
        tasks = (*self.state.tasks, TaskEntry(change.name, directory, home))
        return place_merged(tasks, self.state.files, contents_of(change, directory), change.merged)

    def propose(self, change: Commit, reason: str) -> None:
        """Keep a task that failed its gate, to be accepted or dropped; the caller holds the lock.

        The project is as before; the checkpoint goes, for the task is learned.

        Raises:
            TreeLoraError: A value is not finite, or the disk is full; nothing waits then.
        """
        tasks, kept, contents = self._parts(change)
        self._writer.prepare()
        try:
            state = self._writer.next_state(tasks, kept, contents)
            self.pending.save(Waiting(change.name, reason, self.state.digest(), state.to_json()))
        except ResourceError:
            with suppress(OSError, ProjectError):
                self._writer.drop_unneeded(self.state)
            raise
        with suppress(OSError):
            self.checkpoint.clear()
            self.step_log.clear()

    def accept(self) -> Project:
        """Commit the task that waits; the caller holds the lock.

        Raises:
            UsageError: None does.
            ProjectError: The project has changed since.
            DamagedError: What was kept of it is damaged; the project is as before.
        """
        current = self._writer.prepare()
        waiting = self.pending.read()
        if waiting is None:
            raise UsageError("No task waits to be accepted.")
        if waiting.grown_from != self.state.digest():
            raise ProjectError(
                f"Task '{waiting.task}' was learned on another state of this project."
                " Drop it with: treelora train-task --drop"
            )
        self._check_whole(waiting.state)
        self.history.keep(current)
        project = self._at(self._writer.enter(waiting.state))
        with suppress(OSError):
            self.pending.clear()
        return project

    def drop(self) -> str | None:
        """Delete the task that waits, also a damaged or void one; the caller holds the lock.

        Returns:
            Its name; ``None`` when that cannot be read.

        Raises:
            UsageError: None waits.
        """
        if not self.pending.exists():
            raise UsageError("No task waits to be dropped.")
        try:
            waiting = self.pending.read()
        except DamagedError:
            waiting = None
        self.pending.clear()
        with suppress(DamagedError):  # of an earlier state: what it needs is not known, so nothing else goes
            self._writer.drop_unneeded(self.state)
        return None if waiting is None else waiting.task

    def abandon(self) -> str:
        """Delete the checkpoint of a task that was interrupted; the caller holds the lock.

        Returns:
            The task's name.

        Raises:
            UsageError: None was interrupted.
        """
        facts = self.checkpoint.facts()
        if facts is None:
            raise UsageError("No task was interrupted; there is nothing to give up.")
        self.checkpoint.clear()
        self.step_log.clear()
        return str(facts["task"])

    def set_watch(self, sets: Sequence[WatchSet]) -> Project:
        """Replace the watch sets; the caller holds the lock."""
        kept = {name: record for name, record in self.state.files.items() if name != WATCH}
        return self.advance(self.state.tasks, kept, {WATCH: to_json(watch_document(sets))} if sets else {})

    def with_record(self, task: str, record: dict[str, Any]) -> Project:
        """Replace a task's ``task.json``; the caller holds the lock."""
        name = f"{self.entry(task).directory}/task.json"
        kept = {key: value for key, value in self.state.files.items() if key != name}
        return self.advance(self.state.tasks, kept, {name: to_json(record)})

    def rollback(self, task: str) -> Project:
        """Return to the exact state before ``task`` was learned; the caller holds the lock.

        What goes stays in the trash, and every operation before ``state.json`` is replaced leaves the project as it is.

        Raises:
            UsageError: No such task.
            ProjectError: That state is not kept any more.
            DamagedError: One of its files is damaged.
        """
        index = self.state.tasks.index(self.entry(task))
        target = self.history.before(self.state, task)
        current = self._writer.prepare()
        self._check_whole(target)
        generation = parse_state(target).generation
        later = [data for data in self.history.earlier(self.state) if parse_state(data).generation > generation]
        names = [entry.name for entry in self.state.tasks[index:]]
        self.history.discard(names, target, [*later, current])
        return self._at(self._writer.enter(target))

    def undo_rollback(self, task: str | None) -> Project:
        """Return to the exact state that a rollback left (the newest that fits); the caller holds the lock.

        Raises:
            UsageError: Nothing was rolled back.
            ProjectError: The project has changed since.
            DamagedError: One of the files of that state is damaged.
        """
        current = self._writer.prepare()
        entry = self.history.to_undo(current, task)
        self._check_whole(entry.states[-1])
        for data in (current, *entry.states):
            self.history.keep(data)
        return self._at(self._writer.enter(entry.states[-1]))

    def empty_trash(self) -> int:
        """Delete what rollbacks left, for good; the caller holds the lock. Returns the number of rollbacks."""
        self._writer.prepare()
        count = self.history.empty()
        self._writer.clean_up(self.state)
        return count

    def advance(
        self, tasks: tuple[TaskEntry, ...], kept: Mapping[str, FileRecord], contents: Mapping[str, Content]
    ) -> Project:
        """Go to a state of these tasks, files kept and new contents by name; the caller holds the lock."""
        return self._at(self._writer.advance(tasks, kept, contents))

    def _at(self, state: State) -> Project:
        return Project(self.root, state)

    def _check_whole(self, data: bytes) -> None:
        for name in Project(self.root, parse_state(data)).damage():
            raise DamagedError(f"{name} of that state is damaged; nothing was changed. Run treelora doctor.")


def check_new_directory(root: Path) -> None:
    """Raise ``UsageError`` unless ``root`` is absent or an empty directory."""
    if (root / STATE).exists():
        raise UsageError(f"{root} is a treelora project already. Choose another directory.")
    if root.is_file() or (root.is_dir() and any(root.iterdir())):
        raise UsageError(f"{root} is not empty. Choose another directory for the project.")
