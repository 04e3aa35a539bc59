"""Learn one task and commit it: the main job, in order.

::

    learn_task      read data                                  new_task.py: NewTask
      train_task    frozen pass -> probe: signature            probe_task
                    -> the method begins: search, warm start   methods/
                    -> train                                   trainer.py
                    -> statistics                              session.finish(): Trained
      conclude      tree, budget -> score every task -> gate   concluding.py: Conclusion
      commit                                                   project/
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from treelora_cli.algorithm.signature import SignatureAccumulator, SketchSpec
from treelora_cli.backend import adapters
from treelora_cli.backend.arithmetic import LEAST_STEPS, choose_arithmetic, choose_gradient, precision_beside
from treelora_cli.backend.contract import Base, ChoosingSession, TaskData, TaskSession
from treelora_cli.backend.registry import check_honoured, require
from treelora_cli.backend.runtime import Runtime, peak_bytes
from treelora_cli.backend.values import DataRequest, Score
from treelora_cli.config import Config, to_dict
from treelora_cli.errors import CheckError, DataError
from treelora_cli.learning.branches import BranchPlan
from treelora_cli.learning.concluding import Conclusion, commit_of, conclude, name_of
from treelora_cli.learning.evaluation import Scored, blamed
from treelora_cli.learning.gate import check_gate
from treelora_cli.learning.new_task import Clock, NewTask, Probe, Trained
from treelora_cli.learning.opening import check_base, recorded_arithmetic
from treelora_cli.learning.resuming import restore, save_step
from treelora_cli.learning.tracking import Tracking, check_tracker, open_tracking
from treelora_cli.learning.trainer import TrainReport, task_context, train_session
from treelora_cli.methods.base import Past
from treelora_cli.methods.catalogue import project_method
from treelora_cli.project import Commit, Project
from treelora_cli.project.metrics import WatchSet
from treelora_cli.score_matrix import ScoreMatrix

if TYPE_CHECKING:
    from treelora_cli.learning.trainer import Trainer
    from treelora_cli.methods.base import Method, TaskContext
    from treelora_cli.project.unfinished import Step

_COMPARED = 4
"""Mini-batches on which an earlier adapter and none are compared as starts."""


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
    evaluate: Scored,
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
        evaluate: What is scored afterwards.
        resume: Continue from the checkpoint.
        abandon: Give up what was interrupted, this task or another.

    Raises:
        CheckError: The gate refused it: nothing is committed, and the learned task waits in ``.treelora``.
        TreeLoraError: Bad data, no memory, an interruption, ...; the project is as before.
    """
    _check_ready(project, base, name, config, evaluate=evaluate, interrupted=abandon or resume)
    clock = Clock()
    request = replace(request, kept_in=project.root.absolute())
    data = _read(base, request, runtime)
    check_numbers(data, project.labels_by_task())
    tracking = _tracking(project, name, config, runtime)
    new = NewTask(name, request, data, project, base, config, runtime, project.memory(), project.tree(), tracking)
    clock.lap("read")
    with project.logging_steps(), closing(tracking):
        trained = train_task(new, clock, resume=resume)
        concluded = conclude(new, trained, clock, evaluate)
        tracking.scores(concluded.matrix, trained.report.steps)
        if runtime.is_main:
            _write(new, commit_of(new, trained, concluded, clock), concluded.refusal)
        if concluded.refusal is not None:
            raise CheckError(
                f"Task '{name}' is learned but not committed: {concluded.refusal}."
                " Accept it with treelora train-task --accept, or drop it with --drop."
            )
    clock.lap("commit")
    return _report(new, trained, concluded, clock)


def _check_ready(
    project: Project, base: Base, name: str, config: Config, *, evaluate: Scored, interrupted: bool
) -> None:
    """Refuse at once what would fail only later; ``interrupted``: an interrupted task may be given up or goes on."""
    project.check_free(name)
    project.check_decided()
    if not interrupted:
        project.check_uninterrupted()
    check_gate(config.gate, evaluate)
    check_tracker(str(config.track))
    check_base(project, base)


def _tracking(project: Project, name: str, config: Config, runtime: Runtime) -> Tracking:
    """Open the experiment tracker that the settings name; of several processes the main one has it."""
    names = project.root.name, name
    return open_tracking(str(config.track), project.tracking, *names, runtime.reporter.note, wanted=runtime.is_main)


def _read(base: Base, request: DataRequest, runtime: Runtime) -> TaskData:
    data = base.read_task(request)
    check_honoured(request, data)
    for note in data.notes:
        runtime.reporter.note(note)
    if data.sample:
        runtime.reporter.note(f"First example, as the model sees it: {data.sample}")
    return data


def _write(new: NewTask, change: Commit, refusal: str | None) -> None:
    if refusal is None:
        new.project.commit(change)
    else:
        new.project.propose(change, refusal)


def _report(new: NewTask, trained: Trained, concluded: Conclusion, clock: Clock) -> TaskReport:
    return TaskReport(
        name=new.name,
        matrix=concluded.matrix,
        scores=concluded.scores,
        parent=name_of(new, trained.found.parent),
        nearest=name_of(new, trained.found.nearest),
        seconds=clock.seconds,
        cpu_seconds=clock.cpu_seconds,
        steps=trained.report.steps,
        peak_bytes=peak_bytes(),
        notes=new.data.notes,
        watch=concluded.watch,
        branch=None if trained.branches is None else trained.branches.name,
        branch_reason=None if trained.branches is None else trained.branches.sentence(),
    )


