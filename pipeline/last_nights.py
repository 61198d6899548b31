"""What the last published nights of a job scored, from their reports."""

from __future__ import annotations

import datetime
from collections.abc import Collection, Iterable
from concurrent.futures import ThreadPoolExecutor

from pipeline.distribution import Scores, Shift, add, as_text, from_text, shifts
from pipeline.ledger import CommitRecord
from pipeline.publish import find_report
from pipeline.report import RunReport, ScoreDistribution
from pipeline.storage import Storage

MOST_NIGHTS = 7
LOOK_BACK_DAYS = 35
"""Dates that are tried: a listing would name every part of every night. A weekly job has five."""
NUM_READERS = 8


def scores_of_night(
    records: Collection[CommitRecord], replaced: ScoreDistribution | None = None
) -> Scores | None:
    """The sum over a night's shards; None when no row was scored.

    Args:
        records: Of all shards.
        replaced: Of the version before. Rows that were taken over from it count like all of its
            rows where its ledger is gone, which knew the scores of each shard.
    """
    known = [from_text(record.scores, record.num_scored) for record in records if record.scores]
    num_rows = sum(record.num_scored for record in records if not record.scores)
    if replaced is not None and num_rows:
        num_values = min(num_rows, replaced.num_values)
        known.append(from_text(replaced.counts, num_rows, num_values))
    return add(known)


def last_nights(output: Storage, job: str, date: str, model: str, head: str) -> list[RunReport]:
    """Reports of the last nights before a date that the same model scored, the newest first.

    A night whose scores were accepted although they had moved is the last one: from then on its
    scores are what is usual.

    Args:
        output: Of the job.
        job: Its name.
        date: ISO date of the night that is compared with them.
        model: Fingerprint of the model.
        head: Of the model.
    """
    today = datetime.date.fromisoformat(date).toordinal()
    days = range(today - 1, max(today - 1 - LOOK_BACK_DAYS, 0), -1)

    def read(day: int) -> RunReport | None:
        return find_report(output, job, datetime.date.fromordinal(day).isoformat())

    found: list[RunReport] = []
    with ThreadPoolExecutor(NUM_READERS) as pool:
        for report in pool.map(read, days):
            kept = report.distribution if report else None
            if report is None or kept is None or (kept.model, kept.head) != (model, head):
                continue
            found.append(report)
            if len(found) == MOST_NIGHTS or any(s.startswith("scores:") for s in report.accepted):
                break
    return found


def compare_with(
    past: Iterable[RunReport], found: Scores, model: str, head: str
) -> ScoreDistribution:
    """A night's scores beside those of earlier nights.

    Args:
        past: Reports of the nights, each with its distribution.
        found: The night's scores.
        model: Fingerprint of the model.
        head: Of the model.
    """
    kept = {report.date: report.distribution for report in past if report.distribution}
    before = add(from_text(each.counts, num_values=each.num_values) for each in kept.values())
    moved: dict[str, Shift] = shifts(before, found) if before else {}
    return ScoreDistribution(
        counts=as_text(found),
        num_values=round(found.num_values),
        model=model,
        head=head,
        nights=tuple(kept),
        psi={name: shift.psi for name, shift in moved.items()},
        chance={name: shift.chance for name, shift in moved.items()},
        before=as_text(before) if before else "",
    )
