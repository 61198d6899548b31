"""The Prefect flow `score`: the same night as `score run`, as tasks that a server can watch."""

from __future__ import annotations

import datetime
import os
import threading
from collections.abc import Callable, Sequence
from typing import Annotated, Any
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

# Before Prefect is imported: it reads its settings then. No telemetry, from nobody's machine.
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
os.environ.setdefault("DO_NOT_TRACK", "1")

from prefect import flow, get_run_logger, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.runtime import flow_run
from prefect.task_runners import ThreadPoolTaskRunner
from prefect.utilities.annotations import quote
from pydantic import Field

from flows.mail import mailed
from flows.night import Group, run_night
from flows.progress import LineProgress
from pipeline.errors import ConfigError, known_guards
from pipeline.job_file import load_job, parse_date
from pipeline.report_text import render_markdown
from pipeline.run import Night

MAX_TASKS_AT_ONCE = 64
"""Threads that only wait for lanes; `run_night` never asks for more than two per lane."""
PROGRESS_PERIOD_S = 30.0
ISO_DATE = r"^\d{4}-\d{2}-\d{2}$"
"""Checked by Prefect before a run is made, so that its form and its command say what is wrong."""
# Any: Prefect types a flow's runner by a parameter that fits no runner of its own.
_TASK_RUNNER: Any = ThreadPoolTaskRunner(max_workers=MAX_TASKS_AT_ONCE)


def date_of(scheduled: datetime.datetime, days_back: int, timezone: str) -> str:
    """The date that a run scores: `days_back` days before its scheduled start in `timezone`.

    The scheduled start and not the clock: a late run still scores its own night.
    """
    try:
        zone = ZoneInfo(timezone)
    except (ZoneInfoNotFoundError, ValueError):
        raise ConfigError(
            f"timezone: {timezone!r}; expected a name such as Europe/Zurich or UTC."
        ) from None
    return (scheduled.astimezone(zone).date() - datetime.timedelta(days=days_back)).isoformat()


def _run_name() -> str:
    parameters = flow_run.parameters
    job = os.path.splitext(os.path.basename(parameters["job"]))[0]
    try:
        return f"{job}-{_date_from(parameters)}"
    except ConfigError:  # said by the flow itself; here it would crash the run before it begins
        return f"{job}-{parameters['date']}"


def _date_from(parameters: dict[str, object]) -> str:
    if parameters.get("date"):
        return parse_date(str(parameters["date"]))
    scheduled = flow_run.scheduled_start_time or datetime.datetime.now(datetime.UTC)
    return date_of(scheduled, int(str(parameters["days_back"])), str(parameters["timezone"]))


# No task retries: a lane replaces its own process, and the ledger, not Prefect, knows what is done.
# No cache: Prefect's cache reports success even when the output has gone.
@task(name="score shards", task_run_name="{label}", cache_policy=NO_CACHE)
def _score_group(label: str, score_group: Callable[[Group], None], group: Group) -> None:
    del label  # it names the task run
    score_group(group)


def map_as_tasks(
    score_group: Callable[[Group], None], groups: Sequence[Group], num_callers: int
) -> None:
    """Hand out groups as task runs, `num_callers` at a time."""
    slots = threading.Semaphore(num_callers)
    running = []
    for group in groups:
        slots.acquire()
        label = f"shards {group[0].name} to {group[-1].name}"
        # Quoted, or Prefect searches every shard for futures.
        future = _score_group.submit(label, score_group, quote(group))
        future.add_done_callback(lambda _: slots.release())
        running.append(future)
    for future in running:
        future.result()  # raises what the task raised


@flow(
    name="score",
    flow_run_name=_run_name,
    description="Score one date of a job, publish it, and report what it cost.",
    task_runner=_TASK_RUNNER,
)
def score(
    job: str,
    date: Annotated[str, Field(pattern=ISO_DATE)] | None = None,
    days_back: Annotated[int, Field(ge=0)] = 1,
    timezone: str = "UTC",
    accept: tuple[str, ...] = (),
) -> str:
    """Score one date of a job; a published date is left as it is.

    No retries of the flow: storage retries, lanes replace their processes, and what is left (a
    guard, a wrong job, changed input) would fail again. Running it again goes on where it stopped.

    Args:
        job: Job file (YAML), as the worker sees its path.
        date: ISO date. Empty: `days_back` days before the scheduled start.
        days_back: Used when `date` is empty.
        timezone: Time zone in which days are counted.
        accept: Guards that may not stop this run, of `rows`, `quarantine`, `budget`, `scores` and
            `drift`.

    Returns:
        Address of the run's manifest.
    """
    wanted: dict[str, object] = {"date": date, "days_back": days_back, "timezone": timezone}
    logger = get_run_logger()
    night = Night(job=load_job(job), date=_date_from(wanted), accept=known_guards(accept))
    observer = LineProgress(logger.info, PROGRESS_PERIOD_S)
    report = mailed(
        night.job, night.date, observer.say, lambda: run_night(night, observer, map_as_tasks)
    )
    create_markdown_artifact(
        render_markdown(report),
        key=f"nightscore-{report.job}-{report.date}".replace("_", "-"),
        description=f"{report.job} {report.date}: {report.rows:,} rows",
    )
    return report.manifest
