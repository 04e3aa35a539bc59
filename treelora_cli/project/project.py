"""Open, read and extend a project directory."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from treelora_cli.config import DEFAULTS, Config, load_config
from treelora_cli.errors import CheckError, ConfigError, DamagedError, ProjectError, ResourceError, UsageError
from treelora_cli.project.answers import ANSWERS, TaskAnswers, parse_answers
from treelora_cli.project.checkpoint import Checkpoint
from treelora_cli.project.commit import (
    Commit,
    all_finite,
    branch_file,
    check_finite,
    contents_of,
    place_merged,
    stored_layout,
    to_json,
)
from treelora_cli.project.history import History
from treelora_cli.project.lock import exclusive_lock, lock_holder
from treelora_cli.project.pending import Pending, Waiting
from treelora_cli.project.signals import signals_held
from treelora_cli.project.state import State, TaskEntry, parse_state
from treelora_cli.project.steps import STEPS, Step, StepLog, parse_steps
from treelora_cli.project.store import Content, FileRecord, Store, as_user_error, refuse_links, write_file
from treelora_cli.project.watch import WATCH, WatchSet, parse_watch, watch_document
from treelora_cli.score_matrix import ScoreMatrix
from treelora_cli.version import __version__

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from treelora_cli.algorithm.tree import Tree
    from treelora_cli.backend.adapters import AdapterWeights
    from treelora_cli.backend.values import Memory, TaskMemory

T = TypeVar("T")

_TASK_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
_DEVICE_NAMES = {"con", "prn", "aux", "nul", *(f"{p}{n}" for p in ("com", "lpt") for n in range(10))}
_CONFIG = "treelora.yaml"
STATE = "state.json"
"""The file that says what a project is made of."""
_WRITTEN = ("history", "trash", "run", "pending")
_OWN = (STATE, *(f".treelora/{name}" for name in ("objects", *_WRITTEN)))
_FIXED_LATER = {"method": "treelora", "tree.branch": "never", "tree.branch_adapter": "trained"}
"""What a project is made with that says nothing of it: one from before the setting existed."""
_ADAPTERS_AT_HAND = 32
"""Adapters kept in memory after they were read and verified; a prediction switches between a few."""


def check_task_name(name: str) -> str:
    """Return a safe task name.

    Raises:
        UsageError: Not letters, digits, ``.``, ``_``, ``-``, starting with a letter or digit, at most 64.
    """
    if not _TASK_NAME.fullmatch(name) or name.lower().split(".")[0] in _DEVICE_NAMES or name.endswith("."):
        raise UsageError(f"Task name {name!r} is not allowed: use letters, digits, '.', '_' and '-', at most 64.")
    return name


class Project:
    """One project directory at one generation of its state."""

    def __init__(self, root: Path, state: State) -> None:
        self.root = root
        self.state = state
        self.store = Store(root)
        self.checkpoint = Checkpoint(root / ".treelora" / "run")
        self.history = History(root)
        self.step_log = StepLog(root / ".treelora" / "run" / STEPS)
        self.pending = Pending(root / ".treelora" / "pending")

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

    # -- open and create ------------------------------------------------------------------------------

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
        state = parse_state(_read_state(root))
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
            write_file(root / _CONFIG, config_text.encode())
            write_file(root / STATE, state.to_json())
        except BaseException:
            # also Ctrl-C: what is left of a project that was not made would only be in the way of the next try
            (root / STATE).unlink(missing_ok=True)
            (root / _CONFIG).unlink(missing_ok=True)
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

    # -- read -----------------------------------------------------------------------------------------

    def config(self) -> Config:
        """Read ``treelora.yaml`` and check that what is fixed was not edited.

        Raises:
            ConfigError: A malformed file, or an edited setting that stored adapters depend on.
        """
        config = load_config(self.root / _CONFIG)
        for key, value in self.fixed.items():
            section, _, name = key.rpartition(".")
            part = getattr(config, section) if section else config
            given = part.get(name) if isinstance(part, dict) else getattr(part, name)
            if given is not None and given != value:
                raise ConfigError(
                    f"{_CONFIG}: '{name}' is {given} but this project was made with {value}."
                    " Set it back, or make a new project."
                )
        return config

    @property
    def fixed(self) -> dict[str, Any]:
        """Settings that every stored adapter depends on, by name with their section."""
        return {**_FIXED_LATER, **self.state.fixed}

    def read(self, name: str) -> bytes:
        """Return the verified content of one of the project's files."""
        record = self.state.files.get(name)
        if record is None:
            raise DamagedError(f"{name} is not part of this project's state. Run treelora doctor.")
        return self.store.read(name, record)

    def _read_json(self, name: str) -> Any:
        try:
            return json.loads(self.read(name))
        except (ValueError, RecursionError) as error:
            raise DamagedError(f"{name} is not valid JSON. Run treelora doctor.") from error

    def tree(self) -> Tree | None:
        """Return the tree over all tasks, task ``i`` being ``state.tasks[i]``; ``None`` before the first."""
        from treelora_cli.algorithm.tree import Tree

        if not self.state.tasks:
            return None
        arrays = self.read_arrays("tree.safetensors")
        try:
            return Tree.from_state(self._read_json("tree.json"), arrays)
        except (ValueError, KeyError, TypeError, IndexError, RecursionError, OverflowError) as error:
            raise DamagedError(f"tree.json: {error}. Run treelora doctor.") from error

    def bandit(self) -> tuple[dict[str, np.ndarray[Any, Any]], dict[str, Any]] | None:
        """Return (arrays, facts) of the last task's search, ``None`` when nothing was searched yet.

        Raises:
            DamagedError: They do not fit each other.
        """
        from treelora_cli.algorithm.bandit import pull_summary

        if "bandit.json" not in self.state.files:
            return None
        arrays, facts = self.read_arrays("bandit.safetensors"), self._read_json("bandit.json")
        try:
            pulls, _ = pull_summary(arrays)
            state = facts["state"]
            texts = [*facts["tasks"], facts["task"], state["search"], state["width"]]
            counts = [state["step_count"], state["distance_computations"]]
            sound = all(type(text) is str for text in texts) and all(type(count) is int for count in counts)
            sound = sound and pulls.shape[1] == len(facts["tasks"]) and bool((pulls >= 0).all())
        except (KeyError, ValueError, TypeError, IndexError) as error:
            raise DamagedError("bandit.safetensors does not fit bandit.json. Run treelora doctor.") from error
        if not sound:
            raise DamagedError("bandit.json is malformed. Run treelora doctor.")
        return arrays, cast("dict[str, Any]", facts)

    def matrix(self) -> ScoreMatrix:
        """Return the scores of every task after every task."""
        if not self.state.tasks:
            return ScoreMatrix()
        try:
            return ScoreMatrix.from_json(self._read_json("metrics/matrix.json"))
        except (ValueError, TypeError) as error:
            raise DamagedError("metrics/matrix.json is malformed. Run treelora doctor.") from error

    def watch(self) -> tuple[WatchSet, ...]:
        """Return the watch sets and their scores.

        Raises:
            DamagedError: The file is malformed.
        """
        return parse_watch(self.read(WATCH)) if WATCH in self.state.files else ()

    def answers(self) -> dict[str, TaskAnswers]:
        """Return what was answered when tasks were last scored, by task; empty in older projects.

        Raises:
            DamagedError: The file is malformed.
        """
        return parse_answers(self.read(ANSWERS)) if ANSWERS in self.state.files else {}

    def steps(self, name: str) -> tuple[Step, ...]:
        """Return a task's training steps; empty in older projects.

        Raises:
            DamagedError: The file is malformed.
        """
        where = f"{self.entry(name).directory}/{STEPS}"
        return parse_steps(self.read(where)) if where in self.state.files else ()

    def task_record(self, name: str) -> dict[str, Any]:
        """Return a task's ``task.json``: data request, settings, versions, timings.

        Raises:
            DamagedError: It is not what this program writes.
        """
        from treelora_cli.backend.values import DataRequest, Recorded

        where = f"{self.entry(name).directory}/task.json"
        record = self._read_json(where)
        try:
            DataRequest.from_json(record["data"])
            Recorded.from_task(record)
            for key in ("name", "metric", "precision", "device"):
                if type(record[key]) is not str:
                    raise TypeError(key)
            for key in ("branch", "branch_reason"):
                if type(record.get(key)) not in (str, type(None)):
                    raise TypeError(key)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DamagedError(f"{where} is malformed ({error}). Run treelora doctor.") from error
        return cast("dict[str, Any]", record)

    def labels(self, name: str) -> tuple[str, ...]:
        """Return a task's class or answer names.

        Raises:
            DamagedError: The file is not a list of names.
        """
        where = f"{self.entry(name).directory}/labels.json"
        found = self._read_json(where)
        if type(found) is not list or not all(type(label) is str for label in found):
            raise DamagedError(f"{where} is not a list of names. Run treelora doctor.")
        return tuple(found)

    def labels_by_task(self) -> dict[str, tuple[str, ...]]:
        """Return every task's class or answer names."""
        return {task.name: self.labels(task.name) for task in self.state.tasks}

    def entry(self, name: str) -> TaskEntry:
        """Return the state's entry of a task.

        Raises:
            UsageError: No such task; the known ones are listed.
        """
        entry = self.state.task(name)
        if entry is None:
            known = ", ".join(task.name for task in self.state.tasks) or "none yet"
            raise UsageError(f"No task '{name}' in this project. Known: {known}.")
        return entry

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

    def check_uninterrupted(self, name: str | None) -> None:
        """Raise ``ProjectError`` while another task than ``name`` can be resumed: its checkpoint would be dropped."""
        if not self.checkpoint.fits(self.state):
            return
        facts = self.checkpoint.facts()
        if facts is not None and facts["task"] != name:
            raise ProjectError(
                f"Task '{facts['task']}' was interrupted after step {facts['step']} and would be lost."
                " Continue it first: treelora train-task --resume. Or give it up: --abandon."
            )

    def memory(self) -> Memory:
        """Return what later predictions need; tensors are read and verified when first asked for."""
        from treelora_cli.backend.values import Memory

        adapter_of = functools.lru_cache(maxsize=_ADAPTERS_AT_HAND)(self.adapter)
        tasks = tuple(self._task_memory(entry, adapter_of) for entry in self.state.tasks)
        if not tasks:
            return Memory((), dict)
        # not cached: of a thousand features or more, it is the largest thing in memory
        shared = functools.partial(self._read_tensors, "head.safetensors")
        layout = stored_layout(self.task_record(tasks[-1].name), "shared")
        return Memory(tasks, shared, lambda: layout, lambda name: self._read_tensors(branch_file(name)))

    def _task_memory(self, entry: TaskEntry, adapter_of: Callable[[str], AdapterWeights]) -> TaskMemory:
        from treelora_cli.backend.values import TaskMemory

        record = self.task_record(entry.name)
        layout = stored_layout(record, "task")
        return TaskMemory(
            name=entry.name,
            labels=self.labels(entry.name),
            metric=record["metric"],
            adapter=functools.partial(adapter_of, entry.name),
            tensors=functools.cache(lambda: self._read_tensors(f"{entry.directory}/head.safetensors")),
            layout=lambda: layout,
            branch=record.get("branch"),
        )

    def adapter(self, name: str) -> AdapterWeights:
        """Return a task's adapter, its group's when it was merged."""
        from treelora_cli.backend.adapters import AdapterWeights

        where = f"{self.entry(name).adapter}/adapter_model.safetensors"
        rank = self.state.fixed["adapter.rank"]
        scale = self.state.fixed["adapter.alpha"] / rank
        weights = AdapterWeights.from_tensors(self._read_tensors(where), self.state.base["layers"], scale, where)
        if weights.rank != rank:
            raise DamagedError(f"{where}: rank {weights.rank}, this project's is {rank}. Run treelora doctor.")
        return weights

    def adapter_bytes(self) -> int:
        """Return the bytes that adapters take on disk."""
        names = {f"{task.adapter}/adapter_model.safetensors" for task in self.state.tasks}
        return sum(self.state.files[name].size for name in names)

    def task_bytes(self) -> dict[str, int]:
        """Return the bytes of each task's records; an adapter shared by a group counts for its newest member."""
        of_folder: dict[str, int] = {}
        for name, record in self.state.files.items():
            folder = name.rpartition("/")[0]
            of_folder[folder] = of_folder.get(folder, 0) + record.size
        return {task.name: of_folder.get(task.directory, 0) for task in self.state.tasks}

    def damage(self) -> dict[str, str]:
        """Read every recorded file and return what is wrong, by file name; empty when all is whole."""
        found = {}
        for name, record in sorted(self.state.files.items()):
            try:
                self.store.read(name, record)
            except DamagedError as error:
                found[name] = "hash mismatch" if "mismatch" in str(error) else "missing"
        return found

    def lock_holder(self) -> str | None:
        """Return who is writing this project, ``None`` when nobody is."""
        return lock_holder(self.root / ".treelora")

    def total_bytes(self) -> int:
        """Return the bytes of all recorded files."""
        return sum(record.size for record in self.state.files.values())

    def _read_tensors(self, name: str) -> dict[str, Tensor]:
        from safetensors.torch import load

        tensors = self._parsed(name, load)
        for key, tensor in tensors.items():
            if not all_finite(tensor):
                raise DamagedError(f"{name}: '{key}' holds values that are not finite. Run treelora doctor.")
        return tensors

    def read_arrays(self, name: str) -> dict[str, np.ndarray[Any, Any]]:
        """Return the verified arrays of one of the project's safetensors files."""
        from safetensors.numpy import load

        return self._parsed(name, load)

    def _parsed(self, name: str, load: Callable[[bytes], dict[str, T]]) -> dict[str, T]:
        from safetensors import SafetensorError

        try:
            return load(self.read(name))
        except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
            raise DamagedError(f"{name}: {error}. Run treelora doctor.") from error

    # -- write ----------------------------------------------------------------------------------------

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
        self._prepare()
        try:
            state = self._next(tasks, kept, contents)
            self.pending.save(Waiting(change.name, reason, self.state.digest(), state.to_json()))
        except ResourceError:
            with suppress(OSError, ProjectError):
                self._drop_unneeded(self.state)
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
        current = self._prepare()
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
        project = self._enter(waiting.state)
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
            self._drop_unneeded(self.state)
        return None if waiting is None else waiting.task

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
        current = self._prepare()
        self._check_whole(target)
        generation = parse_state(target).generation
        later = [data for data in self.history.earlier(self.state) if parse_state(data).generation > generation]
        names = [entry.name for entry in self.state.tasks[index:]]
        self.history.discard(names, target, [*later, current])
        return self._enter(target)

    def undo_rollback(self, task: str | None) -> Project:
        """Return to the exact state that a rollback left (the newest that fits); the caller holds the lock.

        Raises:
            UsageError: Nothing was rolled back.
            ProjectError: The project has changed since.
            DamagedError: One of the files of that state is damaged.
        """
        current = self._prepare()
        entry = self.history.to_undo(current, task)
        self._check_whole(entry.states[-1])
        for data in (current, *entry.states):
            self.history.keep(data)
        return self._enter(entry.states[-1])

    def empty_trash(self) -> int:
        """Delete what rollbacks left, for good; the caller holds the lock. Returns the number of rollbacks."""
        self._prepare()
        count = self.history.empty()
        self._clean_up(self.state)
        return count

    def _check_whole(self, data: bytes) -> None:
        for name in Project(self.root, parse_state(data)).damage():
            raise DamagedError(f"{name} of that state is damaged; nothing was changed. Run treelora doctor.")

    def advance(
        self, tasks: tuple[TaskEntry, ...], kept: Mapping[str, FileRecord], contents: Mapping[str, Content]
    ) -> Project:
        """Write new contents, then the state that names them, then bring them to their places.

        Args:
            tasks: Tasks of the new state.
            kept: Files that stay as they are.
            contents: New files, by name.
        """
        current = self._prepare()
        try:
            state = self._next(tasks, kept, contents)
            self.history.keep(current)
            return self._enter(state.to_json())
        except ResourceError:
            with suppress(OSError, ProjectError):  # nothing was committed: what was written takes room that is wanted
                self._drop_unneeded(self.state)
            raise

    def _next(
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

    def _prepare(self) -> bytes:
        """Finish what a killed process left undone; returns ``state.json``, verbatim.

        Raises:
            ProjectError: Another process wrote the project since it was opened.
        """
        current = _read_state(self.root)
        if parse_state(current).to_json() != self.state.to_json():
            raise ProjectError(f"{self.root} was changed by another process. Run the command again.")
        self.history.drop_void(current)
        others = [parse_state(data).files for data in self.history.readable_states(current)]
        try:
            self.store.publish(self.state.files, {}, others)
        except OSError as error:
            raise as_user_error(error, self.root) from error
        return current

    def _enter(self, data: bytes) -> Project:
        """Replace ``state.json`` (the commit point) and bring its files to their places."""
        state = parse_state(data)
        with signals_held("the change was made"):
            self._publish(state, data)
        return Project(self.root, state)

    def _publish(self, state: State, data: bytes) -> None:
        self._replace_state(data)
        # committed: whatever fails from here on is made good by the next commit, and readers look in objects
        with suppress(OSError, ProjectError, ResourceError):
            self.store.publish(state.files, self.state.files)
            self.history.keep(data)
            self.history.drop_void(data)
            self._clean_up(state)

    def _replace_state(self, data: bytes) -> None:
        """Write ``state.json``; an error after the file was replaced (flushing its directory) is no failure."""
        try:
            write_file(self.root / STATE, data)
        except (ProjectError, ResourceError):
            if _read_state(self.root) != data:
                raise

    def _clean_up(self, state: State) -> None:
        self.history.prune(state, self._tasks_kept())
        self._drop_unneeded(state)
        self.store.sweep(
            [*state.files, STATE, *(f".treelora/{name}/x" for name in ("history", "trash", "run", "pending"))]
        )

    def _drop_unneeded(self, state: State) -> None:
        """Delete the objects of no state that is kept, and a task that waited on an earlier state."""
        kept = self.history.kept_states(_read_state(self.root))
        waiting = self.pending.of(state)
        if waiting is not None:
            kept.append(parse_state(waiting.state))
        elif self.pending.exists():
            self.pending.clear()
        self.store.keep_only(self.store.needed(state.files, (one.files for one in kept)))

    def _tasks_kept(self) -> int:
        """Return the setting ``history``; a file that is being edited must not stop a commit."""
        try:
            given = load_config(self.root / _CONFIG).history
        except ConfigError:
            given = None
        return DEFAULTS.history if given is None else given  # type: ignore[return-value]


def check_new_directory(root: Path) -> None:
    """Raise ``UsageError`` unless ``root`` is absent or an empty directory."""
    if (root / STATE).exists():
        raise UsageError(f"{root} is a treelora project already. Choose another directory.")
    if root.is_file() or (root.is_dir() and any(root.iterdir())):
        raise UsageError(f"{root} is not empty. Choose another directory for the project.")


def _read_state(root: Path) -> bytes:
    try:
        return (root / STATE).read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ProjectError(f"No treelora project at {root}. Run: treelora init {root} --model ...") from error
    except OSError as error:
        raise ProjectError(f"{root / STATE} cannot be read: {error.strerror}.") from error
