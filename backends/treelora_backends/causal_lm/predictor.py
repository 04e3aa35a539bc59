"""Answer prompts with everything learned so far, without being told the task.

``routed``: the frozen model's view of the bare input says which task it is from. Where that task's answers are a
closed set that frozen states tell apart, its solved head chooses (``closed.py``); otherwise its adapter, rendering and
labels answer. ``latest`` and ``merged``: one adapter for all; held-out examples are rendered as their own data says,
labels included, as the field does. ``base``: the same without any adapter.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from treelora_backends.causal_lm.answers import Answer, Answerer, Manner, other_scores, sum_scores
from treelora_backends.causal_lm.closed import ClosedHead
from treelora_backends.causal_lm.memory import common_manner, digest_of, holder_of, manner_of, merged_adapter, system_of
from treelora_backends.causal_lm.router import Route, TaskRouter
from treelora_backends.causal_lm.task import LmTask
from treelora_cli.backend import adapters
from treelora_cli.backend.adapters import AdapterWeights
from treelora_cli.backend.contract import OTHERS
from treelora_cli.backend.values import Answers, Memory, Picture, Prediction, Score, Turn
from treelora_cli.data.examples import TextExample, chat_example
from treelora_cli.data.text_scores import exact_match
from treelora_cli.errors import DataError, UsageError

if TYPE_CHECKING:
    from treelora_backends.causal_lm.loaded import LoadedLm

_ANY_LENGTH = 2**31
_UNTOUCHED = "(none)"
"""Counted as the route of an input that is doubted to be any task's: the model without an adapter answers it."""
_IMAGES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff"}


