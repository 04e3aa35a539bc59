"""Learn one task and commit it: the main job, in order.

::

    read data -> frozen pass -> probe: signature -> the method begins: search, warm start -> train -> statistics
              -> tree, budget -> score every task -> commit
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from treelora_cli.algorithm.signature import SignatureAccumulator, SketchSpec
from treelora_cli.backend import adapters
from treelora_cli.backend.arithmetic import choose_arithmetic
from treelora_cli.backend.contract import Base, Session, TaskData
from treelora_cli.backend.registry import check_honoured, require
from treelora_cli.backend.runtime import Runtime, peak_bytes
from treelora_cli.backend.values import DataRequest, Score
from treelora_cli.config import Config, to_dict
from treelora_cli.errors import CheckError, DataError
from treelora_cli.learning.branches import BranchPlan
from treelora_cli.learning.concluding import (
    commit_of,
    counted,
    extended_tree,
    name_of,
    scores_of,
    with_new,
    within_budget,
)
from treelora_cli.learning.evaluation import blamed
from treelora_cli.learning.gate import after_task, check_gate, for_gate, of_tasks, refusal
from treelora_cli.learning.new_task import Clock, NewTask, Probe, Trained
from treelora_cli.learning.opening import check_base, recorded_arithmetic
from treelora_cli.learning.resuming import restore, save_step
from treelora_cli.learning.trainer import task_context, train_session
from treelora_cli.methods.base import Past
from treelora_cli.methods.catalogue import project_method
from treelora_cli.project import Project
from treelora_cli.project.metrics import WatchSet
from treelora_cli.score_matrix import ScoreMatrix

if TYPE_CHECKING:
    from treelora_cli.learning.trainer import Trainer
    from treelora_cli.methods.base import TaskContext


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
        watch: Watch sets with their scores after the task.
        branch: The branch that the task belongs to; ``None`` where it has none.
        branch_reason: One sentence that says why it joined or opened one; ``None`` where tasks never do.
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
    watch: tuple[WatchSet, ...] = ()
    branch: str | None = None
    branch_reason: str | None = None


def check_numbers(task: TaskData, known: Mapping[str, Sequence[str]]) -> None:
    """Refuse labels that are bare numbers and the same as an earlier task's: they may mean other classes.

    Args:
        task: The new task.
        known: Labels of the earlier tasks, by task.

    Raises:
        DataError: They are; the message says how to name them, or how to say that they mean the same.
    """
    if not task.numbered:
        return
    for name, labels in known.items():
        shared = sorted(set(labels) & set(task.labels), key=int)
        if shared:
            raise DataError(
                f"Labels {', '.join(shared[:5])} are bare numbers, and task '{name}' has the same ones: do they mean"
                " the same classes? Pass --label-names FILE, --label-prefix NAME, or --map SOURCE=label for a column of"
                " names; --label-prefix '' if they do mean the same."
            )


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
    abandon: bool = False,
) -> TaskReport:
    """Learn a task and commit it; the caller holds the lock.

    Args:
        project: Where it is committed.
        base: The project's loaded base.
        request: Where the data lies.
        name: The task's.
        config: Settings in force.
        runtime: Device and reporter.
        evaluate: Score every task afterwards.
        resume: Continue from the checkpoint.
        abandon: Give up what was interrupted, this task or another.

    Raises:
        CheckError: The gate refused it: nothing is committed, and the learned task waits in ``.treelora``.
        TreeLoraError: Bad data, no memory, an interruption, ...; the project is as before.
    """
    project.check_free(name)
    project.check_decided()
    if not (abandon or resume):
        project.check_uninterrupted()
    check_gate(config.gate, evaluate=evaluate)
    check_base(project, base)
    clock = Clock()
    data = _read(base, request, runtime)
    check_numbers(data, project.labels_by_task())
    new = NewTask(name, request, data, project, base, config, runtime, project.memory(), project.tree())
    clock.lap("read")
    with project.logging_steps():
        trained = train_task(new, clock, resume=resume)
        tree = extended_tree(new, trained.signature)
        clock.lap("tree")
        memory, merged = within_budget(new, with_new(new, trained), tree)
        found = scores_of(new, memory) if evaluate else {}
        scores, watch = of_tasks(found), after_task(project.watch(), name, found)
        matrix = project.matrix().with_row(
            name, [scores[one.name].value if one.name in scores else None for one in memory.tasks]
        )
        clock.lap("evaluate")
        reason = refusal(config.gate, matrix, for_gate(project.watch(), watch, name)) if evaluate else None
        if runtime.is_main:
            change = replace(
                commit_of(new, trained, clock, tree, matrix, merged),
                watch=watch,
                steps=project.step_log.read(),
                answers={one: counted(score.answers) for one, score in scores.items() if score.answers is not None},
            )
            if reason is None:
                project.commit(change)
            else:
                project.propose(change, reason)
        if reason is not None:
            raise CheckError(
                f"Task '{name}' is learned but not committed: {reason}."
                " Accept it with treelora train-task --accept, or drop it with --drop."
            )
    clock.lap("commit")
    return TaskReport(
        name=name,
        matrix=matrix,
        scores=scores,
        parent=name_of(new, trained.found.parent),
        nearest=name_of(new, trained.found.nearest),
        seconds=clock.seconds,
        cpu_seconds=clock.cpu_seconds,
        steps=trained.report.steps,
        peak_bytes=peak_bytes(),
        notes=data.notes,
        watch=watch,
        **({} if trained.branches is None else trained.branches.record()),
    )


def _read(base: Base, request: DataRequest, runtime: Runtime) -> TaskData:
    data = base.read_task(request)
    check_honoured(request, data)
    for note in data.notes:
        runtime.reporter.note(note)
    if data.sample:
        runtime.reporter.note(f"First example, as the model sees it: {data.sample}")
    return data


# -- train --------------------------------------------------------------------------------------------


def train_task(new: NewTask, clock: Clock, *, resume: bool) -> Trained:
    """Probe the task and train it under the project's method."""
    method = project_method(str(new.config.method)).make()
    with blamed(new.memory):
        session = new.base.session(new.data, new.memory, new.config)
    require(session, Session, new.project.state.backend)
    context = task_context(new.base, session, new.config, len(new.memory.tasks), fresh_seed=new.seed)
    adapters.write_slot(new.base.network, context.fresh)
    _choose_arithmetic(new, session, context, resume=resume)
    session.prepare()
    clock.lap("frozen pass")
    probe = probe_task(new, session, context)
    clock.lap("probe")
    earlier, checkpoint, identity = new.memory.tasks, new.project.checkpoint, _identity(new)
    context = replace(context, past=Past(new.tree, probe.queries, lambda index: earlier[index].adapter()))
    plan = None if new.config.tree.branch == "never" else BranchPlan(new.config, new.name, new.memory)
    if plan is not None:
        plan.choose(session, context.seed)
        context = replace(context, config=plan.config)

    def save(step: int, tensors: dict[str, torch.Tensor]) -> None:
        if new.runtime.is_main:
            save_step(checkpoint, identity, new.config, new.request, step, tensors, method)

    def resumed(trainer: Trainer) -> None:
        if resume:
            restore(checkpoint, identity, trainer, method)
        if new.runtime.is_main:
            new.project.step_log.begin(trainer.step)

    def begun() -> None:
        if plan is not None and plan.joins:
            adapters.write_slot(new.base.network, earlier[plan.home_index()].adapter())
        clock.lap("search")

    report = train_session(
        session,
        method,
        context,
        new.runtime,
        begun=begun,
        resume=resumed,
        save=save,
        log=lambda steps: new.project.step_log.add(steps) if new.runtime.is_main else None,
    )
    clock.lap("train")
    adapter = adapters.read_slot(new.base.network, new.base.layers, context.scale)
    if plan is not None and plan.draws_adapter:
        adapter = adapters.random_like(adapter, context.seed)
        adapters.write_slot(new.base.network, adapter)
    with blamed(new.memory):
        learned = session.finish()
    if plan is not None:
        plan.settle(learned)
    clock.lap("statistics")
    return Trained(adapter, probe.signature, learned, method.found(), report, plan)


