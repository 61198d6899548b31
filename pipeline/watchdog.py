"""End a lane's process that is stuck or takes all memory."""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.lane_messages import WatchLimits
    from pipeline.work_marks import Mark, WorkMarks

PERIOD_S = 0.2
SLOWNESS = 20.0
"""A busy machine is slower than the one on which the engine was measured; not by so much."""
TRIAL_PATIENCE = 0.5
"""Of several rows that are tried alone: who is wrongly suspected is only halved once more."""
SHARE_OF_MEMORY = 0.8
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
MIB = 2**20


class Watchdog(threading.Thread):
    """Watches one process until it ends.

    Args:
        process: That is watched.
        marks: What it is at.
        limits: What it may take.
    """

    def __init__(self, process: BaseProcess, marks: WorkMarks, limits: WatchLimits) -> None:
        super().__init__(name="watchdog", daemon=True)
        self._process = process
        self._marks = marks
        self.limits = limits
        self.verdict: tuple[str, str] | None = None
        """Why it ended the process: reason and message; there before the process ends."""
        self._ages_s: dict[int, float] = {}

    def run(self) -> None:
        """Look again and again until the process ends; whoever owns it reaps it."""
        while not wait([self._process.sentinel], PERIOD_S):
            found = self._stuck() or self._greedy()
            if found:
                self.verdict = found
                self._process.kill()
                return

    def _stuck(self) -> tuple[str, str] | None:
        if self._marks.is_paused:
            return None
        marks = [mark for mark in self._marks.in_work() if not mark.is_read]
        # Counted in looks and not by the clock: while all of us are stopped, nobody is stuck.
        self._ages_s = {
            mark.serial: self._ages_s.get(mark.serial, 0.0) + PERIOD_S for mark in marks
        }
        for mark in marks:
            expected_s = mark.num_rows / self.limits.rows_per_s
            allowed_s = self._patience(mark) * self.limits.hang_s + SLOWNESS * expected_s
            if self._ages_s[mark.serial] > allowed_s:
                took = f"{self._ages_s[mark.serial]:.1f} s for {mark.num_rows:,} rows"
                return "hung", f"no answer after {took}"
        return None

    def _patience(self, mark: Mark) -> float:
        if not mark.is_trial:
            return self.limits.patience
        return TRIAL_PATIENCE if mark.num_rows > 1 else 1.0

    def _greedy(self) -> tuple[str, str] | None:
        rss_bytes = resident_bytes(self._process.pid)
        if rss_bytes <= self.limits.max_rss_bytes:
            return None
        limit = f"{self.limits.max_rss_bytes / MIB:,.0f} MiB"
        return "out_of_memory", f"{rss_bytes / MIB:,.0f} MiB in use; at most {limit} are allowed"


def resident_bytes(pid: int | None) -> int:
    """Memory that a process has in use; 0 when it is gone, or where there is no /proc."""
    with suppress(OSError, ValueError, IndexError):
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    return 0


def memory_share(num_lanes: int) -> int:
    """Bytes that each lane may take where the job does not say: most of the machine's memory.

    A container's limit counts.
    """
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with suppress(OSError, ValueError):  # no limit is "max"
        total = min(total, int(CGROUP_LIMIT.read_text()))
    return int(total * SHARE_OF_MEMORY / num_lanes)
