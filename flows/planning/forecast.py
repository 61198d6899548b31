"""`score plan`: what the date is expected to take and cost, and whether that fits its window."""

from __future__ import annotations

import datetime
from dataclasses import asdict
from typing import Any

from pipeline import report_words as words
from pipeline import window_words
from pipeline.config import Job
from pipeline.forecast import LOOK_BACK_NIGHTS, NightForecast, forecast_night
from pipeline.history import read_history
from pipeline.report import Price
from pipeline.storage import Storage
from pipeline.window import Window, find_window

Facts = dict[str, Any]


def forecast_facts(
    job: Job, date: str, output: Storage, price: Price, *, rows: int | None, must_build: bool
) -> Facts:
    """Under `forecast` what scoring `rows` takes, under `window` by when; null where unknown.

    Args:
        job: The job.
        date: ISO date.
        output: Of the job.
        price: Of the machine, or of the date's share of it.
        rows: Of the date that are not committed; None: it is published.
        must_build: Whether an engine must be built first.
    """
    if rows is None:
        return {"forecast": None, "window": None}
    now = datetime.datetime.now(datetime.UTC)
    past = read_history(output, job.name, last=LOOK_BACK_NIGHTS)
    found = forecast_night(past, rows, price, must_build=must_build)
    window = find_window(job.window, date, now)
    return {
        "forecast": asdict(found) if found else None,
        "window": _window_facts(window, now, found) if window else None,
    }


def _window_facts(window: Window, now: datetime.datetime, found: NightForecast | None) -> Facts:
    facts: Facts = {"deadline": window.deadline.isoformat(), "left_s": window.margin_s(now)}
    if found is None:
        return {**facts, "fits_now": None, "start_by": None, "start_by_to_be_sure": None}
    starts = (window.deadline - datetime.timedelta(seconds=s) for s in (found.wall_s, found.high_s))
    start_by, sure = (start.isoformat(timespec="seconds") for start in starts)
    fits = found.wall_s <= facts["left_s"]
    return {**facts, "fits_now": fits, "start_by": start_by, "start_by_to_be_sure": sure}


def forecast_rows(facts: Facts) -> list[tuple[str, str]]:
    """What was found, for a table of two columns."""
    rows = []
    found, window = facts["forecast"], facts["window"]
    if found is not None:
        rows += _expected(found)
    elif not facts["published"]:
        rows.append(("expected", "unknown: no night of this job on such a machine yet"))
    if window is not None:
        rows.append(("window", _due(window)))
    return rows


def _expected(found: Facts) -> list[tuple[str, str]]:
    nights = words.plural(len(found["nights"]), "night")
    build = f", {words.duration(found['build_s'])} of it for the engine" if found["build_s"] else ""
    between = f"{words.duration(found['low_s'])} to {words.duration(found['high_s'])}"
    money = f"{words.usd(found['low_usd'])} to {words.usd(found['high_usd'])}"
    rate = f"{words.amount(found['rows_per_s'])} rows/s"
    return [
        ("expected", f"{words.duration(found['wall_s'])} ({between}){build}"),
        ("cost", f"{words.usd(found['usd'])} ({money})"),
        ("taken from", f"{nights} until {found['nights'][-1]}, {rate} while scoring"),
    ]


def _due(window: Facts) -> str:
    deadline = datetime.datetime.fromisoformat(window["deadline"])
    due = f"due {deadline:%H:%M on %Y-%m-%d (UTC%z)}"
    if window["left_s"] <= 0:
        return f"{due}: that has passed"
    if window["fits_now"] is None:
        return due
    by, sure = (
        window_words.clock(datetime.datetime.fromisoformat(window[key]))
        for key in ("start_by", "start_by_to_be_sure")
    )
    fits = "begun now it is in time" if window["fits_now"] else "begun now it is too late"
    return f"{due}: {fits}; begin by {by}, or by {sure} to be sure"
