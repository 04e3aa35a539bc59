"""Sequential LoRA: one adapter that goes on learning, with nothing to protect earlier tasks.

Source: the baseline SeqLoRA of TreeLoRA, section 4.1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from treelora_cli import adapters

if TYPE_CHECKING:
    from torch import Tensor

    from treelora_cli.adapters import AdapterWeights
    from treelora_cli.methods.base import StepView, TaskContext


class SeqLora:
    """Meets ``Contender``; see the module docstring."""

    def begin(self, task: TaskContext) -> AdapterWeights:
        """Go on with the adapter as the task before left it."""
        return task.fresh if task.index == 0 else adapters.read_slot(task.network, task.layers, task.scale)

    def penalty(self, view: StepView, loss: Tensor) -> Tensor | None:
        """Add nothing."""
        return None

    def before_step(self, view: StepView) -> None:
        """Leave the gradients as they are."""

    def after_step(self, view: StepView) -> None:
        """Leave the adapter as it is."""

    def end(self, task: TaskContext) -> None:
        """Learn nothing for later."""

    def kept_bytes(self) -> int:
        """Nothing is kept."""
        return 0