class LmPredictor:
    """Meets ``Predictor``; see the module docstring.

    Args:
        base: The loaded model.
        memory: Everything learned.
        inference: See the module docstring.
        choose: With ``routed``, returns the task of each input in place of the ridge router.
    """

    def __init__(
        self,
        base: LoadedLm,
        memory: Memory,
        inference: str,
        choose: Callable[[Sequence[TextExample]], list[int]] | None = None,
    ) -> None:
        if inference not in ("routed", "latest", "merged", "base"):
            raise UsageError(f"--inference {inference}: language models answer routed, latest, merged or base.")
        self.base = base
        self.memory = memory
        self.inference = inference
        self._choose = choose
        self._given: list[tuple[str, str, float | None, str | None, dict[str, float]]] = []
        self.answerer = Answerer(base.lm, base.encoder, base.runtime, base.known_answers)

    @property
    def tells_foreign(self) -> bool:
        """Whether an input that is of no task is told."""
        routed = self.inference == "routed" and self._choose is None and len(self.memory.tasks) > 1
        return routed and TaskRouter.thresholds(self.memory) is not None

    # -- which adapter --------------------------------------------------------------------------------

    @cached_property
    def _router(self) -> TaskRouter:
        return TaskRouter.restore(self.memory, self.base.config)

    @cached_property
    def _merged(self) -> AdapterWeights:
        return merged_adapter(self.memory)

    def route(self, examples: Sequence[TextExample]) -> list[int]:
        """Return the likeliest task of each input."""
        if len(self.memory.tasks) == 1:
            return [0] * len(examples)
        if self._choose is not None:
            return self._choose(examples)
        return [int(one) for one in self._task_scores(examples).argmax(dim=1)]

    def _task_scores(self, examples: Sequence[TextExample]) -> Tensor:
        """Return one score for each input and task, (n, T)."""
        features = self.base.lm.routing(self.base.read_features(examples, "Choosing tasks"))
        return self._among_same_system(examples, self._router.scores(features, self.memory))

    def _routes(self, examples: Sequence[TextExample]) -> list[Route]:
        """Return where each input belongs, and how sure that is."""
        if len(self.memory.tasks) == 1 or self._choose is not None:
            return [Route(task) for task in self.route(examples)]
        return self._router.routes(self._task_scores(examples), self.memory)

    def _among_same_system(self, examples: Sequence[TextExample], scores: Tensor) -> Tensor:
        """Leave out the tasks that were taught another system prompt than an input's own, where one has the same."""
        known = [system_of(task) for task in self.memory.tasks]
        for row, one in enumerate(examples):
            if one.system and one.system in known:
                scores[row, torch.tensor([system != one.system for system in known])] = -torch.inf
        return scores

    def _groups(self, examples: Sequence[TextExample]) -> dict[int | None, list[int]]:
        """Return rows by the task whose adapter answers them; ``None`` for the merged or no adapter."""
        rows = list(range(len(examples)))
        if not rows:
            return {}
        if self.inference == "latest":
            return {len(self.memory.tasks) - 1: rows}
        if self.inference != "routed":
            return {None: rows}
        return _grouped([one.task if one.known else None for one in self._routes(examples)])

    # -- closed answers -------------------------------------------------------------------------------

    def _closed_head(self, task: int | None) -> ClosedHead | None:
        """Return the solved head of a task that was chosen for an input; ``None`` where its adapter answers."""
        solved = self.inference == "routed" and self.base.config.head.closed == "solved"
        if task is None or not solved or not manner_of(self.memory.tasks[task]).by_label:
            return None
        return ClosedHead.from_tensors(self.memory.tasks[task].tensors())

    def _closed_answers(self, head: ClosedHead, examples: Sequence[TextExample], task: int | None) -> list[Answer]:
        assert task is not None
        labels = self.memory.tasks[task].labels
        places, confidence = head(self.base.read_features(examples, "Answering"))
        return [(labels[place], sure) for place, sure in zip(places, confidence, strict=True)]

    def _load(self, task: int | None) -> None:
        """Put the adapter of a group into the slot."""
        self.base.network.eval()
        if task is not None:
            weights = self.memory.tasks[task].adapter()
        elif self.inference == "merged":
            weights = self._merged
        else:
            weights = adapters.reference_point(self.base.network, self.base.layers, 1.0, 0)
        adapters.write_slot(self.base.network, weights)
        self.answerer.weights = digest_of(weights)

    # -- scores ---------------------------------------------------------------------------------------

    def evaluate(self, task: LmTask) -> Score:
        """Score a task's held-out examples."""
        holder = holder_of(self.memory, task)
        metric = task.metric if holder is None else self.memory.tasks[holder].metric
        examples = self.base.runtime.share(task.test)
        self._given = []
        total = count = right = 0.0
        for chosen, rows in self._groups(examples).items():
            some = [examples[row] for row in rows]
            score, number = self._score_sum(some, task, holder, chosen, metric)
            total, count = total + score, count + number
            right += len(rows) if chosen == holder else 0
        sums = torch.tensor([total, count, right, len(examples)], device=self.base.lm.device)
        totals = self.base.runtime.sum(sums).tolist()
        known = self.inference == "routed" and holder is not None
        routed = totals[2] / max(1.0, totals[3]) if known else None
        given = self.base.runtime.gather_json(self._given)
        answers = _counted(given) if metric == "accuracy" else None
        routes = Counter(name for _, _, _, name, _ in given if name is not None)
        beside = {name: sum(one[4][name] for one in given) / len(given) for name in (given[0][4] if given else {})}
        return Score(totals[0] / max(1.0, totals[1]), int(totals[3]), routed, answers, beside, routes)

    def _score_sum(
        self, examples: Sequence[TextExample], task: LmTask, holder: int | None, chosen: int | None, metric: str
    ) -> tuple[float, float]:
        """Return (sum of scores, their number) of examples that one task's weights answer."""
        if metric != "token_accuracy" and (head := self._closed_head(chosen)) is not None:
            answers = self._closed_answers(head, examples, chosen)
        else:
            self._load(chosen)
            routed = None if self.inference != "routed" else chosen
            manner = self._own_manner(task, holder) if routed is None else manner_of(self.memory.tasks[routed])
            if metric == "token_accuracy":
                return self.answerer.score_sum(examples, manner, metric)
            answers = self.answerer.held_out_answers(examples, manner)
        name = None if self.inference != "routed" else _UNTOUCHED if chosen is None else self.memory.tasks[chosen].name
        for one, (text, sure) in zip(examples, answers, strict=True):
            self._given.append((one.answer, text, sure, name, other_scores(one, text, metric)))
        return sum_scores(examples, answers, metric)

    def _own_manner(self, task: LmTask, holder: int | None) -> Manner:
        """Return how the data itself says that it is rendered."""
        if holder is not None:
            return manner_of(self.memory.tasks[holder])
        encoded = [self.base.encoder.encode(one, task.style, task.labels) for one in task.test]
        return Manner(task.style, task.labels, task.metric == "accuracy", max(one.longest for one in encoded))

    # -- predictions ----------------------------------------------------------------------------------

    def predict(self, inputs: Sequence[str | Sequence[Turn] | Picture]) -> list[Prediction]:
        """Answer prompts and chats; a chat's task is asked with its own system prompt unless the input has one.

        Raises:
            DataError: An empty prompt, an image, or a prompt longer than the model's context.
        """
        examples = [_checked(text, number) for number, text in enumerate(inputs, start=1)]
        for one in examples:
            self.base.encoder.fitted_prompt(one, "plain", (), self.base.context)  # what no tokenizer takes is named
        found: dict[int, Prediction] = {}
        routes = self._routes(examples) if self.inference == "routed" and examples else []
        groups = _grouped([one.task if one.known else None for one in routes]) if routes else self._groups(examples)
        for chosen, rows in groups.items():
            some = [self._with_system(examples[row], chosen) for row in rows]
            routed = None if self.inference != "routed" else chosen
            manner = common_manner(self.memory) if routed is None else manner_of(self.memory.tasks[routed])
            self._check_lengths(some, [row + 1 for row in rows], manner)
            name = None if chosen is None else self.memory.tasks[chosen].name
            if (head := self._closed_head(chosen)) is not None:
                features = self.base.read_features(some, "Answering")
                assert chosen is not None
                labels, likely = self.memory.tasks[chosen].labels, head.likely(features, OTHERS + 1)
                answered = [_of_likely([(labels[place], sure) for place, sure in row], name) for row in likely]
            else:
                self._load(chosen)
                answers = self.answerer.answers(some, manner, self.base.context)
                answered = [Prediction(text, name, sure) for text, sure in answers]
            found |= dict(zip(rows, answered, strict=True))
        self.base.runtime.meet()
        answers_in_order = [found[row] for row in range(len(examples))]
        if not routes:
            return answers_in_order
        return [
            replace(one, task_confidence=route.probability, task_margin=route.margin)
            for one, route in zip(answers_in_order, routes, strict=True)
        ]

    def _with_system(self, one: TextExample, task: int | None) -> TextExample:
        """Return an input with the system prompt of the task that answers it, as its examples had it."""
        system = "" if task is None else system_of(self.memory.tasks[task])
        if not system or one.system:
            return one
        return replace(one, turns=(Turn("system", system), *one.asked))

    def _check_lengths(self, examples: Sequence[TextExample], numbers: Sequence[int], manner: Manner) -> None:
        encoder, reserve = self.base.encoder, manner.reserve(self.base.context)
        for one, number in zip(examples, numbers, strict=True):
            _, ids = encoder.fitted_prompt(one, manner.style, manner.labels, _ANY_LENGTH)
            length = len(ids)
            if length + reserve > self.base.context:
                raise DataError(
                    f"Prompt {number} has {length} tokens; the model's context is {self.base.context},"
                    f" {reserve} of them for the answer. Shorten it."
                )


