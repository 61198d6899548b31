"""The `score deploy` command."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from flows.commands.terminal import JobPath, Json, load, number, show


def deploy(  # noqa: PLR0913  # each argument is an option of the command
    job: JobPath,
    cron: Annotated[str, typer.Option(help="Schedule, as cron.")] = "30 0 * * *",
    timezone: Annotated[str, typer.Option(help="Time zone of the schedule.")] = "UTC",
    pool: Annotated[str, typer.Option(help="Work pool; made when it is missing.")] = "nightscore",
    prefix: Annotated[
        str, typer.Option(help="Of the deployments' names, where a server has several jobs.")
    ] = "",
    notify: Annotated[
        str | None,
        typer.Option(
            metavar="TYPE/NAME",
            help="Notification block that the server itself sends with an alarm.",
        ),
    ] = None,
    wait_s: Annotated[float, number("Seconds to wait for a server that is only starting.")] = 0.0,
    json: Json = False,
) -> None:
    """Register score/nightly, score/backfill and alarms with the Prefect server.

    The server is the one at PREFECT_API_URL.
    """
    from flows.deployment import Wanted, render_deployment
    from flows.deployment import deploy as register
    from flows.prefect_server import wait_for

    load(job, None)  # a wrong job file should fail now and not at midnight
    wait_for(os.environ.get("PREFECT_API_URL", ""), wait_s)
    wanted = Wanted(job=job, cron=cron, timezone=timezone, pool=pool, prefix=prefix, notify=notify)
    show(register(wanted), render_deployment, as_json=json)
