"""The strategy interface between the trainer and a continual-learning method.

``Method`` is all that the trainer knows. ``Contender`` is a method over a whole stream, kept in memory, as
``treelora compare`` runs it; TreeLoRA itself keeps its state in the project directory instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor, nn

    from treelora_cli.backend.adapters import AdapterWeights


@dataclass(frozen=True)
class StepView:
    """What a method sees of one optimizer step.

    Attributes:
        step: From 0.
        total: Steps of the whole task.
        steps_per_epoch: Steps in one epoch.
        lr: Learning rate of this step.
        slot: Live (down, up) parameters per adapted layer; empty where no adapter is trained.
    """

    step: int
    total: int
    steps_per_epoch: int
    lr: float
    slot: list[tuple[nn.Parameter, nn.Parameter]]


class Method(Protocol):
    """One continual-learning method while a task is trained."""

    def penalty(self, view: StepView, loss: Tensor) -> Tensor | None:
        """Return a scalar added to the task loss, or ``None``."""

    def before_step(self, view: StepView) -> None:
        """Change the slot's gradients in place before the optimizer's step, if the method does."""

    def after_step(self, view: StepView) -> None:
        """Change the slot in place after the optimizer's step, if the method does."""


@dataclass(frozen=True)
class TaskContext:
    """What a contender sees of a task before and after its training.

    Attributes:
        index: Of the task, from 0.
        network: The PEFT model; its frozen weights may be changed in place between tasks.
        layers: Names of the adapted modules in network order, shape (D,).
        slot: Live (down, up) parameters per adapted layer.
        scale: LoRA scale alpha / rank.
        fresh: A newly drawn adapter for this task, with ``up`` at zero.
        losses: Returns up to so many mini-batch losses of this task through the network as it is.
    """

    index: int
    network: nn.Module
    layers: tuple[str, ...]
    slot: list[tuple[nn.Parameter, nn.Parameter]]
    scale: float
    fresh: AdapterWeights
    losses: Callable[[int], Iterator[Tensor]]


class Contender(Method, Protocol):
    """A method over a stream; what it keeps between tasks lives in the object."""

    def begin(self, task: TaskContext) -> AdapterWeights | None:
        """Prepare for a task; returns where its adapter starts, ``None`` to leave the slot alone and not train it."""

    def end(self, task: TaskContext) -> None:
        """Learn from the task what later ones need; the trained adapter is in the slot."""

    def kept_bytes(self) -> int:
        """Return the bytes kept for later tasks, adapters aside."""


class Unprotected:
    """The part of a contender that protects nothing: no term, no change of gradients or slot, nothing kept."""

    def penalty(self, view: StepView, loss: Tensor) -> Tensor | None:
        """Add nothing to the loss."""
        return None

    def before_step(self, view: StepView) -> None:
        """Leave the gradients as they are."""

    def after_step(self, view: StepView) -> None:
        """Leave the slot as it is."""

    def kept_bytes(self) -> int:
        """Keep nothing but the adapter, if there is one."""
        return 0
