"""`score deploy`: register the deployments of a job with a Prefect server.

score/nightly    every night by the schedule, or any date by its form
score/backfill   past dates, by its form
score/alert      started by the alarms (flows/alarms.py)
"""

from __future__ import annotations

import asyncio
import dataclasses
import datetime
import os
import re
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from flows.alarms import HEARTBEAT_S, alarms, automations, longest_gap_s, next_nights
from flows.run_names import job_name
from pipeline.errors import ConfigError, one_line
from pipeline.time_zone import find_zone

if TYPE_CHECKING:
    from uuid import UUID

    from prefect.client.orchestration import PrefectClient

T = TypeVar("T")
ENTRYPOINTS = {
    "nightly": "flows.nightly.score",
    "backfill": "flows.backfills.flow.backfill",
    "alert": "flows.alert.alert",
}
"""Module paths: a file path would put that file's folder first on `sys.path`."""
DESCRIPTIONS = {
    "nightly": "Score the day before, every night, and publish it.",
    "backfill": "Score the dates of a period that are not published.",
    "alert": "Tell somebody what the server noticed; its automations start this.",
}
TAG = "nightscore"
PREFIX = re.compile(r"[\w .-]*")
"""Prefect takes others, too, which its automations would read as patterns or templates."""
CRON_FIELDS = 5
POOL_TYPES = ("process", "kubernetes")
"""For the latter see infra/kubernetes/prefect: its base job template has what we set."""
PAUSES_S = (1.0, 2.0, 4.0, 8.0)
HORIZON = datetime.timedelta(days=99)
"""A server plans the runs of the next 100 days, unless its settings say otherwise."""
PLANNING_S = 20
"""The server looks for new schedules every five seconds."""
NOT_PLANNED = (
    "none planned by the server yet. With SQLAlchemy 2.1, Prefect 3.8 plans no runs: "
    "`pip install 'sqlalchemy<2.1'` where the server runs, and start it again, without "
    "--background to see what it says"
)
ENVIRONMENT = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(HEARTBEAT_S),
}
"""For the process of each flow run: Prefect reads it before our flow is imported there."""
CONCURRENCY: dict[str, dict[str, Any]] = {
    name: {"limit": 1, "collision_strategy": strategy, "grace_period_seconds": 120}
    for name, strategy in (("nightly", "CANCEL_NEW"), ("backfill", "ENQUEUE"))
}
"""One night at a time: one that would overlap is cancelled, and its date is next night's or a
backfill's. Backfills wait for each other."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """What is to be registered."""

    job: str
    """Job file, already checked."""
    cron: str = "30 0 * * *"
    timezone: str = "UTC"
    """Of the schedule, and in which the flow counts days."""
    pool: str = "nightscore"
    """Work pool, of `POOL_TYPES`; one of type process is made when it is missing."""
    prefix: str = ""
    """Of the deployments' names, where a server has several jobs."""
    notify: str | None = None
    """A notification block, `type/name`, that the server itself sends with an alarm."""

    def name_of(self, kind: str) -> str:
        """The deployment's name, without its flow's."""
        return f"{self.prefix}{kind}"


def deploy(wanted: Wanted) -> dict[str, Any]:
    """Register or update the deployments of a job.

    Relative paths in the job file count from where this is called, on the worker too.

    Raises:
        ConfigError: No server, a wrong schedule, no such block, or another job has these names.
    """
    nights = _check(wanted)
    job, nightly = str(Path(wanted.job).resolve()), f"score/{wanted.name_of('nightly')}"
    wanted = dataclasses.replace(wanted, job=job)
    with _server_errors():
        replaced = _patiently(lambda client: _replaced(client, wanted))
        registered, next_night = _patiently(lambda client: _register(client, wanted, nights))
    return {
        "deployment": nightly,
        "deployments": registered,
        "job": job,
        "replaces": replaced,
        "cron": wanted.cron,
        "timezone": wanted.timezone,
        "work_pool": wanted.pool,
        "next_night": next_night,
        "next": [
            f"prefect worker start --pool {wanted.pool}",
            f"prefect deployment run {nightly}",
        ],
    }


