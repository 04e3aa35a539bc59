"""The figures of a report. Each is bounded: of more tasks than fit, some or means of neighbours are drawn, and said."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from treelora_cli.report.charts import Line, bar_chart, heat_map, line_chart
from treelora_cli.report.drawing import Drawing, short
from treelora_cli.report.facts import Pulls, ReportFacts, TaskFacts
from treelora_cli.report.training import (
    class_figures,
    loss_figure,
    routes_figure,
    search_figures,
    selections_figure,
    watch_figure,
)
from treelora_cli.score_matrix import ScoreMatrix

CELLS = 100
"""Most rows and columns of a heat map; of more tasks each cell is the mean of neighbours."""
ROWS = 40
"""Most bars and most rows of a tree."""
_CURVES = 8
_POINTS = 200


def figures(facts: ReportFacts) -> list[Drawing]:
    """Return every figure that the project has data for."""
    found = [matrix_figure(facts.matrix), overall_figure(facts.matrix), curves_figure(facts.matrix)]
    found.append(tree_figure(facts))
    if facts.pulls is not None:
        found += [pulls_figure(facts.pulls), *search_figures(facts.pulls)]
    last = facts.tasks[-1].name
    names = [task.name for task in facts.tasks]
    found += [loss_figure(facts.steps), selections_figure(last, facts.steps.get(last, ()), names)]
    found += [*class_figures(facts.answers), routes_figure(facts.answers), watch_figure(facts.watch, names)]
    found += [time_figure(facts.tasks), memory_figure(facts.tasks), disk_figure(facts.tasks)]
    return [one for one in found if one is not None]


def _percent(value: float | None) -> float | None:
    return None if value is None else 100 * value


def matrix_figure(matrix: ScoreMatrix) -> Drawing | None:
    """The accuracy matrix as a heat map."""
    if not any(value is not None for row in matrix.rows for value in row):
        return None
    count = len(matrix.tasks)
    groups = np.array_split(np.arange(count), min(count, CELLS))
    sums, known = np.zeros((len(groups),) * 2), np.zeros((len(groups),) * 2)
    group_of = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
    for index, row in enumerate(matrix.rows):
        scores = np.array([np.nan if value is None else value for value in row])
        there = ~np.isnan(scores)
        np.add.at(sums[group_of[index]], group_of[: index + 1][there], scores[there])
        np.add.at(known[group_of[index]], group_of[: index + 1][there], 1)
    names = [matrix.tasks[group[-1]] for group in groups]
    cells = [
        [100 * sums[y, x] / known[y, x] if known[y, x] else None for x in range(y + 1)] for y in range(len(groups))
    ]
    merged = "" if len(groups) == count else f" Each cell is the mean of about {count // len(groups)} tasks."
    what = f"After the task of each row, the score on the task of each column, in percent.{merged}"
    return heat_map("matrix", "Accuracy matrix", what, names, names, cells)


def overall_figure(matrix: ScoreMatrix) -> Drawing:
    """OP and forgetting after each task."""
    overall, forgetting = [], []
    diagonal = [row[-1] for row in matrix.rows]
    for number, row in enumerate(matrix.rows, start=1):
        lost = [a - b for a, b in zip(diagonal, row, strict=False) if a is not None and b is not None]
        seen = [value for value in row if value is not None]
        overall.append((float(number), 100 * sum(seen) / len(seen) if seen else None))
        forgetting.append((float(number), 100 * sum(lost) / len(lost) if lost else None))
    last = f"After the last task OP is {_told(overall[-1][1])} and forgetting {_told(forgetting[-1][1])} points."
    lines = [Line("OP (mean score)", _thinned(overall)), Line("forgetting", _thinned(forgetting), 1, dashed=True)]
    return line_chart(
        "overall", "OP and forgetting after each task", last, lines, x_label="tasks learned", y_label="percent"
    )


def _told(value: float | None) -> str:
    return "not known" if value is None else f"{value:.1f}"


def _thinned(points: Sequence[tuple[float, float | None]]) -> list[tuple[float, float | None]]:
    if len(points) <= _POINTS:
        return list(points)
    kept = np.unique(np.linspace(0, len(points) - 1, _POINTS).round().astype(int))
    return [points[index] for index in kept]


def curves_figure(matrix: ScoreMatrix) -> Drawing | None:
    """Each task's score from when it was learned on; of many, those that lost most are named."""
    count = len(matrix.tasks)
    lost = {}
    for index in range(count):
        first, now = matrix.rows[index][index], matrix.rows[-1][index]
        lost[index] = -1.0 if first is None or now is None else first - now
    named = sorted(lost, key=lambda index: -lost[index])[:_CURVES] if count > _CURVES else list(range(count))
    shown = sorted({*named, *np.linspace(0, count - 1, min(count, CELLS)).round().astype(int).tolist()})
    lines = []
    for index in shown:
        points = [(float(row + 1), _percent(matrix.rows[row][index])) for row in range(index, count)]
        colour = named.index(index) if index in named else None
        lines.append(Line(matrix.tasks[index], _thinned(points), colour, dashed=colour is not None and colour % 2 == 1))
    if not any(y is not None for line in lines for _, y in line.points):
        return None
    which = "" if count <= _CURVES else f" The {_CURVES} that lost most are named; {len(shown)} of {count} are drawn."
    what = f"Score of each task from when it was learned to now.{which}"
    return line_chart(
        "curves", "Each task's curve", what, lines, x_label="tasks learned", y_label="percent", y_range=(0, 100)
    )


