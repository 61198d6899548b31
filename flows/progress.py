"""Show how a night goes: bars on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from pipeline.report import StageTimes
from pipeline.report_words import plain

LINE_PERIOD_S = 10.0
"""Plain lines come at a pace that a log can bear."""


class _Bars(Progress):
    """Bars, and below them when the night will end."""

    end = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        if self.end:
            yield Text(self.end, style="dim")


class LiveProgress:
    """One bar for each stage, with rows, rate and time left."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars: _Bars | None = None
        self._tasks: dict[str, TaskID] = {}
        self._num_todo = 0
        self._started = 0.0

    def say(self, text: str) -> None:
        """Print a line above the bars."""
        self._console.print(Text(plain(text), style="dim"))

    def start(self, num_rows: int, num_done: int) -> None:
        """Begin to show bars for the rows that are left."""
        if num_done:
            self.say(f"{num_done:,} of {num_rows:,} rows were committed by an earlier attempt")
        self._num_todo = num_rows - num_done
        self._started = time.monotonic()
        self._tasks = {}  # a night that builds its engine anew begins again
        self._bars = _Bars(
            TextColumn("{task.description:>6}"),
            BarColumn(bar_width=24),
            TaskProgressColumn(),
            TextColumn("{task.completed:,.0f} rows"),
            TextColumn("{task.fields[rate]:>7,.0f}/s"),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
        )
        self._bars.start()

    def update(self, times: dict[str, StageTimes]) -> None:
        """Move the bars."""
        if self._bars is None:
            return
        elapsed_s = time.monotonic() - self._started
        for name, stage in times.items():
            if name not in self._tasks:
                self._tasks[name] = self._bars.add_task(name, total=self._num_todo, rate=0.0)
            rate = stage.items / elapsed_s
            self._bars.update(self._tasks[name], completed=stage.items, rate=rate)

    def expect(self, end: str) -> None:
        """Show when the night will end, below the bars."""
        if self._bars is not None:
            self._bars.end = end

    def stop(self) -> None:
        """Take the bars away."""
        if self._bars is not None:
            self._bars.stop()


class LineProgress:
    """Plain lines, for logs and pipes.

    Args:
        write: Takes one line.
        period_s: Seconds between two lines of progress.
    """

    def __init__(self, write: Callable[[str], None], period_s: float = LINE_PERIOD_S) -> None:
        self._write = write
        self._period_s = period_s
        self._num_todo = 0
        self._started = self._next_line = 0.0
        self._end = ""

    def say(self, text: str) -> None:
        """Write a line."""
        self._write(plain(text))

    def start(self, num_rows: int, num_done: int) -> None:
        """Say what there is to do."""
        reused = f", {num_done:,} committed by an earlier attempt" if num_done else ""
        self._write(f"scoring {num_rows - num_done:,} of {num_rows:,} rows{reused}")
        self._num_todo = num_rows - num_done
        self._started = time.monotonic()
        self._next_line = self._started + self._period_s
        self._end = ""

    def update(self, times: dict[str, StageTimes]) -> None:
        """Write a line when it is time for one."""
        now = time.monotonic()
        if now < self._next_line or "write" not in times:
            return
        self._next_line = now + self._period_s
        done = times["write"].items
        rate = done / (now - self._started)
        end = f", {self._end}" if self._end else ""
        rows = ", ".join(f"{name} {stage.items:,}" for name, stage in times.items())
        self._write(f"{done / self._num_todo:.0%} committed, {rate:,.0f} rows/s{end} ({rows})")

    def expect(self, end: str) -> None:
        """The next line says when the night will end."""
        self._end = end

    def stop(self) -> None:
        """Nothing to take away."""
