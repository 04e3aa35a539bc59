"""One run of ``treelora compare`` in a process of its own: ``python -m treelora_cli.compare.worker JOB``.

A contender's task, in order; everything but the first and the last line counts as training time::

    read data
    open the session, draw a fresh adapter, choose the arithmetic (first task)
    train_session: strategy.begin -> slot -> Trainer -> strategy.end; the head takes its statistics
    score every task seen

``treelora``, and any method that runs in a project, goes through a real one, kept beside the result.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from treelora_cli import seeds
from treelora_cli.backend import adapters
from treelora_cli.backend.arithmetic import choose_arithmetic, precision_beside
from treelora_cli.backend.registry import defaults_on, load_backend
from treelora_cli.backend.runtime import Runtime, Silent, open_runtime, peak_bytes, wait_for
from treelora_cli.backend.values import Memory
from treelora_cli.compare.results import write_result
from treelora_cli.compare.runs import Run
from treelora_cli.config import (
    LAST_QUARTER,
    AdapterConfig,
    Config,
    TrainConfig,
    TreeConfig,
    load_config,
    overlay,
    resolve,
)
from treelora_cli.errors import UsageError
from treelora_cli.learning.evaluation import HeldOut
from treelora_cli.learning.gate import untouched_score, watch_request
from treelora_cli.learning.opening import held_in, load_base
from treelora_cli.learning.stream import PlannedTask, StreamRequest, plan_stream, plan_watch, run_stream
from treelora_cli.learning.trainer import task_context, train_session
from treelora_cli.methods.catalogue import choose_head, load_method, runs_in_project
from treelora_cli.score_matrix import ScoreMatrix
from treelora_cli.version import versions

if TYPE_CHECKING:
    from treelora_cli.backend.contract import Base, ContenderModel, TaskData
    from treelora_cli.backend.values import DataRequest
    from treelora_cli.learning.task import TaskReport
    from treelora_cli.learning.trainer import TrainReport
    from treelora_cli.methods.base import Method

T = TypeVar("T")
_NOT_TRAINING = ("read", "evaluate")


# -- memory ----------------------------------------------------------------------------------------


class MemoryWatch:
    """Peak memory above what the process held right after the base was loaded."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self.base_bytes = 0
        self._cuda_base = 0

    def start(self) -> None:
        """Note what is held now; where the system lets it, forget the peak of loading."""
        gc.collect()
        self.base_bytes = _status("VmRSS") or peak_bytes()
        with suppress(OSError):  # where that fails the peak includes loading, which only overstates it
            Path("/proc/self/clear_refs").write_text("5")
        if self.runtime.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self._cuda_base = torch.cuda.memory_allocated()

    def peaks(self) -> dict[str, int | None]:
        """Return the peaks as the result file names them, in bytes."""
        peak = _status("VmHWM") or peak_bytes()
        cuda = torch.cuda.max_memory_allocated() - self._cuda_base if self.runtime.device.type == "cuda" else None
        return {"base_bytes": self.base_bytes, "peak_bytes": max(0, peak - self.base_bytes), "cuda_peak_bytes": cuda}


def _status(key: str) -> int | None:
    """Return a size in bytes from Linux's own record of this process."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:")), None)


# -- the two kinds of run --------------------------------------------------------------------------


def run_project(run: Run, request: StreamRequest, runtime: Runtime) -> dict[str, Any]:
    """Run the stream through a real project under ``run.out`` and return the result's record."""
    watch = MemoryWatch(runtime)
    reports: list[TaskReport] = []
    project = run_stream(request, runtime, reports.append, watch.start)
    seconds: dict[str, float] = {}
    for report in reports:
        for phase, value in report.seconds.items():
            seconds[phase] = seconds.get(phase, 0.0) + value
    cpu = sum(_training(report.cpu_seconds) for report in reports)
    records = [project.task_record(report.name) for report in reports]
    return {
        "matrix": project.matrix().to_json(),
        "seconds": seconds,
        "task_seconds": {report.name: _training(report.seconds) for report in reports},
        "train_seconds": _training(seconds),
        "train_cpu_seconds": cpu,
        "kept_bytes": project.total_bytes(),
        "trained_parameters": max(record["trained_parameters"] for record in records),
        "steps": sum(report.steps for report in reports),
        **{key: records[-1][key] for key in ("precision", "forward_precision")},
        "base_sha256": project.state.base["fingerprint"],
        "data_sha256": {record["name"]: record["data_sha256"] for record in records},
        "watch": {one.name: {"untouched": one.untouched, "scores": dict(one.scores)} for one in project.watch()},
        **watch.peaks(),
    }


def _training(seconds: dict[str, float]) -> float:
    return sum(value for phase, value in seconds.items() if phase not in _NOT_TRAINING)