def _grouped(chosen: Sequence[int | None]) -> dict[int | None, list[int]]:
    """Return rows by the task chosen for them."""
    return {task: [row for row, one in enumerate(chosen) if one == task] for task in dict.fromkeys(chosen)}


def _checked(text: str | Sequence[Turn] | Picture, number: int) -> TextExample:
    if isinstance(text, Picture):
        raise DataError(f"{text.name} is an image; this project's backend is causal-lm. Give a prompt.")
    if not isinstance(text, str):
        return chat_example(f"prompt {number}", text, Turn("assistant", ""))
    if not text.strip():
        raise DataError(f"Prompt {number} is empty.")
    if Path(text).suffix.lower() in _IMAGES and len(text) < 4096 and Path(text).is_file():
        raise DataError(f"{text} is an image; this project's backend is causal-lm. Give a prompt.")
    return TextExample(f"prompt {number}", text, "")


def _of_likely(likely: Sequence[tuple[str, float]], task: str | None) -> Prediction:
    (best, sure), *others = likely
    return Prediction(best, task, sure, tuple(others))


def _counted(given: Sequence[tuple[str, str, float | None, str | None, dict[str, float]]]) -> Answers:
    """Count what was answered to all processes' examples."""
    return Answers(
        confusion=Counter((right, text) for right, text, *_ in given),
        places=(sum(exact_match(text, right) == 1 for right, text, *_ in given),),
        sure=tuple((sure, exact_match(text, right) == 1) for right, text, sure, *_ in given if sure is not None),
    )
