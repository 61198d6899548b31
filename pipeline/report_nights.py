"""What the page says of a night beside others: alerts, the last nights, where the scores lie."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median

from pipeline import report_words as words
from pipeline.charts import Column, column_chart, histogram_chart
from pipeline.distribution import from_text
from pipeline.histogram import Histogram, histogram
from pipeline.history import HistoryRow, row_of
from pipeline.report import RunReport, ScoreDistribution
from pipeline.report_guards import distribution_sentence
from pipeline.report_markup import Markup, section, table, tag


def alerts_part(report: RunReport) -> Markup:
    """What is odd, above everything else; empty where nothing is."""
    if not report.alerts:
        return Markup()
    lines = [
        tag("li", tag("b", words.plain(alert.name)), " ", words.plain(alert.text))
        for alert in report.alerts
    ]
    lead = f"{words.plural(len(lines), 'alert')}; published all the same."
    return section("What to look at", lead, tag("ul", *lines, class_="alerts"))


def nights_part(report: RunReport, past: Sequence[HistoryRow]) -> Markup:
    """Rate and cost of the last nights; empty where this one is the first.

    Args:
        report: Of the night.
        past: Those before it, by date.
    """
    if not past:
        return Markup()
    rows = [*past, row_of(report, version=1, published_at=report.finished_at)]
    rates = _chart(rows, "Examples per second", _rate, words.amount)
    costs = _chart(rows, "Cost per 100,000 rows", _cost, words.usd)
    columns = {"night": ""} | dict.fromkeys(
        ("rows", "quarantined", "rows/s", "per 100,000 rows", "took"), "number"
    )
    strong = [False] * len(past) + [True]
    numbers = table("Each published night, the newest last", columns, _cells(rows), strong)
    return section(
        f"The last {words.plural(len(rows), 'night')}",
        "Everything included: a night that built its engine is slower and dearer. The dashed line "
        "is the median of the nights before; those of which `score requeue` scored a few rows, or "
        "that had another share of the machine, are not in it, unless all are like that.",
        tag("div", rates, costs, class_="charts"),
        tag("details", tag("summary", "The same in numbers"), numbers),
    )


def scores_figure(report: RunReport) -> Markup:
    """Where the scores of the night lie, and those before; empty where no row was scored."""
    found = report.distribution
    if found is None or not found.counts:
        return Markup()
    kinds = {"scores": "Scores", "classes": "Probabilities of the best class"}
    what = kinds.get(found.head, "Outputs")
    drawn = histogram([from_text(text) for text in (found.counts, found.before) if text])
    shares, *before = drawn.shares
    chart = histogram_chart(
        shares,
        before[0] if before else (),
        label=_scores_label(what, drawn, found),
        ends=(_bound(drawn.first), _bound(drawn.last)),
    )
    line = f"; as a line, {words.plural(len(found.nights), 'night')} before" if before else ""
    cut = "; what lies farther out is in the first and the last bar" if drawn.is_cut else ""
    return tag("figure", tag("figcaption", f"{what}{line}{cut}"), chart, class_="scores")


def _scores_label(what: str, drawn: Histogram, found: ScoreDistribution) -> str:
    shares = drawn.shares[0]
    highest = max(range(len(shares)), key=lambda index: shares[index])
    width = (drawn.last - drawn.first) / len(shares)
    low = drawn.first + highest * width
    return (
        f"Histogram. {what} of this night, from {_bound(drawn.first)} to "
        f"{_bound(drawn.last)}. Most rows, {words.percent(shares[highest])}, lie between "
        f"{_bound(low)} and {_bound(low + width)}. {distribution_sentence(found)}."
    )


def _chart(
    rows: Sequence[HistoryRow],
    title: str,
    value: Callable[[HistoryRow], float],
    number: Callable[[float], str],
) -> Markup:
    *past, now = rows
    values = [value(row) for row in past]
    share = now.machine_share
    whole = [row for row in past if not row.rows_taken_over and row.machine_share == share]
    usual = median(map(value, whole or past))
    named = (0, len(rows) - 1)
    columns = [
        Column(
            name=row.date[5:] if index in named else "",
            title=f"{row.date}: {number(value(row))}",
            value=value(row),
        )
        for index, row in enumerate(rows)
    ]
    label = (
        f"{title}, {words.plural(len(rows), 'night')} from {rows[0].date} to {now.date}: "
        f"{number(value(now))} in this one; in those before {number(min(values))} to "
        f"{number(max(values))}, median {number(usual)}."
    )
    shown = tag("b", number(value(now)))
    caption = tag("figcaption", f"{title}: ", shown, f", median {number(usual)}")
    return tag("figure", caption, column_chart(columns, label=label, usual=usual))


def _rate(row: HistoryRow) -> float:
    return row.examples_per_sec


def _cost(row: HistoryRow) -> float:
    return row.usd_per_100k


def _cells(rows: Sequence[HistoryRow]) -> list[tuple[str, ...]]:
    return [
        (
            words.plain(row.date),
            words.count(row.rows),
            words.count(row.quarantined),
            words.amount(row.examples_per_sec),
            words.usd(row.usd_per_100k),
            words.duration(row.wall_s),
        )
        for row in rows
    ]


def _bound(value: float) -> str:
    return f"{value:.3g}"
