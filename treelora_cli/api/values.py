"""What scoring gives back; reports of learning and export lie with what makes them (``treelora_cli.learning``)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from treelora_cli.backend.values import Score
    from treelora_cli.learning.evaluation import HeldOut
    from treelora_cli.score_matrix import Standing

BASE = "base"
"""Names the model without any adapter, as a way to answer that only scoring offers."""


@dataclass(frozen=True)
class Evaluation:
    """Scores of learned tasks.

    Attributes:
        inference: How was answered.
        standing: Each task when it was learned and now; ``overall()`` and ``forgetting()`` are read off it.
        scores: Score now of each task that could be scored, by name.
        held_out: What each score is of, or why there is none.
        watch: Score now of each watch set that could be scored, by name; none where only some tasks were asked for.
    """

    inference: str
    standing: Standing
    scores: dict[str, Score]
    held_out: tuple[HeldOut, ...]
    watch: dict[str, Score]
