"""Sequential LoRA: one adapter carried on from task to task, with nothing protected.

The usual lower bound of continual learning; Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models",
ICLR 2022, eq. 3, trained on one task after another.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from treelora_cli.backend.adapters import read_slot
from treelora_cli.methods.base import Unprotected

if TYPE_CHECKING:
    from treelora_cli.backend.adapters import AdapterWeights
    from treelora_cli.methods.base import TaskContext


class SeqLora(Unprotected):
    """A contender without protection, and what the others that carry one adapter on have in common."""

    def __init__(self) -> None:
        self._carried: AdapterWeights | None = None

    def begin(self, task: TaskContext) -> AdapterWeights:
        """Start where the task before ended, the first one at a new adapter."""
        return task.fresh if self._carried is None else self._carried

    def end(self, task: TaskContext) -> None:
        """Carry the trained adapter on."""
        self._carried = read_slot(task.network, task.layers, task.scale)
