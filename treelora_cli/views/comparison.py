"""Methods side by side: the table, its file, and one line for a finished run."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.table import Table

from treelora_cli.compare.results import Outcome
from treelora_cli.compare.rows import Figure, MethodRow, flat_row
from treelora_cli.views.scores import FORMULAS, percent

NOTES = (
    f"{FORMULAS}\n"
    "Training time: all work for the tasks but loading the base, reading data and scoring.  CPU time: the processor's"
    " for the same.\nPeak memory: of the process, above the loaded base.  Kept: bytes beside the base after the last"
    " task, by the number of tasks.\nTrained: most parameters trained for one task.  (x): ratio to the baseline.  ±:"
    " standard deviation over seeds."
)


def comparison_table(rows: Sequence[MethodRow], baseline: str, target: float | None) -> Table:
    """One row for each method."""
    table = Table(title=f"Methods side by side; baseline {baseline}")
    cuda = any(row.cuda_peak_bytes for row in rows)
    table.add_column("method")
    headings = ["seeds", "OP", "forgetting", "BWT", "training time", "CPU time"]
    headings += [] if target is None else [f"time to OP {100 * target:g}"]
    headings += ["peak memory", *(["CUDA memory"] if cuda else []), "kept per task", "trained"]
    for heading in headings:
        table.add_column(heading, justify="right")
    for row in rows:
        cells = [str(len(row.seeds)), *(_cell(one, percent, "") for one in (row.op, row.forgetting, row.bwt))]
        cells.append(_cell(row.train_seconds, _seconds, _ratio(row, "train_seconds")))
        cells.append(_cell(row.train_cpu_seconds, _seconds, _ratio(row, "train_cpu_seconds")))
        cells += [] if target is None else [_cell(row.seconds_to_target, _seconds, "")]
        cells.append(_cell(row.peak_bytes, size, _ratio(row, "peak_bytes")))
        cells += [_cell(row.cuda_peak_bytes, size, _ratio(row, "cuda_peak_bytes"))] if cuda else []
        cells.append(_cell(row.kept_bytes_per_task, size, _ratio(row, "kept_bytes_per_task")))
        cells.append(_cell(row.trained_parameters, lambda value: f"{value:,.0f}", ""))
        table.add_row(row.label, *cells)
    return table


def watch_table(outcomes: Sequence[Outcome]) -> Table | None:
    """Each watch set: what the untouched base scores, and each method in the end; ``None`` where there is no set."""
    names = list(dict.fromkeys(name for one in outcomes for name in one.record.get("watch", {})))
    if not names:
        return None
    table = Table(title="Watch sets in percent, never learned from")
    table.add_column("watch set")
    labels = list(dict.fromkeys(one.label for one in outcomes))
    for heading in ("untouched", *labels):
        table.add_column(heading, justify="right")
    for name in names:
        kept = [(one.label, one.record.get("watch", {}).get(name)) for one in outcomes]
        untouched = next((watch["untouched"] for _, watch in kept if watch), None)
        cells = [
            _cell(Figure.over(_last(watch) for label, watch in kept if label == own), percent, "") for own in labels
        ]
        table.add_row(name, percent(untouched), *cells)
    return table


def _last(watch: Mapping[str, Any] | None) -> float | None:
    return next(reversed(watch["scores"].values()), None) if watch else None


def _cell(figure: Figure | None, show: Callable[[float], str], ratio: str) -> str:
    if figure is None:
        return "-"
    spread = f" ± {show(figure.spread)}" if figure.spread else ""
    return f"{show(figure.mean)}{spread}{ratio}"


def _ratio(row: MethodRow, measure: str) -> str:
    value = row.ratios.get(measure)
    return "" if value is None else f" (x{value:.2f})" if value >= 0.1 else f" (x{value:.1g})"


def _seconds(value: float) -> str:
    return f"{value:.1f} s"


def size(value: float) -> str:
    """Return bytes in the unit that leaves at least one digit before the point."""
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if value >= 10 or unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.2f} GiB"


def csv_text(rows: Sequence[MethodRow]) -> str:
    """Return the table as CSV: scores in [0, 1], seconds, bytes; empty where there is no figure."""
    flat = [flat_row(row) for row in rows]
    sink = io.StringIO()
    writer = csv.DictWriter(sink, list(flat[0]) if flat else ["method"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return sink.getvalue()


def outcome_line(outcome: Outcome) -> str:
    """One line for a finished run."""
    return (
        f"OP {percent(outcome.matrix.overall())}, forgetting {percent(outcome.forgetting)},"
        f" {outcome.train_seconds:.1f} s of training, {size(outcome.peak_bytes)} above the base"
    )
