"""Figures of how tasks were trained and answered: losses, pulls by step, classes, confusion, routes, watch sets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from treelora_cli.project.metrics import TaskAnswers, WatchSet
from treelora_cli.project.unfinished import Step
from treelora_cli.report.charts import Line, bar_chart, heat_map, line_chart
from treelora_cli.report.drawing import Drawing, short
from treelora_cli.report.facts import Pulls
from treelora_cli.views.answers import class_scores

_POINTS = 150
_NAMED = 8
_CLASSES = 40
_CELLS = 60


def loss_figure(steps: Mapping[str, Sequence[Step]]) -> Drawing | None:
    """Loss by step of the last tasks, each point the mean of neighbouring steps."""
    if not steps:
        return None
    lines = [
        Line(task, _means([(float(one.step), one.loss) for one in taken]), index, dashed=index % 2 == 1)
        for index, (task, taken) in enumerate(steps.items())
    ]
    which = "the last task" if len(lines) == 1 else f"the last {len(lines)} tasks"
    what = f"The task's own loss at each step, of {which}."
    return line_chart("loss", "Loss while training", what, lines, x_label="step", y_label="loss")


def _means(points: Sequence[tuple[float, float]]) -> list[tuple[float, float | None]]:
    groups = np.array_split(np.array(points), min(len(points), _POINTS))
    return [(float(part[-1, 0]), float(part[:, 1].mean())) for part in groups]


def selections_figure(task: str, steps: Sequence[Step], names: Sequence[str]) -> Drawing | None:
    """Share of layers that pulled each earlier task, by step of the last task."""
    chosen = [one for one in steps if one.selected]
    if not chosen:
        return None
    total = Counter(earlier for one in chosen for earlier in one.selected)
    lines = []
    for index, (earlier, _) in enumerate(total.most_common(_NAMED)):
        shares = [(float(one.step), 100 * one.selected.count(earlier) / len(one.selected)) for one in chosen]
        lines.append(Line(names[earlier], _means(shares), index, dashed=index % 2 == 1))
    some = f" The {len(lines)} selected most of {len(total)}." if len(lines) < len(total) else ""
    what = f"Share of layers that selected each earlier task while {short(task)} was trained.{some}"
    return line_chart("selections", "Search by step", what, lines, x_label="step", y_label="percent", y_range=(0, 100))


def search_figures(pulls: Pulls) -> list[Drawing]:
    """Pulls and lower bounds of the arms pulled most, by step of the last search."""
    if not pulls.arms:
        return []
    names = [pulls.tasks[arm.task] for arm in pulls.arms]
    some = f" The {len(names)} pulled most of {len(pulls.tasks)}." if len(names) < len(pulls.tasks) else ""
    pulled, bounds = [], []
    for index, (name, arm) in enumerate(zip(names, pulls.arms, strict=True)):
        steps = range(1, len(arm.pulls) + 1)
        dashed = index % 2 == 1
        counts = [(float(x), float(y)) for x, y in zip(steps, arm.pulls, strict=True)]
        pulled.append(Line(name, _means(counts), index, dashed))
        known = [(float(x), float(y)) for x, y in zip(steps, arm.bounds, strict=True) if not np.isnan(y)]
        bounds.append(Line(name, _means(known) if known else [], index, dashed))
    values = [y for line in bounds for _, y in line.points if y is not None]
    around = (min(values), max(values)) if values else None
    of = f"of each earlier task while {short(pulls.task)} was trained"
    what = f"Pulls {of}, over all layers, those of the probe before the first step included.{some}"
    how = f"Lower confidence bound on the distance {of}, mean of layers, from pulls at the step and means of the end."
    return [
        line_chart("counts", "Pulls by step", what, pulled, x_label="step", y_label="pulls"),
        line_chart(
            "bounds",
            "Bounds by step",
            how + some,
            bounds,
            x_label="step",
            y_label="L1 distance, scaled",
            y_range=around,
        ),
    ]


def class_figures(answers: Mapping[str, TaskAnswers]) -> list[Drawing]:
    """The least accurate classes, and what they are confused with."""
    confusion: Counter[tuple[str, str]] = Counter()
    for one in answers.values():
        confusion.update(dict(one.confusion))
    scores = class_scores(confusion)
    if not scores:
        return []
    bars = [(one.label, [100 * one.accuracy]) for one in scores[:_CLASSES]]
    some = f"The {len(bars)} least accurate of {len(scores)} classes." if len(bars) < len(scores) else "Every class."
    drawn = [bar_chart("classes", "Accuracy of classes", some, bars, series=["accuracy"], unit="%")]
    labels = [one.label for one in scores[:_CELLS]]
    totals = {one.label: one.count for one in scores}
    cells = [[100 * confusion[right, given] / totals[right] for given in labels] for right in labels]
    some = f" The {len(labels)} least accurate of {len(scores)}." if len(labels) < len(scores) else ""
    what = f"Of each row's class, the share answered with each column's, in percent.{some}"
    return [*drawn, heat_map("confusion", "Confusion of classes", what, labels, labels, cells)]


def routes_figure(answers: Mapping[str, TaskAnswers]) -> Drawing | None:
    """Which task's adapter answered the held-out examples of each task."""
    routed = {task: one.routes for task, one in answers.items() if one.routes}
    names = list(routed)[-_CELLS:]
    if len(names) < 2:
        return None
    cells = [[100 * routed[row].get(one, 0) / max(1, sum(routed[row].values())) for one in names] for row in names]
    some = f" The last {len(names)} of {len(routed)} tasks." if len(names) < len(routed) else ""
    what = f"Of each row's held-out examples, the share answered by each column's task, in percent.{some}"
    return heat_map("routes", "Which task answered", what, names, names, cells)


def watch_figure(sets: Sequence[WatchSet], tasks: Sequence[str]) -> Drawing | None:
    """Scores of watch sets after each task, each with its reference as a dashed line."""
    place = {task: float(number) for number, task in enumerate(tasks, start=1)}
    lines = []
    for index, one in enumerate(sets[:_NAMED]):
        points = [(place[task], 100 * score) for task, score in one.scores.items() if task in place]
        lines.append(Line(one.name, _means(points) if points else [], index))
        if one.reference is not None and points:
            ends = [(points[0][0], 100 * one.reference), (points[-1][0], 100 * one.reference)]
            lines.append(Line(f"{one.name}, reference", ends, index, dashed=True))
    if not lines:
        return None
    what = "Scores on data that is never learned from, and what they are measured against."
    return line_chart("watch", "Watch sets", what, lines, x_label="tasks learned", y_label="percent", y_range=(0, 100))
