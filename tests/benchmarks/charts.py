"""A chart with logarithmic axes as an SVG file, without any plotting library."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

_COLOURS = ("#1b6ca8", "#c8553d", "#588157", "#8e5ea2", "#b8860b", "#444444")
_LEFT, _TOP, _WIDTH, _HEIGHT = 70, 40, 430, 290
_LEGEND = 230

Points = Sequence[tuple[float, float]]


def log_chart(
    path: Path, title: str, x_label: str, y_label: str, lines: Mapping[str, Points], dashed: Sequence[str] = ()
) -> None:
    """Write lines over two logarithmic axes.

    Args:
        path: SVG file to write.
        title: Above the chart.
        x_label: With its unit.
        y_label: With its unit.
        lines: Points (x, y) by the name shown in the legend; all values above 0.
        dashed: Names drawn with a dashed line.
    """
    every = [point for points in lines.values() for point in points]
    x_axis = _Axis([x for x, _ in every], _LEFT, _LEFT + _WIDTH)
    y_axis = _Axis([y for _, y in every], _TOP + _HEIGHT, _TOP)
    width, height = _LEFT + _WIDTH + _LEGEND, _TOP + _HEIGHT + 55
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}"'
        ' font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="{_LEFT}" y="22" font-size="14">{escape(title)}</text>',
        f'<text x="{_LEFT + _WIDTH / 2}" y="{_TOP + _HEIGHT + 42}" text-anchor="middle">{escape(x_label)}</text>',
        f'<text transform="translate(16 {_TOP + _HEIGHT / 2}) rotate(-90)" text-anchor="middle">'
        f"{escape(y_label)}</text>",
    ]
    for power, at in x_axis.decades():
        parts.append(f'<path d="M{at:.1f} {_TOP}V{_TOP + _HEIGHT}" stroke="#ddd"/>')
        parts.append(f'<text x="{at:.1f}" y="{_TOP + _HEIGHT + 18}" text-anchor="middle">{_power(power)}</text>')
    for power, at in y_axis.decades():
        parts.append(f'<path d="M{_LEFT} {at:.1f}H{_LEFT + _WIDTH}" stroke="#ddd"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{_power(power)}</text>')
    parts.append(f'<rect x="{_LEFT}" y="{_TOP}" width="{_WIDTH}" height="{_HEIGHT}" fill="none" stroke="#888"/>')
    for index, (name, points) in enumerate(lines.items()):
        colour, dash = _COLOURS[index % len(_COLOURS)], ' stroke-dasharray="6 4"' if name in dashed else ""
        places = [(x_axis.at(x), y_axis.at(y)) for x, y in points]
        line = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
        parts.append(f'<path d="M{line}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>')
        if name not in dashed:
            parts.extend(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in places)
        row, left = _TOP + 14 + 20 * index, _LEFT + _WIDTH + 12
        parts.append(f'<path d="M{left} {row - 4}h22" stroke="{colour}" stroke-width="2"{dash}/>')
        parts.append(f'<text x="{left + 28}" y="{row}">{escape(name)}</text>')
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([*parts, "</svg>", ""]), encoding="utf-8")


class _Axis:
    """Maps values to pixels, from one whole power of ten to another."""

    def __init__(self, values: Sequence[float], start: float, end: float) -> None:
        self.low = math.floor(math.log10(min(values)) + 1e-9)
        self.high = max(self.low + 1, math.ceil(math.log10(max(values)) - 1e-9))
        self.start, self.end = start, end

    def at(self, value: float) -> float:
        share = (math.log10(value) - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def decades(self) -> list[tuple[int, float]]:
        return [(power, self.at(10.0**power)) for power in range(self.low, self.high + 1)]


def _power(power: int) -> str:
    return f"{10.0**power:g}" if -3 <= power <= 5 else f"1e{power}"


def table(heading: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a Markdown table."""
    lines = [heading, ["---"] * len(heading), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)
