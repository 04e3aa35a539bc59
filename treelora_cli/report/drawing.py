"""Plain SVG, drawn so that one text serves in a page and as a file: colours are classes, resolved by ``STYLE``."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence

STYLE = """
svg.figure{font:12px system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;color:#1b1f24}
svg.figure .ink{fill:#1b1f24}svg.figure .soft{fill:#4b535d}svg.figure .axis{stroke:#8a939e;fill:none}
svg.figure .grid{stroke:#d8dde3;fill:none}svg.figure .rest{stroke:#a3acb7;fill:none}svg.figure .panel{fill:#fff}
svg.figure .note{fill:#4b535d;font-size:11px;paint-order:stroke;stroke:#fff;stroke-width:4px}
svg.figure .line{fill:none;stroke-width:2;stroke-linejoin:round}svg.figure .thin{stroke-width:1}
svg.figure .dash{stroke-dasharray:5 4}svg.figure .leaf{fill:#0b63ce}
svg.figure .s0{stroke:#0b63ce}svg.figure .f0{fill:#0b63ce}svg.figure .s1{stroke:#b4450b}svg.figure .f1{fill:#b4450b}
svg.figure .s2{stroke:#19733b}svg.figure .f2{fill:#19733b}svg.figure .s3{stroke:#8a2f86}svg.figure .f3{fill:#8a2f86}
svg.figure .s4{stroke:#7a5c00}svg.figure .f4{fill:#7a5c00}svg.figure .s5{stroke:#0b6e7a}svg.figure .f5{fill:#0b6e7a}
svg.figure .s6{stroke:#b3123f}svg.figure .f6{fill:#b3123f}svg.figure .s7{stroke:#4d4fb5}svg.figure .f7{fill:#4d4fb5}
@media (prefers-color-scheme:dark){
svg.figure{color:#e6e9ed}svg.figure .ink{fill:#e6e9ed}svg.figure .soft{fill:#b3bcc7}svg.figure .axis{stroke:#77818d}
svg.figure .grid{stroke:#333b45}svg.figure .rest{stroke:#68727e}svg.figure .panel{fill:#14181d}
svg.figure .note{fill:#b3bcc7;stroke:#14181d}
svg.figure .leaf{fill:#6cb0ff}svg.figure .s0{stroke:#6cb0ff}svg.figure .f0{fill:#6cb0ff}
svg.figure .s1{stroke:#ffa26b}svg.figure .f1{fill:#ffa26b}svg.figure .s2{stroke:#6fd08c}svg.figure .f2{fill:#6fd08c}
svg.figure .s3{stroke:#e39be0}svg.figure .f3{fill:#e39be0}svg.figure .s4{stroke:#e3c35a}svg.figure .f4{fill:#e3c35a}
svg.figure .s5{stroke:#62cbd8}svg.figure .f5{fill:#62cbd8}svg.figure .s6{stroke:#ff8fa9}svg.figure .f6{fill:#ff8fa9}
svg.figure .s7{stroke:#aaacff}svg.figure .f7{fill:#aaacff}}
"""
COLOURS = 8
"""Series colours ``f0``, ``s0``, ...; each has a contrast of 4.5 to 1 or more on both grounds."""
_NOT_IN_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def plain(text: str) -> str:
    """Return ``text`` for XML and HTML: escaped, without characters that neither may hold."""
    return html.escape(_NOT_IN_XML.sub("\N{REPLACEMENT CHARACTER}", text))


def short(text: str, limit: int = 22) -> str:
    """Return at most ``limit`` characters; what is longer loses its middle."""
    text = " ".join(text.split())
    return text if len(text) <= limit else f"{text[: limit - limit // 3 - 1]}…{text[-(limit // 3) :]}"


def _number(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


class Drawing:
    """A figure under construction.

    Args:
        name: File name without its ending; also its id in a page.
        title: What it shows, for people and screen readers.
        description: The figure in a sentence or two, read out in its place.
        width, height: Size in pixels.
    """

    def __init__(self, name: str, title: str, description: str, width: float, height: float) -> None:
        self.name = name
        self.title = title
        self.description = description
        self.width = width
        self.height = height
        self._parts: list[str] = []

    def text(self, x: float, y: float, content: str, kind: str = "ink", anchor: str = "start", turn: int = 0) -> None:
        """Write one line at its baseline."""
        turned = f' transform="rotate({turn} {_number(x)} {_number(y)})"' if turn else ""
        placed = "" if anchor == "start" else f' text-anchor="{anchor}"'
        where = f'x="{_number(x)}" y="{_number(y)}"'
        self._parts.append(f'<text {where} class="{kind}"{placed}{turned}>{plain(content)}</text>')

    def rect(
        self, x: float, y: float, width: float, height: float, kind: str = "", fill: str = "", tip: str = ""
    ) -> None:
        """Fill a rectangle by class or colour; ``tip`` shows when the mouse rests on it."""
        look = f'class="{kind}"' if kind else f'fill="{fill}"'
        sides = f'x="{_number(x)}" y="{_number(y)}" width="{_number(width)}" height="{_number(height)}"'
        ending = f"><title>{plain(tip)}</title></rect>" if tip else "/>"
        self._parts.append(f"<rect {sides} {look}{ending}")

    def text_in_cell(self, x: float, y: float, side: float, content: str, fill: str) -> None:
        """Write into the middle of a square whose colour is fixed, so that the text's is, too."""
        where = f'x="{_number(x + side / 2)}" y="{_number(y + side / 2 + 4)}"'
        self._parts.append(f'<text {where} text-anchor="middle" font-size="11" fill="{fill}">{plain(content)}</text>')

    def squares(self, corners: Sequence[tuple[float, float]], side: float, fill: str) -> None:
        """Fill many squares in one colour."""
        long = _number(side)
        shapes = "".join(f"M{_number(x)} {_number(y)}h{long}v{long}h-{long}" for x, y in corners)
        self._parts.append(f'<path d="{shapes}" fill="{fill}"/>')

    def path(self, points: Sequence[tuple[float, float]], kind: str) -> None:
        """Draw straight lines through the points."""
        joined = "L".join(f"{_number(x)} {_number(y)}" for x, y in points)
        self._parts.append(f'<path d="M{joined}" class="{kind}"/>')

    def dot(self, x: float, y: float, kind: str, radius: float = 2.5) -> None:
        """Mark a point."""
        self._parts.append(f'<circle cx="{_number(x)}" cy="{_number(y)}" r="{radius}" class="{kind}"/>')

    def svg(self, *, alone: bool = False) -> str:
        """Return the SVG: a part of a page, or with its style and ground a file of its own."""
        size = f'viewBox="0 0 {_number(self.width)} {_number(self.height)}" width="{_number(self.width)}"'
        space = ' xmlns="http://www.w3.org/2000/svg"' if alone else ""
        ids = f"{self.name}-t {self.name}-d"
        ground = f'<style>{STYLE}</style><rect width="100%" height="100%" class="panel"/>' if alone else ""
        return (
            f'<svg{space} class="figure" role="img" aria-labelledby="{ids}" {size}>'
            f'<title id="{self.name}-t">{plain(self.title)}</title>'
            f'<desc id="{self.name}-d">{plain(self.description)}</desc>{ground}{"".join(self._parts)}</svg>'
        )
