"""What earlier attempts of a run did, and what their interruptions cost."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from engines.masking import masked
from pipeline.errors import PipelineError, one_line
from pipeline.ledger import Attempt, AttemptEnd, CommitRecord, Ledger, utc_now

END_NOTE_S = 2.0
"""Seconds that an attempt which ends may take to say so: a store that is gone must not hold it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EarlierAttempts:
    """The attempts before the one that publishes, together."""

    num_interruptions: int
    """Those that scored, or began to, and ended while nobody else was at work."""
    rows_replayed: int
    """Rows that they began and did not commit."""
    is_exact: bool
    """False: one was killed before it could say what it was at; the number is an upper bound."""
    wall_s: float
    """From the start of each to its end, or to the last that is known of it: what is paid."""
    clock_s: float
    """Of these, by the clock and before the current one began: some work side by side."""
    build_s: float
    """Of these, building engines."""
    score_s: float
    """Of these, scoring."""


def note_end(ledger: Ledger, attempt: Attempt, rows_begun: int, error: BaseException) -> None:
    """Write down that an attempt ended, if that can be done in `END_NOTE_S` seconds.

    Args:
        ledger: Of the run.
        attempt: That ends.
        rows_begun: Rows that it began to score, committed or not.
        error: What ended it.
    """
    name, said = type(error).__name__.strip("_"), masked(one_line(error))
    end = AttemptEnd(
        ended_at=utc_now(), why=f"{name}: {said}" if said else name, rows_begun=rows_begun
    )

    def write() -> None:
        with suppress(OSError, PipelineError):  # it counts as killed then
            ledger.end(attempt, end)

    writer = threading.Thread(target=write, name="attempt-end", daemon=True)
    writer.start()
    writer.join(END_NOTE_S)


def earlier_attempts(
    ledger: Ledger, current: Attempt, records: Mapping[int, CommitRecord], num_rows: int
) -> EarlierAttempts:
    """What the attempts of a run did before the current one.

    Args:
        ledger: Of the run.
        current: The attempt that publishes.
        records: All of the run's commit records.
        num_rows: Rows of the run.
    """
    ends = ledger.ends()
    earlier = [
        _Past(attempt, ends.get(attempt.id), records.values(), num_rows)
        for attempt in ledger.attempts()
        if attempt.id != current.id
    ]
    interrupted = [past for past in earlier if past.was_interrupted_before(current)]
    return EarlierAttempts(
        num_interruptions=len(interrupted),
        rows_replayed=sum(past.rows_dropped for past in interrupted),
        is_exact=all(past.end or not past.rows_dropped for past in interrupted),
        wall_s=sum(past.wall_s for past in earlier),
        clock_s=_clock_s(earlier, until=_moment(current.started_at)),
        build_s=sum(min(past.attempt.build_s, past.wall_s) for past in earlier),
        score_s=sum(max(0.0, past.wall_s - past.attempt.prepared_s) for past in earlier),
    )


class _Past:
    """An earlier attempt, how it ended if it said so, and what it committed."""

    def __init__(
        self,
        attempt: Attempt,
        end: AttemptEnd | None,
        records: Iterable[CommitRecord],
        num_rows: int,
    ) -> None:
        self.attempt = attempt
        self.end = end
        self.started = _moment(attempt.started_at)
        self._last_commit: datetime | None = None
        self._rows_committed = 0
        self._rows_todo = num_rows
        for record in records:
            committed = _moment(record.committed_at)
            if record.owner == attempt.id:
                self._rows_committed += record.num_rows
                self._last_commit = max(committed, self._last_commit or committed)
            elif committed < self.started:
                self._rows_todo -= record.num_rows

    def was_interrupted_before(self, current: Attempt) -> bool:
        """Whether it stopped half-way, before the current one began; others only ran beside it."""
        if self.end is not None:
            return bool(self.end.rows_begun)
        return self._last_commit is None or self._last_commit < _moment(current.started_at)

    @property
    def rows_dropped(self) -> int:
        """Rows begun and not committed; of an attempt that was killed, the most it can be."""
        if self.end is not None:
            return max(0, self.end.rows_begun - self._rows_committed)
        at_risk = self.attempt.rows_at_risk
        uncommitted = self._rows_todo - self._rows_committed
        return uncommitted if at_risk is None else min(at_risk, uncommitted)

    @property
    def wall_s(self) -> float:
        """Seconds until its end, its last commit, or until it was ready: whatever is known."""
        last = _moment(self.end.ended_at) if self.end else self._last_commit
        seconds = (last - self.started).total_seconds() if last else 0.0
        return max(seconds, self.attempt.prepared_s)


def _clock_s(attempts: Iterable[_Past], until: datetime) -> float:
    """Seconds before a moment in which at least one of the attempts was at work."""
    seconds, last = 0.0, datetime.min.replace(tzinfo=UTC)
    for past in sorted(attempts, key=lambda past: past.started):
        ended = min(past.started + timedelta(seconds=past.wall_s), until)
        seconds += max(0.0, (ended - max(past.started, last)).total_seconds())
        last = max(ended, last)
    return seconds


def _moment(text: str) -> datetime:
    return datetime.fromisoformat(text)