class Contest:
    """One contender over one stream, in memory.

    Args:
        base: The loaded base.
        model: Its network under the contender's head.
        strategy: The contender.
        config: Settings in force.
        tasks: Length of the stream.
        runtime: Device and reporter.
    """

    def __init__(
        self, base: Base, model: ContenderModel, strategy: Method, config: Config, tasks: int, runtime: Runtime
    ) -> None:
        self.base = base
        self.model = model
        self.strategy = strategy
        self.config = config
        self.tasks = tasks
        self.runtime = runtime
        self.matrix = ScoreMatrix()
        self.seconds: dict[str, float] = {}
        self.cpu_seconds: dict[str, float] = {}
        self.task_seconds: dict[str, float] = {}
        self.trained_parameters = 0
        self.steps = 0
        self._index = 0
        self.digests: dict[str, str] = {}
        self._held_out: dict[str, DataRequest] = {}
        self._watched: dict[str, TaskData] = {}
        self.watch: dict[str, dict[str, Any]] = {}

    def watch_over(self, sets: Mapping[str, DataRequest]) -> None:
        """Score sets that are never learned from, by the untouched base, now and after each task."""
        for name, request in sets.items():
            data = self.base.read_task(watch_request(request))
            untouched = untouched_score(self.base, Memory((), dict), HeldOut(name, data))
            if untouched is not None:  # images have no answer before a task
                self.watch[name] = {"untouched": untouched, "scores": {}}
                self._watched[name] = data

    def learn(self, tasks: Sequence[PlannedTask], config: Config, *, score_all: bool = True) -> None:
        """Learn tasks, several of them as one, and score everything seen, or these alone."""
        names = ", ".join(task.name for task in tasks)
        self.runtime.reporter.note(f"Task {len(self.digests) + 1}: {names}")
        with self._phase("read"):
            data = [self.base.read_task(task.data) for task in tasks]
        self._held_out |= {task.name: dataclasses.replace(task.data, test_only=True) for task in tasks}
        self.digests |= {task.name: one.digest for task, one in zip(tasks, data, strict=True)}
        before = self.seconds.get("train", 0.0)
        with self._phase("train"):
            report = self._train(data, config)
        self.task_seconds["+".join(task.name for task in tasks)] = self.seconds["train"] - before
        self.trained_parameters = max(self.trained_parameters, report.trained_parameters)
        self.steps += report.steps
        del data
        with self._phase("evaluate"):
            wanted = self._held_out if score_all else {task.name: self._held_out[task.name] for task in tasks}
            scores = {name: self._score(self.base.read_task(data)) for name, data in wanted.items()}
            for name, data_watched in self._watched.items() if score_all else ():
                self.watch[name]["scores"][tasks[-1].name] = self._score(data_watched)
        for task in tasks:
            known = [*self.matrix.tasks, task.name]
            complete = task is tasks[-1]
            self.matrix = self.matrix.with_row(task.name, [scores.get(name) if complete else None for name in known])

    def _score(self, task: TaskData) -> float | None:
        return self.model.evaluate(task).value if task.test_size else None

    def _train(self, data: Sequence[TaskData], config: Config) -> TrainReport:
        session = self.model.session(data, config)
        session.prepare()
        assert config.seed is not None
        fresh_seed = seeds.of_task(config.seed, self._index)
        context = task_context(self.base, session, config, self._index, fresh_seed)
        if self._index == 0:
            adapters.write_slot(self.base.network, context.fresh)
            trained = [*(up for _, up in context.slot), *session.parameters()]
            wanted = precision_beside(str(self.config.train.precision), self.config.base.dtype)
            choose_arithmetic(self.runtime, wanted, session, trained)
        context = dataclasses.replace(context, tasks=self.tasks)
        report = train_session(session, self.strategy, context, self.runtime)
        self.model.learned()
        self._index += 1
        return report

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        """Add the time of what is inside to ``name``; queued work on an accelerator is waited for."""
        wait_for(self.runtime.device)
        started, cpu_started = time.perf_counter(), time.process_time()
        yield
        wait_for(self.runtime.device)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started
        self.cpu_seconds[name] = self.cpu_seconds.get(name, 0.0) + time.process_time() - cpu_started


