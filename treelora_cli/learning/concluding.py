"""After training: extend the tree, keep the budget, score every task, ask the gate, gather what is committed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from treelora_cli.algorithm.budget import merge_to_budget
from treelora_cli.algorithm.tree import Tree, extend_tree
from treelora_cli.backend import adapters
from treelora_cli.backend.runtime import peaks
from treelora_cli.backend.values import Memory, Score, TaskMemory
from treelora_cli.config import to_dict
from treelora_cli.learning.evaluation import HeldOut, Scored, read_held_out, score_tasks
from treelora_cli.learning.gate import after_task, for_gate, of_tasks, refusal, watched
from treelora_cli.learning.new_task import Clock, NewTask, Trained
from treelora_cli.project import Commit
from treelora_cli.project.metrics import TaskAnswers, WatchSet
from treelora_cli.score_matrix import ScoreMatrix
from treelora_cli.version import versions

if TYPE_CHECKING:
    from treelora_cli.backend.adapters import AdapterWeights

    Merged = dict[str, tuple[tuple[str, ...], AdapterWeights]]
    """Adapters that replace those of several tasks: the newest member's name to (members' names, adapter)."""


@dataclass(frozen=True)
class Conclusion:
    """What the project would be with the task in it, and whether the gate lets it.

    Attributes:
        tree: Over all tasks, the new one included.
        merged: Adapters that the storage budget merged.
        scores: Score of each task now, by name; empty where nothing was scored.
        watch: Watch sets with their scores after the task.
        matrix: Scores of every task after every task.
        refusal: Which figure fails the gate, in words; ``None`` when it holds.
    """

    tree: Tree
    merged: Merged
    scores: dict[str, Score]
    watch: tuple[WatchSet, ...]
    matrix: ScoreMatrix
    refusal: str | None


def conclude(new: NewTask, trained: Trained, clock: Clock, evaluate: Scored) -> Conclusion:
    """Extend the tree, keep the storage budget, score what is asked for and ask the gate."""
    tree = extended_tree(new, trained.signature)
    clock.lap("tree")
    memory, merged = within_budget(new, with_new(new, trained), tree)
    before = new.project.watch()
    found = _found(new, memory, before, evaluate)
    scores, watch = of_tasks(found), after_task(before, new.name, found)
    values = [scores[one.name].value if one.name in scores else None for one in memory.tasks]
    matrix = new.project.matrix().with_row(new.name, values)
    clock.lap("evaluate")
    checked = evaluate is Scored.ALL
    reason = refusal(new.config.gate, matrix, for_gate(before, watch, new.name)) if checked else None
    return Conclusion(tree, merged, scores, watch, matrix, reason)


def _counted(scores: Mapping[str, Score]) -> dict[str, TaskAnswers]:
    """Return the counts as a project keeps them; of free answers only who gave them."""
    known = {name: one for name, one in scores.items() if one.answers is not None or one.routes}
    return {
        name: TaskAnswers({}, one.routes)
        if one.answers is None
        else TaskAnswers(one.answers.confusion, one.routes, one.answers.familiar)
        for name, one in known.items()
    }


def name_of(new: NewTask, index: int | None) -> str | None:
    """Return an earlier task's name by its index."""
    return None if index is None else new.memory.tasks[index].name


def extended_tree(new: NewTask, signature: np.ndarray[Any, Any]) -> Tree:
    """Return the tree over all tasks, the new one included."""
    depth, split = new.config.tree.depth, str(new.config.tree.split)
    assert depth is not None
    return extend_tree(new.tree, signature, depth, split=split)


def with_new(new: NewTask, trained: Trained) -> Memory:
    """Return the memory with the new task in it."""
    learned, tensors = trained.learned, trained.tensors
    task = TaskMemory(new.name, new.data.labels, new.data.metric, _constant(trained.adapter), lambda: tensors)
    if learned.branch is None:
        return new.memory.with_task(task, learned.shared)
    return new.memory.with_task(replace(task, branch=learned.branch.name), learned.shared, learned.branch.tensors)


