"""One language task while it is learned."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from treelora_backends.lm_batches import LabelledBatch, by_length, collate, shuffled_batches
from treelora_backends.lm_memory import describe
from treelora_backends.lm_router import TaskRouter
from treelora_backends.lm_task import LmTask

from treelora_cli.backend import Learned, Memory
from treelora_cli.config import Config
from treelora_cli.errors import DataError, UsageError

if TYPE_CHECKING:
    from treelora_backends.hf_causal_lm import CausalLmBase

_TRIAL_EXAMPLES = 4
_TOKENS_KEPT = {"cpu": 1024}
_TOKENS_KEPT_ELSEWHERE = 16_384
"""Tokens whose activations are kept for the backward pass; those of a larger batch are computed twice."""


class LmSession:
    """Meets ``Session``."""

    def __init__(self, base: CausalLmBase, task: LmTask, memory: Memory, config: Config) -> None:
        if not task.train:
            raise DataError("No training examples.")
        self.base = base
        self.task = task
        self.runtime = base.runtime
        assert config.train.batch_size is not None and config.seed is not None
        self.batch_size: int = config.train.batch_size
        self.seed: int = config.seed * 10_007 + len(memory.tasks)
        self.own = self.runtime.share(list(range(task.train_size)))
        processes = self.runtime.accelerator.num_processes
        if self.steps_per_epoch > task.train_size // processes:
            raise UsageError(f"--batch-size {self.batch_size} leaves some of {processes} processes without an example.")
        self.lengths = [len(task.train[index]) for index in self.own]
        self.router = TaskRouter.restore(memory, config)
        self._set_checkpointing(bool(config.train.grad_checkpointing))

    def _set_checkpointing(self, wanted: bool) -> None:
        if not wanted:
            return
        try:
            self.base.lm.model.gradient_checkpointing_enable({"use_reentrant": False})
        except ValueError as error:
            raise UsageError(f"--grad-checkpointing: {error}") from error

    def _collated(self, places: list[int]) -> LabelledBatch:
        """Return this process's examples at ``places``, padded, on the device."""
        chosen = [self.task.train[self.own[place]] for place in places]
        return collate(chosen, self.base.encoder.pad_id).to(self.base.lm.device)

    # -- before training ------------------------------------------------------------------------------

    def trial_loss(self) -> Tensor:
        """Return the loss of a few examples of middling length."""
        self.base.network.eval()
        order = sorted(range(len(self.own)), key=lambda place: self.lengths[place])
        middle = max(0, len(order) // 2 - _TRIAL_EXAMPLES // 2)
        return self.base.lm.loss(self._collated(order[middle : middle + _TRIAL_EXAMPLES]))

    def prepare(self) -> None:
        """Read the frozen features by which this task's inputs will be told."""
        examples = [self.task.listing.train[index] for index in self.own]
        self.router.add_task(self.base.read_features(examples, "Frozen pass"), self.runtime)

    def probe_losses(self, count: int) -> Iterator[Tensor]:
        """Yield language-model losses of mini-batches, without dropout."""
        self.base.network.eval()
        drawn = 0
        while drawn < count:
            seed = self.seed * 7919 + drawn
            for places in shuffled_batches(self.lengths, self.steps_per_epoch, seed):
                if drawn == count:
                    return
                drawn += 1
                yield self._loss(places)

    # -- training -------------------------------------------------------------------------------------

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one pass."""
        return -(-self.task.train_size // self.batch_size)

    def batches(self, epoch: int) -> Iterator[list[int]]:
        """Yield places in this process's share for each step."""
        yield from shuffled_batches(self.lengths, self.steps_per_epoch, self.seed * 104_729 + epoch)

    def loss(self, batch: list[int]) -> Tensor:
        """Mean cross-entropy over the answers' tokens."""
        if not self.base.network.training:
            self.base.network.train()
        return self._loss(batch)

    def _loss(self, places: list[int]) -> Tensor:
        """Return the mean loss over a batch's labels; of a large one, parts are kept in memory in turn."""
        most = _TOKENS_KEPT.get(self.base.lm.device.type, _TOKENS_KEPT_ELSEWHERE)
        parts = [[places[row] for row in rows] for rows in by_length(places, lambda one: self.lengths[one], most)]
        with self.runtime.autocast():
            if len(parts) == 1:
                return self.base.lm.loss(self._collated(parts[0]))
            batches = [self._collated(part) for part in parts]
            labels = sum(len(batch.targets) for batch in batches)
            losses = [
                checkpoint(self.base.lm.loss, batch, use_reentrant=False) * (len(batch.targets) / labels)
                for batch in batches
            ]
            return torch.stack(losses).sum()

    def parameters(self) -> list[nn.Parameter]:
        """Nothing is trained beyond the adapter."""
        return []

    # -- after training -------------------------------------------------------------------------------

    def finish(self) -> Learned:
        """Collect what predictions need."""
        self.base.network.eval()
        tensors = {**describe(self.task), **self.router.task_tensors()}
        facts = {
            "style": self.task.style,
            "tokens": sum(len(one) for one in self.task.train),
            "answer_tokens": int(tensors["answer.tokens"]),
        }
        return Learned(tensors, self.router.to_tensors(), facts)
