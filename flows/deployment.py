"""`score deploy`: register the deployment score/nightly with a Prefect server."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from flows.nightly import score
from pipeline.errors import ConfigError

NAME = "nightly"
ENTRYPOINT = "flows.nightly.score"
"""A module path: a file path would put that file's folder first on `sys.path`."""
TAGS = ["nightscore"]
NO_TELEMETRY = {"DO_NOT_TRACK": "1", "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}
"""For the process of each flow run: Prefect reads it before our flow is imported there."""
CONCURRENCY: dict[str, Any] = {
    "limit": 1,
    "collision_strategy": "ENQUEUE",
    "grace_period_seconds": 120,
}
"""One night at a time; a second one waits for the first."""


def deploy_nightly(job: str, cron: str, timezone: str, pool: str) -> dict[str, Any]:
    """Register or update score/nightly for a job.

    Relative paths in the job file count from where this is called, on the worker too.

    Args:
        job: Job file, already checked.
        cron: Schedule.
        timezone: Time zone of the schedule, and in which the flow counts days.
        pool: Work pool of type `process`; made when it is missing.

    Raises:
        ConfigError: No server, or a wrong schedule.
    """
    _check(cron, timezone)
    job_path = str(Path(job).resolve())
    identity = asyncio.run(_register(job_path, cron, timezone, pool))
    return {
        "deployment": f"score/{NAME}",
        "id": identity,
        "job": job_path,
        "cron": cron,
        "timezone": timezone,
        "work_pool": pool,
        "next": [
            f"prefect worker start --pool {pool} --type process",
            f"prefect deployment run score/{NAME}",
        ],
    }


def _check(cron: str, timezone: str) -> None:
    from prefect.client.schemas.schedules import CronSchedule
    from pydantic import ValidationError

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


async def _register(job: str, cron: str, timezone: str, pool: str) -> str:
    import httpx
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect.client.schemas.objects import ConcurrencyLimitConfig
    from prefect.client.schemas.schedules import CronSchedule
    from prefect.exceptions import ObjectNotFound
    from prefect.types.entrypoint import EntrypointType

    try:
        async with get_client() as client:
            try:
                found = await client.read_work_pool(pool)
                if found.type != "process":
                    raise ConfigError(
                        f"--pool {pool}: a work pool of type {found.type}; expected `process`. "
                        "Name another pool; it is made when it is missing."
                    )
            except ObjectNotFound:
                await client.create_work_pool(WorkPoolCreate(name=pool, type="process"))
    except httpx.HTTPError as error:
        raise ConfigError(
            f"PREFECT_API_URL {os.environ['PREFECT_API_URL']}: {error or type(error).__name__}; "
            "expected a Prefect server there. Start it with `prefect server start`."
        ) from None
    deployment = await score.ato_deployment(
        NAME,
        schedules=[CronSchedule(cron=cron, timezone=timezone)],
        parameters={"job": job, "timezone": timezone},
        tags=TAGS,
        description="Score the day before, every night, and publish it.",
        concurrency_limit=ConcurrencyLimitConfig(**CONCURRENCY),
        job_variables={"working_dir": os.getcwd(), "env": NO_TELEMETRY},
        work_pool_name=pool,
        entrypoint_type=EntrypointType.MODULE_PATH,
    )
    return str(await deployment.aapply())


def render_deployment(facts: dict[str, Any]) -> RenderableType:
    """What was registered, and what to type next."""
    table = Table(show_header=False, box=None, pad_edge=False)
    for name in ("deployment", "job", "cron", "timezone", "work_pool"):
        table.add_row(name.replace("_", " "), Text(str(facts[name])))
    return Group(table, Text("next:", style="dim"), *(Text(f"  {line}") for line in facts["next"]))
