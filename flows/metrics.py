"""Writes a run's figures where node_exporter's textfile collector finds them: `metrics.textfile`.

The file is replaced at once, so that nobody reads half of it. What the last published night was
stays in it while the next one is at work. A file that cannot be written costs a warning, no night.
"""

from __future__ import annotations

import logging
import os
import re
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config import MetricsSection
from pipeline.report import RunReport, StageTimes
from pipeline.report_metrics import (
    NIGHT,
    RunFigures,
    night_gauges,
    render_metrics,
    run_gauges,
)

if TYPE_CHECKING:
    from flows.night import Observer

log = logging.getLogger(__name__)

PERIOD_S = 10.0
"""Prometheus usually looks every 15 to 60 s."""
DATE = re.compile(rf"^{NIGHT}date_timestamp_seconds{{.*}} (\d+\.\d+)$", re.MULTILINE)
END = "# EOF\n"
"""OpenMetrics asks for it; to Prometheus it is a comment."""


class MetricsFile:
    """Observes a run, and keeps the file of a job up to date; a context manager.

    Args:
        job: Name of the job.
        section: Where the file is; None: nothing is written.
        observer: Is told everything, too.
        period_s: Seconds between two writes.
    """

    def __init__(
        self,
        job: str,
        section: MetricsSection | None,
        observer: Observer,
        period_s: float = PERIOD_S,
    ) -> None:
        self._job_name = job
        self._path = Path(section.textfile) if section else None
        self._observer = observer
        self._period_s = period_s
        self._started_at = time.time()
        self._scoring_since = self._next_write = 0.0
        self._num_rows = self._num_reused = self._num_done = 0
        self._stages: dict[str, StageTimes] = {}
        self._night = ""
        self._published: RunReport | None = None

    def __enter__(self) -> MetricsFile:
        self._night = self._last_night()
        self._write(is_working=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._write(is_working=False, has_failed=self._published is None)

    def publish(self, report: RunReport) -> RunReport:
        """What the night was; the file says so from the end of the block on.

        A date that was found published long ago does not take the place of a later one.
        """
        self._published = report
        self._num_rows = self._num_done = report.rows
        night = render_metrics(self._job_name, night_gauges(report))
        if report.status == "published" or _date_of(self._night) <= _date_of(night):
            self._night = night
        return report

    def say(self, text: str) -> None:
        self._observer.say(text)

    def start(self, num_rows: int, num_done: int) -> None:
        self._num_rows, self._num_reused, self._num_done = num_rows, num_done, num_done
        self._scoring_since = time.monotonic()
        self._observer.start(num_rows, num_done)

    def update(self, times: dict[str, StageTimes]) -> None:
        self._stages = times
        if "write" in times:
            self._num_done = self._num_reused + times["write"].items
        now = time.monotonic()
        if now >= self._next_write:
            self._next_write = now + self._period_s
            self._write(is_working=True)
        self._observer.update(times)

    def expect(self, end: str) -> None:
        self._observer.expect(end)

    def stop(self) -> None:
        self._observer.stop()

    def _write(self, *, is_working: bool, has_failed: bool = False) -> None:
        if self._path is None:
            return
        scored_s = time.monotonic() - self._scoring_since if self._scoring_since else 0.0
        figures = RunFigures(
            is_working=is_working,
            has_failed=has_failed,
            started_at=self._started_at,
            updated_at=time.time(),
            num_rows=self._num_rows,
            num_done=self._num_done,
            rows_per_s=(self._num_done - self._num_reused) / scored_s if scored_s else 0.0,
            stages=self._stages,
        )
        text = render_metrics(self._job_name, run_gauges(figures)) + self._night + END
        # Not `.prom`: the collector must not read it.
        draft = self._path.with_name(f"{self._path.name}.{os.getpid()}.tmp")
        try:
            draft.write_text(text, encoding="utf-8")
            draft.replace(self._path)
        except OSError as error:
            log.warning("metrics.textfile: %s; the night goes on without it.", error)
            self._path = None
            with suppress(OSError):
                draft.unlink(missing_ok=True)

    def _last_night(self) -> str:
        """The lines about the last published night, as they are in the file."""
        if self._path is None:
            return ""
        try:
            lines = self._path.read_text(encoding="utf-8").splitlines(keepends=True)
        except (OSError, UnicodeDecodeError):
            return ""
        begins = (NIGHT, f"# HELP {NIGHT}", f"# TYPE {NIGHT}")
        return "".join(line for line in lines if line.startswith(begins))


def _date_of(lines: str) -> float:
    """Unix time of the night's date; 0 without a night."""
    found = DATE.search(lines)
    return float(found[1]) if found else 0.0
