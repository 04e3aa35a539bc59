"""A causal language model in the parts that continual learning needs.

Hidden states first, logits only where asked: a vocabulary is wide and answers are short. A model that does
more to its logits than a linear layer is found out once, by comparison, and then runs its own way.

Symbols: ``B`` texts, ``T`` tokens, ``C`` width, ``M`` chosen positions, ``V`` vocabulary, ``K`` labels.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from treelora_backends.lm_batches import Batch, LabelledBatch
from treelora_backends.lm_forwards import standing_in
from treelora_backends.lm_narrow import feed_forwards, narrowed, read_places, tail_places

_LOSS_CHUNK = 512
"""Positions whose logits are in memory at a time."""
_TRIAL_TOKENS = 6
_OPENING = 16
"""Tokens of an input's beginning that are looked at by themselves."""
_READ = 3
"""Blocks of the first half whose states are read."""
_ROUTING_PARTS = 4


class _Reached(Exception):
    """The forward pass arrived at the last block that is read."""


@dataclass(frozen=True)
class Reading:
    """What the frozen blocks make of right-padded texts.

    Attributes:
        embedded: Embeddings, (B, T, C).
        read: States after each of ``read_blocks``, the last of which tells inputs apart, each (B, T, C).
        entering: States that enter the first adapted block, (B, T, C); ``None`` when the pass stopped before.
    """

    embedded: Tensor
    read: tuple[Tensor, ...]
    entering: Tensor | None


