"""Sequential LoRA: one adapter carried on from task to task, with nothing protected.

The usual lower bound of continual learning; Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models",
ICLR 2022, eq. 3, trained on one task after another.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from treelora_cli.backend.adapters import read_slot
from treelora_cli.config import Config, HeadConfig
from treelora_cli.methods.base import CALM, Entry, Unprotected

if TYPE_CHECKING:
    from treelora_cli.backend.adapters import AdapterWeights
    from treelora_cli.methods.base import TaskContext


class SeqLora(Unprotected):
    """A method without protection, and what the others that carry one adapter on have in common."""

    def __init__(self) -> None:
        self._carried: AdapterWeights | None = None

    def begin(self, task: TaskContext) -> AdapterWeights:
        """Start where the task before ended, the first one at a new adapter."""
        return task.fresh if self._carried is None else self._carried

    def end(self, task: TaskContext) -> None:
        """Carry the trained adapter on."""
        self._carried = read_slot(task.network, task.layers, task.scale)


SEQLORA = Entry(SeqLora, lr_share=CALM)
NCM = Entry(SeqLora, heads=("mean",))
# RanPAC, section 4: 10,000 random features
RANPAC = Entry(SeqLora, heads=("ridge",), settings=Config(head=HeadConfig(width=10_000)))
# a slow learner: the adapter moves at a tenth of the head's rate, which is the recipe's
SLCA = Entry(SeqLora, heads=("aligned",), lr_share={"aligned": 0.1})
JOINT = Entry(SeqLora, at_once=True)
