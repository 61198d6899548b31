"""A letter as HTML that mail clients show: tables and inline styles, no image, nothing loaded.

Charts are tables with coloured cells, because many clients show neither SVG nor linked images. What
is not inline only adds: clients that know `prefers-color-scheme` get the colours of the night.
"""

from __future__ import annotations

from flows.mailing.letter import Bar, Block, Chart, Facts, Letter, Notes
from pipeline.report_markup import Markup, join, tag
from pipeline.report_tiles import Tile
from pipeline.report_words import plain

FONT = "font-family:-apple-system,'Segoe UI',Roboto,Helvetica,Arial,sans-serif;"
WRAP = "overflow-wrap:anywhere;word-break:break-word;"
LIGHT = {
    "page": "background-color:#f4f4f1",
    "card": "background-color:#ffffff",
    "ink": "color:#16191d",
    "muted": "color:#59616b",
    "line": "border-color:#e3e3de",
    "track": "background-color:#e7e7e2",
    "main": "background-color:#3550cf",
    "odd-bar": "background-color:#c77d0a",
    "good": "color:#17734c",
    "odd": "color:#98570a",
    "bad": "color:#b3261e",
    "good-edge": "border-color:#1c8a5d",
    "odd-edge": "border-color:#c77d0a",
    "bad-edge": "border-color:#d0342c",
}
DARK = {
    "page": "background-color:#0e1013",
    "card": "background-color:#171a1f",
    "ink": "color:#e9ebee",
    "muted": "color:#9aa3ae",
    "line": "border-color:#2d323a",
    "track": "background-color:#2d323a",
    "main": "background-color:#8b9dff",
    "odd-bar": "background-color:#e5a84b",
    "good": "color:#62cc9b",
    "odd": "color:#e9b45f",
    "bad": "color:#ff8a80",
    "good-edge": "border-color:#62cc9b",
    "odd-edge": "border-color:#e5a84b",
    "bad-edge": "border-color:#ff8a80",
}
BAR_PX = 10
TILES_IN_A_ROW = 2  # four in a row are too narrow on a phone


def render_html(letter: Letter) -> str:
    """The whole document."""
    dark = "".join(f".{name}{{{style}!important}}" for name, style in DARK.items())
    head = tag(
        "head",
        Markup(
            '<meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            '<meta name="color-scheme" content="light dark">'
            '<meta name="supported-color-schemes" content="light dark">'
            f"<style>@media (prefers-color-scheme:dark){{{dark}}}</style>"
        ),
        tag("title", plain(letter.subject)),
    )
    cards = [_top(letter), *(_card(_block(block)) for block in letter.blocks)]
    column = _table(*cards, style="max-width:640px;margin:0 auto;")
    page = _table(_row(_cell(column, "page", style="padding:16px 8px;")), look="page")
    body = tag("body", page, **_look("page", "margin:0;padding:0;" + FONT))
    return f"<!doctype html>\n{tag('html', head, body, lang='en')}\n"


def _top(letter: Letter) -> Markup:
    mood = letter.mood or "good"
    texts = [
        _text(letter.eyebrow, "muted", "font-size:13px;"),
        tag(
            "h1",
            plain(letter.headline),
            **_look("ink", "font-size:23px;line-height:1.25;margin:4px 0 6px;"),
        ),
        _text(letter.lead, "muted" if letter.tiles else "ink", "font-size:15px;"),
    ]
    content = join([*texts, _tiles(letter.tiles)] if letter.tiles else texts)
    return _card(content, edge=f"{mood}-edge")


def _tiles(tiles: tuple[Tile, ...]) -> Markup:
    rows = []
    for first in range(0, len(tiles), TILES_IN_A_ROW):
        cells = [
            _cell(
                join(
                    [
                        _text(tile.name, "muted", "font-size:13px;"),
                        _text(tile.value, tile.mood or "ink", "font-size:24px;font-weight:650;"),
                        _text(tile.note, "muted", "font-size:12px;"),
                    ]
                ),
                style="padding:14px 8px 0 0;vertical-align:top;width:50%;",
            )
            for tile in tiles[first : first + TILES_IN_A_ROW]
        ]
        rows.append(_row(*cells))
    return _table(*rows)


def _block(block: Block) -> Markup:
    match block:
        case Notes():
            lead, content = "", _notes(block)
        case Facts():
            lead, content = block.lead, _facts(block)
        case Chart():
            lead, content = block.lead, _chart(block)
    title = tag("h2", plain(block.title), **_look("ink", "font-size:16px;margin:0 0 6px;"))
    return join([title, _text(lead, "muted", "font-size:14px;") if lead else Markup(), content])


