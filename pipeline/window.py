"""The night's window: by when a night must be published, and whether it will be.

All of it is arithmetic on rows and moments that the caller gives: nothing here reads a clock.
"""

from __future__ import annotations

import datetime
import math
from collections import deque
from dataclasses import dataclass
from zoneinfo import ZoneInfo

import numpy as np

from pipeline.config import WindowSection

CATCH_UP = datetime.timedelta(days=1)
"""A date whose deadline passed so long before its run began is caught up with, and not late."""
RECENT_S = 600.0
"""Seconds that the rate is taken from: a lane that was lost, or a hot GPU, shows in minutes."""
NUM_SPANS = 10
MIN_ADVANCES = 3
"""Times that more rows were done than before: a block may take longer than the first looks."""
T_90 = 1.833
"""Student's t for the middle 90 % with `NUM_SPANS` - 1 degrees of freedom; source: any table."""
HOLD_SHARE = 0.02
"""Of the window: for so long a night must look late before anybody is told."""
SILENT_SHARE = 0.2
"""Of the window: a night without a scored row is in danger from then on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Window:
    """From the start of a run's first attempt to its deadline; both know their time zone."""

    opened: datetime.datetime
    deadline: datetime.datetime

    @property
    def length_s(self) -> float:
        """Seconds from one to the other; 0 when it was late before it began."""
        return max(0.0, (self.deadline - self.opened).total_seconds())

    def margin_s(self, moment: datetime.datetime) -> float:
        """Seconds from a moment to the deadline; negative after it."""
        return (self.deadline - moment).total_seconds()


def find_window(
    section: WindowSection | None, date: str, opened: datetime.datetime
) -> Window | None:
    """The window of a date, or None when it has none.

    Args:
        section: Of the job.
        date: ISO date that is scored.
        opened: When the run's first attempt began; knows its time zone.
    """
    if section is None:
        return None
    zone = ZoneInfo(section.timezone)
    ends = []
    if section.deadline is not None:
        day = datetime.date.fromisoformat(date) + datetime.timedelta(days=section.days_after)
        hour = datetime.time.fromisoformat(section.deadline)
        deadline = datetime.datetime.combine(day, hour, zone)
        ends += [deadline] if deadline + CATCH_UP >= opened else []
    if section.max_hours is not None:
        ends.append((opened + datetime.timedelta(hours=section.max_hours)).astimezone(zone))
    # In UTC: moments of one zone compare as times of day, and an autumn night has some twice.
    first = min(ends, key=lambda end: end.astimezone(datetime.UTC), default=None)
    return None if first is None else Window(opened=opened, deadline=first)


@dataclass(frozen=True, kw_only=True, slots=True)
class Outlook:
    """When the rows that are left will be scored, at the rate of the last minutes.

    The interval holds nine of ten ends as long as the rate varies as it did in the last minutes; it
    knows nothing of a machine that will be taken away. Publishing is not in it: seconds.
    """

    rows_per_s: float
    rows_left: int
    left_s: float
    """Seconds until then; infinite when nothing moves."""
    soonest_s: float
    latest_s: float
    """The ends of the interval; the latter may be infinite."""


class Pace:
    """How fast a night goes, from the rows that were done at some moments.

    The last minutes are cut into spans of equal length. Their rates give the mean, and how they
    differ from it, how sure it is: for those spans and for the ones to come.

    Args:
        num_rows: That this attempt has to score.
    """

    def __init__(self, num_rows: int) -> None:
        self._num_rows = num_rows
        self._seen: deque[tuple[float, int]] = deque()
        self._num_advances = 0

    def observe(self, at_s: float, num_done: int) -> None:
        """So many rows are done; before the first one there is nothing to see."""
        if not num_done:
            return
        self._num_advances += bool(self._seen) and num_done > self._seen[-1][1]
        self._seen.append((at_s, num_done))
        while len(self._seen) > 2 and self._seen[1][0] <= at_s - RECENT_S:
            self._seen.popleft()

    def outlook(self) -> Outlook | None:
        """As of the last observation; None as long as there are too few."""
        if len(self._seen) <= NUM_SPANS or self._num_advances < MIN_ADVANCES:
            return None
        # (observations,) each
        times_s, rows = np.array(self._seen, dtype=np.float64).T
        edges_s = np.linspace(times_s[0], times_s[-1], NUM_SPANS + 1)
        span_s = float(edges_s[1] - edges_s[0])
        if span_s <= 0:
            return None
        rates = np.diff(np.interp(edges_s, times_s, rows)) / span_s
        mean, spread = float(rates.mean()), float(rates.std(ddof=1))
        rows_left = max(0, self._num_rows - self._seen[-1][1])
        left_s = _seconds(rows_left, mean)
        spans_left = left_s / span_s
        doubt = T_90 * spread * math.sqrt(1 / NUM_SPANS + 1 / max(spans_left, 1.0))
        return Outlook(
            rows_per_s=mean,
            rows_left=rows_left,
            left_s=left_s,
            soonest_s=_seconds(rows_left, mean + doubt),
            latest_s=_seconds(rows_left, mean - doubt),
        )


def _seconds(rows: int, per_s: float) -> float:
    if rows == 0:
        return 0.0
    return rows / per_s if per_s > 0 else math.inf


class WindowWatch:
    """Decides when a night is in danger, and when it no longer is.

    It is in danger when its expected end, or the silence before its first row, has been beyond what
    the window allows for `HOLD_SHARE` of it. It no longer is when even the latest end has been
    within the window for as long.

    Args:
        window: Of the night.
    """

    def __init__(self, window: Window) -> None:
        self._window = window
        self._is_late = False
        self._since: datetime.datetime | None = None
        """When the state began to look like the other one."""

    def look(self, now: datetime.datetime, outlook: Outlook | None) -> bool | None:
        """True: it is in danger from now on. False: it no longer is. None: nothing has changed."""
        if self._looks_late(now, outlook) is self._is_late:
            self._since = None
            return None
        self._since = self._since or now
        if (now - self._since).total_seconds() < HOLD_SHARE * self._window.length_s:
            return None
        self._is_late, self._since = not self._is_late, None
        return self._is_late

    def _looks_late(self, now: datetime.datetime, outlook: Outlook | None) -> bool:
        margin_s = self._window.margin_s(now)
        if outlook is None:
            passed_s = self._window.length_s - margin_s
            return self._is_late or passed_s > SILENT_SHARE * self._window.length_s
        return (outlook.latest_s if self._is_late else outlook.left_s) > margin_s
