"""Facts for `score report --last` and `score compare`, and how they look on a terminal."""

from __future__ import annotations

from dataclasses import asdict
from statistics import median
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from pipeline import report_words as words
from pipeline.alerts import find_alerts
from pipeline.compare import compare
from pipeline.config import Job
from pipeline.errors import InputError
from pipeline.history import NUM_NIGHTS, HistoryRow, read_history
from pipeline.publish import expect_published, note_publication, read_report
from pipeline.report import Alert, RunReport, report_from_dict
from pipeline.report_guards import shift_text
from pipeline.report_text import alert_lines
from pipeline.storage import open_storage

Facts = dict[str, Any]


def report_of(job: Job, date: str | None) -> RunReport:
    """The report of a published date, or of the newest one in the history.

    A night that could not be written to the history, or to the Delta table, is, now.

    Raises:
        InputError: It is not published.
    """
    output = open_storage(job.output.uri)
    wanted = date or _nights(job, 1)[-1].date
    published = expect_published(output, job.name, wanted)
    report = report_from_dict(published.manifest["report"])
    published_at = published.manifest["published_at"]
    # No report is written beside the parts: whoever only reads a job may not be allowed to.
    note_publication(job, output, report, version=published.version, published_at=published_at)
    return report


def last_facts(job: Job, last: int) -> Facts:
    """The last nights, the newest one at the end, and what is odd about that.

    Raises:
        InputError: There is none.
    """
    nights = _nights(job, last + NUM_NIGHTS)
    alerts = find_alerts(nights[-1], nights, job.alerts)
    return {
        "job": job.name,
        "nights": [asdict(row) for row in nights[-last:]],
        "alerts": [asdict(alert) for alert in alerts],
    }


def _nights(job: Job, last: int) -> tuple[HistoryRow, ...]:
    output = open_storage(job.output.uri)
    rows = read_history(output, job.name, last=last)
    if not rows:
        raise InputError(
            f"{output.uri}/{job.name}: no night in its history; expected a published one. Run "
            "`score run JOB --date DATE` first."
        )
    return rows


def render_last(facts: Facts) -> RenderableType:
    """A line for each night, their medians, and the alerts of the newest; 80 columns wide.

    A night of which `score requeue` scored a few rows, or that had another share of the machine
    than the newest, is in no median: its rate says little.
    """
    nights, alerts = facts["nights"], [Alert(**alert) for alert in facts["alerts"]]
    table = _table("date", numbers=("rows", "quarantined", "rows/s", "$/100k", "took"))
    table.add_column("engine", overflow="fold")
    for night in nights:
        version = f" v{night['version']}" if night["version"] > 1 else ""
        table.add_row(
            Text(words.plain(night["date"]) + version),
            words.count(night["rows"]),
            _share(night),
            words.amount(night["examples_per_sec"]),
            words.amount(night["usd_per_100k"], min_decimals=2),
            words.duration(night["wall_s"]),
            Text(words.plain(f"{night['runtime']} {night['precision']}")),
        )
    share = nights[-1]["machine_share"]
    whole = [
        night
        for night in nights
        if not night["rows_taken_over"] and night["machine_share"] == share
    ]
    if whole:
        table.add_section()
        table.add_row(
            "median",
            words.count(round(median(night["rows"] for night in whole))),
            "",
            words.amount(median(night["examples_per_sec"] for night in whole)),
            words.amount(median(night["usd_per_100k"] for night in whole), min_decimals=2),
            words.duration(median(night["wall_s"] for night in whole)),
            style="bold",
        )
    return Group(table, *alert_lines(alerts))


def compare_facts(job: Job, before: str, now: str) -> Facts:
    """Two published nights side by side.

    Raises:
        InputError: One of them is not published.
    """
    output = open_storage(job.output.uri)
    reports = [read_report(output, job.name, date) for date in (before, now)]
    found = compare(*reports)
    figures = [{**asdict(figure), "change": figure.change} for figure in found.figures]
    return {**asdict(found), "figures": figures}


def render_comparison(facts: Facts) -> RenderableType:
    """The figures of both nights and how they differ, their scores, and what changed."""
    table = _table("", numbers=(facts["before"], facts["now"], "change"))
    for figure in facts["figures"]:
        shown = (figure["before_text"], figure["now_text"])
        table.add_row(Text(figure["name"]), *shown, _change(figure["change"]))
    moved = ", ".join(
        f"{name} {shift_text(shift['psi'], shift['chance'])}"
        for name, shift in facts["shifts"].items()
    )
    changed = facts["changed"] or ("neither engine nor machine nor price",)
    return Group(
        table,
        Text(),
        Text(f"scores, stability index: {moved or 'cannot be compared'}"),
        *(Text(f"changed: {line}") for line in changed),
    )


def _table(name: str, *, numbers: tuple[str, ...]) -> Table:
    table = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        show_edge=False,
        header_style="dim",
        padding=(0, 1, 0, 0),
    )
    table.add_column(name, no_wrap=True)
    for number in numbers:
        table.add_column(number, justify="right", overflow="fold")
    return table


def _share(night: Facts) -> str:
    """Of quarantined rows."""
    return words.percent(night["quarantined"] / night["rows"]) if night["rows"] else ""


def _change(change: float | None) -> str:
    return f"{change:+.1%}" if change else ""