def _notes(block: Notes) -> Markup:
    items = [
        _text(note, block.mood or "ink", "font-size:14px;padding:3px 0;") for note in block.notes
    ]
    return join(items)


def _facts(block: Facts) -> Markup:
    rows = []
    for number, (name, value) in enumerate(block.facts, 1):
        line = "line" if number < len(block.facts) else ""
        rows.append(
            _row(
                _cell(
                    plain(name), "muted", line, style=_fact("width:34%;padding-right:12px;", line)
                ),
                _cell(plain(value), "ink", line, style=_fact(WRAP, line)),
            )
        )
    return _table(*rows, style="margin-top:4px;")


def _chart(chart: Chart) -> Markup:
    name, *others = chart.heads
    heads = [_head(name, "left"), _cell("", style="width:100%;")]
    heads += [_head(other, "right") for other in others]
    table = _row(*heads), *(_bar_row(bar) for bar in chart.bars)
    return _table(*table, style="margin-top:4px;")


def _head(text: str, align: str) -> Markup:
    look = f"font-size:12px;padding:2px 0 2px {0 if align == 'left' else 10}px;"
    return _cell(plain(text), "muted", style=f"{look}text-align:{align};vertical-align:bottom;")


def _bar_row(bar: Bar) -> Markup:
    weight = "font-weight:650;" if bar.is_strong else ""
    numbers = "font-size:13px;white-space:nowrap;" + weight
    cells = [
        _cell(plain(cell), bar.mood if bar.mood and not index else "ink", style=style)
        for index, cell in enumerate(bar.cells)
        for style in [f"{numbers}padding:3px 0 3px 10px;text-align:right;"]
    ]
    return _row(
        _cell(plain(bar.name), "ink", style=f"{numbers}padding:3px 10px 3px 0;"),
        _cell(_bar(bar), style="width:100%;"),
        *cells,
    )


def _bar(bar: Bar) -> Markup:
    """Two cells on a line; the numbers stand beside them, so readers need not see it."""
    percent = round(min(max(bar.share, 0.0), 1.0) * 100)
    percent = max(percent, 1) if bar.share > 0 else 0
    color = "odd-bar" if bar.mood in ("odd", "bad") else "main"
    lengths = [(percent, color), (100 - percent, "track")]
    cells = [
        _cell(
            Markup("&nbsp;"),
            look,
            style=f"width:{width}%;height:{BAR_PX}px;font-size:0;line-height:0;",
        )
        for width, look in lengths
        if width
    ]
    return _table(_row(*cells), style="table-layout:fixed;", hidden=True)


def _card(content: Markup, edge: str = "") -> Markup:
    border = "border:1px solid;border-radius:10px;"
    style = f"padding:18px 20px;{border}" + ("border-top-width:4px;" if edge else "")
    inner = _cell(content, "card", edge or "line", style=style)
    spaced = "border-collapse:separate;margin-bottom:12px;"
    return _row(_cell(_table(_row(inner), style=spaced)))


def _table(*rows: Markup, look: str = "", style: str = "", hidden: bool = False) -> Markup:
    attributes = {"aria_hidden": "true"} if hidden else {}
    shape = "width:100%;border-collapse:collapse;" + style
    fixed = {"role": "presentation", "cellpadding": "0", "cellspacing": "0", "border": "0"}
    return tag("table", *rows, width="100%", **fixed, **attributes, **_look(look, shape))


def _row(*cells: Markup) -> Markup:
    return tag("tr", *cells)


def _cell(content: str, *looks: str, style: str = "") -> Markup:
    classes = " ".join(filter(None, looks))
    return tag("td", content, **_look(classes, "padding:0;" + style))


def _text(text: str, look: str, style: str) -> Markup:
    return tag("div", plain(text), **_look(look, f"line-height:1.45;{WRAP}{style}"))


def _fact(style: str, line: str) -> str:
    below = "border-bottom:1px solid;" if line else ""
    return f"font-size:14px;line-height:1.45;vertical-align:top;padding:5px 0;{below}{style}"


def _look(classes: str, style: str = "") -> dict[str, str]:
    """Colours inline, and as classes for the night."""
    names = classes.split()
    colors = "".join(f"{LIGHT[name]};" for name in names)
    return {"class_": " ".join(names), "style": f"{style}{colors}"}