def _check(wanted: Wanted) -> list[datetime.datetime]:
    """When the next nights begin."""
    if not os.environ.get("PREFECT_API_URL"):
        raise ConfigError(
            "PREFECT_API_URL: not set; expected the address of a Prefect server. Run "
            "`prefect server start` and export PREFECT_API_URL=http://127.0.0.1:4200/api."
        )
    if not PREFIX.fullmatch(wanted.prefix):
        raise ConfigError(
            f"--prefix {wanted.prefix!r}: not for a name; expected letters, digits, spaces and any "
            "of `-_.`, such as users-."
        )
    try:
        find_zone(wanted.timezone)
    except ValueError as error:
        raise ConfigError(f"--{error}.") from None
    # Prefect takes a sixth one as seconds: a night every second, where a minute was meant.
    if (num_fields := len(wanted.cron.split())) > CRON_FIELDS:
        raise ConfigError(
            f"--cron {wanted.cron!r}: {num_fields} fields; expected five: minute, hour, day, month "
            "and weekday. Leave out seconds and years."
        )
    try:
        return asyncio.run(next_nights(wanted.cron, wanted.timezone))
    except ValueError:  # no cron, or dates such as February 30
        raise ConfigError(
            f"--cron {wanted.cron!r}: no schedule, or its day never comes; expected e.g. "
            "'30 0 * * *'."
        ) from None


@contextmanager
def _server_errors() -> Iterator[None]:
    """Say in words what is wrong with the server."""
    import httpx

    api = os.environ["PREFECT_API_URL"]
    try:
        yield
    except httpx.TransportError as error:
        raise ConfigError(
            f"PREFECT_API_URL {api}: {error or type(error).__name__}; expected a Prefect server "
            "there. Start it with `prefect server start`."
        ) from None
    except httpx.HTTPStatusError as error:
        raise ConfigError(
            f"PREFECT_API_URL {api}: {one_line(error)}; expected it to take the deployments. Look "
            "whether its Prefect is 3.8 as here; started without --background it says more."
        ) from None


def _patiently(ask: Callable[[PrefectClient], Awaitable[T]]) -> T:
    """Ask again where the server failed: its SQLite may be locked, mostly after its start."""
    from prefect.exceptions import PrefectHTTPStatusError

    for pause_s in PAUSES_S:
        try:
            return asyncio.run(_ask(ask))
        except PrefectHTTPStatusError as error:
            if error.response.status_code < HTTPStatus.INTERNAL_SERVER_ERROR:
                raise
        time.sleep(pause_s)
    return asyncio.run(_ask(ask))


async def _ask(ask: Callable[[PrefectClient], Awaitable[T]]) -> T:
    from prefect.client.orchestration import get_client

    async with get_client() as client:
        return await ask(client)


async def _replaced(client: PrefectClient, wanted: Wanted) -> str | None:
    """The job file whose nights these will be no more; one of another job is not replaced.

    Its file may be on another machine only: then nobody knows which job it is.
    """
    from prefect.exceptions import ObjectNotFound

    name = f"score/{wanted.name_of('nightly')}"
    try:
        found = await client.read_deployment_by_name(name)
    except ObjectNotFound:
        return None
    job = str(found.parameters.get("job", ""))
    if job in ("", wanted.job):
        return None
    ours, theirs = job_name(wanted.job), job_name(job)
    if os.path.exists(job) and ours != theirs:
        raise ConfigError(
            f"{name}: scores {theirs} ({job}), which would have no more nights; expected {ours}. "
            f"Add `--prefix {ours}-`, or remove it with `prefect deployment delete {name}`."
        )
    return job


async def _register(
    client: PrefectClient, wanted: Wanted, nights: Sequence[datetime.datetime]
) -> tuple[dict[str, str], str | None]:
    """Everything; the deployments' ids by their names, and when the first night begins."""
    await _make_pool(client, wanted.pool)
    block = await _find_block(client, wanted.notify) if wanted.notify else None
    ids = {kind: await _apply(kind, wanted) for kind in ENTRYPOINTS}
    watched = alarms(wanted.name_of("nightly"), longest_gap_s(nights))
    for automation in automations(watched, ids["alert"], block):
        await client.create_automation(automation)
    named = {f"score/{wanted.name_of(kind)}": str(identity) for kind, identity in ids.items()}
    if nights[0] > datetime.datetime.now(datetime.UTC) + HORIZON:
        return named, nights[0].astimezone(datetime.UTC).isoformat()
    return named, await _next_night(client, ids["nightly"])


