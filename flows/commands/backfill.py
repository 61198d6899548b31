"""The `score backfill` command."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from flows.commands.terminal import (
    JobPath,
    Json,
    Set,
    errors,
    interruptible,
    load,
    number,
    observer,
    show,
)

First = Annotated[str, typer.Option("--from", metavar="DATE", help="First date of the period.")]
Last = Annotated[str, typer.Option("--to", metavar="DATE", help="Last date of the period.")]


def backfill(  # noqa: PLR0913  # each argument is an option of the command
    job: JobPath,
    first: First,
    last: Last,
    order: Annotated[
        Literal["oldest", "newest"], typer.Option(help="Which dates come first.")
    ] = "oldest",
    concurrency: Annotated[
        int, typer.Option(help="Dates at once, which share this machine's devices.", min=1)
    ] = 1,
    max_usd: Annotated[
        float | None,
        number("What the period may cost, earlier commands for it included."),
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="A date without input is a failure.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would be scored, and its cost.")
    ] = False,
    json: Json = False,
    set: Set = None,
) -> None:
    """Score the dates of a period that are not published; the same command goes on after a stop.

    Exit codes: 0 all done, or without input; 1 a date failed; 3 a guard or --max-usd stopped dates;
    75 interrupted.
    """
    from flows.backfills.backfill import BackfillRequest, run_backfill
    from flows.backfills.summary import BackfillSummary, render_summary
    from flows.cli import EXIT_INTERRUPTED
    from pipeline.errors import Interrupted

    request = BackfillRequest(
        job=load(job, set),
        first=first,
        last=last,
        order=order,
        concurrency=concurrency,
        max_usd=max_usd,
        strict=strict,
        dry_run=dry_run,
    )

    told: list[BackfillSummary] = []
    try:
        with interruptible("published dates and committed shards are kept"):
            run_backfill(request, observer(quiet=json), told.append)
    except Interrupted as stop:
        if not told:
            raise
        is_done = told[0].exit_code != EXIT_INTERRUPTED
        said = "all dates have ended; the mail about them may not be sent." if is_done else stop
        errors.print(f"interrupted: {said}", soft_wrap=True)
    # Once, and as it is told: what comes after it, such as the mail, changes nothing.
    summary = told[0]
    show(summary.to_dict() if json else summary, render_summary, as_json=json)
    raise typer.Exit(summary.exit_code)
