"""`score deploy`: register the deployments of a job with a Prefect server.

score/nightly    every night by the schedule, or any date by its form
score/backfill   past dates, by its form
score/alert      started by the alarms (flows/alarms.py)
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from flows.alarms import HEARTBEAT_S, alarms, automations, longest_gap_s
from pipeline.errors import ConfigError

if TYPE_CHECKING:
    from uuid import UUID

    from prefect.client.orchestration import PrefectClient

ENTRYPOINTS = {
    "nightly": "flows.nightly.score",
    "backfill": "flows.backfill_flow.backfill",
    "alert": "flows.alert.alert",
}
"""Module paths: a file path would put that file's folder first on `sys.path`."""
DESCRIPTIONS = {
    "nightly": "Score the day before, every night, and publish it.",
    "backfill": "Score the dates of a period that are not published.",
    "alert": "Tell somebody what the server noticed; its automations start this.",
}
TAG = "nightscore"
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
    """Work pool of type `process`; made when it is missing."""
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
        ConfigError: No server, a wrong schedule, or no such block.
    """
    _check(wanted)
    job, nightly = str(Path(wanted.job).resolve()), f"score/{wanted.name_of('nightly')}"
    registered = asyncio.run(_register(dataclasses.replace(wanted, job=job)))
    return {
        "deployment": nightly,
        "deployments": registered,
        "job": job,
        "cron": wanted.cron,
        "timezone": wanted.timezone,
        "work_pool": wanted.pool,
        "next": [
            f"prefect worker start --pool {wanted.pool} --type process",
            f"prefect deployment run {nightly}",
        ],
    }


def _check(wanted: Wanted) -> None:
    from prefect.client.schemas.schedules import CronSchedule
    from pydantic import ValidationError

    cron, timezone = wanted.cron, wanted.timezone
    if not os.environ.get("PREFECT_API_URL"):
        raise ConfigError(
            "PREFECT_API_URL: not set; expected the address of a Prefect server. Run "
            "`prefect server start` and export PREFECT_API_URL=http://127.0.0.1:4200/api."
        )
    try:
        ZoneInfo(timezone)
    except (ZoneInfoNotFoundError, ValueError):
        raise ConfigError(f"--timezone {timezone}: unknown; expected e.g. Europe/Zurich.") from None
    try:
        CronSchedule(cron=cron, timezone=timezone)
    except ValidationError:
        raise ConfigError(f"--cron {cron!r}: not a schedule; expected e.g. '30 0 * * *'.") from None


async def _register(wanted: Wanted) -> dict[str, str]:
    """Everything, and the deployments' ids by their names."""
    import httpx
    from prefect.client.orchestration import get_client

    try:
        async with get_client() as client:
            await _make_pool(client, wanted.pool)
            block = await _find_block(client, wanted.notify) if wanted.notify else None
            ids = {kind: await _apply(kind, wanted) for kind in ENTRYPOINTS}
            gap_s = await longest_gap_s(wanted.cron, wanted.timezone)
            watched = alarms(wanted.name_of("nightly"), gap_s)
            for automation in automations(watched, ids["alert"], block):
                await client.create_automation(automation)
    except httpx.TransportError as error:
        raise ConfigError(
            f"PREFECT_API_URL {os.environ['PREFECT_API_URL']}: {error or type(error).__name__}; "
            "expected a Prefect server there. Start it with `prefect server start`."
        ) from None
    return {f"score/{wanted.name_of(kind)}": str(identity) for kind, identity in ids.items()}


async def _make_pool(client: PrefectClient, name: str) -> None:
    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect.exceptions import ObjectNotFound

    try:
        found = await client.read_work_pool(name)
    except ObjectNotFound:
        await client.create_work_pool(WorkPoolCreate(name=name, type="process"))
        return
    if found.type != "process":
        raise ConfigError(
            f"--pool {name}: a work pool of type {found.type}; expected `process`. "
            "Name another pool; it is made when it is missing."
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
    from prefect.client.schemas.schedules import CronSchedule
    from prefect.types.entrypoint import EntrypointType

    module, _, name = ENTRYPOINTS[kind].rpartition(".")
    flow = getattr(import_module(module), name)
    parameters = {"job": wanted.job}
    schedules = []
    if kind == "nightly":
        parameters["timezone"] = wanted.timezone
        schedules.append(CronSchedule(cron=wanted.cron, timezone=wanted.timezone))
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
    for name in ("job", "cron", "timezone", "work_pool"):
        table.add_row(name.replace("_", " "), Text(str(facts[name])))
    return Group(table, Text("next:", style="dim"), *(Text(f"  {line}") for line in facts["next"]))
