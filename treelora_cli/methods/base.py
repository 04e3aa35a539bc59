"""The strategy interface between the trainer and a continual-learning method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

    from treelora_cli.adapters import AdapterWeights

Pair = "tuple[nn.Parameter, nn.Parameter]"


@dataclass(frozen=True)
class StepView:
    """What a method sees of one optimizer step.

    Attributes:
        step: From 0.
        total: Steps of the whole task.
        steps_per_epoch: Steps in one epoch.
        lr: Learning rate of this step.
        slot: Live (down, up) parameters per adapted layer.
    """

    step: int
    total: int
    steps_per_epoch: int
    lr: float
    slot: list[tuple[nn.Parameter, nn.Parameter]]


class Method(Protocol):
    """One continual-learning method while a task is learned."""

    def initial_adapter(self) -> AdapterWeights:
        """Return where the new adapter starts."""

    def penalty(self, view: StepView, loss: Tensor) -> Tensor | None:
        """Return a scalar added to the task loss, or ``None``."""

    def after_step(self, view: StepView) -> None:
        """Change the slot in place after the optimizer's step, if the method does."""

    def state(self) -> tuple[dict[str, np.ndarray[Any, Any]], dict[str, Any]]:
        """Return (arrays, JSON-able facts) from which ``load_state`` continues exactly."""

    def load_state(self, arrays: dict[str, np.ndarray[Any, Any]], facts: dict[str, Any]) -> None:
        """Continue from a saved state."""
