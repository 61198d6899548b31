"""Looks ahead while a night is scored: when it will end, and whether that is in time."""

from __future__ import annotations

import datetime
import math
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from flows.mailing.mail import notify
from flows.shipped import shipped_config
from pipeline import window_words
from pipeline.cost import load_prices
from pipeline.report import StageTimes
from pipeline.run import PreparedRun
from pipeline.window import Outlook, Pace, WindowWatch

if TYPE_CHECKING:
    from flows.night import Observer

OnWarning = Callable[[str], None]
"""Is told in a few sentences what is wrong and what to do; called by a thread of the run."""


class Lookout:
    """Tells the observer of a run how it will end, and warns when its deadline is in danger.

    Args:
        run: That is scored.
        num_lanes: That score it.
        observer: Is told when the night will end, and of danger.
        on_warning: Is told of danger, too, besides a mail; must not raise.
    """

    def __init__(
        self,
        run: PreparedRun,
        num_lanes: int,
        observer: Observer,
        on_warning: OnWarning | None = None,
    ) -> None:
        self.observer = observer
        self._run = run
        self._num_lanes = num_lanes
        self._num_todo = sum(shard.num_rows for shard in run.todo)
        self._pace = Pace(self._num_todo)
        self._watch = None if run.window is None else WindowWatch(run.window)
        self._on_warning = on_warning

    def look(self, times: dict[str, StageTimes]) -> None:
        """Look once; `times` are those of the lanes until now."""
        self.observer.update(times)
        self._pace.observe(time.monotonic(), num_done(times))
        outlook = self._pace.outlook()
        now = datetime.datetime.now(datetime.UTC)
        if outlook is not None:
            self.observer.expect(window_words.end(now, outlook, self._run.window))
        is_late = None if self._watch is None else self._watch.look(now, outlook)
        if is_late is None:
            return
        text = self._danger(now, outlook) if is_late else self._relief(now, outlook)
        self.observer.say(f"warning: {text}" if is_late else text)
        if is_late:
            self._warn(text)

    def _warn(self, text: str) -> None:
        if self._on_warning is not None:
            self._on_warning(text)
        subject = f"{self._run.plan.date}: its deadline is in danger"
        # A mail server may take its time, and the progress is shown by this thread.
        threading.Thread(
            target=notify, args=(self._run.job, subject, text), name="warning", daemon=True
        ).start()

    @property
    def _name(self) -> str:
        return f"{self._run.job.name} {self._run.plan.date}"

    def _danger(self, now: datetime.datetime, outlook: Outlook | None) -> str:
        run, cost = self._run, self._run.job.cost
        assert run.window is not None
        rows_left = outlook.rows_left if outlook else self._num_todo
        means = window_words.Means(
            num_lanes=self._num_lanes,
            shards_left=math.ceil(len(run.todo) * rows_left / self._num_todo),
            instance=cost.instance,
            market=cost.market,
            output=run.output.uri,
            prices=tuple(load_prices(Path(shipped_config("prices.yaml"))).values()),
        )
        return window_words.danger(self._name, now, run.window, outlook, means)

    def _relief(self, now: datetime.datetime, outlook: Outlook | None) -> str:
        assert outlook is not None, "silence is no relief"
        return f"{self._name}: in time again, {window_words.end(now, outlook, self._run.window)}"


def num_done(times: Mapping[str, StageTimes]) -> int:
    """Rows that are committed, or on their way: shards may be large, and the first one far off."""
    return max((times[name].items for name in ("decode", "write") if name in times), default=0)