class LmNetwork:
    """Runs a Hugging Face causal language model; its layers may hold LoRA.

    Args:
        model: The model itself, not PEFT's wrapper.
        layers: Names of the adapted modules in ``model``; the blocks before the first of them are frozen.

    Attributes:
        cut: Index of the first adapted block; 0 where the blocks before it cannot be skipped.
    """

    def __init__(self, model: nn.Module, layers: Sequence[str] = ()) -> None:
        self.model = cast("Any", model)
        self.body: nn.Module = body_of(model)
        self.blocks = blocks_of(model)
        self._head_is_linear = True
        self._head_is_linear = self._agrees_with_forward()
        self._blocks_return_tuples = False
        self.cut = _first_adapted(model, self.blocks, layers)
        if self.cut and not self._skips_exactly():
            self.cut = 0
        self._narrow: list[nn.Module | None] = []
        self._narrow = self._narrowable([model.get_submodule(layer) for layer in layers])

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
        runner = self.body if self._head_is_linear else self.model
        return runner(input_ids=ids, attention_mask=mask, **options)

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

    def loss(self, labelled: LabelledBatch, tail: int = 0) -> Tensor:
        """Return the mean cross-entropy over the labelled positions.

        Args:
            labelled: Texts.
            tail: Last tokens of a prompt through whose feed-forward layers gradients pass; 0 for every token.
        """
        with self._narrowed(labelled, tail):
            states = self._states(self._run(labelled.batch.ids, labelled.batch.mask, use_cache=False))
        chosen, targets = states[labelled.rows, labelled.columns], labelled.targets  # (M, C)
        if len(targets) <= _LOSS_CHUNK:
            return nn.functional.cross_entropy(self._logits(chosen), targets)
        parts = [
            checkpoint(self._summed_loss, some, wanted, use_reentrant=False)
            for some, wanted in zip(chosen.split(_LOSS_CHUNK), targets.split(_LOSS_CHUNK), strict=True)
        ]
        return torch.stack(parts).sum() / len(targets)

    def _summed_loss(self, states: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self._logits(states), targets, reduction="sum")

    @torch.no_grad()
    def correct(self, labelled: LabelledBatch) -> int:
        """Return at how many labelled positions the right token is the likeliest."""
        states = self._states(self._run(labelled.batch.ids, labelled.batch.mask, use_cache=False))
        chosen = states[labelled.rows, labelled.columns]
        pairs = zip(chosen.split(_LOSS_CHUNK), labelled.targets.split(_LOSS_CHUNK), strict=True)
        return sum(int((self._logits(some).argmax(dim=1) == wanted).sum()) for some, wanted in pairs)

    # -- feed-forward layers --------------------------------------------------------------------------

    def _narrowed(self, labelled: LabelledBatch, tail: int) -> AbstractContextManager[None]:
        """Return the context in which feed-forward layers do no more than the loss needs."""
        recomputed = bool(getattr(self.model, "is_gradient_checkpointing", False))  # outside of any context
        if not self._narrow or recomputed:
            return nullcontext()
        return narrowed(self._narrow, read_places(labelled), tail_places(labelled, tail) if tail else None)

    def _narrowable(self, layers: Sequence[nn.Module]) -> list[nn.Module | None]:
        """Return the adapted blocks' feed-forward layers; none when the loss is another through them."""
        ids = torch.arange(_TRIAL_TOKENS, device=self.device).repeat(2, 1)
        mask = torch.ones_like(ids)
        mask[1, -1] = 0
        ends = torch.tensor([_TRIAL_TOKENS - 2, _TRIAL_TOKENS - 3], device=self.device)
        labelled = LabelledBatch(Batch(ids, mask), torch.arange(2, device=self.device), ends, ids[0, :2])
        found = feed_forwards(list(self.blocks)[self.cut :], layers)
        with torch.no_grad():
            plain = self.loss(labelled)
            try:
                with narrowed(found, read_places(labelled), tail_places(labelled, 1)):
                    ours = self.loss(labelled)
            except (AttributeError, TypeError, ValueError, LookupError, RuntimeError):
                return []  # layers that take or give more than states
        return found if bool(torch.allclose(plain, ours, rtol=1e-4, atol=1e-5)) else []

    def trained_part(self) -> list[nn.Module]:
        """Return what runs in every step: the adapted blocks and the output layer."""
        head = self.model.get_output_embeddings()
        return [*list(self.blocks)[self.cut :], *([] if head is None else [head])]

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
        return embedded[0], seen

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

    def features(self, reading: Reading, lengths: Tensor) -> Tensor:
        """Return what is told of an input by frozen states, each part normalised, (B, F).

        The parts: mean embedding, mean embedding of the opening (where a task's form shows), mean and last hidden
        state after the middle block, and the mean states after the earlier blocks that are read.

        Args:
            reading: Of right-padded texts that begin with the inputs.
            lengths: Tokens of each input, (B,).
        """
        embedded, hidden = reading.embedded, reading.read[-1]  # (B, T, C)
        places = torch.arange(embedded.shape[1], device=embedded.device)
        counted = (places < lengths[:, None]).float()
        counted[:, 0] *= (lengths == 1).float()  # models park a huge state on the first token
        opening = counted.clone()
        opening[:, 1 + _OPENING :] = 0
        last = hidden[torch.arange(len(hidden), device=hidden.device), lengths - 1]
        parts = [_mean(embedded, counted), _mean(embedded, opening), _mean(hidden, counted), last]
        parts += [_mean(earlier, counted) for earlier in reading.read[:-1]]
        return torch.cat([nn.functional.layer_norm(part, part.shape[-1:]) for part in parts], dim=1)

    def routing(self, features: Tensor) -> Tensor:
        """Return the part of ``features`` that tells an input's task, (B, 4C): all but the earlier blocks'."""
        return features[:, : features.shape[1] * _ROUTING_PARTS // (_ROUTING_PARTS + len(self.read_blocks) - 1)]

    def entered(self, states: Tensor) -> AbstractContextManager[None]:
        """Return the context in which passes skip the frozen blocks and take ``states`` (B, T, C) for their output."""
        skipped = list(self.blocks)[: self.cut]
        return standing_in(
            [(block, self._stand_in(states if index == 0 else None)) for index, block in enumerate(skipped)]
        )

    def _stand_in(self, given: Tensor | None) -> Any:
        def forward(hidden: Tensor, *_inputs: Any, **_options: Any) -> Any:
            states = hidden if given is None else given
            return (states,) if self._blocks_return_tuples else states

        return forward

    def _skips_exactly(self) -> bool:
        """True when a pass that skips the frozen blocks ends like one that runs them."""
        kinds: list[bool] = []
        hook = self.blocks[0].register_forward_hook(lambda _m, _i, out: kinds.append(isinstance(out, tuple)))
        ids = torch.arange(_TRIAL_TOKENS, device=self.device).repeat(2, 1)
        mask = torch.ones_like(ids)
        mask[1, -1] = 0
        with torch.no_grad():
            whole = self._states(self._run(ids, mask, use_cache=False))
            hook.remove()
            self._blocks_return_tuples = kinds[0]
            try:
                with self.entered(self.entering(Batch(ids, mask))):
                    cut = self._states(self._run(ids, mask, use_cache=False))
            except (AttributeError, TypeError, ValueError, LookupError, RuntimeError):
                return False  # blocks that hand more to each other than states
        counted = mask.bool()
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
        options: dict[str, Any] = {"past_key_values": cache, "use_cache": True}
        runner = self.body if self._head_is_linear else self.model
        if "position_ids" in inspect.signature(runner.forward).parameters:
            options["position_ids"] = batch.lengths[:, None] + torch.arange(count, device=ids.device)
        states = self._states(self._run(ids, mask, **options))  # (B, count, C)
        scores = self._logits(states).log_softmax(dim=2)
        return scores.gather(2, tokens[1:].expand(len(ids), count)[:, :, None]).sum(dim=(1, 2))

    @torch.no_grad()
    def generate(self, batch: Batch, most_new: int, end_ids: tuple[int, ...], pad_id: int) -> list[list[int]]:
        """Continue left-padded prompts greedily; returns the new ids, without what follows an end."""
        config = copy.deepcopy(self.model.generation_config)
        for key in ("temperature", "top_p", "top_k", "min_p", "typical_p", "max_length"):
            setattr(config, key, None)
        config.do_sample = False
        config.max_new_tokens = most_new
        config.pad_token_id = pad_id
        config.eos_token_id = list(end_ids) or None
        out = self.model.generate(input_ids=batch.ids, attention_mask=batch.mask, generation_config=config)
        continued = []
        for row in out[:, batch.ids.shape[1] :].tolist():
            end = next((place for place, one in enumerate(row) if one in end_ids), len(row))
            continued.append(row[:end])
        return continued


def _mean(states: Tensor, weights: Tensor) -> Tensor:
    """Average states (B, T, C) over the tokens that count, (B, C)."""
    return (states * weights[:, :, None]).sum(dim=1) / weights.sum(dim=1, keepdim=True)


def _first_adapted(model: nn.Module, blocks: nn.ModuleList, layers: Sequence[str]) -> int:
    """Return the index of the first block with an adapted layer; 0 when one lies outside the blocks."""
    index_of = {id(inner): index for index, block in enumerate(blocks) for inner in block.modules()}
    return min((index_of.get(id(model.get_submodule(layer)), 0) for layer in layers), default=0)


def body_of(model: nn.Module) -> nn.Module:
    """Return the model without its output layer."""
    decoder = getattr(model, "get_decoder", None)
    found = decoder() if callable(decoder) else None
    if found is None or found is model:
        found = cast("Any", model).base_model
    return cast("nn.Module", found)


def blocks_of(model: nn.Module) -> nn.ModuleList:
    """Return the list of transformer blocks: the first list as long as the configuration says.

    Raises:
        LookupError: There is none.
    """
    count = int(cast("Any", model).config.get_text_config().num_hidden_layers)
    for module in body_of(model).modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise LookupError("no list of transformer blocks")
