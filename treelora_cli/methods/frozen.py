"""No adapter at all: the base stays as it is, and what is learned is the head's own, such as prompts."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from treelora_cli.methods.base import StepView, TaskContext


class Frozen:
    """Meets ``Contender``; see the module docstring."""

    def begin(self, task: TaskContext) -> None:
        """Train no adapter."""

    def end(self, task: TaskContext) -> None:
        """Learn nothing for later."""

    def penalty(self, view: StepView, loss: Tensor) -> Tensor | None:
        """Add nothing to the loss."""
        return None

    def before_step(self, view: StepView) -> None:
        """Leave the gradients as they are."""

    def after_step(self, view: StepView) -> None:
        """There is no slot to change."""

    def kept_bytes(self) -> int:
        """Keep nothing."""
        return 0
