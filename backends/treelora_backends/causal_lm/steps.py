"""What every language task does alike while it is trained: the order of its batches, and when dropout acts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn

from treelora_backends.causal_lm.batches import shuffled_batches
from treelora_cli import seeds
from treelora_cli.errors import UsageError

if TYPE_CHECKING:
    from treelora_backends.causal_lm.loaded import LoadedLm

_TRIAL_EXAMPLES = 4


class LmSteps(ABC):
    """Steps over one task's examples; how the loss of some of them is computed is the subclass's.

    Args:
        base: The loaded model.
        lengths: Tokens of each of this process's examples.
        total: Examples over all processes.
        batch_size: Examples per step over all processes.
        seed: Of the order of examples.
    """

    def __init__(self, base: LoadedLm, lengths: Sequence[int], total: int, batch_size: int, seed: int) -> None:
        self.base = base
        self.lengths = lengths
        self.seed = seed
        self._steps = -(-total // batch_size)

    def checkpoint_gradients(self, setting: str) -> None:
        """Recompute activations in the backward pass; ``setting`` is what the user calls it.

        Raises:
            UsageError: The model cannot.
        """
        try:
            self.base.lm.model.gradient_checkpointing_enable({"use_reentrant": False})
        except ValueError as error:
            raise UsageError(f"{setting}: {error}") from error

    def trial_places(self, tokens: int = 0) -> list[int]:
        """Return the places of a few examples of middling length, of more where they have fewer tokens."""
        order = sorted(range(len(self.lengths)), key=lambda place: self.lengths[place])
        count = max(_TRIAL_EXAMPLES, tokens // self.lengths[order[len(order) // 2]])
        middle = max(0, len(order) // 2 - count // 2)
        return order[middle : middle + count]

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one pass."""
        return self._steps

    def batches(self, epoch: int) -> Iterator[list[int]]:
        """Yield places in this process's share for each step."""
        yield from shuffled_batches(self.lengths, self.steps_per_epoch, seeds.of_order(self.seed, epoch))

    def loss(self, batch: list[int]) -> Tensor:
        """Mean cross-entropy over the answers' tokens."""
        if not self.base.network.training:
            self.base.network.train()
        return self.loss_of(batch)

    @abstractmethod
    def loss_of(self, places: list[int]) -> Tensor:
        """Return the mean loss over the labels of some examples, with dropout as it is set."""

    def parameters(self) -> list[nn.Parameter]:
        """Nothing is trained beyond the adapter."""
        return []
