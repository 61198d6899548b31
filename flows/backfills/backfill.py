"""Score the dates of a period that are not published; works with and without a Prefect server.

One date is scored as `score run` does it, so whatever is interrupted goes on where it stopped: the
same command passes over what is published, and commits to the job's Delta table what it lacks of
that. Nights of the job on this machine go first (`turns.py`), and a date that is caught up with has
no deadline. Lanes stay warm between dates.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Literal

from engines.errors import EngineError
from flows.backfills.budget import Budget
from flows.backfills.dates import dates_between, nothing_to_do
from flows.backfills.summary import BackfillSummary, DateOutcome, Status, plain_summary
from flows.backfills.turns import Turns
from flows.cli import EXIT_INTERRUPTED, exit_code_of
from flows.crews import Crew, make_crews
from flows.lanes import Group, LocalLanes, map_in_threads
from flows.mailing.mail import notify
from flows.night import Observer, price_of, run_night
from flows.planning.plan import plan_facts
from flows.progress import LineProgress
from pipeline import report_words as words
from pipeline.backfill_log import DONE, BackfillLog
from pipeline.config import Job
from pipeline.delta import update_table
from pipeline.errors import GuardError, PipelineError, one_line
from pipeline.report import RunReport, report_from_dict
from pipeline.run import GIB, Night
from pipeline.storage import open_storage
from pipeline.versions import find_published
from pipeline.watchdog import memory_share

log = logging.getLogger(__name__)

Order = Literal["oldest", "newest"]
ENDING_S = 60.0
"""Seconds that dates which are scored at once get to end, besides `lanes.grace_s`: one that is
being published is not stopped half-way."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BackfillRequest:
    """What is asked for."""

    job: Job
    first: str
    """ISO date."""
    last: str
    order: Order = "oldest"
    concurrency: int = 1
    """Dates that are scored at once; they share the devices, and on a CPU its cores."""
    max_usd: float | None = None
    """What all dates may cost, those that earlier commands for the period scored included."""
    strict: bool = False
    """Whether a date without input is a failure."""
    dry_run: bool = False


def run_backfill(
    request: BackfillRequest,
    observer: Observer,
    tell: Callable[[BackfillSummary], None] | None = None,
) -> BackfillSummary:
    """Score the dates of a period that are not published.

    A date that fails does not stop the others. Where the store is full or out of reach, no other
    date is begun.

    Args:
        request: What is asked for.
        observer: Is told of the progress.
        tell: Is told what came of it, also when this call is interrupted and raises.

    Returns:
        What came of each date; its `exit_code` is the command's.

    Raises:
        ConfigError: The period is none, or the job has no dates.
    """
    backfill = _Backfill(request, observer)
    backfill.begin()
    try:
        backfill.forecast() if request.dry_run else backfill.run()
    except BaseException as error:
        backfill.give_up(f"{type(error).__name__.strip('_')}: {one_line(error)}".rstrip(": "))
        raise
    finally:
        summary = backfill.summary()
        if tell is not None:
            tell(summary)
    if summary.began_at is not None:  # one that is interrupted mails when it is run to its end
        subject = f"backfill {summary.first} to {summary.last}: {summary.headline()}"
        notify(request.job, subject, plain_summary(summary))
    return summary


