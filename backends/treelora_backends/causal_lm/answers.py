"""Answer prompts with whatever weights a network holds: by likelihood of each label, or by generation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from treelora_backends.causal_lm.batches import by_length, labelled_padded, padded, tokens_at_once
from treelora_backends.causal_lm.network.decoding import Length
from treelora_backends.causal_lm.network.halves import Passes
from treelora_backends.causal_lm.network.network import LmNetwork
from treelora_backends.causal_lm.render import Encoder, Ids
from treelora_cli.backend.runtime import Runtime
from treelora_cli.data.examples import TextExample
from treelora_cli.data.text_scores import score_text, scores_beside

_LABEL_TOKENS = 128
"""A label set with more tokens than this beyond first ones is cheaper to generate from."""
_TAIL = 24
"""Characters of a prompt's end on which the tokens of an answer can depend."""

Answer = tuple[str, float | None]
"""Text, and its probability among the labels where there are any."""
Known = dict[tuple[str, str, "Manner", bytes], Answer]
"""Answers by weights, precision, manner and prompt."""


@dataclass(frozen=True)
class Manner:
    """How inputs are rendered and answered.

    Attributes:
        style: One of ``data.text.STYLES``.
        labels: The closed set of answers; empty for open ones.
        by_label: Choose the likeliest label instead of generating.
        most_new: Longest generated answer, in tokens.
        least_new: Its fewest tokens: 1 where no empty answer was learned.
    """

    style: str
    labels: tuple[str, ...]
    by_label: bool
    most_new: int
    least_new: int = 0

    def reserve(self, room: int) -> int:
        """Return how many of ``room`` tokens are kept free for the answer; a prompt is worth more than a long one."""
        return min(self.most_new, room // 4)


@dataclass(frozen=True)
class _Prompt:
    ids: Ids
    tail: str

    def __len__(self) -> int:
        return len(self.ids)


class Answerer:
    """Answers with one network as it stands.

    Args:
        lm: The network.
        encoder: Its tokenizer.
        runtime: Device and arithmetic.
        known: Answers given before, kept by what they depend on: a stream asks the same of every task's
            unchanged adapter after each new task.
    """

    def __init__(self, lm: LmNetwork, encoder: Encoder, runtime: Runtime, known: Known | None = None) -> None:
        self.lm = lm
        self.encoder = encoder
        self.runtime = runtime
        self.known: Known = {} if known is None else known
        self.weights = ""
        """Names the weights in the network, in ``known``."""

    def answers(self, examples: Sequence[TextExample], manner: Manner, room: int) -> list[Answer]:
        """Return (answer, probability among the labels) of each input.

        Args:
            examples: Inputs; their own answers are not looked at.
            manner: How to answer.
            room: Most tokens of prompt and answer together; longer prompts lose their middle.
        """
        prompts = [self._prompt(one, manner, room) for one in examples]
        keys = [(self.weights, self.runtime.forward_precision, manner, one.ids.tobytes()) for one in prompts]
        fresh = {key: prompt for key, prompt in zip(keys, prompts, strict=True) if key not in self.known}
        new_keys, asked = list(fresh), list(fresh.values())
        short = manner.by_label and self._labels_are_short(prompts[0], manner)
        ask = self._by_label if short else self._by_generation
        batches = list(by_length(asked, lambda one: len(one) + manner.most_new, self._at_once(short)))
        passes = Passes(self.runtime, self.lm.every_part())
        for rows in self.runtime.reporter.track(batches, "Answering", len(batches)):
            with passes.without_gradients():
                answers = ask([asked[row] for row in rows], manner)
            self.known.update(zip((new_keys[row] for row in rows), answers, strict=True))
        return [self.known[key] for key in keys]

    def _at_once(self, short: bool) -> int:
        """Return the padded tokens of a batch: of prompts that are read only, or of texts that are written on."""
        if short:
            return tokens_at_once(self.lm.device)
        halved = self.runtime.forward_precision == "bf16"
        return self.lm.decoded_at_once(2 if halved else self.lm.state_dtype.itemsize)

    def _prompt(self, example: TextExample, manner: Manner, room: int) -> _Prompt:
        free = max(1, room - manner.reserve(room))
        text, ids = self.encoder.fitted_prompt(example, manner.style, manner.labels, free)
        return _Prompt(np.asarray(ids, dtype=np.int32), text[-_TAIL:])

    # -- labels ---------------------------------------------------------------------------------------

    def _labels_are_short(self, prompt: _Prompt, manner: Manner) -> bool:
        return sum(len(label) - 1 for label in self._label_ids(prompt.tail, manner)) <= _LABEL_TOKENS

    def _label_ids(self, tail: str, manner: Manner) -> list[list[int]]:
        """Return the tokens of each label after a prompt with this end; none begins another."""
        start = self.encoder.prompt_ids(tail, manner.style)
        found = [self.encoder.answer_ids(tail, start, label, manner.style) for label in manner.labels]
        clash = any(a is not b and b[: len(a)] == a for a in found for b in found)
        return [[*label, *self.encoder.end_ids[:1]] for label in found] if clash else found

    def _by_label(self, prompts: Sequence[_Prompt], manner: Manner) -> list[Answer]:
        by_tail = {tail: self._label_ids(tail, manner) for tail in dict.fromkeys(one.tail for one in prompts)}
        answers: dict[int, Answer] = {}
        for labels in _distinct(by_tail.values()):
            rows = [row for row, prompt in enumerate(prompts) if by_tail[prompt.tail] == labels]
            batch = padded([prompts[row].ids for row in rows], self.encoder, self.lm.device)
            scores = self.lm.label_log_likelihoods(batch, labels)
            confidence, best = scores.softmax(dim=1).max(dim=1)
            for row, sure, index in zip(rows, confidence.tolist(), best.tolist(), strict=True):
                answers[row] = (manner.labels[index], sure)
        return [answers[row] for row in range(len(prompts))]

    # -- generation -----------------------------------------------------------------------------------

    def _by_generation(self, prompts: Sequence[_Prompt], manner: Manner) -> list[Answer]:
        batch = padded([prompt.ids for prompt in prompts], self.encoder, self.lm.device, left=True)
        most_new = max(1, min(manner.most_new, self.encoder.context - max(map(len, prompts))))
        new = self.lm.generate(batch, Length(manner.least_new, most_new), self.encoder.stop_ids, self.encoder.pad_id)
        return [(self.encoder.decode(ids, manner.style), None) for ids in new]

    # -- scores ---------------------------------------------------------------------------------------

    def score_sum(self, examples: Sequence[TextExample], manner: Manner, metric: str) -> tuple[float, float]:
        """Return (sum of scores, their number) of examples; free text counts its tokens."""
        if metric == "token_accuracy":
            return self._token_hits(examples)
        return sum_scores(examples, self.held_out_answers(examples, manner), metric)

    def held_out_answers(self, examples: Sequence[TextExample], manner: Manner) -> list[Answer]:
        """Answer as scoring does: with prompts as long as training's."""
        return self.answers(examples, manner, min(self.encoder.context, self.encoder.max_length + manner.most_new))

    def _token_hits(self, examples: Sequence[TextExample]) -> tuple[float, float]:
        encoded = [self.encoder.encode(one, "text", ()) for one in examples]
        right = count = 0
        for rows in by_length(encoded, len, tokens_at_once(self.lm.device)):
            batch = labelled_padded([encoded[row] for row in rows], self.encoder, self.lm.device)
            with torch.no_grad(), self.runtime.autocast():
                right += self.lm.correct(batch)
            count += len(batch.targets)
        return float(right), float(count)


def sum_scores(examples: Sequence[TextExample], answers: Sequence[Answer], metric: str) -> tuple[float, float]:
    """Return (sum of scores, their number) of answers to examples."""
    pairs = zip(examples, answers, strict=True)
    scores = [max(score_text(metric, one.prompt, text, right) for right in _right(one)) for one, (text, _) in pairs]
    return sum(scores), float(len(scores))


def other_scores(one: TextExample, text: str, metric: str) -> dict[str, float]:
    """Return the score of an answer under other definitions, by their names."""
    found = [scores_beside(metric, one.prompt, text, right) for right in _right(one)]
    return {name: max(scores[name] for scores in found) for name in found[0]}


def _right(one: TextExample) -> tuple[str, ...]:
    return (one.answer, *one.others)


def _distinct(label_sets: Iterable[list[list[int]]]) -> list[list[list[int]]]:
    """Return each tokenisation of the labels once."""
    found: list[list[list[int]]] = []
    for labels in label_sets:
        if labels not in found:
            found.append(labels)
    return found
