"""Two linear layers with a LoRA slot each: the smallest network that a method can be tried on."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from treelora_cli.backend import adapters
from treelora_cli.backend.adapters import AdapterWeights
from treelora_cli.methods.base import Method, StepView, TaskContext

LAYERS = ("first", "second")
SCALE = 2.0
seeds = st.integers(0, 2**32 - 1)


class Two(nn.Module):
    """Two layers, of ``nn.Linear`` or of GPT-2's transposed kind."""

    def __init__(self, transposed: bool = False, dims: tuple[int, int, int] = (6, 5, 4)) -> None:
        super().__init__()
        wide, middle, narrow = dims
        self.first: nn.Module = Conv1D(middle, wide) if transposed else nn.Linear(wide, middle)
        self.second: nn.Module = Conv1D(narrow, middle) if transposed else nn.Linear(middle, narrow)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


class Problem:
    """A network with a slot, and regression tasks on it."""

    def __init__(
        self, transposed: bool = False, dims: tuple[int, int, int] = (6, 5, 4), rank: int = 2, tasks: int = 10
    ) -> None:
        torch.manual_seed(0)
        self.network = adapters.attach(Two(transposed, dims), LAYERS, rank=rank, alpha=SCALE * rank, dropout=0.0)
        self.slot = adapters.slot_parameters(self.network, LAYERS)
        self.dims, self.tasks = dims, tasks

    def fresh(self, seed: int) -> AdapterWeights:
        return adapters.reference_point(self.network, LAYERS, SCALE, seed)

    def losses(self, seed: int) -> Callable[[int], Iterator[Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        inputs = torch.randn(5, 3, self.dims[0], generator=generator)
        targets = torch.randn(5, 3, self.dims[2], generator=generator)

        def draw(count: int) -> Iterator[Tensor]:
            for x, y in list(zip(inputs, targets, strict=True))[:count]:
                yield (self.network(x) - y).square().mean()

        return draw

    def task(self, index: int, losses: Callable[[int], Iterator[Tensor]] | None = None) -> TaskContext:
        losses = losses or self.losses(index)
        fresh = self.fresh(index)
        return TaskContext(index, self.network, LAYERS, self.slot, SCALE, fresh, losses, tasks=self.tasks)

    def view(self, step: int = 0) -> StepView:
        return StepView(step, 10, 5, 0.05, self.slot)

    def train(self, method: Method, task: TaskContext, steps: int = 8) -> None:
        """Begin, train with AdamW and weight decay as the trainer does, end."""
        adapters.write_slot(self.network, method.begin(task))
        optimizer = torch.optim.AdamW(self.flat(), lr=0.05, weight_decay=0.1)
        for step in range(steps):
            view = self.view(step)
            loss = torch.stack(list(task.losses(5))).mean()
            penalty = method.penalty(view, loss)
            optimizer.zero_grad(set_to_none=True)
            (loss if penalty is None else loss + penalty).backward()
            method.before_step(view)
            optimizer.step()
            method.after_step(view)
        method.end(task)

    def gradients(self) -> Tensor:
        return torch.cat([p.grad.flatten() for pair in self.slot for p in pair if p.grad is not None])

    def flat(self) -> list[nn.Parameter]:
        return [p for pair in self.slot for p in pair]

    def parameters(self) -> list[Tensor]:
        return [p.detach().clone() for pair in self.slot for p in pair]


def random_weights(problem: Problem, seed: int) -> AdapterWeights:
    generator = torch.Generator().manual_seed(seed)
    down = tuple(torch.randn(a.shape, generator=generator) for a, _ in problem.slot)
    up = tuple(torch.randn(b.shape, generator=generator) for _, b in problem.slot)
    return AdapterWeights(LAYERS, down, up, SCALE)


def same(first: AdapterWeights, second: AdapterWeights) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first.down + first.up, second.down + second.up, strict=True))
