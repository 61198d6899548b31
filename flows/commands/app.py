"""The commands of `score`; what they need is imported when they are called."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows.commands.backfill import backfill
from flows.commands.bench import bench
from flows.commands.deploy import deploy
from flows.commands.engine import engine_app
from flows.commands.plan import plan
from flows.commands.report import compare, report
from flows.commands.setup import doctor, init, schema
from flows.commands.status import status
from flows.commands.terminal import (
    Accept,
    Date,
    JobPath,
    Json,
    Set,
    console,
    interruptible,
    load,
    number,
    observer,
    print_json,
    show,
    show_report,
)
from flows.commands.versions import gc, rollback

if TYPE_CHECKING:
    from pipeline.report import RunReport
    from pipeline.run import Night

app = typer.Typer(
    name="score",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def show_version(wanted: bool) -> None:
    """Print it and end the command."""
    if wanted:
        from importlib.metadata import version

        console.print(f"nightscore {version('nightscore')}", highlight=False)
        raise typer.Exit


@app.callback()
def score(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version and exit.", callback=show_version, is_eager=True
        ),
    ] = False,
) -> None:
    """Score every new row of a Parquet dataset overnight, and lose nothing."""


app.add_typer(engine_app, name="engine")
app.command()(init)
app.command()(schema)
app.command()(doctor)
app.command()(bench)


@app.command()
def run(
    job: JobPath,
    date: Date,
    force: Annotated[
        bool,
        typer.Option("--force", help="Score a published date again, and publish a new version."),
    ] = False,
    accept: Accept = None,
    json: Json = False,
    set: Set = None,
) -> None:
    """Score one date and publish it; a published date is left as it is."""
    score_night(job, date, set, again="all" if force else "no", accept=accept, as_json=json)


@app.command()
def requeue(
    job: JobPath, date: Date, accept: Accept = None, json: Json = False, set: Set = None
) -> None:
    """Try the rows of a date that are in quarantine again, and publish the outcome.

    Only shards with such rows are scored, and those of files that have changed. A published date
    gets a new version; it is left as it is where there are neither.
    """
    score_night(job, date, set, again="quarantine", accept=accept, as_json=json)


def score_night(
    job: str, date: str, overrides: list[str] | None, *, again: Any, accept: Any, as_json: bool
) -> None:
    """Score a date, and print its report."""
    from flows.devices import start_lanes
    from flows.mailing.mail import mailed
    from pipeline.errors import known_guards
    from pipeline.job_file import parse_date

    loaded, wanted = load(job, overrides), parse_date(date)
    accepted = known_guards(accept or ())

    def say(text: str) -> None:
        observer(quiet=as_json).say(text)

    def ask() -> Night:
        from pipeline.run import Night

        return Night(job=loaded, date=wanted, again=again, accept=accepted)

    def score() -> RunReport:
        lanes = start_lanes(loaded)  # their processes import what they need while this one does
        from flows.night import process_start, run_night
        from pipeline.run import RunClock

        watcher = observer(quiet=as_json)
        return run_night(ask(), watcher, clock=RunClock(started=process_start()), lanes=lanes)

    with interruptible():
        found = mailed(ask, say, score)
    show_report(found, as_json=as_json)


app.command()(plan)
app.command()(backfill)
app.command()(rollback)
app.command()(gc)
app.command()(report)
app.command()(compare)


@app.command()
def verify(job: JobPath, date: Date, json: Json = False, set: Set = None) -> None:
    """Recount a published date against its input, with code that shares nothing with the run."""
    from pipeline.job_file import parse_date
    from pipeline.storage import open_storage
    from pipeline.verify import verify_published
    from pipeline.versions import published_folder

    loaded, day = load(job, set), parse_date(date)
    # What verifies takes a bucket that is not there for one without the date; this one says so.
    open_storage(loaded.output.uri).list_folders(published_folder(loaded.name, day))
    verdict = verify_published(loaded.output.uri, loaded.name, day)
    if json:
        print_json(verdict)
    else:
        from rich.text import Text

        said = (
            f" {verdict['rows']:,} rows = {verdict['scored']:,} scored + "
            f"{verdict['quarantined']:,} quarantined, {verdict['parts']:,} parts, "
            f"{verdict['unreadable_files']:,} unreadable files, run {verdict['run_id']}"
        )
        console.print(Text.assemble(("verified", "bold green"), said))


app.command()(status)


@app.command()
def demo(
    rows: Annotated[
        int | None,
        typer.Option(help="Rows to make and score: 4000 pictures, or 200000 users.", min=1000),
    ] = None,
    features: Annotated[
        bool, typer.Option("--features", help="Users with numeric features, not pictures.")
    ] = False,
    folder: Annotated[str, typer.Option(help="Where data and scores go.")] = "nightscore-demo",
    json: Json = False,
) -> None:
    """Make a night's worth of rows and score them; another date each time."""
    from flows.demo import run_demo

    with interruptible():
        result = run_demo(folder, rows, features, observer(quiet=json))
    show_report(result, as_json=json)


@app.command()
def tune(
    job: JobPath,
    date: Date,
    budget_s: Annotated[float, number("Seconds to search.", min=1.0)] = 300.0,
    forget: Annotated[
        bool, typer.Option("--forget", help="Do not search: go back to the defaults.")
    ] = False,
    json: Json = False,
    set: Set = None,
) -> None:
    """Search faster settings for this machine on the rows of a date; later runs use them."""
    from flows.measuring.tune import forget_facts, render_forgotten, render_tuning, tune_facts
    from pipeline.job_file import parse_date

    loaded, wanted = load(job, set), parse_date(date)
    if forget:
        show(forget_facts(loaded), render_forgotten, as_json=json)
        return
    with interruptible("settings that were accepted until then are kept"):
        facts = tune_facts(loaded, wanted, budget_s, observer(quiet=json).say)
    show(facts, render_tuning, as_json=json)


app.command()(deploy)