def tree_figure(facts: ReportFacts) -> Drawing:
    """The learned tree, root at the left, one row for each leaf; the deepest levels go where there are too many."""
    tree, names = facts.tree, [task.name for task in facts.tasks]
    depth = tree.height
    while depth > 0 and sum(not n.children or n.depth == depth for n in tree.nodes if n.depth <= depth) > ROWS:
        depth -= 1
    ends = [node for node in tree.nodes if node.depth <= depth and (not node.children or node.depth == depth)]
    what = f"{len(names)} tasks in a tree of height {tree.height}; each split is on one adapted layer."
    cut = "" if depth == tree.height else f" Drawn down to depth {depth}."
    step = 118.0
    drawing = Drawing("tree", "Tree of tasks", what + cut, 300 + step * depth, 24 * max(1, len(ends)) + 24)
    rows: dict[int, float] = {}

    def place(index: int) -> float:
        node = tree.nodes[index]
        if node.depth == depth or not node.children:
            rows[index] = 24.0 * sum(one in rows for one in [end.index for end in ends]) + 22
        else:
            below = [place(child) for child in node.children]
            rows[index] = sum(below) / len(below)
        return rows[index]

    place(0)
    for index, y in rows.items():
        node, x = tree.nodes[index], 16 + step * tree.nodes[index].depth
        if node.depth < depth and node.children:
            for child in node.children:
                drawing.path([(x, y), (x, rows[child]), (x + step, rows[child])], "axis")
            between = y + 4 if len(node.children) % 2 == 0 else y - 4  # no line goes there
            drawing.text(x + 6, between, short(facts.layers[node.layer], 17), "note")
            drawing.dot(x, y, "leaf", 3)
        else:
            drawing.dot(x, y, "leaf", 4)
            drawing.text(x + 10, y + 4, _members([names[task] for task in node.members]))
    return drawing


def _members(names: Sequence[str]) -> str:
    if len(names) > 4:
        return f"{len(names)} tasks: {short(names[0], 16)} … {short(names[-1], 16)}"
    return ", ".join(short(name) for name in names)


def pulls_figure(pulls: Pulls) -> Drawing:
    """How often the last search pulled each earlier task."""
    counts = pulls.counts.sum(axis=0)
    pulled = [index for index in np.argsort(-counts, kind="stable") if counts[index]]
    bars = [(pulls.tasks[index], [float(counts[index])]) for index in pulled[:ROWS]]
    some = f" {len(pulled)} of {len(pulls.tasks)} earlier tasks were pulled."
    some += f" The {ROWS} pulled most are shown." if len(pulled) > ROWS else ""
    what = f"Pulls over all layers ({pulls.search}).{some}"
    return bar_chart("pulls", f"Search for {short(pulls.task)}", what, bars, series=["pulls"], unit="")


def time_figure(tasks: Sequence[TaskFacts]) -> Drawing | None:
    """Seconds of each task by phase."""
    timed = [task for task in tasks if task.seconds]
    if not timed:
        return None
    totals: dict[str, float] = {}
    for task in timed:
        for phase, seconds in task.seconds.items():
            totals[phase] = totals.get(phase, 0.0) + seconds
    largest = sorted(totals, key=lambda phase: -totals[phase])
    series = [*largest[:5], *(["other"] if len(largest) > 5 else [])]
    shown = timed[-ROWS:]
    bars = [
        (
            task.name,
            [*(task.seconds.get(p, 0.0) for p in largest[:5]), sum(task.seconds.get(p, 0) for p in largest[5:])],
        )
        for task in shown
    ]
    some = "" if len(shown) == len(timed) else f" The last {len(shown)} of {len(timed)} tasks."
    what = f"{sum(totals.values()):,.0f} s in all, most of it {largest[0]}.{some}"
    return bar_chart("time", "Time of each task", what, bars, series=series, unit="s")


def memory_figure(tasks: Sequence[TaskFacts]) -> Drawing | None:
    """Peak memory of the process that learned each task."""
    known = [(task.name, task.peak_bytes) for task in tasks if task.peak_bytes is not None]
    if not known:
        return None
    bars = [(name, [peak / 2**20]) for name, peak in known[-ROWS:]]
    some = "" if len(bars) == len(tasks) else f" The last {len(bars)} of {len(tasks)} tasks."
    what = f"Largest memory, up to its commit, of the process that learned each task; on a GPU that of the GPU.{some}"
    return bar_chart("memory", "Peak memory of each task", what, bars, series=["MiB"], unit="MiB")


def disk_figure(tasks: Sequence[TaskFacts]) -> Drawing:
    """Kept bytes of each task."""
    shown = tasks[-ROWS:]
    bars = [(task.name, [task.disk_bytes / 1024]) for task in shown]
    some = "" if len(shown) == len(tasks) else f" The last {len(shown)} of {len(tasks)} tasks."
    what = f"Records and adapter of each task, in KiB.{some}"
    return bar_chart("disk", "Space of each task", what, bars, series=["KiB"], unit="KiB")
