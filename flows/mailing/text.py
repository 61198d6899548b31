"""A letter as plain text, for clients that show no HTML: complete, and 72 columns wide."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

from flows.mailing.letter import Block, Chart, Facts, Letter, Notes
from pipeline.report_words import plain

WIDTH = 72
NAME_COLUMNS = 24
BAR_COLUMNS = 16


def render_plain(letter: Letter) -> str:
    """The text of a mail; its lines end as in Python."""
    lines = [plain(letter.eyebrow), *_wrapped(letter.headline), *_wrapped(letter.lead)]
    if letter.tiles:
        lines.append("")
        for tile in letter.tiles:
            lines += _fact(tile.name, f"{tile.value} ({tile.note})" if tile.note else tile.value)
    for block in letter.blocks:
        lines += ["", plain(block.title).upper(), *_lines(block)]
    return "\n".join(lines) + "\n"


def _lines(block: Block) -> Iterator[str]:
    match block:
        case Notes():
            for note in block.notes:
                yield from _wrapped(note, "- ", "  ")
        case Facts():
            yield from _wrapped(block.lead)
            for name, value in block.facts:
                yield from _fact(name, value)
        case Chart():
            yield from _wrapped(block.lead)
            yield from _chart(block)


def _chart(chart: Chart) -> Iterator[str]:
    """Columns as wide as they must be; the first one and the bar to the left, numbers right."""
    rows = [tuple(map(plain, (bar.name, *bar.cells))) for bar in chart.bars]
    table = [tuple(map(plain, chart.heads)), *rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    bars = ["", *(_bar(bar.share) for bar in chart.bars)]
    for (name, *cells), bar in zip(table, bars, strict=True):
        numbers = [f"{cell:>{width}}" for cell, width in zip(cells, widths[1:], strict=True)]
        yield "  ".join([f"{name:<{widths[0]}}", f"{bar:<{BAR_COLUMNS}}", *numbers]).rstrip()


def _bar(share: float) -> str:
    length = round(min(max(share, 0.0), 1.0) * BAR_COLUMNS)
    return "#" * max(length, 1 if share > 0 else 0)


def _fact(name: str, value: str) -> list[str]:
    shown = plain(name)
    if len(shown) < NAME_COLUMNS:
        return _wrapped(value, f"{shown:<{NAME_COLUMNS}}", " " * NAME_COLUMNS)
    return [shown, *_wrapped(value, "    ", "    ")]


def _wrapped(text: str, first: str = "", other: str = "") -> list[str]:
    """Lines of at most `WIDTH` columns; addresses and ids stay in one piece."""
    return textwrap.wrap(
        plain(text),
        WIDTH,
        initial_indent=first,
        subsequent_indent=other,
        break_long_words=False,
        break_on_hyphens=False,
    )
