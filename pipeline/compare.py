"""Two nights of a job side by side: the figures of both, their scores, and what changed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pipeline import report_words as words
from pipeline.changes import what_changed
from pipeline.distribution import Shift, from_text, shifts
from pipeline.history import row_of
from pipeline.report import RunReport, ScoreDistribution

Text = Callable[[float], str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """A line of the comparison: a number of both nights, or a word."""

    name: str
    before: float | None
    """None: unknown, or a word."""
    now: float | None
    before_text: str
    now_text: str

    @property
    def change(self) -> float | None:
        """Relative: 0.25 is a quarter more; None where there is nothing to relate to."""
        if not self.before or self.now is None:
            return None
        return self.now / self.before - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """What two nights of a job have in common, and what not."""

    job: str
    before: str
    now: str
    """ISO dates."""
    figures: tuple[Figure, ...]
    shifts: dict[str, Shift]
    """The population stability index of the scores, as in the report; empty when the models' heads
    differ, or when one of the nights scored nothing."""
    changed: tuple[str, ...]


def compare(before: RunReport, now: RunReport) -> Comparison:
    """Compare two nights of one job."""
    reports = (before, now)
    rows = [row_of(each, version=1, published_at=each.finished_at) for each in reports]
    return Comparison(
        job=now.job,
        before=before.date,
        now=now.date,
        figures=(
            *_figures(before, now),
            *_reasons(before, now),
            *_costs(before, now),
            *_words(before, now),
        ),
        shifts=_shifts(before.distribution, now.distribution),
        changed=what_changed(*rows),
    )


def _figures(before: RunReport, now: RunReport) -> list[Figure]:
    of: dict[str, tuple[Callable[[RunReport], float | None], Text]] = {
        "rows": (lambda report: report.rows, _count),
        "scored": (lambda report: report.scored, _count),
        "examples per second": (lambda report: report.examples_per_sec, words.amount),
        "while scoring": (words.scoring_per_s, words.amount),
        "wall-clock time": (lambda report: report.wall_s, words.duration),
        "agreement with fp32": (lambda report: report.engine.agreement, words.agreement),
        "J per 1,000 rows": (lambda report: report.joules_per_1000_rows, words.amount),
        "interruptions": (lambda report: report.interruptions, _count),
        "quarantined": (lambda report: report.quarantined, _count),
    }
    figures = [_figure(name, text, get(before), get(now)) for name, (get, text) in of.items()]
    return [each for each in figures if (each.before, each.now) != (None, None)]


def _reasons(before: RunReport, now: RunReport) -> list[Figure]:
    by_reason = [report.quarantined_by_reason for report in (before, now)]
    names = sorted({name for each in by_reason for name in each})
    return [
        _figure(f"- {words.plain(name)}", _count, *(each.get(name, 0) for each in by_reason))
        for name in names
    ]


def _costs(before: RunReport, now: RunReport) -> list[Figure]:
    parts = [
        {part.name: part.amount for part in words.costs_per_100k(each)} for each in (before, now)
    ]
    named = [
        _figure(f"- {name}", words.usd, *(each.get(name, 0.0) for each in parts))
        for name in dict.fromkeys([*parts[0], *parts[1]])
    ]
    price = [report.cost.price.usd_per_hour for report in (before, now)]
    total = _figure("$ per 100,000 rows", words.usd, before.usd_per_100k, now.usd_per_100k)
    return [total, *named, _figure("$ an hour", words.usd, *price)]


def _words(before: RunReport, now: RunReport) -> list[Figure]:
    of: dict[str, Callable[[RunReport], str]] = {
        "price read on": lambda report: report.cost.price.as_of,
        "machine": lambda report: report.cost.price.instance,
        "market": lambda report: words.market(report.cost.price),
        "engine": lambda report: f"{report.engine.runtime} {report.engine.precision}",
        "bottleneck": lambda report: report.bottleneck,
    }
    shown = {
        name: [words.plain(get(report)) for report in (before, now)] for name, get in of.items()
    }
    return [
        Figure(name=name, before=None, now=None, before_text=old, now_text=new)
        for name, (old, new) in shown.items()
    ]


def _shifts(before: ScoreDistribution | None, now: ScoreDistribution | None) -> dict[str, Shift]:
    if before is None or now is None or before.head != now.head:
        return {}
    kept = [from_text(each.counts, num_values=each.num_values) for each in (before, now)]
    return shifts(*kept)


def _figure(name: str, text: Text, before: float | None, now: float | None) -> Figure:
    shown = ["unknown" if value is None else text(value) for value in (before, now)]
    return Figure(name=name, before=before, now=now, before_text=shown[0], now_text=shown[1])


def _count(value: float) -> str:
    return words.count(int(value))
