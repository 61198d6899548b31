"""Charts as inline SVG: pure functions from numbers to markup, without a script or a font.

Colours are CSS classes of the page, so that a chart is dark where the page is; each chart is one
image to a screen reader, with a name that says in words what it shows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pipeline.report_markup import Markup, escaped, join, tag

WIDTH, HEIGHT = 360.0, 140.0
TOP, BOTTOM = 22.0, 22.0
"""Room for the numbers above the plot, and for the names below it."""
GAP = 0.28
"""Of a column's slot."""
MIN_SLOTS = 8
"""So that the first nights of a job are columns, and not fields."""
MIN_HEIGHT = 1.5
"""Of a column whose value is not 0: it must be seen."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Column:
    """One night of a column chart."""

    name: str
    """Below the column; empty: none."""
    title: str
    """What a pointer that rests on it is told."""
    value: float


def column_chart(
    columns: Sequence[Column], *, label: str, number: Callable[[float], str], usual: float
) -> Markup:
    """Columns from left to right, the last one in colour and with its number.

    Args:
        columns: The last one, at the right edge, is the night that the page is about.
        label: What a screen reader says: all that is to be known of the chart.
        number: A value as text.
        usual: Of the others; a dashed line.
    """
    most = max(usual, *(column.value for column in columns)) or 1.0
    slot = WIDTH / max(len(columns), MIN_SLOTS)
    drawn = [_line(_y(usual, most), "usual")]
    for index, column in enumerate(columns):
        is_last = index == len(columns) - 1
        right = WIDTH - slot * (len(columns) - 1 - index) - slot * GAP / 2
        width, height = slot * (1 - GAP), _height(column.value, most)
        box = _rect(right - width, width, height)
        drawn.append(_named("rect", box, "column now" if is_last else "column", column.title))
        if is_last:
            above = _y(column.value, most) - 6
            drawn.append(_text(number(column.value), right, above, "end strong"))
        if column.name:
            place = (right, "end") if is_last else (right - width, "start")
            drawn.append(_text(column.name, place[0], HEIGHT - 6, place[1]))
    return _svg(label, drawn)


def histogram_chart(
    shares: Sequence[float], before: Sequence[float], *, label: str, ends: tuple[str, str]
) -> Markup:
    """A night's shares as filled columns, those of other nights as a line over them.

    Args:
        shares: Of each bin, from left to right.
        before: The same of other nights; empty: none.
        label: What a screen reader says.
        ends: What the leftmost and the rightmost bin stand for.
    """
    most = max([*shares, *before], default=0.0) or 1.0
    slot = WIDTH / len(shares)
    drawn = [
        _named("rect", _rect(index * slot + 0.5, slot - 1, _height(share, most)), "column now", "")
        for index, share in enumerate(shares)
        if share
    ]
    if before:
        steps = [
            f"L{_n(index * slot)} {_n(_y(share, most))}H{_n((index + 1) * slot)}"
            for index, share in enumerate(before)
        ]
        path = f"M0 {_n(_y(0, most))}{''.join(steps)}V{_n(_y(0, most))}"
        drawn.append(_named("path", {"d": path}, "outline", ""))
    drawn.append(_text(ends[0], 2, HEIGHT - 6, "start"))
    drawn.append(_text(ends[1], WIDTH - 2, HEIGHT - 6, "end"))
    return _svg(label, drawn)


def _svg(label: str, drawn: Sequence[Markup]) -> Markup:
    base = _line(HEIGHT - BOTTOM, "base")
    box = f"0 0 {WIDTH:g} {HEIGHT:g}"
    # Its attributes are not written by `tag`: SVG's names have capitals.
    return Markup(
        f'<svg class="chart" viewBox="{box}" role="img" aria-label="{escaped(label)}">'
        f"{base}{join(drawn)}</svg>"
    )


def _line(y: float, class_: str) -> Markup:
    ends = {"x1": "0", "x2": f"{WIDTH:g}", "y1": _n(y), "y2": _n(y)}
    return _named("line", ends, class_, "")


def _rect(x: float, width: float, height: float) -> dict[str, str]:
    return {
        "x": _n(x),
        "y": _n(HEIGHT - BOTTOM - height),
        "width": _n(width),
        "height": _n(height),
        "rx": "2",
    }


def _named(name: str, numbers: dict[str, str], class_: str, title: str) -> Markup:
    return tag(name, tag("title", title) if title else "", class_=class_, **numbers)


def _text(text: str, x: float, y: float, class_: str) -> Markup:
    return tag("text", text, x=_n(x), y=_n(y), class_=class_)


def _height(value: float, most: float) -> float:
    plot = HEIGHT - TOP - BOTTOM
    return max(value / most * plot, MIN_HEIGHT) if value > 0 else 0.0


def _y(value: float, most: float) -> float:
    return HEIGHT - BOTTOM - _height(value, most)


def _n(value: float) -> str:
    """A number for SVG: two decimals are a hundredth of a pixel."""
    return f"{value:.2f}".rstrip("0").rstrip(".")
