"""HiDe with LoRA: every task has an adapter of its own; which one answers is the head's to find out.

Source: HiDe-Prompt (Wang et al., NeurIPS 2023) and HiDe-PET (2024), with LoRA as the instruction. What makes
the method work across tasks, statistics of uninstructed and instructed features, is the ``routed`` head.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from treelora_cli.backend.adapters import AdapterWeights
    from treelora_cli.methods.base import StepView, TaskContext


class HideLora:
    """Meets ``Contender``; see the module docstring."""

    def begin(self, task: TaskContext) -> AdapterWeights:
        """Start anew."""
        return task.fresh

    def penalty(self, view: StepView, loss: Tensor) -> Tensor | None:
        """Add nothing: no other task shares the adapter."""
        return None

    def before_step(self, view: StepView) -> None:
        """Leave the gradients as they are."""

    def after_step(self, view: StepView) -> None:
        """Leave the adapter as it is."""

    def end(self, task: TaskContext) -> None:
        """Learn nothing for later; the head keeps the adapter."""

    def kept_bytes(self) -> int:
        """Nothing is kept beside the head's."""
        return 0
