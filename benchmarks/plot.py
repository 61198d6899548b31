"""The comparison as a picture: a bar for each command, drawn as SVG by hand."""

from __future__ import annotations

from collections.abc import Sequence
from xml.sax.saxutils import escape

from benchmarks.contenders import PRODUCT
from benchmarks.summary import Spread, Summary

WIDTH, BAR, GAP = 900, 20, 10
LEFT, RIGHT, TOP, BOTTOM = 190, 190, 76, 34
OURS, THEIRS = "#2f8f5b", "#8c8c8c"
STYLE = (
    "text{font:13px system-ui,sans-serif;fill:#222}.title{font-size:17px;font-weight:600}"
    ".quiet{fill:#666;font-size:12px}.whisker{stroke:#222;stroke-width:1.5}"
)


def to_svg(summaries: Sequence[Summary], title: str, where: str, note: str) -> str:
    """Examples per second of each command; whiskers span the rounds.

    Args:
        summaries: In the order of the bars; those that never ended well have none.
        title: First line.
        where: Second line: the machine and the day.
        note: Last line: how it was measured.
    """
    bars = [(s, s.examples_per_s) for s in summaries if s.examples_per_s]
    height = TOP + len(bars) * (BAR + GAP) + BOTTOM
    scale = (WIDTH - LEFT - RIGHT) / max((rate.high for _, rate in bars), default=1.0)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
        f'viewBox="0 0 {WIDTH} {height}" role="img">',
        f"<style>{STYLE}</style>",
        f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>',
        _text(16, 30, title, "title"),
        _text(16, 52, where, "quiet"),
    ]
    for position, (summary, rate) in enumerate(bars):
        parts += _bar(summary, rate, TOP + position * (BAR + GAP), scale)
    return "\n".join([*parts, _text(16, height - 12, note, "quiet"), "</svg>"]) + "\n"


def _bar(summary: Summary, rate: Spread, y: int, scale: float) -> list[str]:
    low, middle, high = (LEFT + value * scale for value in (rate.low, rate.middle, rate.high))
    centre, base_y = y + BAR / 2, y + BAR - 5
    colour = OURS if summary.name == PRODUCT else THEIRS
    name = escape(summary.name)
    cpu_s = summary.cpu_s_per_1000
    cost = "" if cpu_s is None else f", {cpu_s.middle:.3g} CPU s/1,000"
    return [
        f'<text x="{LEFT - 10}" y="{base_y}" text-anchor="end">{name}</text>',
        f'<rect x="{LEFT}" y="{y}" width="{middle - LEFT:.1f}" height="{BAR}" fill="{colour}"/>',
        f'<line class="whisker" x1="{low:.1f}" x2="{high:.1f}" y1="{centre}" y2="{centre}"/>',
        _text(high + 8, base_y, f"{rate.middle:,.0f}{cost}", "quiet"),
    ]


def _text(x: float, y: float, text: str, kind: str) -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y}">{escape(text)}</text>'
