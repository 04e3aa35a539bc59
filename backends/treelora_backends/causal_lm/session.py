"""One language task while it is learned.

The blocks before the first adapted one give the same states in every epoch: they are run once, without
gradients, and training enters the network behind them. Where it can, the same pass reads the features by
which inputs will be told apart.

Symbols: ``B`` examples, ``T`` tokens, ``C`` width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from treelora_backends.added_updates import AddedUpdates
from treelora_backends.causal_lm.batches import (
    Batch,
    LabelledBatch,
    by_length,
    labelled_padded,
    padded,
    shuffled_batches,
    tokens_at_once,
)
from treelora_backends.causal_lm.closed import ClosedHead
from treelora_backends.causal_lm.memory import describe
from treelora_backends.causal_lm.network.halves import HalfWeights, Passes
from treelora_backends.causal_lm.render import Ids
from treelora_backends.causal_lm.router import TaskRouter
from treelora_backends.causal_lm.steps import PLAIN, LmSteps, in_parts
from treelora_backends.causal_lm.task import LmTask, answer_classes
from treelora_backends.kept import Keeping, KeptRows, each_expected
from treelora_backends.objective import Objective, class_weights
from treelora_cli import seeds
from treelora_cli.backend.runtime import fetched, sent, wait_for
from treelora_cli.backend.values import Learned, Memory
from treelora_cli.config import Config
from treelora_cli.errors import DataError, UsageError

if TYPE_CHECKING:
    from treelora_backends.causal_lm.loaded import LoadedLm

_TAIL = 8
"""Last tokens of a prompt through which gradients pass where nothing is said and frozen states answer: reading
a text in two parts saves arithmetic, and costs twice the launches. Free answers are learned worse so."""
_ALWAYS_DIVIDED = ("cpu",)
"""Where that is faster whatever the texts (recipes/RESULTS.md), so that results hang on no clock."""
_MEASURED = ("cuda",)
"""Where the first long task decides."""
_WHOLE, _DIVIDED = "through whole texts", f"through the last {_TAIL} tokens of each prompt"
_TOKENS_KEPT = {"cpu": 1024}
_TOKENS_KEPT_ELSEWHERE = 16_384
"""Tokens whose activations are kept for the backward pass; of a larger batch one part follows the other."""


class LmSession(LmSteps):
    """Meets ``TaskSession``."""

    def __init__(self, base: LoadedLm, task: LmTask, memory: Memory, config: Config) -> None:
        if not task.train:
            raise DataError("No training examples.")
        assert config.train.batch_size is not None and config.seed is not None
        told = config.train.prompt_tail
        self._tail_is_told = told is not None
        self._chooses = told is None and config.train.compile in (None, "none") and not config.train.grad_checkpointing
        divided = task.closed and base.lm.device.type in _ALWAYS_DIVIDED
        self.tail = told if told is not None else _TAIL if divided else 0
        whole = told is not None or base.lm.device.type not in _ALWAYS_DIVIDED
        self._probe_tail = self.tail if whole else _TAIL
        self.task = task
        self.runtime = base.runtime
        self.own = self.runtime.share(list(range(task.train_size)))
        lengths = [len(task.train[index]) for index in self.own]
        seed = seeds.of_task(config.seed, len(memory.tasks))
        super().__init__(base, lengths, task.train_size, config.train, seed)
        processes = self.runtime.accelerator.num_processes
        if self.steps_per_epoch > task.train_size // processes:
            raise UsageError(
                f"--batch-size {config.train.batch_size} leaves some of {processes} processes without an example."
            )
        self.router = TaskRouter.restore(memory, config)
        self._starts = np.cumsum([0, *lengths]).tolist()
        self._keeping = Keeping.of(base.lm.device, config.train.keep_mib)
        self._entering: KeptRows | None = None
        self._halves: HalfWeights | None = None
        self._added: AddedUpdates | None = None
        self._recomputes = bool(config.train.grad_checkpointing)
        self._closed: dict[str, Tensor] = {}
        self.answers = answer_classes([task], config.train.class_weights)[torch.tensor(self.own)]
        weights = class_weights(config.train.class_weights, self.answers, len(task.labels), self.runtime)
        self.objective = replace(self.objective, weights=weights)
        if self.compilation.mode is not None:
            self._read_whole(told)
        if config.train.grad_checkpointing:
            self.checkpoint_gradients("--grad-checkpointing")

    def _read_whole(self, told: int | None) -> None:
        """Read texts in one part: the cache between two would have its blocks compiled again at every step."""
        if told:
            raise UsageError(f"train.compile does not go with train.prompt_tail {told}. Leave one out.")
        self.tail = self._probe_tail = 0

    def _collated(self, places: list[int]) -> LabelledBatch:
        """Return this process's examples at ``places``, padded, on the device."""
        chosen = [self.task.train[self.own[place]] for place in places]
        return labelled_padded(chosen, self.base.encoder, self.base.lm.device, few=self.compilation.mode is not None)

    # -- before training ------------------------------------------------------------------------------

    def try_step(self, parameters: Sequence[Tensor]) -> None:
        """Compute the loss of a few examples of middling length, and its gradient, from where training enters."""
        self.base.network.eval()
        labelled = self._collated(self.trial_places())
        ids, mask = labelled.batch.ids, labelled.batch.mask
        entering = None
        if self.base.lm.cut:
            first = self.base.lm.entering(Batch(ids[:, :1], mask[:, :1]))
            entering = first.repeat(1, ids.shape[1], 1)
        with self._arithmetic():
            loss = self.base.lm.loss(labelled, self.tail, entering)
        torch.autograd.grad(loss, parameters, allow_unused=True)

    def try_forward(self) -> None:
        """Run the frozen blocks over as much as they read at once, or all blocks where none is skipped."""
        self.base.network.eval()
        labelled = self._collated(self.trial_places(tokens_at_once(self.base.lm.device)))
        with self._passes.without_gradients():
            _ = self.base.lm.entering(labelled.batch) if self.base.lm.cut else self.base.lm.loss(labelled)

    def prepare(self) -> None:
        """Run the frozen blocks once: features that tell and answer this task's inputs, and where training enters."""
        lm, examples = self.base.lm, [self.task.listing.train[index] for index in self.own]
        features = self._run_frozen_blocks() if lm.cut else {}
        rest = [place for place in range(len(examples)) if place not in features]
        if rest:
            given = self.base.read_features([examples[place] for place in rest], "Frozen pass")
            features |= dict(zip(rest, given, strict=True))
        read = torch.stack([features[place] for place in range(len(examples))])
        self.router.add_task(lm.routing(read), self.runtime)
        if self.task.closed:
            answers = [one.answer.strip() for one in examples]
            head = ClosedHead.fit(read, answers, self.task.labels, self.runtime)
            self._closed = {} if head is None else head.to_tensors()
            if head is None and not self._tail_is_told:
                self.tail = 0  # the adapter alone will answer

    @cached_property
    def _passes(self) -> Passes:
        return Passes(self.runtime, self.base.lm.first_blocks(self.base.lm.cut))

    def _run_frozen_blocks(self) -> dict[int, Tensor]:
        """Keep the states that enter the adapted blocks; returns the features found on the way, by place."""
        lm, encoder = self.base.lm, self.base.encoder
        tokens = [np.concatenate([one.prompt, one.answer]) for one in (self.task.train[index] for index in self.own)]
        inputs = self._leading_inputs(tokens) if lm.read_once else {}
        batches = list(by_length(tokens, len, tokens_at_once(lm.device)))
        features: dict[int, Tensor] = {}
        self.base.network.eval()
        for places in self.runtime.reporter.track(batches, "Frozen pass", len(batches)):
            batch = padded([tokens[place] for place in places], encoder, lm.device)
            began = None if self._entering is None else self._entering.clock()
            with self._passes.without_gradients():
                reading = lm.read(batch, to_cut=True) if lm.read_once else None
                states = lm.entering(batch) if reading is None else reading.entering
            assert states is not None
            self._keep(places, states, began)
            if reading is not None:
                lengths = sent(torch.tensor([inputs.get(place, 1) for place in places]), lm.device)
                found = fetched(reading.features(lengths))
                features |= {place: found[row] for row, place in enumerate(places) if place in inputs}
        wait_for(lm.device)
        if self._entering is not None and self._entering.given_up:
            self.runtime.reporter.detail(str(self._entering))
        return features

    def _keep(self, places: list[int], states: Tensor, began: float | None) -> None:
        """Keep what enters the adapted blocks of some padded examples, (B, T, C), token by token."""
        if self._entering is None:
            self._entering = KeptRows(self._starts[-1], states.shape[-1:], self._keeping, again=True)
            self.runtime.reporter.detail(str(self._entering))
        tokens = [row * states.shape[1] + torch.arange(self.lengths[place]) for row, place in enumerate(places)]
        kept = states.flatten(0, 1)[sent(torch.cat(tokens), states.device)]
        self._entering.write(self._tokens_of(places), kept, began)

    def _tokens_of(self, places: list[int]) -> Tensor:
        """Return the places of some examples' tokens among all that are kept, one example after the other, (n,)."""
        return torch.cat([torch.arange(self._starts[place], self._starts[place + 1]) for place in places])

    def _leading_inputs(self, tokens: Sequence[Ids]) -> dict[int, int]:
        """Return the length of each input with which its rendered example begins, by place."""
        found = {}
        for place, ids in enumerate(tokens):
            given = self.base.encoder.content_ids(self.task.listing.train[self.own[place]].content)
            if np.array_equal(ids[: len(given)], given):
                found[place] = len(given)
        return found

    def gradient_ways(self) -> tuple[str, ...]:
        """Return the ways of taking gradients; none to choose from where one is told, needed or known to be best."""
        measured = self.base.lm.device.type in _MEASURED and self.base.lm.divides
        return (_WHOLE, _DIVIDED) if measured and self._chooses and self._closed else ()

    def take_gradient(self, way: str) -> None:
        """Take gradients through whole texts or the ends of prompts."""
        self.tail = _TAIL if way == _DIVIDED else 0

    def try_gradient(self, parameters: Sequence[Tensor], *, longest: bool) -> None:
        """Compute the gradient on the longest of the first epoch's batches, or on a middling one."""
        batches = sorted(super().batches(0), key=lambda places: max(self.lengths[place] for place in places))
        loss = self.loss_of(batches[-1 if longest else len(batches) // 2], self.objective)
        torch.autograd.grad(loss, parameters, allow_unused=True)

    def probe_losses(self, count: int) -> Iterator[Tensor]:
        """Yield language-model losses of mini-batches, without dropout."""
        self.base.network.eval()
        drawn = 0
        while drawn < count:
            seed = seeds.of_probe(self.seed, drawn)
            for places in shuffled_batches(self.lengths, self.steps_per_epoch, seed):
                if drawn == count:
                    return
                drawn += 1
                yield self._probed(places)

    def _probed(self, places: list[int]) -> Tensor:
        """Return a probe's loss; gradients are only compared, and all tasks' pass through the same tokens."""
        trained, self.tail = self.tail, self._probe_tail
        try:
            return self.loss_of(places)
        finally:
            self.tail = trained

    # -- training -------------------------------------------------------------------------------------

    def loss_of(self, places: list[int], objective: Objective = PLAIN) -> Tensor:
        """Return the mean loss over a batch's labels; of a large one, one part after the other is in memory."""
        most = _TOKENS_KEPT.get(self.base.lm.device.type, _TOKENS_KEPT_ELSEWHERE)
        parts = [
            [some[row] for row in rows]
            for some in in_parts(places, self.parts)
            for rows in by_length(some, self._tokens_with_graph, most)
        ]
        if len(parts) == 1:
            return self._loss_of_part(parts[0], objective)
        labels = [sum(len(self.task.train[self.own[place]].places) for place in part) for part in parts]
        return self.summed(parts, lambda part: self._loss_of_part(part, objective), labels)

    def _tokens_with_graph(self, place: int) -> int:
        one = self.task.train[self.own[place]]
        prompt = len(one.prompt)
        if self.tail and self.base.lm.divides:
            prompt = min(prompt, self.tail)
        return prompt + len(one.answer)

    def _loss_of_part(self, places: list[int], objective: Objective) -> Tensor:
        """Return the mean loss over the labels of some examples, from where training enters."""
        labelled = self._collated(places)
        entering = None if self._entering is None else self._entering_states(self._entering, places, labelled.batch)
        with self._arithmetic():
            weights = objective.of_examples(self.answers[places])
            if weights is not None:
                weights = weights.to(self.base.lm.device)
            return self.base.lm.loss(labelled, self.tail, entering, objective.smoothing, weights)

    def _entering_states(self, kept: KeptRows, places: list[int], batch: Batch) -> Tensor:
        """Return what enters the adapted blocks of a padded batch, (B, T, C); any token's where none is."""
        if kept.place == "nowhere":
            return self._entering_anew(batch)
        lengths = torch.tensor([self.lengths[place] for place in places])
        first = lengths.cumsum(0) - lengths
        columns = torch.arange(batch.ids.shape[1])
        rows = torch.where(columns < lengths[:, None], first[:, None] + columns, 0)  # (B, T)
        tokens = kept.read(self._tokens_of(places))
        return tokens[sent(rows, tokens.device)].to(self.base.lm.state_dtype)

    def _entering_anew(self, batch: Batch) -> Tensor:
        """Return the same where nothing is kept, as it would have been kept: without dropout."""
        trains = self.base.network.training
        self.base.network.eval()
        with self._passes.without_gradients():
            states = self.base.lm.entering(batch)
        self.base.network.train(trains)
        return states.bfloat16().to(self.base.lm.state_dtype)

    def batches(self, epoch: int) -> Iterator[list[int]]:
        """Yield places in this process's share for each step; the next step's states are read meanwhile."""
        yield from each_expected(self._entering, super().batches(epoch), self._tokens_of)

    @contextmanager
    def _arithmetic(self) -> Iterator[None]:
        """Return the context of a step in the chosen arithmetic; on a CPU bf16 is for frozen linear layers alone."""
        with ExitStack() as stack:
            if self.compilation.mode is None and not self._recomputes:
                self._added = self._added or AddedUpdates(self.base.lm.trained_part())
                stack.enter_context(self._added.used())
            if self.runtime.precision == "bf16" and self.base.lm.device.type == "cpu":
                self._halves = self._halves or HalfWeights(self.base.lm.trained_part())
                stack.enter_context(self._halves.used())
            else:
                stack.enter_context(self.runtime.autocast())
            yield

    # -- after training -------------------------------------------------------------------------------

    def finish(self) -> Learned:
        """Collect what predictions need."""
        self.base.network.eval()
        tensors = {**describe(self.task), **self.router.task_tensors(), **self._closed}
        facts: dict[str, Any] = {
            "style": self.task.style,
            "prompt_tail": self.tail,
            "tokens": sum(len(one) for one in self.task.train),
            "answer_tokens": int(tensors["answer.tokens"]),
        }
        if self._entering is not None:
            facts["kept"] = self._entering.facts()
        return Learned(tensors, self.router.to_tensors, facts)
