"""What the runs of a comparison say: mean and spread over seeds, ratios to the baseline (pure)."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from treelora_cli.compare.results import Outcome
from treelora_cli.errors import ConfigError, suggest
from treelora_cli.methods.catalogue import OURS


@dataclass(frozen=True)
class Figure:
    """Mean over seeds and sample standard deviation; the latter is ``None`` for a single seed."""

    mean: float
    spread: float | None

    @classmethod
    def over(cls, values: Iterable[float | None]) -> Figure | None:
        """Summarise values; ``None`` unless every seed has one."""
        found = list(values)
        known = [value for value in found if value is not None]
        if not known or len(known) < len(found):
            return None
        return cls(statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else None)


@dataclass(frozen=True)
class MethodRow:
    """One method over its seeds.

    Attributes:
        label: The method.
        seeds: Seeds that have a result.
        op, forgetting, bwt: In [0, 1], see ``metrics``.
        train_seconds, train_cpu_seconds: See ``Outcome``.
        seconds_to_target: Training time, where every seed ended at the target OP.
        peak_bytes, cuda_peak_bytes: See ``Outcome``.
        kept_bytes_per_task: What is kept, divided by the number of tasks.
        trained_parameters: See ``Outcome``.
        ratios: Of the measures in ``RATIOS`` to the baseline's; what has no ratio is left out.
    """

    label: str
    seeds: tuple[int, ...]
    op: Figure | None
    forgetting: Figure | None
    bwt: Figure | None
    train_seconds: Figure | None
    train_cpu_seconds: Figure | None
    seconds_to_target: Figure | None
    peak_bytes: Figure | None
    cuda_peak_bytes: Figure | None
    kept_bytes_per_task: Figure | None
    trained_parameters: Figure | None
    ratios: dict[str, float]


MEASURES = tuple(spec.name for spec in dataclasses.fields(MethodRow) if spec.name not in ("label", "seeds", "ratios"))
RATIOS = ("train_seconds", "train_cpu_seconds", "peak_bytes", "cuda_peak_bytes", "kept_bytes_per_task")


def summarise(
    labels: Sequence[str], outcomes: Sequence[Outcome], baseline: str, target: float | None
) -> list[MethodRow]:
    """Return a row for each method that has a result, in the order of ``labels``.

    Args:
        labels: The methods.
        outcomes: Results of any of them.
        baseline: The method that ratios are taken to.
        target: OP in [0, 1] whose time is wanted.
    """
    rows = [_row(label, own, target) for label in labels if (own := [one for one in outcomes if one.label == label])]
    base = next((row for row in rows if row.label == baseline), None)
    return rows if base is None else [dataclasses.replace(row, ratios=_ratios(row, base)) for row in rows]


def _row(label: str, own: Sequence[Outcome], target: float | None) -> MethodRow:
    return MethodRow(
        label=label,
        seeds=tuple(one.seed for one in own),
        op=Figure.over(one.matrix.overall() for one in own),
        forgetting=Figure.over(one.forgetting for one in own),
        bwt=Figure.over(one.bwt for one in own),
        train_seconds=Figure.over(one.train_seconds for one in own),
        train_cpu_seconds=Figure.over(one.train_cpu_seconds for one in own),
        seconds_to_target=None if target is None else Figure.over(one.seconds_to(target) for one in own),
        peak_bytes=Figure.over(one.peak_bytes for one in own),
        cuda_peak_bytes=Figure.over(one.cuda_peak_bytes for one in own),
        kept_bytes_per_task=Figure.over(one.kept_bytes / max(1, len(one.matrix.tasks)) for one in own),
        trained_parameters=Figure.over(one.trained_parameters for one in own),
        ratios={},
    )


def _ratios(row: MethodRow, base: MethodRow) -> dict[str, float]:
    pairs = {name: (getattr(row, name), getattr(base, name)) for name in RATIOS}
    return {name: own.mean / other.mean for name, (own, other) in pairs.items() if own and other and other.mean}


def flat_row(row: MethodRow) -> dict[str, Any]:
    """Return a row as plain columns, for a table file: means, spreads and ratios under their own names."""
    flat: dict[str, Any] = {"method": row.label, "seeds": " ".join(map(str, row.seeds))}
    for name in MEASURES:
        figure: Figure | None = getattr(row, name)
        flat[name] = None if figure is None else figure.mean
        flat[f"{name}_spread"] = None if figure is None else figure.spread
    return {**flat, **{f"{name}_ratio": row.ratios.get(name) for name in RATIOS}}


def check_baseline(baseline: str | None, labels: Sequence[str]) -> str:
    """Return the row that ratios are taken to: the one named, else ``treelora``, else the first.

    Raises:
        ConfigError: The one named is not among the methods.
    """
    if baseline is None:
        return OURS if OURS in labels else labels[0]
    if baseline not in labels:
        hint = suggest(baseline, labels)
        raise ConfigError(f"--baseline {baseline} is not among --methods{hint}: {', '.join(labels)}.")
    return baseline
