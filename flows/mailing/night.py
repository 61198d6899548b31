"""The letters about a night: published, with all that the report knows, or why it is not."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from flows.cli import EXIT_INTERRUPTED, exit_code_of
from flows.mailing.history import changes, nights_chart
from flows.mailing.letter import Bar, Block, Chart, Facts, Letter, Mood, Notes
from pipeline import report_tables as tables
from pipeline import report_words as words
from pipeline import window_words
from pipeline.errors import GuardError
from pipeline.history import HistoryRow
from pipeline.report import RunReport
from pipeline.report_devices import device_facts
from pipeline.report_guards import guard_facts
from pipeline.report_tiles import tiles

if TYPE_CHECKING:
    from pipeline.run import Night

MOST_SAMPLES = 10
"""A mail of more than 100 kB is cut off by some clients; the page has all."""
MOST_LINES = 100
"""Of a summary's table, for the same reason."""
MAX_SUBJECT_CHARACTERS = 120
COSTS = {"other": "idle and other"}
SOON = "The same command goes on where it stopped; what is committed is kept."


def published_letter(report: RunReport, history: Sequence[HistoryRow]) -> Letter:
    """Everything scored, how fast, what it cost, what was odd.

    Args:
        report: Of the night.
        history: Rows until this night, by date; empty when they cannot be read.
    """
    report = dataclasses.replace(report, status="published")  # whoever found it done sends it, too
    mood: Mood = "odd" if report.quarantined or report.degraded or report.alerts else "good"
    return Letter(
        subject=_subject(report.job, report.date, _verdict(report)),
        eyebrow=_eyebrow(report.job, report.date),
        headline=words.headline(report),
        lead=words.subline(report),
        mood=mood,
        tiles=tiles(report),
        blocks=tuple(_blocks(report, history)),
    )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Stop:
    """How a night ended that was not published."""

    error: BaseException
    """Other than an `Exception`: somebody stopped it."""
    said: str
    """What the error says, without secrets."""
    is_published: bool
    """Whether the date has a version from before."""


def stopped_letter(night: Night, stop: Stop, history: Sequence[HistoryRow]) -> Letter:
    """A night that was not published, and what to do.

    Args:
        night: What was asked for.
        stop: How it ended.
        history: Of the nights before, by date.
    """
    job, date, error = night.job.name, night.date, stop.error
    nothing = f"Nothing{' new' if stop.is_published else ''} was published."
    code = exit_code_of(error) if isinstance(error, Exception) else EXIT_INTERRUPTED
    can_resume = code == EXIT_INTERRUPTED
    if isinstance(error, GuardError):
        verdict, way_out = f"STOPPED by guard {error.guard}", nothing
    elif can_resume:
        verdict, way_out = "INTERRUPTED", SOON
    else:
        verdict, way_out = "FAILED", f"{nothing} {SOON}"
    facts = [
        ("outcome", way_out),
        ("exit code", str(code)),
        ("how far it came", "score status JOB"),
        ("go on", night.command_accepting()),
    ]
    if isinstance(error, GuardError):
        facts.append(("publish as it is", night.command_accepting(error.guard)))
    chart = nights_chart(history, date)
    return Letter(
        subject=_subject(job, date, f"{verdict}: {stop.said}"),
        eyebrow=_eyebrow(job, date),
        headline=verdict,
        lead=words.plain(stop.said),
        mood="odd" if can_resume else "bad",
        blocks=(Facts(title="What now", facts=tuple(facts)), *([chart] if chart else [])),
    )