async def _next_night(client: PrefectClient, nightly: UUID) -> str | None:
    """When the first night begins, ISO 8601; None: the server has not planned any in time.

    A server can take a schedule and never plan a run of it: then nothing else says so.
    """
    from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterId
    from prefect.client.schemas.sorting import FlowRunSort

    wanted = DeploymentFilter(id=DeploymentFilterId(any_=[nightly]))
    for _ in range(PLANNING_S):
        runs = await client.read_flow_runs(
            deployment_filter=wanted, sort=FlowRunSort.EXPECTED_START_TIME_DESC
        )
        planned = [
            run.expected_start_time
            for run in runs
            if run.auto_scheduled and run.state is not None and run.state.is_scheduled()
        ]
        found = min((moment for moment in planned if moment is not None), default=None)
        if found is not None:
            return str(found.isoformat())
        await asyncio.sleep(1)
    return None


async def _make_pool(client: PrefectClient, name: str) -> None:
    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect.exceptions import ObjectNotFound

    try:
        found = await client.read_work_pool(name)
    except ObjectNotFound:
        await client.create_work_pool(WorkPoolCreate(name=name, type="process"))
        return
    if found.type not in POOL_TYPES:
        raise ConfigError(
            f"--pool {name}: a work pool of type {found.type}; expected {' or '.join(POOL_TYPES)}. "
            "Name another pool; one of type process is made when it is missing."
        )


async def _find_block(client: PrefectClient, slug: str) -> UUID:
    from prefect.exceptions import ObjectNotFound

    kind, _, name = slug.partition("/")
    try:
        return (await client.read_block_document_by_name(name, kind)).id
    except ObjectNotFound:
        raise ConfigError(
            f"--notify {slug}: no such block; expected type/name of a notification block. Make one "
            "on the page Blocks of Prefect, such as slack-webhook/ops; `prefect block ls` lists "
            "them."
        ) from None


async def _apply(kind: str, wanted: Wanted) -> UUID:
    from prefect.client.schemas.objects import ConcurrencyLimitConfig
    from prefect.schedules import Cron
    from prefect.types.entrypoint import EntrypointType

    module, _, name = ENTRYPOINTS[kind].rpartition(".")
    flow = getattr(import_module(module), name)
    parameters = {"job": wanted.job}
    schedules = []
    if kind == "nightly":
        parameters["timezone"] = wanted.timezone
        schedules.append(Cron(wanted.cron, timezone=wanted.timezone, slug=kind))
    limit = CONCURRENCY.get(kind)
    deployment = await flow.ato_deployment(
        wanted.name_of(kind),
        schedules=schedules,
        parameters=parameters,
        tags=[TAG, wanted.name_of(kind)],
        description=DESCRIPTIONS[kind],
        concurrency_limit=ConcurrencyLimitConfig(**limit) if limit else None,
        job_variables={"working_dir": os.getcwd(), "env": ENVIRONMENT},
        work_pool_name=wanted.pool,
        entrypoint_type=EntrypointType.MODULE_PATH,
    )
    identity: UUID = await deployment.aapply()
    return identity


def render_deployment(facts: dict[str, Any]) -> RenderableType:
    """What was registered, and what to type next."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_row("deployments", Text(", ".join(facts["deployments"])))
    if facts["replaces"]:
        table.add_row("instead of", Text(facts["replaces"], style="yellow"))
    for name in ("job", "cron", "timezone", "work_pool"):
        table.add_row(name.replace("_", " "), Text(str(facts[name])))
    night = facts["next_night"]
    table.add_row("next night", Text(night) if night else Text(NOT_PLANNED, style="yellow"))
    return Group(table, Text("next:", style="dim"), *(Text(f"  {line}") for line in facts["next"]))
