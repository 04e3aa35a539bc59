"""Answer inputs some at a time, so that a thousand cost one load and the first answer comes early."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice

from treelora_cli.backend.contract import Predictor
from treelora_cli.backend.runtime import Reporter
from treelora_cli.backend.values import Memory, Picture, Prediction, Turn
from treelora_cli.errors import DataError
from treelora_cli.learning.evaluation import blamed
from treelora_cli.learning.unknown import Threshold

Input = str | Sequence[Turn] | Picture
"""A path, a prompt, a chat, or an image that is no file."""
_AT_ONCE = 256
"""Inputs answered before the first of them is handed out."""


@dataclass(frozen=True)
class Answerer:
    """Answers with everything that was learned at one commit.

    Attributes:
        inference: How answers are made.
        predictor: The backend's.
        memory: What it computes with.
        reporter: Shows progress.
        threshold: Says which answers are ``unknown`` instead; none are when ``None``.
    """

    inference: str
    predictor: Predictor
    memory: Memory
    reporter: Reporter
    threshold: Threshold | None = None

    def __call__(self, inputs: Sequence[Input]) -> list[Prediction]:
        """Answer inputs at once.

        Raises:
            DataError: One cannot be read.
        """
        with _files_named(), blamed(self.memory):
            answers = self.predictor.predict(inputs)
        return answers if self.threshold is None else [self.threshold(one) for one in answers]

    def each(self, inputs: Iterable[Input], bad: list[str] | None = None) -> Iterator[tuple[str, Prediction]]:
        """Yield each input, of a chat its last turn, with its answer; a progress bar shows where their number is known.

        Args:
            inputs: Taken some at a time.
            bad: Takes a line on each input that cannot be read, which is left out then.

        Raises:
            DataError: An input cannot be read, and ``bad`` is ``None``.
        """
        total = len(inputs) if isinstance(inputs, list) else None
        return self.reporter.track(self._answered(iter(inputs), bad), "Answering", total)

    def _answered(self, inputs: Iterator[Input], bad: list[str] | None) -> Iterator[tuple[str, Prediction]]:
        while part := list(islice(inputs, _AT_ONCE)):
            try:
                yield from zip(map(shown, part), self(part), strict=True)
            except DataError:
                if bad is None:
                    raise
                yield from self._one_by_one(part, bad)

    def _one_by_one(self, inputs: Sequence[Input], bad: list[str]) -> Iterator[tuple[str, Prediction]]:
        for one in inputs:
            try:
                yield shown(one), self([one])[0]
            except DataError as error:
                bad.append(str(error))


def shown(one: Input) -> str:
    """Return what stands for an input beside its answer."""
    if isinstance(one, Picture):
        return one.name
    return one if isinstance(one, str) else one[-1].content


def read_through(memory: Memory) -> None:
    """Read everything that answers are made of, so that what is damaged is known before the first.

    Raises:
        DamagedError: A file is.
    """
    for task in memory.tasks:
        task.stored()
    if memory.tasks:
        memory.shared()
    for name in {task.branch for task in memory.tasks} - {None}:
        memory.branch(str(name))


@contextmanager
def _files_named() -> Iterator[None]:
    """Turn what the system says of an input file into an error that names it."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            raise
        raise DataError(f"{error.filename} cannot be read: {error.strerror}.") from error
