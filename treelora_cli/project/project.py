"""Open, read and extend a project directory."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from treelora_cli import __version__
from treelora_cli.config import Config, load_config
from treelora_cli.errors import ConfigError, DamagedError, ProjectError, ResourceError, TreeLoraError, UsageError
from treelora_cli.metrics import ScoreMatrix
from treelora_cli.project.checkpoint import Checkpoint
from treelora_cli.project.lock import exclusive_lock, lock_holder
from treelora_cli.project.state import State, TaskEntry, parse_state
from treelora_cli.project.store import FileRecord, Store, write_file

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from treelora_cli.adapters import AdapterWeights
    from treelora_cli.backend import Memory, TaskMemory
    from treelora_cli.tree import Tree

_TASK_NAME = re.compile(r"^[a-z0-9][a-z0-9._-]{0,63}$")
_DEVICE_NAMES = {"con", "prn", "aux", "nul", *(f"{p}{n}" for p in ("com", "lpt") for n in range(10))}
_CONFIG, _STATE = "treelora.yaml", "state.json"
_ADAPTERS_AT_HAND = 32
"""Adapters kept in memory after they were read and verified; a prediction switches between a few."""
_HISTORY_KEPT = 1
"""Earlier states whose contents stay, for readers that opened the project before a commit."""


def check_task_name(name: str) -> str:
    """Return a safe task name.

    Raises:
        UsageError: Not lower-case letters, digits, ``.``, ``_``, ``-``, starting with a letter or digit, at most 64.
    """
    if not _TASK_NAME.fullmatch(name) or name.split(".")[0] in _DEVICE_NAMES or name.endswith("."):
        raise UsageError(
            f"Task name {name!r} is not allowed: use lower-case letters, digits, '.', '_' and '-', at most 64."
        )
    return name


@dataclass(frozen=True)
class Commit:
    """Everything one learned task adds to the project.

    Attributes:
        name: Task name.
        record: Contents of ``task.json``.
        labels: Class or answer names.
        adapter_files: The task's PEFT directory, file name to content.
        tensors: Kept with the task.
        shared: Statistics shared by all tasks.
        tree: Tree over all tasks, this one included.
        bandit_arrays, bandit_meta: Statistics of this task's search; empty for the first task.
        matrix: Scores, this task's row included.
        merged: PEFT directories that replace those of merged tasks: newest member's name to
            (members' names, files).
    """

    name: str
    record: dict[str, Any]
    labels: tuple[str, ...]
    adapter_files: dict[str, bytes]
    tensors: dict[str, Tensor]
    shared: dict[str, Tensor]
    tree: Tree
    bandit_arrays: dict[str, np.ndarray[Any, Any]]
    bandit_meta: dict[str, Any]
    matrix: ScoreMatrix
    merged: dict[str, tuple[tuple[str, ...], dict[str, bytes]]] = field(default_factory=dict)


class Project:
    """One project directory at one generation of its state."""

    def __init__(self, root: Path, state: State) -> None:
        self.root = root
        self.state = state
        self.store = Store(root)
        self.checkpoint = Checkpoint(root / ".treelora" / "run")

    # -- open and create ------------------------------------------------------------------------------

    @staticmethod
    def locate(start: Path) -> Path:
        """Return the nearest directory at or above ``start`` that is a project.

        Raises:
            ProjectError: There is none.
        """
        start = start.absolute()
        for directory in (start, *start.parents):
            if (directory / _STATE).is_file():
                return directory
        raise ProjectError("No treelora project here or above. Run: treelora init DIR --model ...")

    @classmethod
    def open(cls, root: Path) -> Project:
        """Open the project at ``root`` at its last commit.

        Raises:
            ProjectError: No project, a newer schema, or damaged state.
        """
        return cls(root, parse_state(_read_state(root)))

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
        write_file(root / _CONFIG, config_text.encode())
        write_file(root / _STATE, state.to_json())
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
        for key, value in self.state.fixed.items():
            section, _, name = key.rpartition(".")
            part = getattr(config, section) if section else config
            given = getattr(part, name)
            if given is not None and given != value:
                raise ConfigError(
                    f"{_CONFIG}: '{name}' is {given} but this project was made with {value}."
                    " Set it back, or make a new project."
                )
        return config

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
        from treelora_cli.tree import Tree

        if not self.state.tasks:
            return None
        arrays = self._read_arrays("tree.safetensors")
        try:
            return Tree.from_state(self._read_json("tree.json"), arrays)
        except (ValueError, KeyError) as error:
            raise DamagedError(f"tree.json: {error}. Run treelora doctor.") from error

    def bandit(self) -> tuple[dict[str, np.ndarray[Any, Any]], dict[str, Any]] | None:
        """Return (arrays, facts) of the last task's search, ``None`` when nothing was searched yet."""
        if "bandit.json" not in self.state.files:
            return None
        return self._read_arrays("bandit.safetensors"), cast("dict[str, Any]", self._read_json("bandit.json"))

    def matrix(self) -> ScoreMatrix:
        """Return the scores of every task after every task."""
        if not self.state.tasks:
            return ScoreMatrix()
        try:
            return ScoreMatrix.from_json(self._read_json("metrics/matrix.json"))
        except ValueError as error:
            raise DamagedError("metrics/matrix.json is malformed. Run treelora doctor.") from error

    def task_record(self, name: str) -> dict[str, Any]:
        """Return a task's ``task.json``: data request, settings, versions, timings."""
        return cast("dict[str, Any]", self._read_json(f"{self.entry(name).directory}/task.json"))

    def labels(self, name: str) -> tuple[str, ...]:
        """Return a task's class or answer names."""
        return tuple(self._read_json(f"{self.entry(name).directory}/labels.json"))

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
            if task.name == name:
                raise UsageError(f"Task '{name}' exists ({number:03d}). Choose another --name.")

    def memory(self) -> Memory:
        """Return what later predictions need; tensors are read and verified when first asked for."""
        from treelora_cli.backend import Memory

        shared = functools.cache(lambda: self._read_tensors("head.safetensors"))
        adapter_of = functools.lru_cache(maxsize=_ADAPTERS_AT_HAND)(self.adapter)
        tasks = tuple(self._task_memory(entry, adapter_of) for entry in self.state.tasks)
        return Memory(tasks, shared if self.state.tasks else dict)

    def _task_memory(self, entry: TaskEntry, adapter_of: Callable[[str], AdapterWeights]) -> TaskMemory:
        from treelora_cli.backend import TaskMemory

        record = self.task_record(entry.name)
        return TaskMemory(
            name=entry.name,
            labels=self.labels(entry.name),
            metric=record["metric"],
            adapter=functools.partial(adapter_of, entry.name),
            tensors=functools.cache(lambda: self._read_tensors(f"{entry.directory}/head.safetensors")),
        )

    def adapter(self, name: str) -> AdapterWeights:
        """Return a task's adapter, its group's when it was merged."""
        from treelora_cli.adapters import AdapterWeights

        where = f"{self.entry(name).adapter}/adapter_model.safetensors"
        scale = self.state.fixed["adapter.alpha"] / self.state.fixed["adapter.rank"]
        return AdapterWeights.from_tensors(self._read_tensors(where), self.state.base["layers"], scale, where)

    def adapter_bytes(self) -> int:
        """Return the bytes that adapters take on disk."""
        names = {f"{task.adapter}/adapter_model.safetensors" for task in self.state.tasks}
        return sum(self.state.files[name].size for name in names)

    def damage(self) -> dict[str, str]:
        """Read every recorded file and return what is wrong, by file name; empty when all is whole."""
        found = {}
        for name, record in sorted(self.state.files.items()):
            try:
                self.store.read(name, record)
            except DamagedError as error:
                found[name] = "hash mismatch" if "mismatch" in str(error) else "missing"
        return found

    @staticmethod
    def whole_tasks(state: State, damaged: Mapping[str, str]) -> list[str]:
        """Return the tasks whose own files, adapter included, are not among the damaged."""
        folders = [(task.name, (f"{task.directory}/", f"{task.adapter}/adapter_")) for task in state.tasks]
        return [name for name, prefixes in folders if not any(file.startswith(prefixes) for file in damaged)]

    def lock_holder(self) -> str | None:
        """Return who is writing this project, ``None`` when nobody is."""
        return lock_holder(self.root / ".treelora")

    def total_bytes(self) -> int:
        """Return the bytes of all recorded files."""
        return sum(record.size for record in self.state.files.values())

    def _read_tensors(self, name: str) -> dict[str, Tensor]:
        from safetensors import SafetensorError
        from safetensors.torch import load

        try:
            return load(self.read(name))
        except SafetensorError as error:
            raise DamagedError(f"{name}: {error}. Run treelora doctor.") from error

    def _read_arrays(self, name: str) -> dict[str, np.ndarray[Any, Any]]:
        from safetensors import SafetensorError
        from safetensors.numpy import load

        try:
            return load(self.read(name))
        except SafetensorError as error:
            raise DamagedError(f"{name}: {error}. Run treelora doctor.") from error

    # -- write ----------------------------------------------------------------------------------------

    def commit(self, change: Commit) -> Project:
        """Add one task; the caller holds the lock. Until ``state.json`` is replaced, nothing has changed.

        Raises:
            TreeLoraError: A value is not finite; stored, it would make the project unreadable.
        """
        _check_finite(change)
        from safetensors.numpy import save as save_arrays
        from safetensors.torch import save as save_tensors

        directory = f"tasks/{len(self.state.tasks) + 1:03d}-{change.name}"
        contents = {f"{directory}/{name}": data for name, data in change.adapter_files.items()}
        contents |= {
            f"{directory}/head.safetensors": save_tensors(change.tensors),
            f"{directory}/labels.json": _json(list(change.labels)),
            f"{directory}/task.json": _json(change.record),
            "head.safetensors": save_tensors(change.shared),
            "tree.json": _json(change.tree.to_dict()),
            "tree.safetensors": save_arrays(change.tree.to_arrays()),
            "metrics/matrix.json": _json(change.matrix.to_json()),
        }
        if change.bandit_meta:
            contents["bandit.safetensors"] = save_arrays(change.bandit_arrays)
            contents["bandit.json"] = _json(change.bandit_meta)
        tasks = (*self.state.tasks, TaskEntry(change.name, directory, directory))
        return self._advance(*_place_merged(tasks, self.state.files, contents, change.merged))

    def save_matrix(self, matrix: ScoreMatrix) -> Project:
        """Record newly measured scores; the caller holds the lock."""
        return self._advance(self.state.tasks, self.state.files, {"metrics/matrix.json": _json(matrix.to_json())})

    def _advance(
        self, tasks: tuple[TaskEntry, ...], kept: Mapping[str, FileRecord], contents: Mapping[str, bytes]
    ) -> Project:
        """Write the new contents, then the state that names them, then move them to their places."""
        current_is = self._repair_publication()
        records = {name: self.store.put(data) for name, data in contents.items()}
        state = dataclasses.replace(
            self.state,
            tasks=tasks,
            files={**kept, **records},
            generation=self.state.generation + 1,
            written_by=__version__,
        )
        history = self.root / ".treelora" / "history"
        write_file(history / f"{self.state.generation:06d}.json", current_is)
        self._replace_state(state.to_json())
        # committed: whatever fails from here on is made good by the next commit, and readers look in objects
        with suppress(OSError, ProjectError, ResourceError):
            self.store.publish(dict(state.files), dict(self.state.files))
            self._collect_garbage(state)
        return Project(self.root, state)

    def _replace_state(self, data: bytes) -> None:
        """Write ``state.json``; an error after the file was replaced (flushing its directory) is no failure."""
        try:
            write_file(self.root / _STATE, data)
        except (ProjectError, ResourceError):
            if _read_state(self.root) != data:
                raise

    def _repair_publication(self) -> bytes:
        """Finish moving files whose commit was cut off after ``state.json`` was replaced."""
        self.store.publish(dict(self.state.files), {})
        return self.state.to_json()

    def _collect_garbage(self, state: State) -> None:
        history = sorted((self.root / ".treelora" / "history").glob("*.json"))
        for old in history[:-_HISTORY_KEPT]:
            old.unlink(missing_ok=True)
        kept = [parse_state(path.read_bytes()) for path in history[-_HISTORY_KEPT:]]
        self.store.collect_garbage(record for one in (*kept, state) for record in one.files.values())
        self.store.sweep([*state.files, _STATE, ".treelora/history/x", ".treelora/run/x"])


def check_new_directory(root: Path) -> None:
    """Raise ``UsageError`` unless ``root`` is absent or an empty directory."""
    if (root / _STATE).exists():
        raise UsageError(f"{root} is a treelora project already. Choose another directory.")
    if root.is_file() or (root.is_dir() and any(root.iterdir())):
        raise UsageError(f"{root} is not empty. Choose another directory for the project.")


def _check_finite(change: Commit) -> None:
    from safetensors.torch import load

    weights = [files["adapter_model.safetensors"] for files in (change.adapter_files, *_merged_files(change))]
    for tensors in (change.tensors, change.shared, *map(load, weights)):
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                raise TreeLoraError(
                    f"Training diverged: '{name}' of task '{change.name}' is not finite; nothing was committed."
                    " Retry with a smaller --lr."
                )


def _merged_files(change: Commit) -> list[dict[str, bytes]]:
    return [files for _, files in change.merged.values()]


def _read_state(root: Path) -> bytes:
    try:
        return (root / _STATE).read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ProjectError(f"No treelora project at {root}. Run: treelora init {root} --model ...") from error
    except OSError as error:
        raise ProjectError(f"{root / _STATE} cannot be read: {error.strerror}.") from error


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()


def _place_merged(
    tasks: Sequence[TaskEntry],
    files: Mapping[str, FileRecord],
    contents: dict[str, bytes],
    merged: Mapping[str, tuple[tuple[str, ...], dict[str, bytes]]],
) -> tuple[tuple[TaskEntry, ...], dict[str, FileRecord], dict[str, bytes]]:
    """Point merged tasks at their group's directory and drop the adapters they had."""
    placed, kept, contents = {task.name: task for task in tasks}, dict(files), dict(contents)
    for newest, (members, adapter_files) in merged.items():
        home = placed[newest].directory
        for member in members:
            placed[member] = dataclasses.replace(placed[member], adapter=home)
        contents |= {f"{home}/{name}": data for name, data in adapter_files.items()}
    homes = {task.adapter for task in placed.values()}
    for task in tasks:
        if task.directory not in homes:
            for name in ("adapter_config.json", "adapter_model.safetensors"):
                kept.pop(f"{task.directory}/{name}", None)
                contents.pop(f"{task.directory}/{name}", None)
    return tuple(placed[task.name] for task in tasks), kept, contents