def warning_letter(job: str, subject: str, text: str) -> Letter:
    """A warning, or a summary: not about one night that has ended.

    Args:
        job: Name of the job.
        subject: Some words.
        text: Sentences, one a line; `name  value`, with two spaces between, is a line of a table.
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    sentences = tuple(line for line in lines if "  " not in line)
    facts = [(name, value) for name, gap, value in (line.partition("  ") for line in lines) if gap]
    if len(facts) > MOST_LINES:
        facts = [*facts[:MOST_LINES], ("...", f"and {len(facts) - MOST_LINES:,} more")]
    notes = [Notes(title="What happened", notes=sentences)] if sentences else []
    return Letter(
        subject=_cut(f"[nightscore] {job}: {subject}"),
        eyebrow=f"nightscore \N{MIDDLE DOT} {job}",
        headline=words.plain(subject),
        lead="",
        mood="odd",
        blocks=(*notes, *([Facts(title="In detail", facts=tuple(facts))] if facts else [])),
    )


def _subject(job: str, date: str, verdict: str) -> str:
    return _cut(f"[nightscore] {job} {date}: {verdict}")


def _cut(subject: str) -> str:
    """One line, whatever is quoted: a line break would begin another header."""
    text = words.plain(subject)
    is_long = len(text) > MAX_SUBJECT_CHARACTERS
    return text[: MAX_SUBJECT_CHARACTERS - 3] + "..." if is_long else text


def _eyebrow(job: str, date: str) -> str:
    return f"nightscore \N{MIDDLE DOT} {job} \N{MIDDLE DOT} {date}"


def _verdict(report: RunReport) -> str:
    rows = words.plural(report.rows, "row")
    if report.quarantined:
        rows = f"{words.count(report.scored)} of {rows}"
    alerts = f", {words.plural(len(report.alerts), 'alert')}" if report.alerts else ""
    return f"published, {rows}, {words.usd(report.usd_per_100k)} per 100k{alerts}"


def _blocks(report: RunReport, history: Sequence[HistoryRow]) -> Iterator[Block]:
    if report.alerts:
        texts = tuple(f"{alert.name}: {alert.text}" for alert in report.alerts)
        yield Notes(title="Alerts", notes=texts, mood="odd")
    if report.accepted:
        yield Notes(title="Published although a guard said no", notes=report.accepted, mood="odd")
    if len(history) > 1 and history[-1].run_id == report.run_id:
        yield changes(history[-1], history[-2])
    if chart := nights_chart(history, report.date):
        yield chart
    yield _cost(report)
    yield _time(report)
    yield from _limits(report)
    yield from _quarantine(report)
    yield from _unreadable(report)
    if facts := tuple(guard_facts(dataclasses.replace(report, accepted=()))):
        yield Facts(title="Scores and drift", facts=facts)
    yield _run(report)


def _cost(report: RunReport) -> Chart:
    shares = words.costs_per_100k(report)
    bars = [
        Bar(
            name=COSTS.get(part.name, part.name),
            share=part.share,
            cells=(words.usd(part.amount), words.percent(part.share)),
        )
        for part in shares
    ]
    if all(part.name != "replay" for part in shares):
        bars.append(Bar(name="replay", share=0.0, cells=("$0", "0%")))
    price = report.cost.price
    return Chart(
        title="What it cost",
        lead=f"{words.usd(report.usd_per_100k)} per 100,000 rows, {words.usd(report.cost.usd)} for "
        f"the run: {words.hourly(price)} as of {words.plain(price.as_of)} "
        f"({words.plain(price.source)}).",
        heads=("spent on", "per 100k", "share"),
        bars=tuple(bars),
    )


def _time(report: RunReport) -> Facts:
    interrupted = words.interruption_sentence(report)
    all_attempts = " (all attempts)" if report.attempts > 1 else ""
    phases = ", ".join(f"{p.name} {words.duration(p.amount)}" for p in words.phases(report))
    return Facts(
        title="When",
        facts=(
            (
                tables.of_attempt("from and to", report),
                _span(report.started_at, report.finished_at),
            ),
            *([("window", window_words.outcome(report.window))] if report.window else []),
            ("wall clock", f"{words.duration(report.wall_s)}{all_attempts}"),
            (tables.of_attempt("phases", report), phases),
            ("attempts", words.count(report.attempts)),
            *([("interruptions", interrupted)] if interrupted else []),
        ),
    )


def _span(started: str, finished: str) -> str:
    """`2026-11-21 02:00:00 to 02:43:10 UTC`; the report's times are ISO 8601 in UTC."""
    (day, begin), (other, end) = (words.plain(iso)[:19].split("T") for iso in (started, finished))
    return f"{day} {begin} to {end if other == day else f'{other} {end}'} UTC"


def _limits(report: RunReport) -> Iterator[Block]:
    lead = " ".join(filter(None, (words.bottleneck_sentence(report), words.limit_sentence(report))))
    bars = tuple(
        Bar(name=name, share=limit.reached or 0.0, cells=(per_s, reached))
        for (name, per_s, reached), limit in zip(
            tables.limit_rows(report), words.limits(report), strict=True
        )
    )
    if bars:
        heads = ("ceiling", "rows/s", "reached")
        yield Chart(title="How near to the limit", lead=lead, heads=heads, bars=bars)
    facts = [("bottleneck", lead)] if not bars else []
    if facts := [*facts, *device_facts(report)]:
        yield Facts(title="Devices and energy", facts=tuple(facts))


def _quarantine(report: RunReport) -> Iterator[Block]:
    if not report.quarantined:
        return
    bars = tuple(
        Bar(
            name=words.plain(reason),
            share=rows / report.quarantined,
            cells=(words.count(rows),),
            mood="odd",
        )
        for reason, rows in words.reasons(report)
    )
    yield Chart(
        title="What was odd",
        lead=f"{words.count(report.quarantined)} of {words.plural(report.rows, 'row')} are in "
        "quarantine; `score requeue` tries them again.",
        heads=("reason", "rows"),
        bars=bars,
    )
    samples = tables.sample_rows(report)[:MOST_SAMPLES]
    if not samples:
        return
    # A folder that all have is the date's: on a phone it would take most of four lines of each.
    is_one = len({file.rpartition("/")[0] for file, *_ in samples}) == 1
    facts = [
        (f"{file.rpartition('/')[2] if is_one else file}, row {row}", f"{reason}: {said}")
        for file, row, reason, said in samples
    ]
    yield Facts(title="Some of them", facts=tuple(facts))


def _unreadable(report: RunReport) -> Iterator[Block]:
    files = report.unreadable_files
    if not files:
        return
    facts = [(words.plain(file.path), words.message(file.message)) for file in files]
    yield Facts(
        title="What could not be read",
        lead=f"{words.plural(len(files), 'file')}, whose rows are in none of the figures above; "
        "once repaired, score the date again.",
        facts=tuple(facts[:MOST_SAMPLES]),
    )


def _run(report: RunReport) -> Facts:
    engine, engines = report.engine, words.engines_sentence(report.engines)
    return Facts(
        title="This run",
        facts=(
            ("engine", f"{words.engine_name(engine)}, {words.engine_origin(engine)}"),
            *([("all engines", engines)] if engines else []),
            ("agreement", words.agreement_sentence(engine)),
            ("engine key", words.plain(engine.key)),
            ("device", words.plain(report.device)),
            ("run", words.plain(report.run_id)),
            ("shards", words.shards_sentence(report)),
            ("output", words.plain(report.output)),
            ("full report", f"{words.plain(report.output)}/_report.html"),
        ),
    )
