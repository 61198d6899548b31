"""The clock of one date of a backfill, which stands still while the date waits for a night."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from flows.giving_way import wait_for_nights
from pipeline.config import Job
from pipeline.run import RunClock


class Turns:
    """Lets nights of the job go first, and keeps what they take out of the date's time.

    The clock stands still while groups wait and none is at work. Threads may share it.

    Args:
        job: The job.
        say: Is told that we wait.
        stopped: Ends the waiting.
    """

    def __init__(self, job: Job, say: Callable[[str], None], stopped: threading.Event) -> None:
        self.clock = RunClock()
        self._job, self._say, self._stopped = job, say, stopped
        self._num_waiting = self._num_working = 0
        self._still_since: float | None = None
        self._lock = threading.Lock()

    @property
    def spent_s(self) -> float:
        """Seconds since the date began in which it did not only wait."""
        self._count()
        return time.monotonic() - self.clock.started

    def wait(self) -> None:
        """Return when no night is at work; raises as `wait_for_nights` does."""
        self._count(waiting=1)
        try:
            wait_for_nights(self._job, self._say, self._stopped)
        finally:
            self._count(waiting=-1)

    @contextmanager
    def take(self) -> Iterator[None]:
        """Wait, then work."""
        self.wait()
        self._count(working=1)
        try:
            yield
        finally:
            self._count(working=-1)

    def _count(self, waiting: int = 0, working: int = 0) -> None:
        with self._lock:
            now = time.monotonic()
            if self._still_since is not None:
                self.clock.stand_still(now - self._still_since)
            self._num_waiting += waiting
            self._num_working += working
            is_still = self._num_waiting > 0 and self._num_working == 0
            self._still_since = now if is_still else None
