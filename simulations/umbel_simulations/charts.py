"""Charts for reports: plain SVG text, so that a report is one page that needs nothing else.

Colours are set by CSS classes (`series-0` … `series-5`) that the page defines; every point carries a `<title>`, which
browsers show as a tool tip and screen readers read out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Final

WIDTH: Final = 640
HEIGHT: Final = 260
LEFT: Final = 52
RIGHT: Final = 12
TOP: Final = 14
BOTTOM: Final = 40
_ROW: Final = 18
"""Height of a line of the legend."""
_LETTER: Final = 7
"""Width of a letter, amply."""


@dataclass(frozen=True, slots=True)
class Series:
    """One named line: its points as (x, y), in order of x."""

    name: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class _Scale:
    low: float
    high: float
    start: float
    stop: float

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return round(self.start + share * (self.stop - self.start), 1)


def line_chart(
    series: Sequence[Series], *, x_label: str, y_label: str, y_range: tuple[float, float] | None = None
) -> str:
    """An SVG with a line per series, axes and a legend. Series without points are left out."""
    shown = [line for line in series if line.points]
    if not shown:
        return '<p class="empty">Nothing to draw yet.</p>'
    xs = [x for line in shown for x, _ in line.points]
    ys = [y for line in shown for _, y in line.points]
    low, high = y_range or (min(0.0, *ys), max(0.0, *ys) * 1.08)
    across = _Scale(*_apart(min(xs), max(xs)), LEFT, WIDTH - RIGHT)
    up = _Scale(*_apart(low, high), HEIGHT - BOTTOM, TOP)
    body = [_axes(across, up, x_label, y_label)]
    body += [_line(index, line, across, up) for index, line in enumerate(shown)]
    legend, height = _legend(shown) if len(shown) > 1 else ("", 0)
    label = escape(f"{y_label} over {x_label}")
    # The legend stands above the plot, where it hides no line.
    box = f"0 {-height} {WIDTH} {HEIGHT + height}"
    return f'<svg viewBox="{box}" role="img" aria-label="{label}">{"".join(body)}{legend}</svg>'


def _apart(low: float, high: float) -> tuple[float, float]:
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _ticks(scale: _Scale, most: int = 6) -> list[float]:
    """Round numbers inside the scale: steps of 1, 2 or 5 times a power of ten."""
    rough = (scale.high - scale.low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    first = math.ceil(scale.low / step)
    return [index * step for index in range(first, math.floor(scale.high / step + 1e-9) + 1)]


def _number(value: float) -> str:
    # As many figures as it takes to tell one tick from the next, and none of a float's own rounding.
    return f"{value:.10g}"


def _axes(across: _Scale, up: _Scale, x_label: str, y_label: str) -> str:
    floor = HEIGHT - BOTTOM
    parts = []
    for tick in _ticks(up):
        y = up(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{y + 4}" text-anchor="end">{_number(tick)}</text>')
    for tick in _ticks(across):
        parts.append(
            f'<text class="tick" x="{across(tick)}" y="{floor + 16}" text-anchor="middle">{_number(tick)}</text>'
        )
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text class="label" x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text>')
    turned = f'transform="rotate(-90 12 {HEIGHT / 2})"'
    parts.append(f'<text class="label" x="12" y="{HEIGHT / 2}" text-anchor="middle" {turned}>{escape(y_label)}</text>')
    return "".join(parts)


def _line(index: int, line: Series, across: _Scale, up: _Scale) -> str:
    places = [(across(x), up(y), x, y) for x, y in line.points]
    path = " ".join(f"{px},{py}" for px, py, _, _ in places)
    dots = "".join(
        f'<circle cx="{px}" cy="{py}" r="3"><title>{escape(line.name)}: {_number(x)}, {y:.4g}</title></circle>'
        for px, py, x, y in places
    )
    return f'<g class="series-{index % 6}"><polyline points="{path}"/>{dots}</g>'


def _legend(shown: Sequence[Series]) -> tuple[str, int]:
    """Names in lines above the plot, as many to a line as fit, and the height that they take."""
    places, x, row = [], LEFT, 0
    for line in shown:
        width = 30 + _LETTER * len(line.name)
        if x > LEFT and x + width > WIDTH:
            x, row = LEFT, row + 1
        places.append((x, row))
        x += width
    height = _ROW * (row + 1)
    entries = [
        f'<g class="series-{index % 6}"><circle cx="{x + 5}" cy="{_ROW * row - height + 10}" r="4"/>'
        f'<text class="label" x="{x + 14}" y="{_ROW * row - height + 14}">{escape(line.name)}</text></g>'
        for index, (line, (x, row)) in enumerate(zip(shown, places, strict=True))
    ]
    return "".join(entries), height
