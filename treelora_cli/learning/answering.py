"""Answer inputs some at a time, so that a thousand cost one load and the first answer comes early."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice

from treelora_cli.backend.contract import Predictor
from treelora_cli.backend.runtime import Reporter
from treelora_cli.backend.values import Memory, Prediction, Turn
from treelora_cli.errors import DataError
from treelora_cli.learning.evaluation import blamed

Input = str | Sequence[Turn]
"""A path, a prompt or a chat."""
_AT_ONCE = 256
"""Inputs answered before the first of them is handed out."""


def answer_each(
    predictor: Predictor, memory: Memory, inputs: Iterable[Input], reporter: Reporter
) -> Iterator[tuple[str, Prediction]]:
    """Yield each input, of a chat its last turn, with its answer, under a progress bar where their number is known.

    Raises:
        DataError: An input cannot be read.
    """
    total = len(inputs) if isinstance(inputs, list) else None
    pairs = _answered(predictor, memory, iter(inputs))
    return reporter.track(pairs, "Answering", total)


def _answered(predictor: Predictor, memory: Memory, inputs: Iterator[Input]) -> Iterator[tuple[str, Prediction]]:
    while part := list(islice(inputs, _AT_ONCE)):
        with _files_named(), blamed(memory):
            answers = predictor.predict(part)
        shown = [one if isinstance(one, str) else one[-1].content for one in part]
        yield from zip(shown, answers, strict=True)


@contextmanager
def _files_named() -> Iterator[None]:
    """Turn what the system says of an input file into an error that names it."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            raise
        raise DataError(f"{error.filename} cannot be read: {error.strerror}.") from error
