"""The `score status` command."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Annotated, Any

import typer

from flows.commands.terminal import JobPath, Json, Set, console, load, show

WATCH_PERIOD_S = 2.0


def status(
    job: JobPath,
    date: Annotated[str | None, typer.Option("--date", help="Only this date; ISO.")] = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="Look again every two seconds until no run is at work.")
    ] = False,
    json: Json = False,
    set: Set = None,
) -> None:
    """Say which dates are published, and how far a run at work has come: rate, end, devices."""
    from flows.status import render_status, status_facts
    from pipeline.job_file import parse_date

    loaded, day = load(job, set), None if date is None else parse_date(date)
    facts = status_facts(loaded, day)
    if not watch:
        show(facts, render_status, as_json=json)
        return
    try:
        _watch(facts, lambda: status_facts(loaded, day), as_json=json)
    except KeyboardInterrupt:  # the usual way to stop watching
        return


def _watch(facts: Any, look: Callable[[], Any], *, as_json: bool) -> None:
    from rich.live import Live

    from flows.status import render_status

    with ExitStack() as stack:
        page = None
        if console.is_terminal and not as_json:
            page = stack.enter_context(Live(console=console, auto_refresh=False))
        while True:
            if page is None:
                show(facts, render_status, as_json=as_json)
            else:
                page.update(render_status(facts), refresh=True)
            if not any(run["working"] for run in facts["unfinished"]):
                return
            time.sleep(WATCH_PERIOD_S)
            facts = look()