def run_contender(run: Run, request: StreamRequest, runtime: Runtime) -> dict[str, Any]:
    """Run a contender over the stream and return the result's record."""
    recipe = load_config(run.recipe)
    backend = load_backend(overlay(run.flags, recipe).backend or "vit")
    entry = load_method(run.variant.method)
    head = choose_head(run.variant.method, getattr(backend, "contender_heads", ()), backend.name)
    config = contender_config(run, resolve(run.flags, recipe, backend.defaults()), head)
    resolved = backend.resolve_base(config.base, offline=runtime.offline)
    config = dataclasses.replace(config, base=held_in(backend, resolved, runtime))
    tasks = plan_stream(request)
    base = load_base(backend, config, runtime)
    settled = contender_config(run, resolve(run.flags, recipe, defaults_on(backend, base.facts)), head)
    config = dataclasses.replace(settled, base=config.base)
    watch = MemoryWatch(runtime)
    watch.start()
    contest = Contest(base, base.contender(head, config), entry.make(), config, len(tasks), runtime)
    contest.watch_over(plan_watch(request))
    for group in [tasks] if entry.at_once else [(task,) for task in tasks]:
        epochs = max((task.config(run.flags, config).train.epochs or 0) for task in group)
        score_all = not run.ends or group[-1] is tasks[-1]
        contest.learn(group, overlay(Config(train=TrainConfig(epochs=epochs)), config), score_all=score_all)
    return {
        "matrix": contest.matrix.to_json(),
        "seconds": contest.seconds,
        "task_seconds": contest.task_seconds,
        "train_seconds": contest.seconds["train"],
        "train_cpu_seconds": contest.cpu_seconds["train"],
        "kept_bytes": contest.model.kept_bytes() + contest.strategy.kept_bytes(),
        "trained_parameters": contest.trained_parameters,
        "steps": contest.steps,
        **runtime.arithmetic,
        "base_sha256": base.fingerprint,
        "data_sha256": contest.digests,
        "watch": contest.watch,
        "lr": config.train.lr,
        "head": head,
        **watch.peaks(),
    }


def contender_config(run: Run, config: Config, head: str) -> Config:
    """Return a contender's settings: its row's own over its paper's over the recipe's.

    Unless told, all blocks are adapted, and what contenders' papers adapt of them: the inputs of attention.
    """
    entry = load_method(run.variant.method)
    own = run.variant.settings
    config = overlay(own, overlay(entry.settings, config))
    assert config.train.lr is not None
    lr = config.train.lr if own.train.lr is not None else config.train.lr * entry.lr_share.get(head, 1.0)
    blocks = 0 if config.adapter.blocks is None else config.adapter.blocks
    targets = "auto" if config.adapter.targets == LAST_QUARTER else config.adapter.targets
    alone = TreeConfig(branch="never")  # which layers are adapted is otherwise the branches' choice
    return overlay(
        Config(adapter=AdapterConfig(blocks=blocks, targets=targets), train=TrainConfig(lr=lr), tree=alone), config
    )


# -- the process -----------------------------------------------------------------------------------


_TELL_EVERY = 10.0
"""Seconds between two lines of progress."""


class LogReporter(Silent):
    """A reporter whose notes go to the run's log, and every few seconds how far the work is.

    Args:
        every: Seconds between two lines of progress.
    """

    def __init__(self, every: float = _TELL_EVERY) -> None:
        self.every = every

    def note(self, message: str) -> None:
        """Write one line."""
        print(message, file=sys.stderr, flush=True)

    def track(self, items: Iterable[T], description: str, total: int | None) -> Iterator[T]:
        """Yield ``items``; say now and then how many are done and what time is left."""
        started = told = time.perf_counter()
        for count, item in enumerate(items, start=1):
            yield item
            now = time.perf_counter()
            if now - told < self.every:
                continue
            told = now
            left = "" if total is None else f" of {total}, {(now - started) / count * (total - count):.0f} s left"
            self.note(f"  {description}: {count}{left}")


def perform(run: Run) -> None:
    """Do a run and write its result."""
    started = time.perf_counter()
    runtime = open_runtime(run.device, offline=run.offline, reporter=LogReporter())
    request = StreamRequest(run.recipe, run.out / run.name, run.data, run.flags, run.limit, resume=False, ends=run.ends)
    if runs_in_project(run.variant.method):
        _clear(request.root)
        record = run_project(run, request, runtime)
    else:
        record = run_contender(run, request, runtime)
    total = round(time.perf_counter() - started, 3)
    write_result(run, {**record, "process_seconds": total, "device": runtime.device.type, "versions": versions()})


def _clear(root: Path) -> None:
    """Remove what a run that was cut short left of its own project."""
    if not root.exists():
        return
    if not (root / "state.json").is_file():
        raise UsageError(f"{root} is in the way and is no project. Move it, or choose another --out.")
    shutil.rmtree(root)


def main(arguments: list[str]) -> int:
    """Run the job in the file named; returns the exit code, errors are one line."""
    from treelora_cli.backend.runtime import quiet_libraries
    from treelora_cli.errors import describe_error

    quiet_libraries()
    run = Run.from_json(json.loads(Path(arguments[0]).read_text(encoding="utf-8")))
    if run.offline:
        os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        perform(run)
    except (Exception, KeyboardInterrupt) as error:
        import traceback

        traceback.print_exc()
        message, code = describe_error(error)
        print(f"Error: {message}", file=sys.stderr)
        return code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