def within_budget(new: NewTask, memory: Memory, tree: Tree) -> tuple[Memory, Merged]:
    """Merge the nearest adapters until no more than the budget are kept; say which."""
    if not new.config.budget or new.config.tree.branch != "never":
        return memory, {}  # no more branches than the budget are opened
    homes = [task.adapter for task in new.project.state.tasks] + [f"new/{new.name}"]
    groups = merge_to_budget(
        tree, homes, lambda index: memory.tasks[index].adapter(), new.config.budget, adapters.merge
    )
    tasks, merged = list(memory.tasks), {}
    for group in groups:
        names = tuple(tasks[index].name for index in group.members)
        merged[names[-1]] = (names, group.adapter)
        for index in group.members:
            tasks[index] = replace(tasks[index], adapter=_constant(group.adapter))
        new.runtime.reporter.note(f"Storage budget: {', '.join(names)} now share one adapter.")
    return replace(memory, tasks=tuple(tasks)), merged


def _found(new: NewTask, memory: Memory, sets: Sequence[WatchSet], evaluate: Scored) -> dict[str, Score]:
    """Score with what is learned now: every task and watch set, the new task alone, or nothing."""
    if evaluate is Scored.NONE:
        return {}
    wanted = _held_out(new, sets) if evaluate is Scored.ALL else _own_held_out(new)
    return score_tasks(new.base, memory, str(new.config.inference), wanted)


def _own_held_out(new: NewTask) -> Iterator[HeldOut]:
    if new.data.test_size:
        yield HeldOut(new.name, new.data)


def _held_out(new: NewTask, sets: Sequence[WatchSet]) -> Iterator[HeldOut]:
    records = {task.name: new.project.task_record(task.name) for task in new.project.state.tasks}
    for one in read_held_out(new.base, records, None):
        if one.data is None:
            new.runtime.reporter.note(f"Task '{one.name}' is not scored: {one.problem}")
        yield one
    yield from _own_held_out(new)
    yield from watched(new.base, sets, new.runtime.reporter)


def commit_of(new: NewTask, trained: Trained, concluded: Conclusion, clock: Clock) -> Commit:
    """Gather what is written."""
    arrays, facts = trained.found.search
    searched = {"tasks": [task.name for task in new.project.state.tasks], "task": new.name, "state": facts}
    network, model = new.base.network, new.config.base.model
    return Commit(
        name=new.name,
        record=_record(new, trained, clock),
        labels=new.data.labels,
        adapter_files=adapters.adapter_files(network, model, trained.adapter),
        tensors=trained.tensors,
        shared=trained.learned.shared(),
        tree=concluded.tree,
        bandit_arrays={key: np.ascontiguousarray(value) for key, value in arrays.items()},
        bandit_meta=searched if facts else {},
        matrix=concluded.matrix,
        merged={
            newest: (names, adapters.adapter_files(network, model, weights))
            for newest, (names, weights) in concluded.merged.items()
        },
        watch=concluded.watch,
        steps=new.project.step_log.read(),
        answers=_counted(concluded.scores),
        **({} if trained.branches is None else trained.branches.commit_part(trained.learned)),
    )


def _record(new: NewTask, trained: Trained, clock: Clock) -> dict[str, Any]:
    return {
        "name": new.name,
        "metric": new.data.metric,
        "data": new.request.to_json(),
        "data_sha256": new.data.digest,
        "held_out": "".join(new.data.held_out),
        "train_examples": new.data.train_size,
        "test_examples": new.data.test_size,
        "nearest": name_of(new, trained.found.nearest),
        "warm_start_from": name_of(new, trained.found.parent),
        "settings": {key: value for key, value in to_dict(new.config).items() if key != "stream"},
        **new.runtime.arithmetic,
        "processes": new.runtime.accelerator.num_processes,
        "base_divided": new.runtime.shards is not None,
        "device": new.runtime.device.type,
        "steps": trained.report.steps,
        "last_loss": trained.report.last_loss,
        "trained_parameters": trained.report.trained_parameters,
        "seconds": dict(clock.seconds),
        "cpu_seconds": dict(clock.cpu_seconds),
        **peaks(new.runtime.device.type),
        **({} if trained.branches is None else trained.branches.record()),
        "facts": trained.learned.facts,
        "versions": versions(),
    }


def _constant(weights: AdapterWeights) -> Callable[[], AdapterWeights]:
    return lambda: weights
