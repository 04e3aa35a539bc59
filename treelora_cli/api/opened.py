"""An open project: what is known of it without its model, and the model, loaded when a call first needs it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from treelora_cli.config.by_name import from_names
from treelora_cli.project import Project as Stored

if TYPE_CHECKING:
    from treelora_cli.algorithm.tree import Tree
    from treelora_cli.backend.contract import Base
    from treelora_cli.backend.runtime import Runtime
    from treelora_cli.config import Config
    from treelora_cli.learning.answering import Answerer
    from treelora_cli.project.metrics import WatchSet
    from treelora_cli.score_matrix import ScoreMatrix


class Opened:
    """A project directory at one state, and its base.

    Args:
        stored: The directory, as ``treelora_cli.project`` reads it.
        start: Starts device and processes; called once, when a call needs the model.
    """

    def __init__(self, stored: Stored, start: Callable[[], Runtime]) -> None:
        self._stored = stored
        self._start = start
        self._runtime: Runtime | None = None
        self._base: tuple[Config, Base] | None = None
        self._answerers: dict[str, Answerer] = {}

    @property
    def root(self) -> Path:
        """The project's directory."""
        return self._stored.root

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the learned tasks in order of arrival."""
        return tuple(task.name for task in self._stored.state.tasks)

    @property
    def matrix(self) -> ScoreMatrix:
        """Scores of every task after every task."""
        return self._stored.matrix()

    @property
    def tree(self) -> Tree | None:
        """The tree of tasks, task ``i`` being ``tasks[i]``; ``None`` before the first."""
        return self._stored.tree()

    @property
    def watch(self) -> tuple[WatchSet, ...]:
        """Sets that are scored after each task and never learned from, with their scores."""
        return self._stored.watch()

    def record(self, task: str) -> dict[str, Any]:
        """Return what is known of a task: data, settings, versions, timings, nearest task.

        Raises:
            UsageError: No such task.
        """
        return self._stored.task_record(task)

    def labels(self, task: str) -> tuple[str, ...]:
        """Return a task's class or answer names; empty for free text.

        Raises:
            UsageError: No such task.
        """
        return self._stored.labels(task)

    @property
    def digest(self) -> str:
        """SHA-256 of the state that this object is at, hex: it names the commit."""
        return self._stored.state.digest()

    @property
    def takes_images(self) -> bool:
        """Whether the model is asked with images, and not with texts."""
        return "input_size" in self._stored.state.base["facts"]

    def reload(self) -> None:
        """Take in what another process committed since."""
        self._enter(Stored.open(self.root))

    def _enter(self, stored: Stored) -> None:
        self._stored = stored
        self._answerers.clear()

    @property
    def runtime(self) -> Runtime:
        """Device and processes, started when first asked for."""
        if self._runtime is None:
            self._runtime = self._start()
        return self._runtime

    def _loaded(self, config: Config, *, exact: bool = False) -> Base:
        """Return the base under these settings; it is loaded again only where they differ, its arithmetic set anew."""
        from treelora_cli.learning.opening import compute_as_recorded, open_base

        if self._base is None or self._base[0] != config:
            self._answerers.clear()
            self._base = config, open_base(self._stored, config, self.runtime, exact=exact)
        else:
            compute_as_recorded(self._stored, self.runtime, exact=exact)
        return self._base[1]

    def _config(self, settings: Mapping[str, Any] | None = None) -> Config:
        from treelora_cli.learning.opening import project_config

        return project_config(self._stored, from_names(settings or {}), self.runtime.device.type)
