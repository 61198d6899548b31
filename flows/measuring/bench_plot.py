"""The benchmark as a picture: a bar for each variant, drawn as SVG by hand."""

from __future__ import annotations

from typing import Any
from xml.sax.saxutils import escape

from flows.measuring.bench_markdown import best_of

Facts = dict[str, Any]
WIDTH, BAR, GAP = 900, 22, 12
LEFT, RIGHT, TOP, BOTTOM = 200, 180, 76, 34
BASE_COLOUR, COLOURS = "#8c8c8c", {"fp32": "#5b8db8", "fp16": "#c98b2b", "int8": "#2f8f5b"}
STYLE = (
    "text{font:13px system-ui,sans-serif;fill:#222}.title{font-size:17px;font-weight:600}"
    ".quiet{fill:#666;font-size:12px}.whisker{stroke:#222;stroke-width:1.5}"
)


def to_svg(facts: Facts) -> str:
    """Rows per second of each variant at its best batch size; whiskers span the quartiles."""
    found = [(v, best) for v in facts["variants"] if (best := best_of(v))]
    height = TOP + len(found) * (BAR + GAP) + BOTTOM
    setup = facts["setup"]
    where = setup["gpu"] or f"{setup['cpu']}, {setup['threads']} threads"
    largest = max((best["rows_per_s"]["q3"] for _, best in found), default=1.0)
    scale = (WIDTH - LEFT - RIGHT) / largest
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
        f'viewBox="0 0 {WIDTH} {height}" role="img">',
        f"<style>{STYLE}</style>",
        f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>',
        _text(16, 30, f"{facts['job']}: rows per second, inference only", "title"),
        _text(16, 52, f"{where}; {setup['date'][:10]}; longer is better", "quiet"),
    ]
    for position, (variant, best) in enumerate(found):
        y = TOP + position * (BAR + GAP)
        is_base = variant["name"] == facts["base_line"]
        colour = BASE_COLOUR if is_base else COLOURS.get(variant["precision"], BASE_COLOUR)
        parts += _bar(variant["name"], best, colour, y, scale)
    note = f"grey: the base line; whiskers: quartiles of {setup['options']['num_rounds']} rounds"
    parts += [_text(16, height - 12, note, "quiet"), "</svg>"]
    return "\n".join(parts) + "\n"


def _bar(name: str, best: Facts, colour: str, y: int, scale: float) -> list[str]:
    rate = best["rows_per_s"]
    low, middle, high = (LEFT + rate[share] * scale for share in ("q1", "median", "q3"))
    centre, base_y = y + BAR / 2, y + BAR - 6
    percent = best["percent_of_base"]
    label = f"{rate['median']:,.0f}" + ("" if percent is None else f"  ({percent:,.0f} %)")
    return [
        f'<text x="{LEFT - 10}" y="{base_y}" text-anchor="end">{escape(name)}</text>',
        f'<rect x="{LEFT}" y="{y}" width="{middle - LEFT:.1f}" height="{BAR}" fill="{colour}"/>',
        f'<line class="whisker" x1="{low:.1f}" x2="{high:.1f}" y1="{centre}" y2="{centre}"/>',
        _text(max(middle, high) + 8, base_y, f"{label}, batch {best['batch_size']}", "quiet"),
    ]


def _text(x: float, y: float, text: str, kind: str) -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y}">{escape(text)}</text>'