# -- train --------------------------------------------------------------------------------------------


def train_task(new: NewTask, clock: Clock, *, resume: bool) -> Trained:
    """Probe the task, train it under the project's method, and take what later tasks and predictions need."""
    method = project_method(str(new.config.method)).make()
    session, context = _begin_session(new)
    _choose_arithmetic(new, session, context, resume=resume)
    session.prepare()
    clock.lap("frozen pass")
    _choose_gradient(new, session, context, resume=resume)
    probe = probe_task(new, session, context)
    clock.lap("probe")
    earlier = new.memory.tasks
    past = Past(
        new.tree,
        probe.queries,
        lambda index: earlier[index].adapter(),
        lambda start: _loss_from(new, session, start),
    )
    context = replace(context, past=past)
    plan = None
    if new.config.tree.branch != "never":
        plan = BranchPlan(new.config, new.name, new.memory)
        plan.choose(session, context.seed)
        context = replace(context, config=plan.config)
    report = _train(new, session, method, context, plan, clock, resume=resume)
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


def _begin_session(new: NewTask) -> tuple[TaskSession, TaskContext]:
    """Open the task, its slot at the reference point: an adapter without effect."""
    with blamed(new.memory):
        session = new.base.session(new.data, new.memory, new.config)
    require(session, TaskSession, new.project.state.backend)
    context = task_context(new.base, session, new.config, len(new.memory.tasks), fresh_seed=new.seed)
    adapters.write_slot(new.base.network, context.fresh)
    return session, context


def _train(
    new: NewTask,
    session: TaskSession,
    method: Method,
    context: TaskContext,
    plan: BranchPlan | None,
    clock: Clock,
    *,
    resume: bool,
) -> TrainReport:
    """Train with a checkpoint after each epoch and a log of steps, from a checkpoint where there is one to resume."""
    checkpoint, identity, step_log = new.project.checkpoint, _identity(new), new.project.step_log

    def begun() -> None:
        if plan is not None and plan.joins:
            adapters.write_slot(new.base.network, new.memory.tasks[plan.home_index()].adapter())
        clock.lap("search")

    def resumed(trainer: Trainer) -> None:
        if resume:
            restore(checkpoint, identity, trainer, method)
        if new.runtime.is_main:
            step_log.begin(trainer.step)

    def save(step: int, tensors: dict[str, torch.Tensor]) -> None:
        if new.runtime.is_main:
            save_step(checkpoint, identity, new.config, new.request, step, tensors, method)

    def log(steps: Sequence[Step]) -> None:
        if new.runtime.is_main:
            step_log.add(steps)
            new.tracking.steps(steps)

    return train_session(session, method, context, new.runtime, begun=begun, resume=resumed, save=save, log=log)


def _choose_arithmetic(new: NewTask, session: TaskSession, context: TaskContext, *, resume: bool) -> None:
    begun = new.project.checkpoint.facts() if resume else None
    if begun is not None and "precision" in begun:
        new.runtime.compute_as(begun)
        return
    wanted = precision_beside(str(new.config.train.precision), new.config.base.dtype)
    last = recorded_arithmetic(new.project, new.runtime.device.type)
    if wanted == "auto" and last is not None:
        new.runtime.compute_as(last)
    else:
        choose_arithmetic(new.runtime, wanted, session, [up for _, up in context.slot])


def _choose_gradient(new: NewTask, session: TaskSession, context: TaskContext, *, resume: bool) -> None:
    """Take gradients as the task was begun, as the project does on this kind of device, or as a trial finds faster."""
    new.runtime.gradient = None
    ways = session.gradient_ways() if isinstance(session, ChoosingSession) else ()
    if not ways:
        return
    assert isinstance(session, ChoosingSession) and new.config.train.epochs is not None
    known = recorded_arithmetic(new.project, new.runtime.device.type, "gradient")
    begun = new.project.checkpoint.facts() if resume else known
    way = None if begun is None else begun.get("gradient")
    if way in ways:
        session.take_gradient(way)
    elif resume or new.config.train.epochs * session.steps_per_epoch < LEAST_STEPS:
        return
    else:
        way = choose_gradient(new.runtime, session, [up for _, up in context.slot])
    new.runtime.gradient = way
    new.runtime.reporter.detail(f"Gradients are taken {way}.")


def probe_task(new: NewTask, session: TaskSession, context: TaskContext) -> Probe:
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


def _loss_from(new: NewTask, session: TaskSession, start: adapters.AdapterWeights) -> float:
    """Return the mean loss of the probe's first mini-batches, over all processes, under an adapter."""
    runtime = new.runtime
    adapters.write_slot(new.base.network, start)
    with torch.no_grad():
        losses = torch.stack(list(session.probe_losses(-(-_COMPARED // runtime.accelerator.num_processes))))
    sums = runtime.sum(torch.stack([losses.sum(), losses.new_tensor(float(len(losses)))]))
    return float(sums[0] / sums[1])


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
