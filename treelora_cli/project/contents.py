"""What a project holds: every file of one state, verified against its hash when it is read."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from treelora_cli.errors import DamagedError, UsageError
from treelora_cli.locations import followed
from treelora_cli.project.commit import all_finite, branch_file, stored_layout
from treelora_cli.project.metrics import ANSWERS, WATCH, TaskAnswers, WatchSet, parse_answers, parse_watch
from treelora_cli.project.state import State, TaskEntry
from treelora_cli.project.store import Store
from treelora_cli.project.unfinished import STEPS, Step, parse_steps
from treelora_cli.score_matrix import ScoreMatrix

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from treelora_cli.algorithm.tree import Tree
    from treelora_cli.backend.adapters import AdapterWeights
    from treelora_cli.backend.values import Memory, TaskMemory

T = TypeVar("T")

_FIXED_LATER = {"method": "treelora", "tree.branch": "never", "tree.branch_adapter": "trained"}
"""What a project is made with that says nothing of it: one from before the setting existed."""
_ADAPTERS_AT_HAND = 32
"""Adapters kept in memory after they were read and verified; a prediction switches between a few."""


class Contents:
    """The files of a project directory at one state.

    Args:
        root: The directory.
        state: Names every file and its hash.
    """

    def __init__(self, root: Path, state: State) -> None:
        self.root = root
        self.state = state
        self.store = Store(root)

    @property
    def fixed(self) -> dict[str, Any]:
        """Settings that every stored adapter depends on, by name with their section."""
        return {**_FIXED_LATER, **self.state.fixed}

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

    def read_arrays(self, name: str) -> dict[str, np.ndarray[Any, Any]]:
        """Return the verified arrays of one of the project's safetensors files."""
        from safetensors.numpy import load

        return self._parsed(name, load)

    def _read_tensors(self, name: str) -> dict[str, Tensor]:
        from safetensors.torch import load

        tensors = self._parsed(name, load)
        for key, tensor in tensors.items():
            if not all_finite(tensor):
                raise DamagedError(f"{name}: '{key}' holds values that are not finite. Run treelora doctor.")
        return tensors

    def _parsed(self, name: str, load: Callable[[bytes], dict[str, T]]) -> dict[str, T]:
        from safetensors import SafetensorError

        try:
            return load(self.read(name))
        except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
            raise DamagedError(f"{name}: {error}. Run treelora doctor.") from error

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
        sets = parse_watch(self.read(WATCH)) if WATCH in self.state.files else ()
        return tuple(
            replace(one, record={**one.record, "data": followed(one.record["data"], self.root)}) for one in sets
        )

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

        Data that moved together with the project is where it is now.

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
            if not all(type(one) is float for one in record.get("kind_distances", {}).values()):
                raise TypeError("kind_distances")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DamagedError(f"{where} is malformed ({error}). Run treelora doctor.") from error
        return {**cast("dict[str, Any]", record), "data": followed(record["data"], self.root)}

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

    def total_bytes(self) -> int:
        """Return the bytes of all recorded files."""
        return sum(record.size for record in self.state.files.values())

    def damage(self) -> dict[str, str]:
        """Read every recorded file and return what is wrong, by file name; empty when all is whole."""
        found = {}
        for name, record in sorted(self.state.files.items()):
            try:
                self.store.read(name, record)
            except DamagedError as error:
                found[name] = "hash mismatch" if "mismatch" in str(error) else "missing"
        return found
