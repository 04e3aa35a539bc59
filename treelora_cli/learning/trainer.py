"""One task under one method, as ``train-task`` and a contender of ``compare`` train it, and the optimisation loop.

::

    for epoch, for batch:
        loss    = session.loss(batch)                     the task's own
        total   = loss + method.penalty(loss)             eq. 3: every term is summed here
        grads   = mean over processes of d total
        step    AdamW; the rate rises, then falls as ``train.schedule`` says
        method.before_step / after_step                   eq. 3 as a proximal step, when chosen

All randomness is a function of (seed, step), so a run stopped after any step continues exactly.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from treelora_cli import seeds
from treelora_cli.backend import adapters
from treelora_cli.backend.contract import StatefulSession, TaskSession
from treelora_cli.backend.runtime import Runtime
from treelora_cli.config import TrainConfig
from treelora_cli.errors import Interrupted, ResourceError, TreeLoraError, is_out_of_memory
from treelora_cli.methods.base import Method, StepView, TaskContext
from treelora_cli.project.unfinished import Step

if TYPE_CHECKING:
    from treelora_cli.backend.contract import Base
    from treelora_cli.config import Config

_SESSION = "session."
"""Begins the names of a session's own tensors in a checkpoint."""
_CHECK_EVERY = 10
"""Steps between looks at the loss; each costs a synchronisation with the device."""


def task_context(base: Base, session: TaskSession, config: Config, index: int, fresh_seed: int) -> TaskContext:
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
    session: TaskSession,
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


@dataclass(frozen=True)
class TrainSettings:
    """Settings of the loop; see ``config.TrainConfig``."""

    epochs: int
    lr: float
    weight_decay: float
    batch_size: int
    seed: int
    accumulate: int = 1
    warmup: float = 0.0
    schedule: str = "cosine"
    clip: float = 0.0

    @classmethod
    def of(cls, train: TrainConfig, seed: int) -> TrainSettings:
        """Return the settings of a complete configuration."""
        assert train.epochs is not None and train.lr is not None
        assert train.weight_decay is not None and train.batch_size is not None
        assert train.accumulate is not None and train.warmup is not None
        assert train.schedule is not None and train.clip is not None
        return cls(
            train.epochs,
            train.lr,
            train.weight_decay,
            train.batch_size,
            seed,
            train.accumulate,
            train.warmup,
            train.schedule,
            train.clip,
        )

    def rate(self, step: int, total: int) -> float:
        """Return the learning rate of a step, from 0, of so many: no step of the warm-up is at 0."""
        rising = round(self.warmup * total)
        if step < rising:
            return self.lr * (step + 1) / (rising + 1)
        progress = (step - rising) / (total - rising)
        if self.schedule == "cosine":
            return self.lr * 0.5 * (1 + math.cos(math.pi * progress))
        return self.lr * (1 - progress) if self.schedule == "linear" else self.lr


@dataclass(frozen=True)
class TrainReport:
    """What a loop did.

    Attributes:
        steps: Optimizer steps taken, resumed ones included.
        seconds: Time in this process.
        last_loss: Mean task loss over the last epoch; ``None`` without steps.
        trained_parameters: Numbers that were trained; 0 without steps.
    """

    steps: int
    seconds: float
    last_loss: float | None
    trained_parameters: int


class StopRequest:
    """Set by the first Ctrl-C or SIGTERM; the second interrupts at once."""

    def __init__(self) -> None:
        self.requested = False

    def __call__(self, _signal: int, _frame: FrameType | None) -> None:
        """Handle the signal."""
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True


@contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Turn SIGINT and SIGTERM into a request that the loop sees between two steps."""
    stop = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


SaveStep = Callable[[int, dict[str, Tensor]], None]
Log = Callable[[Sequence[Step]], None]


@dataclass(frozen=True)
class _Taken:
    """One step as it was taken; its numbers may still be on their way from the device."""

    step: int
    loss: Tensor
    penalty: Tensor | None
    lr: float
    ended: float
    selected: tuple[int, ...]


class Trainer:
    """Trains the slot and the session's own parameters on one task.

    Args:
        session: The task.
        method: What protects earlier tasks.
        slot: Live (down, up) parameters per layer.
        settings: Settings of the loop.
        runtime: Device and processes.
    """

    def __init__(
        self,
        session: TaskSession,
        method: Method,
        slot: list[tuple[nn.Parameter, nn.Parameter]],
        settings: TrainSettings,
        runtime: Runtime,
    ) -> None:
        self.session = session
        self.method = method
        self.slot = slot
        self.settings = settings
        self.runtime = runtime
        self.step = 0
        self._taken: list[_Taken] = []
        self._logged = time.perf_counter()
        self.total = settings.epochs * session.steps_per_epoch
        self.parameters = [parameter for pair in slot for parameter in pair] + session.parameters()
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=settings.lr, weight_decay=settings.weight_decay, fused=self._fused
        )

    @property
    def _fused(self) -> bool:
        """True where one kernel steps all parameters; it keeps its count of steps on the device."""
        return self.runtime.device.type == "cuda"

    def run(self, save: SaveStep, log: Log = lambda _steps: None) -> TrainReport:
        """Train to the end.

        Args:
            save: Called with (step, tensors) after each epoch but the last and when stopped.
            log: Called with the steps taken since it was called last, whenever the device is waited for anyway.

        Raises:
            Interrupted: A signal came; the checkpoint is saved.
            ResourceError: Out of memory.
            TreeLoraError: The loss is not finite.
        """
        started = self._logged = time.perf_counter()
        epoch_loss = torch.zeros((), device=self.runtime.device)
        with stop_on_signal() as stop:
            for batch in self.runtime.reporter.track(self._remaining(), "Training", self.total - self.step):
                if self.step % self.session.steps_per_epoch == 0:
                    epoch_loss = torch.zeros_like(epoch_loss)
                epoch_loss += self._guarded_step(batch)
                self._after(stop, save, log, epoch_loss)
        self._write_log(log)
        report_steps = max(1, min(self.total, self.session.steps_per_epoch))
        last = float(epoch_loss) / report_steps if self.total else None
        trained = sum(parameter.numel() for parameter in self.parameters) if self.total else 0
        return TrainReport(self.step, time.perf_counter() - started, last, trained)

    def _remaining(self) -> Iterator[Any]:
        per_epoch = self.session.steps_per_epoch
        if self.step >= self.total:
            return
        for epoch in range(self.step // per_epoch, self.settings.epochs):
            yield from islice(self.session.batches(epoch), self.step % per_epoch, None)

    def _guarded_step(self, batch: Any) -> Tensor:
        try:
            return self._take_step(batch)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            smaller = max(1, self.settings.batch_size // 2)
            raise ResourceError(
                f"Out of memory at step {self.step + 1}; nothing was committed. Retry with --batch-size {smaller}"
                f" --set train.accumulate={2 * self.settings.accumulate} --lr {self.settings.lr:g}, the same steps, or"
                " --grad-checkpointing."
            ) from error

    def _take_step(self, batch: Any) -> Tensor:
        torch.manual_seed(seeds.of_step(self.settings.seed, self.step))  # dropout
        lr = self.settings.rate(self.step, self.total)
        view = StepView(self.step, self.total, self.session.steps_per_epoch, lr, self.slot)
        loss = self.session.loss(batch)
        penalty = self.method.penalty(view, loss)
        total = loss if penalty is None else loss + penalty
        self.optimizer.zero_grad(set_to_none=True)
        self.runtime.accelerator.backward(total)
        self._share_gradients()
        self.method.before_step(view)
        if self.settings.clip:
            nn.utils.clip_grad_norm_(self.parameters, self.settings.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = view.lr
        self.optimizer.step()
        self.method.after_step(view)
        chosen = self.method.chosen(self.step)
        self.step += 1
        term = None if penalty is None else penalty.detach()
        self._taken.append(_Taken(self.step, loss.detach(), term, view.lr, time.perf_counter(), chosen))
        return loss.detach()

    def _share_gradients(self) -> None:
        """Average gradients over processes in one message; adapters are small."""
        processes = self.runtime.accelerator.num_processes
        if processes == 1:
            return
        grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self.parameters]
        shared = self.runtime.sum(torch.cat([grad.flatten() for grad in grads])) / processes
        for parameter, part in zip(self.parameters, shared.split([g.numel() for g in grads]), strict=True):
            parameter.grad = part.view_as(parameter).clone()

    def _write_log(self, log: Log) -> None:
        """Hand over the steps since the last time, with the time that each took."""
        steps = []
        for one in self._taken:
            seconds = max(one.ended - self._logged, 1e-9)
            self._logged = one.ended
            pull = None if one.penalty is None else float(one.penalty)
            rate = self.settings.batch_size * self.settings.accumulate / seconds
            steps.append(Step(one.step, float(one.loss), pull, one.lr, round(seconds, 6), round(rate, 3), one.selected))
        self._taken.clear()
        if steps:
            log(steps)

    def _after(self, stop: StopRequest, save: SaveStep, log: Log, epoch_loss: Tensor) -> None:
        done = self.step >= self.total
        ends_epoch = self.step % self.session.steps_per_epoch == 0
        if (ends_epoch or self.step % _CHECK_EVERY == 0) and not bool(torch.isfinite(epoch_loss)):
            raise TreeLoraError(
                f"Training diverged: the loss is not finite by step {self.step}; nothing was committed."
                f" Retry with a smaller --lr than {self.settings.lr:g}."
            )
        stopped = bool(self._any_process(stop.requested))
        if stopped or ends_epoch or self.step % _CHECK_EVERY == 0:
            self._write_log(log)
        if stopped or (ends_epoch and not done):
            save(self.step, self.tensors())
        if stopped:
            raise Interrupted(
                f"Interrupted after step {self.step} of {self.total}; nothing was committed."
                " Continue with: treelora train-task --resume"
            )

    def _any_process(self, flag: bool) -> bool:
        if self.runtime.accelerator.num_processes == 1:
            return flag
        return float(self.runtime.sum(torch.tensor([float(flag)], device=self.runtime.device))) > 0

    # -- checkpoint -----------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """Return parameters and optimizer moments, on the CPU."""
        saved: dict[str, Tensor] = {}
        for index, parameter in enumerate(self.parameters):
            saved[f"parameter.{index}"] = parameter.detach().cpu().clone()
            for key, value in self.optimizer.state.get(parameter, {}).items():
                saved[f"optimizer.{index}.{key}"] = torch.as_tensor(value).detach().cpu().clone()
        if isinstance(self.session, StatefulSession):
            saved |= {f"{_SESSION}{key}": tensor.cpu() for key, tensor in self.session.state().items()}
        return saved

    def load(self, step: int, saved: dict[str, Tensor]) -> None:
        """Continue after ``step`` from what ``tensors`` returned there."""
        self.step = step
        if isinstance(self.session, StatefulSession):
            own = {key.removeprefix(_SESSION): tensor for key, tensor in saved.items() if key.startswith(_SESSION)}
            self.session.load_state(own)
        with torch.no_grad():
            for index, parameter in enumerate(self.parameters):
                parameter.copy_(saved[f"parameter.{index}"])
                prefix = f"optimizer.{index}."
                found = {key[len(prefix) :]: value for key, value in saved.items() if key.startswith(prefix)}
                if found:
                    self.optimizer.state[parameter] = {
                        key: value.clone() if key == "step" and not self._fused else value.to(parameter.device)
                        for key, value in found.items()
                    }