def _choose_arithmetic(new: NewTask, session: Session, context: TaskContext, *, resume: bool) -> None:
    begun = new.project.checkpoint.facts() if resume else None
    if begun is not None and "precision" in begun:
        new.runtime.compute_as(begun)
        return
    wanted, last = str(new.config.train.precision), recorded_arithmetic(new.project, new.runtime.device.type)
    if wanted == "auto" and last is not None:
        new.runtime.compute_as(last)
    else:
        choose_arithmetic(new.runtime, wanted, session, [up for _, up in context.slot])


def probe_task(new: NewTask, session: Session, context: TaskContext) -> Probe:
    """Average the new task's gradients at the reference point, which the slot holds."""
    tree, runtime = new.config.tree, new.runtime
    assert tree.probe_batches is not None and tree.signature_width is not None
    accumulator = SignatureAccumulator(SketchSpec(width=tree.signature_width, seed=new.seed))
    ups = [up for _, up in context.slot]
    own = -(-tree.probe_batches // runtime.accelerator.num_processes)
    for loss in runtime.reporter.track(session.probe_losses(own), "Probing", own):
        accumulator.add(list(torch.autograd.grad(loss, ups)))
    batches = runtime.concatenate(accumulator.batches.to(runtime.device)).cpu()
    mean = runtime.sum(accumulator.signature().to(runtime.device)).cpu()
    return Probe(batches.numpy(), torch.nn.functional.normalize(mean, dim=-1).numpy())


def _identity(new: NewTask) -> dict[str, Any]:
    """What a checkpoint must agree with to be continued; the arithmetic is chosen before."""
    free = ("precision", "keep_mib")
    train = {key: value for key, value in to_dict(new.config)["train"].items() if key not in free}
    return {
        "task": new.name,
        "state": new.project.state.digest(),
        "data": new.data.digest,
        "train": train,
        **new.runtime.arithmetic,
    }
