"""The Prefect flow `score`: the same night as `score run`, as tasks that a server can watch."""

from __future__ import annotations

import datetime
import functools
import os
import threading
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

# Before Prefect is imported: it reads its settings then. No telemetry, from nobody's machine.
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
os.environ.setdefault("DO_NOT_TRACK", "1")

from prefect import flow, get_client, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import FlowRunPolicy
from prefect.runtime import flow_run
from prefect.task_runners import ThreadPoolTaskRunner
from prefect.utilities.annotations import quote
from pydantic import Field

from engines.errors import EngineError
from flows.cli import EXIT_INTERRUPTED, exit_code_of
from flows.hooks import cancelled, crashed, failed, speaks_for
from flows.lanes import Group
from flows.mailing.mail import mailed
from flows.night import run_night
from flows.run_names import title_of, wanted_date
from flows.run_page import PageProgress, quietly, warn_of_deadline
from pipeline.config import Job
from pipeline.errors import PipelineError, known_guards
from pipeline.job_file import load_job
from pipeline.report import RunReport
from pipeline.run import Night

MAX_TASKS_AT_ONCE = 64
"""Threads that only wait for lanes; `run_night` never asks for more than two per lane."""
NUM_RETRIES = 2
RETRY_DELAY_S = 120
"""Of a night that met something that may pass, such as a store out of reach."""
Guard = Literal["rows", "quarantine", "budget", "scores", "drift"]
"""Of `pipeline.errors.GUARDS`: Prefect's form makes a choice of them."""
# Any: Prefect types a flow's runner by a parameter that fits no runner of its own.
_TASK_RUNNER: Any = ThreadPoolTaskRunner(max_workers=MAX_TASKS_AT_ONCE)


def _run_name() -> str:
    return title_of(flow_run.parameters, flow_run.scheduled_start_time)


# No task retries: a lane replaces its own process, and the ledger, not Prefect, knows what is done.
# No cache: Prefect's cache reports success even when the output has gone.
@task(name="score shards", task_run_name="{label}", cache_policy=NO_CACHE)
def _score_group(label: str, score_group: Callable[[Group], None], group: Group) -> None:
    del label  # it names the task run
    score_group(group)


def map_as_tasks(
    title: str, score_group: Callable[[Group], None], groups: Sequence[Group], num_callers: int
) -> None:
    """Hand out groups as task runs, `num_callers` at a time; `title` is the job and the date."""
    slots = threading.Semaphore(num_callers)
    running = []
    for number, group in enumerate(groups, 1):
        slots.acquire()
        # A later attempt takes shards in an order of its own: only the number of them says much.
        shards = f"{len(group)} shards" if len(group) > 1 else "1 shard"
        label = f"{title}: group {number} of {len(groups)}, {shards} from {group[0].name}"
        # Quoted, or Prefect searches every shard for futures.
        future = _score_group.submit(label, score_group, quote(group))
        future.add_done_callback(lambda _: slots.release())
        running.append(future)
    for future in running:
        future.result()  # raises what the task raised


def may_pass(error: Exception) -> bool:
    """Whether the same night may succeed later: a guard, a wrong job or damaged data stay."""
    is_ours = isinstance(error, (PipelineError, EngineError))
    return not is_ours or exit_code_of(error) == EXIT_INTERRUPTED


def _on_lanes(job: Job, title: str, score_it: Callable[..., RunReport]) -> RunReport:
    """Call it; with lanes that are task runs on Ray where the job asks for that."""
    if job.lanes.runner != "ray":
        return score_it()
    from flows.on_ray.lanes import missing

    try:
        from flows.on_ray.tasks import ray_lanes
    except ModuleNotFoundError as error:
        raise missing(error) from None

    with ray_lanes(job, title) as lanes:
        return score_it(lanes=lanes)


def _do_not_retry() -> None:
    """For this run; Prefect knows no condition for the retries of a flow."""
    if flow_run.id is not None:
        with get_client(sync_client=True) as client:
            client.update_flow_run(flow_run.id, empirical_policy=FlowRunPolicy(retries=0))


@flow(
    name="score",
    flow_run_name=_run_name,
    description="Score one date of a job, publish it, and report what it cost.",
    task_runner=_TASK_RUNNER,
    retries=NUM_RETRIES,
    retry_delay_seconds=RETRY_DELAY_S,
    on_failure=[failed],
    on_crashed=[crashed],
    on_cancellation=[cancelled],
)
def score(
    job: str,
    date: datetime.date | None = None,
    days_back: Annotated[int, Field(ge=0)] = 1,
    timezone: str = "UTC",
    accept: tuple[Guard, ...] = (),
) -> str:
    """Score one date of a job; a published date is left as it is.

    What may pass (a store out of reach) is tried again, twice; what would fail again (a guard, a
    wrong job, changed input) is not. Running it again goes on where it stopped.

    Args:
        job: Job file (YAML), as the worker sees its path.
        date: The date to score. Empty: `days_back` days before the scheduled start.
        days_back: Used when `date` is empty. 1: the day before the night.
        timezone: Time zone in which days are counted, such as Europe/Zurich.
        accept: Guards that may not stop this run. Look at what they found first.

    Returns:
        Address of the run's manifest.
    """
    asked: dict[str, Any] = {"date": date, "days_back": days_back, "timezone": timezone}
    try:
        day = wanted_date(asked, flow_run.scheduled_start_time)
        night = Night(job=load_job(job), date=day, accept=known_guards(accept))
        title = f"{night.job.name} {day}"
        page = PageProgress(title, get_run_logger().info)
        score_it = functools.partial(
            run_night,
            night,
            page,
            functools.partial(map_as_tasks, title),
            on_warning=warn_of_deadline(night.job.name, title),
        )
        on_lanes = functools.partial(_on_lanes, night.job, title, score_it)
        speaks_for(str(flow_run.id))
        report = mailed(lambda: night, page.say, on_lanes)
    except Exception as error:
        if not may_pass(error):
            quietly(_do_not_retry)
        raise
    page.publish(report)
    return report.manifest
