"""Learn one task and commit it: the main job, in order.

::

    read data -> frozen pass -> probe: signature -> search -> warm start -> train -> statistics
              -> tree, budget -> score every task -> commit
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from treelora_cli.algorithm.budget import merge_to_budget
from treelora_cli.algorithm.signature import SignatureAccumulator, SketchSpec
from treelora_cli.algorithm.tree import Tree, extend_tree
from treelora_cli.backend import adapters
from treelora_cli.backend.arithmetic import choose_arithmetic
from treelora_cli.backend.contract import Base, DataRequest, Learned, Memory, Score, Session, TaskData, TaskMemory
from treelora_cli.backend.runtime import Runtime, return_free_memory
from treelora_cli.config import Config, to_dict
from treelora_cli.errors import DamagedError, ProjectError
from treelora_cli.learning.evaluation import HeldOut, blamed, read_held_out, score_tasks
from treelora_cli.learning.opening import check_base
from treelora_cli.learning.provenance import adapter_files, peak_bytes, versions
from treelora_cli.learning.trainer import Trainer, TrainReport, TrainSettings
from treelora_cli.methods.treelora import TreeLora, TreeLoraSettings
from treelora_cli.project import Commit, Project
from treelora_cli.score_matrix import ScoreMatrix

if TYPE_CHECKING:
    from treelora_cli.algorithm.bandit import Search, Width
    from treelora_cli.algorithm.split import SplitRule
    from treelora_cli.backend.adapters import AdapterWeights


@dataclass(frozen=True)
class TaskReport:
    """What ``train-task`` shows in the end.

    Attributes:
        name: The new task.
        matrix: Scores after the commit.
        scores: Score of each task now, by name.
        parent: Task whose adapter the new one started from; ``None`` for a cold start.
        nearest: Task the search found nearest; ``None`` for the first.
        seconds: Time by phase.
        cpu_seconds: This process's processor time by phase, which others on the machine do not lengthen.
        steps: Optimizer steps.
        peak_bytes: Largest resident memory of the process.
        notes: Lines for the user.
    """

    name: str
    matrix: ScoreMatrix
    scores: dict[str, Score]
    parent: str | None
    nearest: str | None
    seconds: dict[str, float]
    cpu_seconds: dict[str, float]
    steps: int
    peak_bytes: int
    notes: tuple[str, ...]


class _Clock:
    """Seconds and processor seconds by phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.cpu_seconds: dict[str, float] = {}
        self._last = time.perf_counter(), time.process_time()

    def lap(self, phase: str) -> None:
        """End a phase: give back the memory it freed, and note its time."""
        return_free_memory()
        now = time.perf_counter(), time.process_time()
        for total, before, after in zip((self.seconds, self.cpu_seconds), self._last, now, strict=True):
            total[phase] = round(total.get(phase, 0.0) + after - before, 3)
        self._last = now


def learn_task(
    project: Project,
    base: Base,
    request: DataRequest,
    name: str,
    config: Config,
    runtime: Runtime,
    *,
    evaluate: bool,
    resume: bool,
) -> TaskReport:
    """Learn a task and commit it; the caller holds the lock.

    Raises:
        TreeLoraError: Bad data, no memory, an interruption, ...; the project is as before.
    """
    project.check_free(name)
    check_base(project, base)
    clock = _Clock()
    task = base.read_task(request)
    for note in task.notes:
        runtime.reporter.note(note)
    if task.sample:
        runtime.reporter.note(f"First example, as the model sees it: {task.sample}")
    clock.lap("read")
    learner = _Learner(project, base, task, name, config, runtime, clock)
    learned, report = learner.train(request, resume)
    memory, tree, matrix, scores = learner.conclude(learned, evaluate)
    if runtime.is_main:
        project.commit(learner.commit_of(learned, report, request, tree, matrix))
    clock.lap("commit")
    names = [one.name for one in memory.tasks]
    nearest, parent = learner.method.nearest(), learner.method.parent()
    return TaskReport(
        name=name,
        matrix=matrix,
        scores=scores,
        parent=None if parent is None else names[parent],
        nearest=None if nearest is None else names[nearest],
        seconds=clock.seconds,
        cpu_seconds=clock.cpu_seconds,
        steps=report.steps,
        peak_bytes=peak_bytes(),
        notes=task.notes,
    )


