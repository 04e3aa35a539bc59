"""Send a task's figures to an experiment tracker, when asked: the same as in ``steps.jsonl``, and the scores.

The trackers are accelerate's. Nothing goes over the network unless the tracker's own settings say so: without them
Weights & Biases runs offline and MLflow writes files, both below the project's ``.treelora/tracking``.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from treelora_cli.errors import UsageError
from treelora_cli.project.unfinished import Step
from treelora_cli.score_matrix import ScoreMatrix

TRACKERS = ("tensorboard", "wandb", "mlflow")


class Sink(Protocol):
    """What this module asks of accelerate's trackers."""

    def start(self) -> None:
        """Open the run."""

    def log(self, values: dict[str, float], step: int) -> None:
        """Take figures of one step."""

    def finish(self) -> None:
        """Close the run."""


class Tracking:
    """One task's figures on their way to a tracker, or to none.

    A tracker that fails is given up with one note: it costs its figures, not the task.

    Args:
        make: Makes the tracker; ``None`` for none.
        note: Shows a line to the user.
    """

    def __init__(self, make: Callable[[], Sink] | None, note: Any) -> None:
        self._sink: Sink | None = None
        self._note = note
        if make is not None:
            self._guarded(lambda: self._begin(make))

    def _begin(self, make: Callable[[], Sink]) -> None:
        self._sink = make()
        self._sink.start()

    def steps(self, steps: Sequence[Step]) -> None:
        """Send training steps."""
        for one in steps:
            values = {"loss": one.loss, "lr": one.lr, "examples_per_second": one.examples_per_second}
            if one.pull is not None:
                values["pull"] = one.pull
            self._call("log", {f"train/{name}": value for name, value in values.items()}, step=one.step)

    def scores(self, matrix: ScoreMatrix, steps: int) -> None:
        """Send the scores of every task after this one, in percent, and what is made of them."""
        if not matrix.rows:
            return
        pairs = zip(matrix.tasks, matrix.rows[-1], strict=False)
        values = {f"score/{name}": 100 * value for name, value in pairs if value is not None}
        standing = matrix.standing()
        for name, value in (("op", standing.overall()), ("forgetting", standing.forgetting())):
            if value is not None:
                values[name] = 100 * value
        self._call("log", values, step=steps)

    def close(self) -> None:
        """Close the run; further figures are left out."""
        self._call("finish")
        self._sink = None

    def _call(self, what: str, *arguments: Any, **keywords: Any) -> None:
        if self._sink is not None:
            call = getattr(self._sink, what)
            self._guarded(lambda: call(*arguments, **keywords))

    def _guarded(self, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:  # somebody else's program: full disks, services that are away, and anything else
            self._sink = None
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
            self._note(f"The tracker is given up ({reason}); the task goes on, and steps.jsonl has every figure.")


def check_tracker(name: str) -> None:
    """Refuse a tracker whose package is missing, before anything is learned.

    Raises:
        UsageError: It is.
    """
    if name != "none" and importlib.util.find_spec(name) is None:
        raise UsageError(f"--track {name} needs the {name} package. Run: pip install {name}")


def open_tracking(name: str, folder: Path, project: str, task: str, note: Any, *, wanted: bool) -> Tracking:
    """Open a tracker.

    Args:
        name: One of ``TRACKERS``, or ``none``.
        folder: Where local trackers write; made when needed.
        project: Names the experiment.
        task: Names the run.
        note: Shows a line to the user.
        wanted: False in processes other than the main one.
    """
    asked = wanted and name != "none"
    return Tracking((lambda: _sink(name, folder, project, task)) if asked else None, note)


def _sink(name: str, folder: Path, project: str, task: str) -> Sink:
    from accelerate import tracking

    folder.mkdir(parents=True, exist_ok=True)
    sink: Any
    if name == "tensorboard":
        sink = tracking.TensorBoardTracker(task, str(folder / "tensorboard"))
    elif name == "wandb":
        mode = os.environ.get("WANDB_MODE", "offline")
        sink = tracking.WandBTracker(project, name=task, dir=str(folder), mode=mode)
    else:
        if "MLFLOW_TRACKING_URI" not in os.environ:
            os.environ["MLFLOW_TRACKING_URI"] = (folder / "mlruns").as_uri()
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # newer ones refuse files otherwise
        sink = tracking.MLflowTracker(project, run_name=task)
    return _Sink(sink)


class _Sink:
    """Accelerate's tracker under the three calls that are used."""

    def __init__(self, tracker: Any) -> None:
        self._tracker = tracker

    def start(self) -> None:
        start = getattr(self._tracker, "start", None)  # before accelerate 1.8 a tracker starts when it is made
        if start is not None:
            start()

    def log(self, values: dict[str, float], step: int) -> None:
        self._tracker.log(values, step=step)

    def finish(self) -> None:
        self._tracker.finish()
