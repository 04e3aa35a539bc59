"""One task under one method: what ``train-task`` and a contender of ``compare`` do alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from treelora_cli import seeds
from treelora_cli.backend import adapters
from treelora_cli.learning.trainer import Log, SaveStep, Trainer, TrainReport, TrainSettings
from treelora_cli.methods.base import TaskContext

if TYPE_CHECKING:
    from treelora_cli.backend.contract import Base, Session
    from treelora_cli.backend.runtime import Runtime
    from treelora_cli.config import Config
    from treelora_cli.methods.base import Method


def task_context(base: Base, session: Session, config: Config, index: int, fresh_seed: int) -> TaskContext:
    """Return what a method sees of task ``index``.

    Args:
        base: The loaded base.
        session: The task.
        config: The settings in force, complete.
        index: Of the task, from 0.
        fresh_seed: Seed of the adapter without effect that the task may start from.
    """
    assert config.seed is not None
    scale = config.adapter.scale
    return TaskContext(
        index=index,
        network=base.network,
        layers=base.layers,
        slot=adapters.slot_parameters(base.network, base.layers),
        scale=scale,
        fresh=adapters.reference_point(base.network, base.layers, scale, fresh_seed),
        losses=session.probe_losses,
        seed=seeds.of_task(config.seed, index),
        config=config,
    )


def train_session(
    session: Session,
    method: Method,
    task: TaskContext,
    runtime: Runtime,
    *,
    begun: Callable[[], None] = lambda: None,
    resume: Callable[[Trainer], None] = lambda _trainer: None,
    save: SaveStep = lambda _step, _tensors: None,
    log: Log = lambda _steps: None,
) -> TrainReport:
    """Train a prepared session from the method's ``begin`` to its ``end``; leaves the trained adapter in the slot.

    Args:
        session: The task, prepared.
        method: What protects the earlier tasks.
        task: What the method sees of it.
        runtime: Device and processes.
        begun: Called once the adapter is where it starts.
        resume: Puts the trainer where an interrupted task stopped.
        save: Called with (step, tensors) after each epoch but the last and when stopped.
        log: Called with steps taken, as in ``Trainer.run``.

    Raises:
        TreeLoraError: As ``Trainer.run``.
    """
    start = method.begin(task)
    if start is not None:
        adapters.write_slot(task.network, start)
    begun()
    slot = [] if start is None else task.slot
    trainer = Trainer(session, method, slot, TrainSettings.of(task.config.train, task.seed), runtime)
    resume(trainer)
    report = trainer.run(save, log)
    method.end(task)
    return report
