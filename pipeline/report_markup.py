"""HTML in small pieces that escape by default: what is not `Markup` is text."""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Iterable, Sequence

from pipeline.report_words import Share


class Markup(str):
    """Text that is HTML already; every other string is escaped where it enters the page."""

    __slots__ = ()


def tag(name: str, *children: str, **attributes: str) -> Markup:
    """An element; `class_` and `aria_hidden` are attributes, those without a value are left out."""
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(value)}"'
        for key, value in attributes.items()
        if value
    )
    return Markup(f"<{name}{written}>{join(escaped(child) for child in children)}</{name}>")


def escaped(text: str) -> Markup:
    """Text as HTML; what is HTML already, as it is."""
    return text if isinstance(text, Markup) else Markup(html.escape(text))


def join(markup: Iterable[Markup]) -> Markup:
    """One piece of several."""
    return Markup("".join(markup))


def section(title: str, lead: str, *content: str) -> Markup:
    """A part of the page, with the sentence that says the most about it."""
    lead_paragraph = tag("p", lead, class_="lead") if lead else ""
    return tag("section", tag("h2", title), lead_paragraph, *content)


def fact_list(facts: dict[str, str]) -> Markup:
    """Names and their values, side by side."""
    pairs = [(tag("dt", name), tag("dd", value)) for name, value in facts.items()]
    return tag("dl", *(part for pair in pairs for part in pair), class_="facts")


def table(
    caption: str,
    columns: dict[str, str],
    rows: Sequence[Sequence[str]],
    strong: Sequence[bool] = (),
    class_: str = "",
) -> Markup:
    """A table whose first column names the row; `columns` are the heads with their CSS class."""
    heads = [
        tag("th", name, scope="col", class_=class_) if name else tag("td", class_=class_)
        for name, class_ in columns.items()
    ]
    lines = []
    for row, is_strong in zip(rows, strong or [False] * len(rows), strict=True):
        first, *others = row
        _, *classes = columns.values()
        cells = [tag("td", cell, class_=c) for cell, c in zip(others, classes, strict=True)]
        name = tag("th", first, scope="row")
        lines.append(tag("tr", name, *cells, class_="strong" if is_strong else ""))
    content = tag(
        "table",
        tag("caption", caption),
        tag("thead", tag("tr", *heads)),
        tag("tbody", *lines),
        class_=class_,
    )
    return tag("div", content, class_="scroll")


def with_bars(rows: Iterable[tuple[str, ...]], bars: Iterable[Markup]) -> list[tuple[str, ...]]:
    """The rows of a table, with a bar behind the name of each."""
    return [(row[0], bar, *row[1:]) for row, bar in zip(rows, bars, strict=True)]


def bar(*shares: tuple[float, str], class_: str = "bar") -> Markup:
    """Coloured lengths on a track; the numbers stand beside it, so it is hidden from readers."""
    lengths = [
        tag("i", class_=color, style=f"width:{min(max(share, 0.0), 1.0):.2%}")
        for share, color in shares
        if share > 0
    ]
    return tag("div", *lengths, class_=class_, aria_hidden="true")


def stacked(parts: Sequence[Share], colors: Sequence[str]) -> Markup:
    """One bar for a whole and its parts."""
    shares = ((part.share, color) for part, color in zip(parts, colors, strict=True))
    return bar(*shares, class_="bar tall")


def legend(parts: Iterable[Share], colors: Iterable[str], number: Callable[[float], str]) -> Markup:
    """What the colours of a stacked bar mean, with the amounts."""
    items = [
        tag("li", f"{part.name} {number(part.amount)}", class_=f"key {color}")
        for part, color in zip(parts, colors, strict=True)
    ]
    return tag("ul", *items, class_="legend")


def linked(text: str) -> Markup:
    """Text whose leading https address, if it has one, is a link."""
    address = re.match(r"https://\S+", text)
    if address is None:
        return escaped(text)
    link = tag("a", address.group(), href=address.group(), rel="noreferrer")
    return join([link, escaped(text[address.end() :])])
