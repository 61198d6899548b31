"""A night beside the nights before: the chart of the last two weeks, and what has changed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from flows.mail_letter import Bar, Chart, Notes
from pipeline import report_words as words
from pipeline.history import HistoryRow

NIGHTS = 14
SMALL_CHANGE = 0.005
"""Of a price: below half a percent nothing has changed."""


def nights_chart(rows: Sequence[HistoryRow], date: str) -> Chart | None:
    """Examples per second and cost of the last nights, the newest at the end; None without any.

    Args:
        rows: By date.
        date: Of the night that the mail is about.
    """
    shown = rows[-NIGHTS:]
    if not shown:
        return None
    fastest = max(row.examples_per_sec for row in shown)
    bars = tuple(
        Bar(
            name=row.date[5:],  # the year is known, and a phone is narrow
            share=row.examples_per_sec / fastest if fastest else 0.0,
            cells=(
                words.amount(row.examples_per_sec),
                words.usd(row.usd_per_100k),
                _short(row.rows),
                _short(row.quarantined),
            ),
            is_strong=row.date == date,
        )
        for row in shown
    )
    title = "The only night" if len(shown) == 1 else f"The last {len(shown)} published nights"
    return Chart(
        title=title,
        lead="Bars: examples per second, everything included.",
        heads=("night", "ex/s", "per 100k", "rows", "bad"),
        bars=bars,
    )


def changes(now: HistoryRow, before: HistoryRow) -> Notes:
    """What is not as it was the night before: rows, speed and cost, engine, price, machine."""
    notes = tuple(_changes(now, before))
    return Notes(title=f"Since the night before ({words.plain(before.date)})", notes=notes)


def _changes(now: HistoryRow, before: HistoryRow) -> Iterator[str]:
    yield _moved("rows", words.count(before.rows), words.count(now.rows), now.rows, before.rows)
    for name, old, new, text in (
        ("examples per second", before.examples_per_sec, now.examples_per_sec, words.amount),
        ("cost per 100,000 rows", before.usd_per_100k, now.usd_per_100k, words.usd),
    ):
        yield _moved(name, text(old), text(new), new, old)
    if now.quarantined != before.quarantined:
        bad = (words.count(row.quarantined) for row in (before, now))
        yield f"quarantined: {' to '.join(bad)}"
    for name, old_text, new_text in (
        ("engine", _engine(before), _engine(now)),
        ("model", before.model_fingerprint or "unknown", now.model_fingerprint or "unknown"),
        ("machine", _machine(before), _machine(now)),
        ("bottleneck", before.bottleneck, now.bottleneck),
    ):
        if old_text != new_text:
            yield f"{name}: {words.plain(old_text)} to {words.plain(new_text)}"
    if abs(now.usd_per_hour - before.usd_per_hour) > SMALL_CHANGE * before.usd_per_hour:
        prices = (f"${row.usd_per_hour:,.6g}" for row in (before, now))
        yield f"price of an hour: {' to '.join(prices)}, as of {words.plain(now.price_as_of)}"
    yield from _unchanged(now, before)


def _unchanged(now: HistoryRow, before: HistoryRow) -> Iterator[str]:
    same = [
        name
        for name, is_same in (
            ("engine", _engine(now) == _engine(before)),
            ("model", now.model_fingerprint == before.model_fingerprint),
            ("machine", _machine(now) == _machine(before)),
        )
        if is_same
    ]
    if same:
        yield f"{', '.join(same)}: as before"


def _short(number: int) -> str:
    """`950`, `40.0k`, `100M`: for a column that must stay narrow."""
    for size, unit in ((10**9, "G"), (10**6, "M"), (10**4, "k")):
        if number >= size:
            return f"{words.amount(number / (1_000 if unit == 'k' else size))}{unit}"
    return words.count(number)


def _moved(name: str, old_text: str, new_text: str, new: float, old: float) -> str:
    if old_text == new_text:
        return f"{name}: {new_text}, as before"
    change = f" ({new / old - 1:+.1%})" if old else ""
    return f"{name}: {old_text} to {new_text}{change}"


def _engine(row: HistoryRow) -> str:
    return f"{row.runtime} {row.precision} {row.engine_key[:20]}"


def _machine(row: HistoryRow) -> str:
    market = words.MARKETS.get(row.market, row.market)
    lanes = words.plural(row.num_lanes, "lane")
    return f"{row.instance}, {market}, {lanes}"
