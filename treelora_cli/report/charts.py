"""Charts of numbers: lines, bars and heat maps. Pure: data in, ``Drawing`` out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from treelora_cli.report.drawing import COLOURS, Drawing, short

_WIDTH, _HEIGHT = 480, 280
_RAMP = ((247, 251, 255), (198, 219, 239), (107, 174, 214), (33, 113, 181), (8, 48, 107))
"""From the lowest value to the highest."""
_HALF_DIGIT = 4.0
"""Half the width of a digit in pixels, with some room."""
_SCALE = 176.0
"""Width of the scale below a heat map, its numbers included."""
_TIPS = 1600
"""Cells up to which each says its value when the mouse rests on it."""


@dataclass(frozen=True)
class Line:
    """One series.

    Attributes:
        name: Shown at its end.
        points: (x, y) in order of x; ``None`` for y leaves a gap.
        colour: Number of a series colour; ``None``: a thin grey line without a name.
        dashed: Draw it dashed.
    """

    name: str
    points: Sequence[tuple[float, float | None]]
    colour: int | None = 0
    dashed: bool = False


def line_chart(
    name: str,
    title: str,
    description: str,
    lines: Sequence[Line],
    *,
    x_label: str,
    y_label: str,
    y_range: tuple[float, float] | None = None,
) -> Drawing:
    """Draw lines over one pair of axes; the names of coloured lines stand in a legend below."""
    named = [line for line in lines if line.colour is not None]
    rows = math.ceil(len(named) / 2) if len(named) > 1 else 0
    drawing = Drawing(name, title, description, _WIDTH, _HEIGHT + 18 * rows)
    xs = [x for line in lines for x, y in line.points if y is not None]
    ys = [y for line in lines for _, y in line.points if y is not None]
    x_low, x_high = (min(xs), max(xs)) if xs else (0.0, 1.0)
    y_ticks = ticks(*(y_range or ((min(0.0, *ys), max(ys)) if len(ys) > 1 else (0.0, max([*ys, 1.0])))))
    left, right, top, bottom = 60.0, _WIDTH - 14.0, 14.0, _HEIGHT - 44.0

    def at(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / ((x_high - x_low) or 1)
        return left + across * (right - left), bottom - (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]) * (bottom - top)

    for tick in y_ticks:
        height = at(x_low, tick)[1]
        drawing.path([(left, height), (right, height)], "grid")
        drawing.text(left - 6, height + 4, _shown(tick), "soft", "end")
    for tick in [one for one in ticks(x_low, x_high) if x_low <= one <= x_high and one == int(one)]:  # tasks and steps
        shown = _shown(tick)
        within = _WIDTH - _HALF_DIGIT * len(shown)
        drawing.text(min(at(tick, 0)[0], within), bottom + 16, shown, "soft", "middle")
    drawing.path([(left, bottom), (right, bottom)], "axis")
    drawing.text((left + right) / 2, bottom + 34, x_label, "soft", "middle")
    drawing.text(12, (top + bottom) / 2, y_label, "soft", "middle", turn=-90)
    for line in sorted(lines, key=lambda one: one.colour is not None):
        _draw_line(drawing, line, at)
    if rows:
        _legend(drawing, named, _HEIGHT + 4.0)
    return drawing


def _draw_line(drawing: Drawing, line: Line, at: Callable[[float, float], tuple[float, float]]) -> None:
    look = "rest line thin" if line.colour is None else f"line s{line.colour % COLOURS}"
    run: list[tuple[float, float]] = []
    for x, y in [*line.points, (0.0, None)]:
        if y is not None:
            run.append(at(x, y))
            continue
        if len(run) > 1:
            drawing.path(run, f"{look} dash" if line.dashed else look)
        if line.colour is not None and 0 < len(run) <= 40:
            for point in run:
                drawing.dot(*point, f"f{line.colour % COLOURS}")
        run = []


def _legend(drawing: Drawing, lines: Sequence[Line], top: float) -> None:
    for index, line in enumerate(lines):
        x, y = 52.0 + (index % 2) * 210, top + 18 * (index // 2)
        assert line.colour is not None
        drawing.path([(x, y), (x + 22, y)], f"line s{line.colour % COLOURS}{' dash' if line.dashed else ''}")
        drawing.text(x + 28, y + 4, short(line.name, 26))


def bar_chart(
    name: str,
    title: str,
    description: str,
    bars: Sequence[tuple[str, Sequence[float]]],
    *,
    series: Sequence[str],
    unit: str,
) -> Drawing:
    """Draw one horizontal, stacked bar for each row; the total stands behind it."""
    rows = math.ceil(len(series) / 3) if len(series) > 1 else 0
    drawing = Drawing(name, title, description, _WIDTH, 22.0 * len(bars) + 18 * rows + 26)
    longest = max((sum(values) for _, values in bars), default=0.0) or 1.0
    left, room = 168.0, _WIDTH - 168.0 - 84
    for index, (label, values) in enumerate(bars):
        y, x = 8 + 22.0 * index, left
        drawing.text(left - 8, y + 12, short(label), anchor="end")
        for place, value in enumerate(values):
            width = room * value / longest
            drawing.rect(x, y, width, 16, f"f{place % COLOURS}")
            x += width
        drawing.text(x + 6, y + 12, f"{_shown(sum(values))} {unit}".strip(), "soft")
    for index, label in enumerate(series if rows else ()):
        x, y = 20.0 + (index % 3) * 150, 22.0 * len(bars) + 22 + 18 * (index // 3)
        drawing.rect(x, y - 10, 12, 12, f"f{index % COLOURS}")
        drawing.text(x + 18, y, short(label, 18))
    return drawing


def heat_map(
    name: str,
    title: str,
    description: str,
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float | None]],
    *,
    high: float = 100.0,
    unit: str = "%",
) -> Drawing:
    """Draw one cell for each value; few cells carry their numbers, of many the axes name some.

    Args:
        name: See ``Drawing``.
        title: See ``Drawing``.
        description: See ``Drawing``.
        rows: Names along the left side.
        columns: Names along the top.
        values: One sequence for each row; ``None`` or a missing end stays empty.
        high: Value of the darkest colour; 0 is the lightest.
        unit: Written behind a value.
    """
    few = max(len(rows), len(columns)) <= 15
    cell = 34.0 if few else max(4.0, min(16.0, 560.0 / max(len(rows), len(columns), 1)))
    longest = max((len(short(label, 16)) for label in columns), default=0)
    left, top = 168.0, 24.0 + 6 * longest
    width = left + max(cell * len(columns) + 6 + 3 * longest, _SCALE)
    drawing = Drawing(name, title, description, width, top + cell * len(rows) + 54)
    _name_cells(drawing, (left, top), cell, rows, columns)
    if len(rows) * len(columns) > _TIPS:
        _fill_by_colour(drawing, (left, top), cell, [[None if v is None else v / high for v in row] for row in values])
        values = ()
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            if value is None:
                continue
            place, side = (left + cell * x, top + cell * y), cell - (1 if few else 0)
            tip = f"{rows[y]}, {columns[x]}: {value:.1f}{unit}"
            drawing.rect(*place, side, side, fill=shade(value / high), tip=tip)
            if few:
                drawing.text_in_cell(*place, cell, f"{value:.0f}", "#fff" if value / high > 0.55 else "#10233f")
    _scale(drawing, left, top + cell * len(rows) + 22, high, unit)
    return drawing


def _name_cells(
    drawing: Drawing, corner: tuple[float, float], cell: float, rows: Sequence[str], columns: Sequence[str]
) -> None:
    """Write the names of rows and columns, as many as there is room for."""
    left, top = corner
    every = max(1, math.ceil(13 / cell))
    for index, label in enumerate(rows):
        if index % every == 0:
            drawing.text(left - 8, top + cell * (index + 0.5) + 4, short(label), anchor="end")
    for index, label in enumerate(columns):
        if index % every == 0:
            drawing.text(left + cell * (index + 0.5) + 4, top - 8, short(label, 16), turn=-60)


def _fill_by_colour(
    drawing: Drawing, corner: tuple[float, float], cell: float, shares: Sequence[Sequence[float | None]]
) -> None:
    """Fill many cells with one path for each of 64 colours: a third of the size of a rectangle each."""
    runs: dict[int, list[tuple[float, float]]] = {}
    for y, row in enumerate(shares):
        for x, share in enumerate(row):
            if share is not None:
                runs.setdefault(round(63 * min(max(share, 0.0), 1.0)), []).append((x, y))
    for level, cells in sorted(runs.items()):
        places = [(corner[0] + cell * x, corner[1] + cell * y) for x, y in cells]
        drawing.squares(places, cell, shade(level / 63))


def _scale(drawing: Drawing, x: float, y: float, high: float, unit: str) -> None:
    for index in range(20):
        drawing.rect(x + 6 * index, y, 6, 10, fill=shade(index / 19))
    drawing.text(x - 8, y + 10, f"0{unit}", "soft", "end")
    drawing.text(x + 126, y + 10, f"{_shown(high)}{unit}", "soft")


def shade(share: float) -> str:
    """Return the ramp's colour at ``share`` of its length, as ``#rrggbb``."""
    place = min(max(share, 0.0), 1.0) * (len(_RAMP) - 1)
    first = min(int(place), len(_RAMP) - 2)
    part = place - first
    mixed = (round(a + (b - a) * part) for a, b in zip(_RAMP[first], _RAMP[first + 1], strict=True))
    return "#" + "".join(f"{one:02x}" for one in mixed)


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Return round numbers from below ``low`` to above ``high``, about ``wanted`` of them."""
    span = (high - low) or 1.0
    raw = span / wanted
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 10) for index in range(first, max(last, first + 1) + 1)]


def _shown(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"