class _Backfill:
    """A backfill at work; its threads share `_outcomes`, `_todo` and the budget."""

    def __init__(self, request: BackfillRequest, observer: Observer) -> None:
        self._request = request
        self._job = request.job.model_copy(update={"window": None})
        self._observer = observer
        self._dates = dates_between(request.first, request.last)
        output = open_storage(self._job.output.uri)
        self._log = BackfillLog(output, self._job.name, self._dates[0], self._dates[-1])
        self._outcomes = nothing_to_do(self._job, self._dates)
        in_order = self._dates if request.order == "oldest" else self._dates[::-1]
        self._todo = [date for date in in_order if date not in self._outcomes]
        self._num_todo = len(self._todo)
        self._began_at: str | None = None
        self._machine_share = 1 / request.concurrency
        price = price_of(self._job, self._dates[-1], self._machine_share)
        self._usd_per_hour = price.usd_per_hour
        self._budget = Budget(request.max_usd, self._log.spent())
        self._crews = make_crews(self._job, request.concurrency)
        self._lock = threading.Lock()
        self._stopped = threading.Event()

    def begin(self) -> None:
        """Write down that it begins, or find out when it did, and what it has spent since."""
        if self._todo and not self._request.dry_run:
            self._began_at = self._log.begin(self._todo)
            self._budget = Budget(self._request.max_usd, self._log.spent())

    def forecast(self) -> None:
        """Say what a run would do, and what it would cost; the first date builds the engine."""
        is_built = False
        while self._todo:
            date = self._todo.pop(0)
            try:
                found = plan_facts(self._job, date, self._machine_share)["forecast"]
            except (PipelineError, EngineError, OSError) as error:
                self._note(DateOutcome(date=date, status="failed", why=one_line(error)))
                continue
            why, usd = "no night to forecast from yet", 0.0
            if found:
                wall_s = found["wall_s"] - found["build_s"] * is_built
                usd = wall_s * self._usd_per_hour / 3600
                why = f"about {words.duration(wall_s)} and {words.usd(usd)}"
                is_built = True
            if self._can_pay(date, usd):
                self._note(DateOutcome(date=date, status="to_do", why=why))

    def run(self) -> None:
        """Score what is missing."""
        try:
            if len(self._crews) == 1:  # in this thread, where signals come
                self._work(self._crews[0])
            else:
                self._work_at_once()
            self._commit_to_table()
        finally:
            self._stopped.set()
            for crew in self._crews:
                crew.dismiss()

    def _work_at_once(self) -> None:
        # No threads that are joined: Python takes one for ended when a signal meets its `join`.
        pool = ThreadPoolExecutor(len(self._crews), thread_name_prefix="backfill")
        working = [pool.submit(self._work, crew) for crew in self._crews]
        try:
            wait(working)
        except BaseException:
            self._stopped.set()
            for crew in self._crews:
                crew.dismiss(self._job.lanes.grace_s)
            wait(working, ENDING_S)
            raise
        finally:
            pool.shutdown(wait=False)
        for work in working:
            work.result()

    def _work(self, crew: Crew) -> None:
        """Score one date after the other until none is left."""
        while (date := self._next()) is not None:
            turns = Turns(self._job, self._observer.say, self._stopped)
            try:
                outcome = self._score(date, crew, turns)
            except BaseException as error:
                usd = turns.spent_s * self._usd_per_hour / 3600
                self._end_of(self._ended(date, error, usd))
                if not isinstance(error, Exception):
                    raise
            else:
                self._end_of(outcome)

    def _commit_to_table(self) -> None:
        """See that the job's Delta table has all that is published, as its reader may expect.

        Dates that were published before there was a table are not in it, and one that was scored
        now may have ended before its commit.
        """
        if not self._job.output.delta:
            return
        output = open_storage(self._job.output.uri)
        for outcome in self.summary().dates:
            if outcome.status not in DONE:
                continue
            try:
                if update_table(self._job, output, outcome.date):
                    self._observer.say(f"{outcome.date}: now in the Delta table, too")
            except (PipelineError, OSError) as error:
                found = self._not_done(outcome.date, error, outcome.usd)
                self._note(replace(outcome, status=found.status, why=found.why))
                self._observer.say(f"{found.date}: {found.why}")
                if found.status == "interrupted":  # the store is gone, for other dates, too
                    return

    def _next(self) -> str | None:
        """The next date, if there is money for it."""
        with self._lock:
            if not self._todo or self._stopped.is_set():
                return None
            date = self._todo.pop(0)
        return date if self._can_pay(date, self._expected_usd(date)) else None

    def _expected_usd(self, date: str) -> float:
        """0 where nobody asks, or nobody knows: then the cap stops the date itself."""
        if self._request.max_usd is None:
            return 0.0
        with suppress(PipelineError, EngineError, OSError):  # the date itself will say so
            found = plan_facts(self._job, date, self._machine_share)["forecast"]
            return float(found["usd"]) if found else 0.0
        return 0.0

    def _can_pay(self, date: str, expected_usd: float) -> bool:
        """Whether there is money left for a date; if not, for none after it either."""
        if self._budget.reserve(date, expected_usd):
            return True
        why = f"about {words.usd(expected_usd)}, and {self._budget}"
        self._note(DateOutcome(date=date, status="cost_cap", why=why))
        self.give_up(f"after {date}, for which too little is left", "cost_cap")
        return False

    def _score(self, date: str, crew: Crew, turns: Turns) -> DateOutcome:
        number = self._num_todo - len(self._todo)
        say = self._observer.say
        turns.wait()
        say(f"{date}, {number} of {self._num_todo}")
        lanes = crew.lanes()
        job = self._job_of(date, len(lanes) * self._request.concurrency)
        night = Night(job=job, date=date, gives_way=True, machine_share=self._machine_share)
        alone = self._request.concurrency == 1
        observer = self._observer if alone else LineProgress(lambda line: say(f"{date}: {line}"))

        def map_politely(
            score: Callable[[Group], None], groups: Sequence[Group], num_callers: int
        ) -> None:
            def wait_and_score(group: Group) -> None:
                with turns.take():
                    score(group)

            map_in_threads(wait_and_score, groups, num_callers)

        own = LocalLanes(lanes, map_politely)
        return _done(run_night(night, observer, map_politely, clock=turns.clock, lanes=own))

    def _job_of(self, date: str, num_lanes: int) -> Job:
        """The job with what this date may cost, and what a lane of so many may take."""
        limits = self._job.limits.model_copy(update={"max_usd": self._limit_of(date)})
        memory_gib = self._job.lanes.memory_gib or memory_share(num_lanes) / GIB
        lanes = self._job.lanes.model_copy(update={"memory_gib": memory_gib})
        return self._job.model_copy(update={"limits": limits, "lanes": lanes})

    def _limit_of(self, date: str) -> float | None:
        """What the date may cost: by the job, and by what is left for the backfill."""
        limits = (self._job.limits.max_usd, self._budget.left_for(date))
        return min((limit for limit in limits if limit is not None), default=None)

    def _ended(self, date: str, error: BaseException, usd: float) -> DateOutcome:
        outcome = self._not_done(date, error, usd)
        with suppress(PipelineError, OSError):  # it may have ended after its publication
            found = find_published(open_storage(self._job.output.uri), self._job.name, date)
            if found is not None:
                return _done(report_from_dict(found.manifest["report"]))
        return outcome

    def _not_done(self, date: str, error: BaseException, usd: float) -> DateOutcome:
        why, status = one_line(error), _status_of(error)
        if status == "guard" and self._is_cap(date, error):
            status = "cost_cap"
            self.give_up(f"the cost cap was reached at {date}", status)
        elif status == "interrupted":
            self.give_up(f"not begun: {date} was interrupted", status)
        elif not isinstance(error, (PipelineError, EngineError, OSError)):
            log.error("%s, %s: failed.", self._job.name, date, exc_info=error)
            why = f"{type(error).__name__}: {why}"
        return DateOutcome(date=date, status=status, why=why, usd=usd)

    def _is_cap(self, date: str, error: BaseException) -> bool:
        """Whether it was the backfill's budget that stopped a date, and not the job's own."""
        left_usd = self._budget.left_for(date)
        is_budget = isinstance(error, GuardError) and error.guard == "budget"
        return is_budget and left_usd is not None and left_usd == self._limit_of(date)

    def _end_of(self, outcome: DateOutcome) -> None:
        is_done = outcome.status in DONE
        self._budget.settle(outcome.date, outcome.usd, is_whole=is_done)
        self._note(outcome)
        if not is_done:
            self._observer.say(f"{outcome.date}: {outcome.why}")
        try:
            self._log.note(outcome.date, outcome.status, outcome.usd)
        except (PipelineError, OSError) as error:  # the store is gone: that is what ended the date
            log.warning("%s: its cost is not in the log (%s).", outcome.date, error)

    def _note(self, outcome: DateOutcome) -> None:
        with self._lock:
            self._outcomes[outcome.date] = outcome

    def give_up(self, why: str, status: Status = "interrupted") -> None:
        """Begin no other date."""
        with self._lock:
            left, self._todo = self._todo, []
        for date in left:
            self._note(DateOutcome(date=date, status=status, why=why))

    def summary(self) -> BackfillSummary:
        """What has come of all dates until now."""
        lost = DateOutcome(
            date="", status="interrupted", why="it had begun, and did not end in time"
        )
        with self._lock:
            found = [self._outcomes.get(date, replace(lost, date=date)) for date in self._dates]
        return BackfillSummary(
            job=self._job.name,
            first=self._dates[0],
            last=self._dates[-1],
            dates=tuple(found),
            began_at=self._began_at,
            spent_usd=self._budget.spent_usd,
            max_usd=self._request.max_usd,
            strict=self._request.strict,
            dry_run=self._request.dry_run,
        )


def _status_of(error: BaseException) -> Status:
    if not isinstance(error, Exception):
        return "interrupted"
    if isinstance(error, GuardError):
        return "guard"
    return "interrupted" if exit_code_of(error) == EXIT_INTERRUPTED else "failed"


def _done(report: RunReport) -> DateOutcome:
    is_old = report.status == "already_published"
    num_lost = len(report.unreadable_files)
    lost = f"{words.plural(num_lost, 'file')} cannot be read, `score requeue` once mended"
    return DateOutcome(
        date=report.date,
        status="already_published" if is_old else "published",
        why=lost if num_lost else "",
        run_id=report.run_id,
        rows=report.rows,
        usd=report.cost.usd,
        wall_s=report.wall_s,
    )
