"""What every language task does alike while it is trained: the order of its batches, and when dropout acts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor, nn

from treelora_backends.causal_lm.batches import shuffled_batches
from treelora_backends.compiled import Compilation
from treelora_backends.objective import Objective, summed_in_parts
from treelora_cli import seeds
from treelora_cli.errors import UsageError

if TYPE_CHECKING:
    from treelora_backends.causal_lm.loaded import LoadedLm
    from treelora_cli.config import TrainConfig

_TRIAL_EXAMPLES = 4
PLAIN = Objective()
"""What probes measure, whatever is trained: gradients of all tasks are compared."""


class LmSteps(ABC):
    """Steps over one task's examples; how the loss of some of them is computed is the subclass's.

    Args:
        base: The loaded model.
        lengths: Tokens of each of this process's examples.
        total: Examples over all processes.
        train: Batch size, accumulation, smoothing of labels and whether blocks are compiled.
        seed: Of the order of examples.
    """

    def __init__(self, base: LoadedLm, lengths: Sequence[int], total: int, train: TrainConfig, seed: int) -> None:
        assert train.batch_size is not None and train.accumulate is not None
        self.base = base
        self.lengths = lengths
        self.seed = seed
        self.parts: int = train.accumulate
        self.objective = Objective(train.label_smoothing or 0.0)
        self.compilation = Compilation(train.compile, base.lm.compilable, recomputed=train.grad_checkpointing)
        self._steps = -(-total // (train.batch_size * train.accumulate))

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
        with self.compilation.used():
            return self.loss_of(batch, self.objective)

    @abstractmethod
    def loss_of(self, places: list[int], objective: Objective = PLAIN) -> Tensor:
        """Return the mean loss over the labels of some examples, with dropout as it is set."""

    def summed(self, parts: Sequence[list[int]], loss: Callable[[list[int]], Tensor], labels: Sequence[int]) -> Tensor:
        """Return the mean loss over the labels of all parts, one after the other in memory.

        Args:
            parts: Places of examples.
            loss: Returns the mean over the labels of a part.
            labels: How many each part has.
        """
        losses = [partial(_share, loss, part, own / sum(labels)) for part, own in zip(parts, labels, strict=True)]
        return summed_in_parts(losses, [one for one in self.base.network.parameters() if one.requires_grad])

    def parameters(self) -> list[nn.Parameter]:
        """Nothing is trained beyond the adapter."""
        return []


def _share(loss: Callable[[list[int]], Tensor], part: list[int], share: float) -> Tensor:
    return loss(part) * share


def in_parts(places: Sequence[int], count: int) -> list[list[int]]:
    """Return examples in ``count`` parts as equal as can be, none of them empty."""
    size = -(-len(places) // max(1, min(count, len(places))))
    return [list(places[start : start + size]) for start in range(0, len(places), size)]
