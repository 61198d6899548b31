"""The `score engine` commands."""

from __future__ import annotations

from typing import Annotated

import typer

from flows.commands.terminal import Date, JobPath, Json, Set, interruptible, load, observer, show

engine_app = typer.Typer(help="Build and look after a job's engines.", no_args_is_help=True)

Key = Annotated[str, typer.Argument(help="Key of the engine, or its first characters.")]


@engine_app.command()
def build(
    job: JobPath,
    date: Date,
    force: Annotated[bool, typer.Option("--force", help="Build even when there is one.")] = False,
    json: Json = False,
    set: Set = None,
) -> None:
    """Find or build the job's engine for this machine, from the rows of a date."""
    from flows.engine_tables import render_built
    from flows.engines import build_facts
    from pipeline.job_file import parse_date

    with interruptible("nothing was stored"):
        facts = build_facts(load(job, set), parse_date(date), observer(quiet=json).say, force=force)
    show(facts, render_built, as_json=json)


@engine_app.command("list")
def list_(job: JobPath, json: Json = False, set: Set = None) -> None:
    """List the engines in the job's store, newest first."""
    from flows.engine_tables import render_engines
    from flows.engines import list_facts

    show(list_facts(load(job, set)), render_engines, as_json=json)


@engine_app.command("show")
def show_(job: JobPath, key: Key, json: Json = False, set: Set = None) -> None:
    """Show one engine: what it is, how it was chosen, and what each rung of the ladder gave."""
    from flows.engine_tables import render_engine
    from flows.engines import show_facts

    show(show_facts(load(job, set), key), render_engine, as_json=json)


@engine_app.command()
def verify(
    job: JobPath,
    key: Annotated[str | None, typer.Argument(help="Only this engine.")] = None,
    json: Json = False,
    set: Set = None,
) -> None:
    """Check every file of the engines, and run the probe batch where this device can."""
    from flows.engine_tables import render_verdicts
    from flows.engines import verify_facts

    facts = verify_facts(load(job, set), key)
    show(facts, render_verdicts, as_json=json)
    if facts["damaged"]:
        raise typer.Exit(1)


@engine_app.command()
def rollback(
    job: JobPath,
    to: Annotated[
        str | None, typer.Option("--to", metavar="KEY", help="Not the one before, but this one.")
    ] = None,
    json: Json = False,
    set: Set = None,
) -> None:
    """Let the engine before the current one score again; a second rollback undoes the first."""
    from flows.engine_tables import render_rollback
    from flows.engines import rollback_facts

    show(rollback_facts(load(job, set), to), render_rollback, as_json=json)


@engine_app.command()
def gc(
    job: JobPath,
    keep: Annotated[int, typer.Option(help="Versions of each request that stay.", min=1)] = 3,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say it.")] = False,
    json: Json = False,
    set: Set = None,
) -> None:
    """Remove engines that no request needs, and what killed processes left behind."""
    from flows.engine_tables import render_garbage
    from flows.engines import gc_facts

    show(gc_facts(load(job, set), keep, dry_run=dry_run), render_garbage, as_json=json)
