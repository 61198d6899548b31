"""What is odd in a night beside those before: told, and nothing is stopped by it.

Guards stop what must not be published (see guards.py); this is for what a person should look at
some time: slower, dearer, dirtier, other scores, an old price.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Sequence
from statistics import median

from pipeline import report_words as words
from pipeline.changes import what_changed
from pipeline.config import AlertsSection
from pipeline.history import HistoryRow
from pipeline.report import Alert

NUM_NIGHTS = 7
MIN_NIGHTS = 3
"""The median of fewer is one night, or lies between two: nothing to call usual."""
CHANCE_DEVIATIONS = 3.0
"""Of a Poisson variable: how many rows more may be in quarantine by chance."""


def find_alerts(
    now: HistoryRow, past: Sequence[HistoryRow], limits: AlertsSection
) -> tuple[Alert, ...]:
    """What is odd.

    Args:
        now: The night.
        past: Nights of the same job by date; those after `now`, and `now` itself, do not count.
        limits: What is odd.
    """
    before = [row for row in past if row.date < now.date]
    telling = [row for row in before if is_telling(row)]
    alike = [row for row in telling if row.machine_share == now.machine_share][-NUM_NIGHTS:]
    nights = telling[-NUM_NIGHTS:]
    found: list[Alert | None] = [_old_price(now, before, limits), _moved(now, limits)]
    if len(nights) >= MIN_NIGHTS:
        found.append(_dirtier(now, nights, limits))
    if len(alike) >= MIN_NIGHTS and is_telling(now):
        found += [_slower(now, alike, limits), _dearer(now, alike, limits)]
    order = ("rate", "cost", "quarantine", "scores", "price")
    return tuple(sorted(filter(None, found), key=lambda alert: order.index(alert.name)))


def is_telling(row: HistoryRow) -> bool:
    """Whether a night has a rate that others can be held against.

    `score requeue` scores a few rows, at a poor rate; and of attempts that were killed it is not
    known exactly how long they took.
    """
    return row.rows > 0 and row.rows_taken_over == 0 and row.wall_s > row.building_s


def rate_per_s(row: HistoryRow) -> float:
    """Rows per second of a night, the building of an engine left out: it is rare, and known."""
    return row.rows / (row.wall_s - row.building_s)


def price_age_days(as_of: str, day: str) -> int:
    """Days from the ISO date on which a price was read to another date, or to a time on it."""
    read = datetime.date.fromisoformat(as_of)
    return (datetime.date.fromisoformat(day[:10]) - read).days


def stale_price(
    instance: str, market: str, as_of: str, day: str, max_age_days: int | None
) -> str | None:
    """A sentence on a price that was read too long ago, or None.

    Args:
        instance: The machine.
        market: `own` for a price of the job file, which never gets old.
        as_of: ISO date on which the price was read.
        day: ISO date, or a time on it, from which it is seen.
        max_age_days: None: never too long.
    """
    age_days = price_age_days(as_of, day)
    if market == "own" or max_age_days is None or age_days <= max_age_days:
        return None
    return (
        f"The price of {words.plain(instance)} was read on {words.plain(as_of)}, "
        f"{words.plural(age_days, 'day')} ago; expected at most {max_age_days:,} "
        "(alerts.max_price_age_days). Look at its source, or set cost.usd_per_hour."
    )


def _slower(now: HistoryRow, nights: Sequence[HistoryRow], limits: AlertsSection) -> Alert | None:
    usual, rate = median(map(rate_per_s, nights)), rate_per_s(now)
    fall = 1 - rate / usual
    if limits.max_rate_fall is None or fall <= limits.max_rate_fall:
        return None
    return Alert(
        name="rate",
        text=f"{words.amount(rate)} rows/s, {words.percent(fall)} below {_usual(nights)} "
        f"({words.amount(usual)}, engine builds left out); expected at most "
        f"{words.percent(limits.max_rate_fall)} (alerts.max_rate_fall).{_changes(nights, now)}",
    )


def _dearer(now: HistoryRow, nights: Sequence[HistoryRow], limits: AlertsSection) -> Alert | None:
    usual = median(row.usd_per_100k for row in nights)
    if limits.max_cost_rise is None or now.usd_per_100k <= usual * (1 + limits.max_cost_rise):
        return None
    rise = f"{words.percent(now.usd_per_100k / usual - 1)} above" if usual else "above"
    return Alert(
        name="cost",
        text=f"{words.usd(now.usd_per_100k)} per 100,000 rows, {rise} {_usual(nights)} "
        f"({words.usd(usual)}); expected at most {words.percent(limits.max_cost_rise)} "
        f"(alerts.max_cost_rise).{_changes(nights, now)}",
    )


def _dirtier(now: HistoryRow, nights: Sequence[HistoryRow], limits: AlertsSection) -> Alert | None:
    if limits.max_quarantine_rise is None or not now.rows:
        return None
    usual = median(row.quarantined / row.rows for row in nights)
    expected = now.rows * (usual + limits.max_quarantine_rise)
    if now.quarantined <= expected + CHANCE_DEVIATIONS * math.sqrt(now.rows * usual):
        return None
    return Alert(
        name="quarantine",
        text=f"{words.count(now.quarantined)} of {words.plural(now.rows, 'row')} "
        f"({words.percent(now.quarantined / now.rows)}) are in quarantine; the median of the last "
        f"{words.plural(len(nights), 'night')} is {words.percent(usual)}; expected at most "
        f"{words.percent(limits.max_quarantine_rise)} more (alerts.max_quarantine_rise). Look at "
        "the reasons, and at who wrote the rows.",
    )


def _moved(now: HistoryRow, limits: AlertsSection) -> Alert | None:
    chance = now.psi_chance or 0.0
    if limits.max_psi is None or now.psi is None or now.psi <= limits.max_psi + chance:
        return None
    return Alert(
        name="scores",
        text=f"The scores have a population stability index of {words.amount(now.psi)} against "
        f"the nights before; expected at most {limits.max_psi:g} (alerts.max_psi) and "
        f"{chance:.2g} that may be chance. Look at the input: the model is the same.",
    )


def _old_price(
    now: HistoryRow, before: Sequence[HistoryRow], limits: AlertsSection
) -> Alert | None:
    """Told in one night only: a mail each morning about the same price hides what is new."""

    def told(night: HistoryRow) -> str | None:
        price = (night.instance, night.market, night.price_as_of, night.published_at)
        return stale_price(*price, limits.max_price_age_days)

    text = told(now)
    if text is None or any(
        told(night) and (night.instance, night.price_as_of) == (now.instance, now.price_as_of)
        for night in before[-1:]
    ):
        return None
    return Alert(name="price", text=text)


def _usual(nights: Sequence[HistoryRow]) -> str:
    return f"the median of the last {words.plural(len(nights), 'night')}"


def _changes(nights: Sequence[HistoryRow], now: HistoryRow) -> str:
    changed = what_changed(nights[-1], now)
    return f" Since {nights[-1].date}: {'; '.join(changed)}." if changed else ""
