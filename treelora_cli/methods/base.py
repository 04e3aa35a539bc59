"""The interface between the trainer and a continual-learning method, and how a method is registered.

``Method`` is all that the trainer and what stands around it know. ``Unprotected`` is one that protects nothing: a new
method derives from it and writes what it does otherwise. TreeLoRA and every contender meet the same interface.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from treelora_cli.config import Config

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

    from treelora_cli.algorithm.tree import Tree
    from treelora_cli.backend.adapters import AdapterWeights

    State = tuple[dict[str, np.ndarray[Any, Any]], dict[str, Any]]
    """Arrays, and JSON-able facts."""


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


@dataclass(frozen=True)
class Past:
    """What a project knows of the tasks before a new one, and how the new one relates to them.

    Attributes:
        tree: Over the earlier tasks, in order of arrival; ``None`` for the first task.
        queries: Sketched mini-batch gradients of the new task at the reference point, (n, D, m).
        adapter: Returns earlier task ``i``'s adapter.
        loss_from: Returns the new task's mean loss over a few mini-batches, the same at every call, under an adapter.
    """

    tree: Tree | None
    queries: np.ndarray[Any, Any]
    adapter: Callable[[int], AdapterWeights]
    loss_from: Callable[[AdapterWeights], float]


@dataclass(frozen=True)
class TaskContext:
    """What a method sees of a task before and after its training.

    Attributes:
        index: Of the task, from 0.
        network: The base with its adapter slot; a contender may change its frozen weights in place between tasks.
        layers: Names of the adapted modules in network order, shape (D,).
        slot: Live (down, up) parameters per adapted layer.
        scale: LoRA scale alpha / rank.
        fresh: An adapter without effect to start from: ``up`` is zero.
        losses: Returns up to so many mini-batch losses of this task through the network as it is.
        seed: Of what the method draws for this task.
        config: The settings in force.
        tasks: Length of the stream; ``None`` where it is not known beforehand, as in a project.
        past: What the project knows; ``None`` where ``compare`` runs a contender, which keeps what it needs itself.
    """

    index: int
    network: nn.Module
    layers: tuple[str, ...]
    slot: list[tuple[nn.Parameter, nn.Parameter]]
    scale: float
    fresh: AdapterWeights
    losses: Callable[[int], Iterator[Tensor]]
    seed: int = 0
    config: Config = field(default_factory=Config)
    tasks: int | None = None
    past: Past | None = None


@dataclass(frozen=True)
class Found:
    """What a method found out about the earlier tasks, for the task's record.

    Attributes:
        nearest: Index of the earlier task that the new one is most like, if it looked.
        parent: Index of the earlier task whose adapter the new one started from, if any.
        search: The bandit's statistics, as ``inspect-tree --bandit`` shows them; empty without one.
    """

    nearest: int | None = None
    parent: int | None = None
    search: State = field(default_factory=lambda: ({}, {}))


class Method(Protocol):
    """A method over a stream; in a project, a new one over each task."""

    def begin(self, task: TaskContext) -> AdapterWeights | None:
        """Prepare for a task; returns where its adapter starts, ``None`` to leave the slot alone and not train it."""

    def penalty(self, view: StepView, loss: Tensor) -> Tensor | None:
        """Return a scalar added to the task loss, or ``None``."""

    def before_step(self, view: StepView) -> None:
        """Change the slot's gradients in place before the optimizer's step, if the method does."""

    def after_step(self, view: StepView) -> None:
        """Change the slot in place after the optimizer's step, if the method does."""

    def end(self, task: TaskContext) -> None:
        """Learn from the task what later ones need; the trained adapter is in the slot."""

    def state(self) -> State:
        """Return what ``load_state`` continues from when an interrupted task is resumed, beside the parameters."""

    def load_state(self, arrays: dict[str, np.ndarray[Any, Any]], facts: dict[str, Any]) -> None:
        """Continue, after ``begin``, from what ``state`` returned."""

    def found(self) -> Found:
        """Return what was found out about the earlier tasks."""

    def chosen(self, step: int) -> tuple[int, ...]:
        """Return the earlier task selected for each layer at a step just taken, (D,); empty without a search."""

    def kept_bytes(self) -> int:
        """Return the bytes kept for later tasks, adapters aside."""


class Unprotected:
    """A method but for ``begin``: no term, no change of gradients or slot, nothing found, nothing kept."""

    def penalty(self, view: StepView, loss: Tensor) -> Tensor | None:
        """Add nothing to the loss."""
        return None

    def before_step(self, view: StepView) -> None:
        """Leave the gradients as they are."""

    def after_step(self, view: StepView) -> None:
        """Leave the slot as it is."""

    def end(self, task: TaskContext) -> None:
        """Learn nothing for later."""

    def state(self) -> State:
        """Nothing changes from step to step but the parameters."""
        return {}, {}

    def load_state(self, arrays: dict[str, np.ndarray[Any, Any]], facts: dict[str, Any]) -> None:
        """Nothing to continue from."""

    def found(self) -> Found:
        """Nothing is looked for."""
        return Found()

    def chosen(self, step: int) -> tuple[int, ...]:
        """Nothing is selected."""
        return ()

    def kept_bytes(self) -> int:
        """Keep nothing but the adapter, if there is one."""
        return 0


SHARED_HEADS = ("linear", "answer")
"""One adapter for all tasks, under a growing classifier or the language model's own output layer."""
CALM = {"linear": 0.2}
"""One adapter drifts under the image recipes' rate, which suits an adapter for each task: sequential LoRA on
``cifar100_50classes`` (40 of 500 images per class, seed 0) ended at OP 14.4 with it and at 20.5 with a fifth of it."""


@dataclass(frozen=True)
class Entry:
    """A method as it is registered on the entry-point group ``treelora.methods``.

    Attributes:
        make: Returns a new method; its class, where that is made without arguments.
        in_project: It runs in a project: ``begin`` takes what it needs of earlier tasks from ``TaskContext.past``, and
            nothing else outlives a task. Otherwise it is a contender of ``compare``, in memory under one of ``heads``.
        heads: Kinds of head that a contender works with; the first that the backend offers is taken.
        lr_share: Learning rate of what a contender trains, as a share of the recipe's, by head; 1 where none is named.
        settings: Settings that the method's paper fixes.
        at_once: All tasks are learned as one.
        own_settings: A frozen dataclass of ``fields.setting`` fields that the method reads from
            ``TaskContext.config.method_settings``; ``None`` for none.
    """

    make: Callable[[], Method]
    in_project: bool = False
    heads: tuple[str, ...] = SHARED_HEADS
    lr_share: Mapping[str, float] = field(default_factory=dict)
    settings: Config = field(default_factory=Config)
    at_once: bool = False
    own_settings: type[Any] | None = None
