"""A causal language model in the parts that continual learning needs.

Hidden states first, logits only where asked: a vocabulary is wide and answers are short. A model that does
more to its logits than a linear layer is found out once, by comparison, and then runs its own way.

Symbols: ``B`` texts, ``T`` tokens, ``C`` width, ``M`` chosen positions, ``V`` vocabulary, ``K`` labels.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn

from treelora_backends.causal_lm.batches import Batch, LabelledBatch, tokens_at_once
from treelora_backends.causal_lm.network.ahead import OutputLoss
from treelora_backends.causal_lm.network.decoding import Length, decoded, generated, is_plain, numbers_of_token
from treelora_backends.causal_lm.network.features import Reading, routing_part
from treelora_backends.causal_lm.network.layers import blocks_of, body_of, called_parts, first_adapted
from treelora_backends.causal_lm.network.narrow import feed_forward, narrowed
from treelora_backends.causal_lm.network.tail import Divided, chosen_states, divide
from treelora_backends.standing_in import standing_in

_CACHED_BYTES = 2**28
"""Of keys and values on a CPU while answers are written. A step reads every weight, for one text as for many."""
_TRIAL_TOKENS = 6
_UNLIKE = (AttributeError, TypeError, ValueError, LookupError, RuntimeError)
"""What a model of another make may raise where it is tried in parts."""
_READ = 3
"""Blocks of the first half whose states are read."""


class _Reached(Exception):
    """The forward pass arrived at the last block that is read."""


class LmNetwork:
    """Runs a Hugging Face causal language model; its layers may hold LoRA.

    Args:
        model: The model itself, not PEFT's wrapper.
        layers: Names of the adapted modules in ``model``; the blocks before the first of them are frozen.
        passing: Returns the context in which parts of a step that have no gradients are computed.

    Attributes:
        cut: Index of the first adapted block; 0 where the blocks before it cannot be skipped.
        divides: True where texts may be read in two parts.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[str] = (),
        passing: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        self.model = cast("Any", model)
        self.body: nn.Module = body_of(model)
        self.blocks = blocks_of(model)
        self._passing = passing
        self._head_is_linear = True
        self._head_is_linear = self._agrees_with_forward()
        self._blocks_return_tuples = False
        self.cut = first_adapted(model, self.blocks, layers)
        if self.cut and not self._skips_exactly():
            self.cut = 0
        self._narrow: nn.Module | None = None
        self._narrow = self._narrowable()
        self.divides = self._divides_exactly()

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return cast("torch.device", self.model.device)

    @property
    def state_dtype(self) -> torch.dtype:
        """Type of the states between blocks."""
        return cast("torch.dtype", self.model.get_input_embeddings().weight.dtype)

    @property
    def feature_block(self) -> int:
        """Index of the block whose output tells inputs apart: the middle one."""
        return (len(self.blocks) - 1) // 2

    @property
    def read_blocks(self) -> list[int]:
        """Indices of the blocks that features come from: the ends of the first half's thirds."""
        ends = {(self.feature_block + 1) * third // _READ - 1 for third in range(1, _READ + 1)}
        return sorted(end for end in ends if end >= 0)

    def _agrees_with_forward(self) -> bool:
        """True when body and output layer together give the model's own logits."""
        if self.model.get_output_embeddings() is None:
            return False
        ids = torch.arange(_TRIAL_TOKENS, device=self.device)[None]
        batch = Batch(ids, torch.ones_like(ids))
        with torch.no_grad():
            theirs = self.model(input_ids=ids, attention_mask=batch.mask, use_cache=False).logits[0].float()
            ours = self.logits_at(batch, torch.zeros_like(ids[0]), ids[0])
        return ours.shape == theirs.shape and bool(torch.allclose(ours, theirs, rtol=1e-3, atol=1e-3))

    # -- logits and loss ------------------------------------------------------------------------------

    def _run(self, ids: Tensor, mask: Tensor, **options: Any) -> Any:
        return self._runner(input_ids=ids, attention_mask=mask, **options)

    @property
    def _runner(self) -> Any:
        return self.body if self._head_is_linear else self.model

    @cached_property
    def _taken(self) -> frozenset[str]:
        """Names of what the model's forward pass takes."""
        return frozenset(inspect.signature(self._runner.forward).parameters)

    def _states(self, out: Any) -> Tensor:
        """Return what ``_logits`` continues from, (B, T, C or V)."""
        return cast("Tensor", out.last_hidden_state if self._head_is_linear else out.logits)

    def _logits(self, states: Tensor) -> Tensor:
        """Turn chosen states into float32 logits."""
        if not self._head_is_linear:
            return states.float()
        return cast("Tensor", self.model.get_output_embeddings()(states)).float()

    def logits_at(self, batch: Batch, rows: Tensor, columns: Tensor) -> Tensor:
        """Return logits at chosen positions of right-padded texts, (M, V)."""
        states = self._states(self._run(batch.ids, batch.mask, use_cache=False))
        return self._logits(states[rows, columns])

    def loss(
        self,
        labelled: LabelledBatch,
        tail: int = 0,
        entering: Tensor | None = None,
        smoothing: float = 0.0,
        weights: Tensor | None = None,
    ) -> Tensor:
        """Return the mean cross-entropy over the labelled positions.

        Args:
            labelled: Texts.
            tail: Last tokens of a prompt through which gradients pass, see ``tail.py``; 0 for every token.
            entering: States that enter the first adapted block, (B, T, C); the blocks before it are then skipped.
            smoothing: Share of a token's probability that is spread over the vocabulary.
            weights: Factor on the loss of each text's tokens, (B,).
        """
        divided = divide(labelled, tail) if tail and self.divides and not self._recomputes else None
        if divided is not None and divided.first.ids.shape[1]:
            states, labelled = self._end_states(divided, entering), divided.end
        else:
            with self._narrowed(labelled), self.entered(entering):
                states = self._states(self._run(labelled.batch.ids, labelled.batch.mask, use_cache=False))
        chosen, targets = states[labelled.rows, labelled.columns], labelled.targets  # (M, C)
        factors = None if weights is None else weights[labelled.rows]
        return self._output(chosen, targets, smoothing, factors)

    @cached_property
    def _output(self) -> OutputLoss:
        head = self.model.get_output_embeddings() if self._head_is_linear else None
        return OutputLoss(self._logits, head, self.device, int(self.model.config.get_text_config().vocab_size))

    @torch.no_grad()
    def correct(self, labelled: LabelledBatch) -> int:
        """Return at how many labelled positions the right token is the likeliest."""
        states = self._states(self._run(labelled.batch.ids, labelled.batch.mask, use_cache=False))
        chosen = states[labelled.rows, labelled.columns]
        most = self._output.at_once
        pairs = zip(chosen.split(most), labelled.targets.split(most), strict=True)
        return sum(int((self._logits(some).argmax(dim=1) == wanted).sum()) for some, wanted in pairs)

    # -- what the loss does not need ------------------------------------------------------------------

    @property
    def _recomputes(self) -> bool:
        """True under gradient checkpointing, which computes blocks again outside of any context, without a cache."""
        return bool(getattr(self.model, "is_gradient_checkpointing", False))

    def _narrowed(self, labelled: LabelledBatch) -> AbstractContextManager[None]:
        """Return the context in which the last feed-forward layer runs where a label is predicted only."""
        if self._narrow is None or self._recomputes:
            return nullcontext()
        return narrowed(self._narrow, labelled.rows, labelled.columns)

    def _narrowable(self) -> nn.Module | None:
        """Return the last block's feed-forward layer; ``None`` when the loss is another through it narrowed.

        Adapters in it get their whole gradient: what it gives where no label is predicted reaches no loss.
        """
        found = feed_forward(self.blocks[-1])
        if found is None:
            return None
        labelled = self._trial()
        with torch.no_grad():
            plain = self.loss(labelled)
            try:
                with narrowed(found, labelled.rows, labelled.columns):
                    ours = self.loss(labelled)
            except _UNLIKE:
                return None  # a layer that takes or gives more than states
        return found if bool(torch.allclose(plain, ours, rtol=1e-4, atol=1e-5)) else None

    def _divides_exactly(self) -> bool:
        """True when texts read in two parts have the same loss."""
        labelled = self._trial()
        with torch.no_grad():
            plain = self.loss(labelled)
            try:
                entering = self.entering(labelled.batch) if self.cut else None
                divided = divide(labelled, 2)
                states = self._end_states(divided, entering)[divided.end.rows, divided.end.columns]
                ours = nn.functional.cross_entropy(self._logits(states), labelled.targets)
            except _UNLIKE:
                return False  # no cache, or one of another kind
        return bool(torch.allclose(plain, ours, rtol=1e-3, atol=1e-4))

    def _trial(self) -> LabelledBatch:
        """Return three texts of different lengths, each with one label; the last has it after its first token."""
        ids = torch.arange(_TRIAL_TOKENS, device=self.device).repeat(3, 1)
        mask = torch.ones_like(ids)
        mask[1, -1] = 0
        ends = torch.tensor([_TRIAL_TOKENS - 2, _TRIAL_TOKENS - 3, 0], device=self.device)
        return LabelledBatch(Batch(ids, mask), torch.arange(3, device=self.device), ends, ids[0, :3])

    def _end_states(self, divided: Divided, entering: Tensor | None) -> Tensor:
        """Return the last states of the ends, (B, E, C or V); the first parts are read without a graph."""
        first, end = divided.first, divided.end.batch
        mask = torch.cat([first.mask, end.mask], dim=1)

        def entered(places: Tensor) -> AbstractContextManager[None]:
            return self.entered(None if entering is None else chosen_states(entering, places))

        nowhere = end.ids.new_empty(0)  # of the last block only what is attended to is needed
        last = nullcontext() if self._narrow is None else narrowed(self._narrow, nowhere, nowhere)
        with torch.no_grad(), self._passing(), entered(divided.first_places), last:
            cache = self._continue(first.ids, first.mask, None).past_key_values
        if entering is not None:  # the skipped blocks hold nothing of the first part but its length
            nothing = torch.zeros(1, 1, 1, 1, device=first.ids.device).expand(len(first.ids), 1, first.ids.shape[1], 1)
            for layer in cache.layers[: self.cut]:
                layer.update(nothing, nothing)
        with entered(divided.end_places):
            return self._states(self._continue(end.ids, mask, cache))

    def _continue(self, ids: Tensor, mask: Tensor, cache: Any) -> Any:
        """Run texts on from cached keys and values, if any: ids (B, T), mask (B, cached + T)."""
        options: dict[str, Any] = {"use_cache": True}
        if cache is not None:
            options["cache" if "cache" in self._taken else "past_key_values"] = cache
        if "position_ids" in self._taken:
            options["position_ids"] = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        return self._run(ids, mask, **options)

    def first_blocks(self, count: int) -> list[nn.Module]:
        """Return the first so many blocks."""
        return list(self.blocks)[:count]

    def every_part(self) -> list[nn.Module]:
        """Return all that an answer runs through: the blocks and the output layer."""
        head = self.model.get_output_embeddings()
        return [*self.blocks, *([] if head is None else [head])]

    def trained_part(self) -> list[nn.Module]:
        """Return what runs in every step: the adapted blocks and the output layer."""
        return self.every_part()[self.cut :]

    def compilable(self) -> list[nn.Module]:
        """Return what a step runs with gradients, in parts that are each called as they are."""
        return called_parts(list(self.blocks)[self.cut :], self._narrow)

    # -- frozen blocks --------------------------------------------------------------------------------

    def _watched(self, batch: Batch, after: Sequence[int]) -> tuple[Tensor, dict[int, Tensor]]:
        """Return the embeddings and the outputs of some blocks, each (B, T, C); the pass ends at the last of them."""
        embedded: list[Tensor] = []
        seen: dict[int, Tensor] = {}

        def note(index: int, output: Any) -> None:
            seen[index] = output[0] if isinstance(output, tuple) else output
            if index == max(after):
                raise _Reached

        hooks = [self.model.get_input_embeddings().register_forward_hook(lambda _m, _i, out: embedded.append(out))]
        for index in set(after):
            hook = self.blocks[index].register_forward_hook(lambda _m, _i, out, index=index: note(index, out))
            hooks.append(hook)
        try:
            self._run(batch.ids, batch.mask, use_cache=False)
        except _Reached:
            pass
        finally:
            for hook in hooks:
                hook.remove()
        return embedded[0].detach(), seen  # under gradient checkpointing transformers has them ask for a gradient

    @torch.no_grad()
    def read(self, batch: Batch, *, to_cut: bool = False) -> Reading:
        """Run the frozen blocks as far as inputs are told apart, or also to the first adapted block."""
        read = self.read_blocks
        embedded, seen = self._watched(batch, [*read, self.cut - 1] if to_cut else read)
        return Reading(
            embedded.float(), tuple(seen[index].float() for index in read), seen[self.cut - 1] if to_cut else None
        )

    @torch.no_grad()
    def entering(self, batch: Batch) -> Tensor:
        """Return the states that enter the first adapted block, (B, T, C)."""
        return self._watched(batch, [self.cut - 1])[1][self.cut - 1]

    @property
    def read_once(self) -> bool:
        """True when one pass serves both to tell inputs apart and to enter the adapted blocks."""
        return self.cut > self.feature_block

    def routing(self, features: Tensor) -> Tensor:
        """Return the part of inputs' features (B, F) that tells their task, (B, 4C)."""
        return routing_part(features, len(self.read_blocks))

    def entered(self, states: Tensor | None) -> AbstractContextManager[None]:
        """Return the context in which passes skip the frozen blocks and take ``states`` (B, T, C), if given."""
        if states is None:
            return nullcontext()
        skipped = enumerate(self.first_blocks(self.cut))
        return standing_in([(block, self._stand_in(states if index == 0 else None)) for index, block in skipped])

    def _stand_in(self, given: Tensor | None) -> Any:
        def forward(hidden: Tensor, *_inputs: Any, **_options: Any) -> Any:
            states = hidden if given is None else given
            return (states,) if self._blocks_return_tuples else states

        return forward

    def _skips_exactly(self) -> bool:
        """True when a pass that skips the frozen blocks ends like one that runs them."""
        kinds: list[bool] = []
        hook = self.blocks[0].register_forward_hook(lambda _m, _i, out: kinds.append(isinstance(out, tuple)))
        batch = self._trial().batch
        with torch.no_grad():
            whole = self._states(self._run(batch.ids, batch.mask, use_cache=False))
            hook.remove()
            self._blocks_return_tuples = kinds[0]
            try:
                with self.entered(self.entering(batch)):
                    cut = self._states(self._run(batch.ids, batch.mask, use_cache=False))
            except _UNLIKE:
                return False  # blocks that hand more to each other than states
        counted = batch.mask.bool()
        return cut.shape == whole.shape and bool(torch.allclose(cut[counted], whole[counted], rtol=1e-3, atol=1e-3))

    # -- answers --------------------------------------------------------------------------------------

    @torch.no_grad()
    def label_log_likelihoods(self, batch: Batch, labels: list[list[int]]) -> Tensor:
        """Return the log-likelihood of each label as the continuation of right-padded prompts, (B, K).

        The prompts are run once; what a label has beyond its first token continues from a copy of the cache.
        """
        rows = torch.arange(len(batch.ids), device=batch.ids.device)
        longer = any(len(label) > 1 for label in labels)
        out = self._run(batch.ids, batch.mask, use_cache=longer)
        states = self._states(out)[rows, batch.lengths - 1]
        first = self._logits(states).log_softmax(dim=1)  # (B, V)
        columns = []
        for label in labels:
            column = first[:, label[0]]
            if len(label) > 1:
                column = column + self._continuation(batch, label, copy.deepcopy(out.past_key_values))
            columns.append(column)
        return torch.stack(columns, dim=1)

    def _continuation(self, batch: Batch, label: list[int], cache: Any) -> Tensor:
        """Return the log-likelihood of ``label[1:]`` after the prompt and ``label[0]``, (B,)."""
        count = len(label) - 1
        tokens = torch.tensor(label, device=batch.ids.device)
        ids = tokens[:-1].expand(len(batch.ids), count)
        mask = torch.cat([batch.mask, torch.ones_like(ids)], dim=1)
        states = self._states(self._continue(ids, mask, cache))  # (B, count, C)
        scores = self._logits(states).log_softmax(dim=2)
        return scores.gather(2, tokens[1:].expand(len(ids), count)[:, :, None]).sum(dim=(1, 2))

    def generate(self, batch: Batch, length: Length, end_ids: tuple[int, ...], pad_id: int) -> list[list[int]]:
        """Continue left-padded prompts greedily; returns the new ids, without what follows an end."""
        if self.divides and self._head_is_linear and is_plain(self.model.generation_config):
            return decoded(self._next, batch, length, end_ids)
        return generated(self.model, batch, length, end_ids, pad_id)

    def _next(self, ids: Tensor, mask: Tensor, cache: Any, barred: Sequence[int]) -> tuple[Tensor, Any]:
        """Return the likeliest next token of each text that is not barred, (B,), and the cache with what was run."""
        out = self._continue(ids, mask, cache)
        logits = self._logits(self._states(out)[:, -1])
        if barred:
            logits[:, list(barred)] = -torch.inf
        return logits.argmax(dim=1), out.past_key_values

    def decoded_at_once(self, number_bytes: int) -> int:
        """Return the padded tokens whose keys and values, of so many bytes a number, are kept at a time."""
        if self.device.type != "cpu":
            return tokens_at_once(self.device)
        return max(1, _CACHED_BYTES // (numbers_of_token(self.model) * number_bytes))
