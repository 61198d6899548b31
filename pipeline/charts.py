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
MIN_HEIGHT = 1.5
"""Of a column whose value is not 0: it must be seen."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Column:
    """One night of a column chart."""

    name: str
    """Below the column; empty: none."""
    title: str
    """What a pointer that rests on it is told."""
    value: float | None
    """None: nothing is known, and nothing is drawn."""


def column_chart(
    columns: Sequence[Column], *, label: str, number: Callable[[float], str], usual: float | None
) -> Markup:
    """Columns from left to right, the last one in colour and with its number.

    Args:
        columns: The last one is the night that the page is about.
        label: What a screen reader says: all that is to be known of the chart.
        number: A value as text.
        usual: Of the others; a dashed line, None for none.
    """
    known = [column.value for column in columns if column.value is not None]
    most = max([*known, usual or 0.0], default=0.0) or 1.0
    slot = WIDTH / len(columns)
    drawn: list[Markup] = []
    for index, column in enumerate(columns):
        is_last = index == len(columns) - 1
        middle = slot * (index + 0.5)
        if column.value is not None:
            height = _height(column.value, most)
            box = _rect(middle - slot * (1 - GAP) / 2, slot * (1 - GAP), height)
            class_ = "column now" if is_last else "column"
            drawn.append(_named("rect", box, class_, column.title))
            if is_last:
                above = HEIGHT - BOTTOM - height - 6
                drawn.append(
                    _text(number(column.value), min(middle, WIDTH - 4), above, "end strong")
                )
        if column.name:
            anchor = "end" if is_last else "start" if index == 0 else "middle"
            drawn.append(_text(column.name, _at(anchor, middle), HEIGHT - 6, anchor))
    if usual is not None:
        drawn += _usual_line(HEIGHT - BOTTOM - _height(usual, most), number(usual))
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


def _usual_line(y: float, number: str) -> list[Markup]:
    """With its number where columns seldom reach: at the left, above the line."""
    return [_line(y, "usual"), _text(f"median {number}", 2, y - 5, "start")]


def _line(y: float, class_: str) -> Markup:
    ends = {"x1": "0", "x2": f"{WIDTH:g}", "y1": _n(y), "y2": _n(y)}
    return _named("line", ends, class_, "")


def _rect(x: float, width: float, height: float) -> dict[str, str]:
    top = HEIGHT - BOTTOM - height
    return {"x": _n(x), "y": _n(top), "width": _n(width), "height": _n(height), "rx": "2"}


def _named(name: str, numbers: dict[str, str], class_: str, title: str) -> Markup:
    return tag(name, tag("title", title) if title else "", class_=class_, **numbers)


def _text(text: str, x: float, y: float, class_: str) -> Markup:
    return tag("text", text, x=_n(x), y=_n(y), class_=class_)


def _at(anchor: str, middle: float) -> float:
    return {"start": 2.0, "end": WIDTH - 2.0}.get(anchor, middle)


def _height(value: float, most: float) -> float:
    plot = HEIGHT - TOP - BOTTOM
    return max(value / most * plot, MIN_HEIGHT) if value > 0 else 0.0


def _y(value: float, most: float) -> float:
    return HEIGHT - BOTTOM - _height(value, most)


def _n(value: float) -> str:
    """A number for SVG: two decimals are a hundredth of a pixel."""
    return f"{value:.2f}".rstrip("0").rstrip(".")