class _Learner:
    """The steps of ``learn_task`` that share the loaded base and the task's session."""

    def __init__(
        self, project: Project, base: Base, task: TaskData, name: str, config: Config, runtime: Runtime, clock: _Clock
    ) -> None:
        self.project = project
        self.base = base
        self.task = task
        self.name = name
        self.config = config
        self.runtime = runtime
        self.clock = clock
        assert config.seed is not None and config.adapter.rank is not None and config.adapter.alpha is not None
        self.scale = config.adapter.alpha / config.adapter.rank
        self.seed: int = config.seed
        self.memory: Memory = project.memory()
        self.task_seed = self.seed * 10_007 + len(self.memory.tasks)
        self.tree = project.tree()
        self.method: TreeLora
        self.signature: np.ndarray[Any, Any]
        self.trained: AdapterWeights

    # -- train ----------------------------------------------------------------------------------------

    def train(self, request: DataRequest, resume: bool) -> tuple[Learned, TrainReport]:
        """Probe, search and train; leaves the trained adapter in the slot."""
        with blamed(self.memory):
            session = self.base.session(self.task, self.memory, self.config)
        slot = adapters.slot_parameters(self.base.network, self.base.layers)
        reference = adapters.reference_point(self.base.network, self.base.layers, self.scale, self.seed)
        adapters.write_slot(self.base.network, reference)
        self._choose_arithmetic(session, slot)
        session.prepare()
        self.clock.lap("frozen pass")
        queries = self._probe(session, slot)
        self.clock.lap("probe")
        earlier = self.memory.tasks  # not self: a cycle would keep this task's statistics while the next is learned
        self.method = TreeLora(
            self._method_settings(), self.tree, queries, reference, lambda index: earlier[index].adapter()
        )
        adapters.write_slot(self.base.network, self.method.initial_adapter())
        self.clock.lap("search")
        trainer = Trainer(session, self.method, slot, TrainSettings.of(self.config.train, self.task_seed), self.runtime)
        if resume:
            self._resume(trainer)
        report = trainer.run(lambda step, tensors: self._save_checkpoint(step, tensors, request))
        self.clock.lap("train")
        self.trained = adapters.read_slot(self.base.network, self.base.layers, self.scale)
        with blamed(self.memory):
            learned = session.finish()
        self.clock.lap("statistics")
        return learned, report

    def _choose_arithmetic(self, session: Session, slot: list[Any]) -> None:
        wanted, last = str(self.config.train.precision), self._record_of_last_task()
        if wanted == "auto" and last is not None:
            self.runtime.compute_as(last)
        else:
            choose_arithmetic(self.runtime, wanted, session, [up for _, up in slot])

    def _record_of_last_task(self) -> dict[str, Any] | None:
        """Return by what was measured before on this kind of device: one project, one arithmetic."""
        if not self.project.state.tasks:
            return None
        record = self.project.task_record(self.project.state.tasks[-1].name)
        return record if record["device"] == self.runtime.device.type else None

    def _probe(self, session: Session, slot: list[Any]) -> np.ndarray[Any, Any]:
        """Average the new task's gradients at the reference point; return the mini-batches' sketches."""
        tree = self.config.tree
        assert tree.probe_batches is not None and tree.signature_width is not None
        accumulator = SignatureAccumulator(SketchSpec(width=tree.signature_width, seed=self.seed))
        ups = [up for _, up in slot]
        own = -(-tree.probe_batches // self.runtime.accelerator.num_processes)
        for loss in self.runtime.reporter.track(session.probe_losses(own), "Probing", own):
            accumulator.add(list(torch.autograd.grad(loss, ups)))
        batches = self.runtime.concatenate(accumulator.batches.to(self.runtime.device)).cpu()
        mean = self.runtime.sum(accumulator.signature().to(self.runtime.device)).cpu()
        self.signature = torch.nn.functional.normalize(mean, dim=-1).numpy()
        return batches.numpy()

    def _method_settings(self) -> TreeLoraSettings:
        train, tree = self.config.train, self.config.tree
        assert train.reg is not None
        return TreeLoraSettings(
            reg=train.reg,
            update=str(train.update),
            warm_start=str(train.warm_start),
            search=cast("Search", tree.search),
            width=cast("Width", tree.width),
            seed=self.task_seed,
        )

    # -- checkpoint -----------------------------------------------------------------------------------

    def _identity(self) -> dict[str, Any]:
        """What a checkpoint must agree with to be continued."""
        free = ("precision", "keep_mib")
        train = {key: value for key, value in to_dict(self.config)["train"].items() if key not in free}
        return {
            "task": self.name,
            "state": self.project.state.digest(),
            "data": self.task.digest,
            "train": train,
            **self.runtime.arithmetic,
        }

    def _save_checkpoint(self, step: int, tensors: dict[str, torch.Tensor], request: DataRequest) -> None:
        if not self.runtime.is_main:
            return
        arrays, facts = self.method.state()
        tensors = {**tensors, **{f"bandit.{key}": torch.from_numpy(np.asarray(a)) for key, a in arrays.items()}}
        self.project.checkpoint.save(
            {**self._identity(), "request": request.to_json(), "step": step, "bandit": facts}, tensors
        )

    def _resume(self, trainer: Trainer) -> None:
        facts = self.project.checkpoint.facts()
        if facts is None:
            raise ProjectError("No interrupted task to resume. Run: treelora train-task DATA")
        for key, value in json.loads(json.dumps(self._identity())).items():
            if facts.get(key) != value:
                raise ProjectError(
                    f"The interrupted task cannot be resumed: its {key} has changed. Train it anew, without --resume."
                )
        saved = self.project.checkpoint.tensors(facts)
        prefix = "bandit."
        arrays = {key[len(prefix) :]: value.numpy() for key, value in saved.items() if key.startswith(prefix)}
        try:
            self.method.load_state(arrays, facts["bandit"])
            trainer.load(int(facts["step"]), saved)
        except (RuntimeError, KeyError, ValueError, TypeError, IndexError) as error:
            raise DamagedError(f"{facts['file']} does not fit this task. Train it anew, without --resume.") from error

    # -- conclude -------------------------------------------------------------------------------------

    def conclude(self, learned: Learned, evaluate: bool) -> tuple[Memory, Tree, ScoreMatrix, dict[str, Score]]:
        """Extend the tree, keep the budget and score every task."""
        tree = self._extended_tree()
        self.clock.lap("tree")
        new = TaskMemory(
            self.name, self.task.labels, self.task.metric, _constant(self.trained), lambda: learned.tensors
        )
        self.memory = memory = self.memory.with_task(new, learned.shared)
        memory, self.merged = self._kept_within_budget(memory, tree)
        scores = self._scores(memory) if evaluate else {}
        self.clock.lap("evaluate")
        values = [scores[one.name].value if one.name in scores else None for one in memory.tasks]
        return memory, tree, self.project.matrix().with_row(self.name, values), scores

    def _extended_tree(self) -> Tree:
        depth, split = self.config.tree.depth, cast("SplitRule", self.config.tree.split)
        assert depth is not None
        return extend_tree(self.tree, self.signature, depth, split=split)

    def _kept_within_budget(
        self, memory: Memory, tree: Tree
    ) -> tuple[Memory, dict[str, tuple[tuple[str, ...], AdapterWeights]]]:
        homes = [task.adapter for task in self.project.state.tasks] + [f"new/{self.name}"]
        groups = merge_to_budget(tree, homes, lambda index: memory.tasks[index].adapter(), self.config.budget or 0)
        tasks, merged = list(memory.tasks), {}
        for group in groups:
            names = tuple(tasks[index].name for index in group.members)
            merged[names[-1]] = (names, group.adapter)
            for index in group.members:
                tasks[index] = replace(tasks[index], adapter=_constant(group.adapter))
            self.runtime.reporter.note(f"Storage budget: {', '.join(names)} now share one adapter.")
        return replace(memory, tasks=tuple(tasks)), merged

    def _scores(self, memory: Memory) -> dict[str, Score]:
        return score_tasks(self.base, memory, str(self.config.inference), self._held_out())

    def _held_out(self) -> Iterator[HeldOut]:
        records = {task.name: self.project.task_record(task.name) for task in self.project.state.tasks}
        for one in read_held_out(self.base, records, None):
            if one.data is None:
                self.runtime.reporter.note(f"Task '{one.name}' is not scored: {one.problem}")
            yield one
        if self.task.test_size:
            yield HeldOut(self.name, self.task)

    def commit_of(
        self, learned: Learned, report: TrainReport, request: DataRequest, tree: Tree, matrix: ScoreMatrix
    ) -> Commit:
        """Gather what is written."""
        arrays, meta = self.method.state()
        searched = {"tasks": [task.name for task in self.project.state.tasks], "task": self.name, "state": meta}
        return Commit(
            name=self.name,
            record=self._record(learned, report, request),
            labels=self.task.labels,
            adapter_files=adapter_files(self.base.network, self.config.base.model, self.trained),
            tensors=learned.tensors,
            shared=learned.shared(),
            tree=tree,
            bandit_arrays={key: np.ascontiguousarray(value) for key, value in arrays.items()},
            bandit_meta=searched if meta else {},
            matrix=matrix,
            merged={
                newest: (names, adapter_files(self.base.network, self.config.base.model, weights))
                for newest, (names, weights) in self.merged.items()
            },
        )

    def _record(self, learned: Learned, report: TrainReport, request: DataRequest) -> dict[str, Any]:
        nearest, parent = self.method.nearest(), self.method.parent()
        names = [task.name for task in self.memory.tasks]
        return {
            "name": self.name,
            "metric": self.task.metric,
            "data": request.to_json(),
            "data_sha256": self.task.digest,
            "train_examples": self.task.train_size,
            "test_examples": self.task.test_size,
            "nearest": None if nearest is None else names[nearest],
            "warm_start_from": None if parent is None else names[parent],
            "settings": {k: v for k, v in to_dict(self.config).items() if k != "stream"},
            **self.runtime.arithmetic,
            "processes": self.runtime.accelerator.num_processes,
            "device": self.runtime.device.type,
            "steps": report.steps,
            "last_loss": report.last_loss,
            "trained_parameters": report.trained_parameters,
            "seconds": dict(self.clock.seconds),
            "cpu_seconds": dict(self.clock.cpu_seconds),
            "facts": learned.facts,
            "versions": versions(),
        }


def _constant(weights: AdapterWeights) -> Callable[[], AdapterWeights]:
    return lambda: weights
