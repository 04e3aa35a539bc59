"""Whether a learned task may be committed: thresholds on the scores after it. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from treelora_cli.config import GateConfig
from treelora_cli.errors import UsageError
from treelora_cli.score_matrix import ScoreMatrix


@dataclass(frozen=True)
class WatchScore:
    """Score of a watch set now, and what it is measured against.

    Attributes:
        now: In [0, 1].
        reference: Of the untouched base, else of the first task after which it was scored; ``None`` for the first.
    """

    now: float
    reference: float | None


def check_gate(gate: GateConfig, *, evaluate: bool) -> None:
    """Raise ``UsageError`` when there is a gate and nothing is scored."""
    if not evaluate and gate != GateConfig():
        raise UsageError("--no-eval leaves the gate nothing to check. Leave one of them out.")


def refusal(gate: GateConfig, matrix: ScoreMatrix, watched: Mapping[str, WatchScore]) -> str | None:
    """Return which figure fails the gate, in words; ``None`` when the gate holds.

    Figures are those of the tasks that could be scored. A watch set counts towards ``max_forgetting`` by what it lost
    against its reference, and towards ``task_under`` like a task.
    """
    standing = matrix.standing()
    overall, forgetting = standing.overall(), standing.forgetting()
    if gate.fail_under is not None and (overall is None or _percent(overall) < gate.fail_under):
        return f"OP {_shown(overall)} is below fail_under {gate.fail_under:g}"
    if gate.max_forgetting is not None:
        if forgetting is None or _percent(forgetting) > gate.max_forgetting:
            return f"forgetting {_shown(forgetting)} is above max_forgetting {gate.max_forgetting:g}"
        for name, one in watched.items():
            lost = None if one.reference is None else one.reference - one.now
            if lost is not None and _percent(lost) > gate.max_forgetting:
                return f"watch set '{name}' lost {_shown(lost)}, above max_forgetting {gate.max_forgetting:g}"
    if gate.task_under is not None:
        scores = {f"task '{task}'": now for task, now in zip(standing.tasks, standing.now, strict=True)}
        scores |= {f"watch set '{name}'": one.now for name, one in watched.items()}
        for who, score in scores.items():
            newest = who == f"task '{standing.tasks[-1]}'"
            if (score is None and newest) or (score is not None and _percent(score) < gate.task_under):
                return f"{who} scores {_shown(score)}, below task_under {gate.task_under:g}"
    return None


def _percent(value: float) -> float:
    """Return percent without the last bits, which sums of decimal fractions leave."""
    return round(100 * value, 6)


def _shown(value: float | None) -> str:
    return "unknown" if value is None else f"{100 * value:.2f}"
