"""A night beside the nights before: the chart of the last two weeks, and what has changed."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Sequence

from flows.mailing.letter import Bar, Chart, Notes
from pipeline import report_words as words
from pipeline.changes import what_changed
from pipeline.history import HistoryRow

NIGHTS = 14


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
        lead=f"Bars: examples per second, everything included.{_missing(shown)}",
        heads=("night", "ex/s", "per 100k", "rows", "odd"),
        bars=bars,
    )


def _missing(shown: Sequence[HistoryRow]) -> str:
    """Dates between the shown ones; those of a job that does not run every night are no gaps."""
    days = [datetime.date.fromisoformat(row.date).toordinal() for row in shown]
    gaps = sorted(set(range(days[0], days[-1])) - set(days))
    if not gaps or len(gaps) > len(days) // 2:
        return ""
    return (
        f" Not published: {', '.join(datetime.date.fromordinal(day).isoformat() for day in gaps)}."
    )


def changes(now: HistoryRow, before: HistoryRow) -> Notes:
    """A night's figures beside those of the night before, and what may explain them."""
    figures: tuple[tuple[str, float, float, Callable[[float], str]], ...] = (
        ("rows", before.rows, now.rows, _count),
        ("examples per second", before.examples_per_sec, now.examples_per_sec, words.amount),
        ("cost per 100,000 rows", before.usd_per_100k, now.usd_per_100k, words.usd),
        ("quarantined", before.quarantined, now.quarantined, _count),
    )
    changed = what_changed(before, now)
    same = [
        name
        for name in ("engine", "model", "device", "machine", "price")
        if not any(line.startswith(f"{name}:") for line in changed)
    ]
    return Notes(
        title=f"Since the night before ({words.plain(before.date)})",
        notes=(
            *(_moved(*figure) for figure in figures),
            *(line for line in changed if not line.startswith("rows:")),  # said by the figures
            *([f"{', '.join(same)}: as before"] if same else []),
        ),
    )


def _short(number: int) -> str:
    """`950`, `40.0k`, `100M`: for a column that must stay narrow."""
    for size, unit in ((10**9, "G"), (10**6, "M"), (10**4, "k")):
        if number >= size:
            return f"{words.amount(number / (1_000 if unit == 'k' else size))}{unit}"
    return words.count(number)


def _moved(name: str, old: float, new: float, text: Callable[[float], str]) -> str:
    if old == new:
        return f"{name}: {text(new)}, as before"
    change = f" ({new / old - 1:+.1%})" if old and name != "quarantined" else ""
    return f"{name}: {text(old)}, now {text(new)}{change}"


def _count(number: float) -> str:
    return words.count(int(number))
