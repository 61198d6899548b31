"""What a night shows on its page in Prefect: lines at a human pace, a progress bar, and the report.

A page is for people: nothing that goes wrong with it may stop a night.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable
from typing import Any
from uuid import UUID

from prefect.artifacts import (
    create_markdown_artifact,
    create_progress_artifact,
    update_progress_artifact,
)
from prefect.events import emit_event

from flows.lookout import OnWarning
from flows.progress import LineProgress
from pipeline.report import RunReport, StageTimes
from pipeline.report_text import render_markdown

PROGRESS_PERIOD_S = 30.0
"""Between two lines of the log."""
BAR_PERIOD_S = 5.0
"""Between two steps of the bar; each is a request of about 10 ms."""
DEADLINE_EVENT = "nightscore.deadline-in-danger"
"""For automations of one's own; its resource is `nightscore.job.<name>`."""


class PageProgress:
    """Tells a night's page how it goes: the log, and an artifact with a bar.

    Args:
        title: Job and date.
        write: Takes a line of the log.
    """

    def __init__(self, title: str, write: Callable[[str], None]) -> None:
        self._title = title
        self._lines = LineProgress(write, PROGRESS_PERIOD_S)
        self._bar: UUID | None = None
        self._num_rows = self._num_done = 0
        self._started = self._next_step = 0.0
        self._end = ""

    def say(self, text: str) -> None:
        """Write a line."""
        self._lines.say(text)

    def start(self, num_rows: int, num_done: int) -> None:
        """Say what there is to do, and show the bar."""
        self._lines.start(num_rows, num_done)
        self._num_rows, self._num_done = num_rows, num_done
        self._started = time.monotonic()
        self._next_step = self._started + BAR_PERIOD_S
        self._bar = quietly(
            create_progress_artifact,
            progress=_percent(num_done, num_rows),
            key=artifact_key(self._title, "progress"),
            description=f"{self._title}: {num_done:,} of {num_rows:,} rows",
        )

    def update(self, times: dict[str, StageTimes]) -> None:
        """Write a line and move the bar when it is time to."""
        self._lines.update(times)
        now = time.monotonic()
        if now < self._next_step or "write" not in times:
            return
        self._next_step = now + BAR_PERIOD_S
        num_scored = times["write"].items
        self._step(self._num_done + num_scored, num_scored / (now - self._started))

    def expect(self, end: str) -> None:
        """The next line, and the bar, say when the night will end."""
        self._lines.expect(end)
        self._end = end

    def stop(self) -> None:
        """Scoring has ended: the bar stays where it is until `publish` fills it."""
        self._lines.stop()

    def publish(self, report: RunReport) -> None:
        """Fill the bar, and show the report."""
        if self._bar is not None:
            self._end = report.status.replace("_", " ")
            self._step(self._num_rows, report.examples_per_sec)
        quietly(
            create_markdown_artifact,
            render_markdown(report),
            key=artifact_key(self._title),
            description=f"{self._title}: {report.rows:,} rows, {report.status}",
        )

    def _step(self, num_rows: int, rows_per_s: float) -> None:
        if self._bar is None:
            return
        said = f"{self._title}: {num_rows:,} of {self._num_rows:,} rows, {rows_per_s:,.0f} rows/s"
        end = f", {self._end}" if self._end else ""
        percent = _percent(num_rows, self._num_rows)
        quietly(update_progress_artifact, self._bar, progress=percent, description=said + end)


def warn_of_deadline(job: str, title: str) -> OnWarning:
    """Tells Prefect, by an event for automations of one's own; the run itself sends a mail."""

    def warn(text: str) -> None:
        resource = {
            "prefect.resource.id": f"nightscore.job.{job}",
            "prefect.resource.name": title,
        }
        quietly(emit_event, DEADLINE_EVENT, resource, payload={"text": text})

    return warn


def artifact_key(title: str, *more: str) -> str:
    """A key that Prefect accepts: lower case, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", " ".join(("nightscore", title, *more)).lower())


def quietly(call: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """What the call returns, or None: a server that is gone for a while must not end a night."""
    try:
        return call(*arguments, **named)
    except Exception as error:  # whatever Prefect's client and the network may raise
        logging.getLogger(__name__).warning("Prefect's page was not updated: %s", error)
        return None


def _percent(part: int, whole: int) -> float:
    return round(100 * part / whole, 1) if whole else 100.0
