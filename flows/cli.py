"""The `score` command.

Exit codes: 0 done or already published; 1 failed; 2 wrong use or configuration; 3 a guard stopped
publication; 75 interrupted, resumable by the same command.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.text import Text

from engines.errors import EngineError, EngineNotFoundError, ModelError
from pipeline.errors import ConfigError, Interrupted, PipelineError

app = typer.Typer(
    name="score",
    help="Score every new row of a Parquet dataset overnight, and lose nothing.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
engine_app = typer.Typer(help="Look at the engines in a job's store.", no_args_is_help=True)
app.add_typer(engine_app, name="engine")

JobPath = Annotated[str, typer.Argument(metavar="JOB", help="Job file (YAML).", show_default=False)]
Date = Annotated[str, typer.Option("--date", help="ISO date of the run, such as 2026-11-20.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Replace a value, such as output.uri=/tmp/x."),
]

EXIT_INTERRUPTED = 75
console = Console()
errors = Console(stderr=True)


def main() -> None:
    """Console entry point: runs a command and turns errors into one sentence and an exit code."""
    try:
        app(standalone_mode=False)
    except typer.Exit as stop:
        sys.exit(stop.exit_code)
    except (typer.Abort, KeyboardInterrupt):  # in a command that has nothing to resume
        sys.exit(EXIT_INTERRUPTED)
    except Exception as error:
        _fail(error)


def _fail(error: Exception) -> NoReturn:
    usage = getattr(error, "format_message", None)  # click's errors of usage
    if usage is not None:
        error = ConfigError(f"{usage().rstrip('.')}. See `score --help`.")
    is_ours = isinstance(error, (PipelineError, EngineError, OSError))
    if not is_ours and not type(error).__module__.startswith("botocore"):
        raise error
    code = exit_code_of(error)
    if "--json" in sys.argv:
        status = "interrupted" if code == EXIT_INTERRUPTED else "failed"
        print_json({"status": status, "exit_code": code, "error": str(error)})
    label = "interrupted" if code == EXIT_INTERRUPTED else "error"
    errors.print(Text.assemble((f"{label}: ", "bold red"), str(error)), soft_wrap=True)
    sys.exit(code)


def exit_code_of(error: Exception) -> int:
    """The exit code for an error that the product raises on purpose."""
    if isinstance(error, PipelineError):
        return error.exit_code
    return 2 if isinstance(error, (ModelError, EngineNotFoundError)) else 1


def print_json(value: Any) -> None:
    """One JSON object on standard output."""
    sys.stdout.write(json.dumps(value, ensure_ascii=False, default=str) + "\n")


class _Stop(BaseException):
    """Raised where a signal meets the program; no `except Exception` on the way may take it."""


@contextmanager
def interruptible() -> Iterator[None]:
    """Turn SIGINT and SIGTERM into `Interrupted`: lanes end, and exit code 75 says resume."""
    received: list[str] = []

    def stop(number: int, _: object) -> None:
        signal.signal(number, signal.SIG_IGN)  # once is enough; cleaning up must not be disturbed
        received.append(signal.Signals(number).name)
        raise _Stop

    previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except BaseException:
        # In the middle of an import a signal may come out as another error: what counts is
        # that there was one.
        if not received:
            raise
        raise Interrupted(
            f"{received[0]} received; committed shards are kept. "
            "Run the same command again to go on."
        ) from None
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def observer(*, quiet: bool) -> Any:
    """Bars on a terminal, lines elsewhere; always on standard error."""
    from flows.progress import LineProgress, LiveProgress

    if errors.is_terminal and not quiet:
        return LiveProgress(errors)
    return LineProgress(
        lambda line: errors.print(line, highlight=False, markup=False, soft_wrap=True)
    )


def _load(job: str, overrides: list[str] | None) -> Any:
    from pipeline.config import load_job

    return load_job(job, overrides or [])


@app.command()
def run(job: JobPath, date: Date, json: Json = False, set: Set = None) -> None:
    """Score one date and publish it; a published date is left as it is."""
    from flows.night import process_start, run_night
    from pipeline.config import parse_date

    with interruptible():
        report = run_night(
            _load(job, set), parse_date(date), observer(quiet=json), started=process_start()
        )
    show_report(report, as_json=json)


def show_report(report: Any, *, as_json: bool) -> None:
    """Print a report as the user asked for it."""
    from pipeline.report_text import render_text

    if as_json:
        print_json(report.to_dict())
    else:
        console.print(render_text(report))


@app.command()
def plan(job: JobPath, date: Date, json: Json = False, set: Set = None) -> None:
    """Say what a run would do, from footers alone; nothing is written."""
    from flows.inspect import plan_facts, render_plan
    from pipeline.config import parse_date

    facts = plan_facts(_load(job, set), parse_date(date))
    _show(facts, render_plan, as_json=json)


@app.command()
def verify(job: JobPath, date: Date, json: Json = False, set: Set = None) -> None:
    """Recount a published date against its input, with code that shares nothing with the run."""
    from pipeline.config import parse_date
    from pipeline.verify import verify_published

    loaded = _load(job, set)
    verdict = verify_published(loaded.output.uri, loaded.name, parse_date(date))
    if json:
        print_json(verdict)
    else:
        console.print(
            f"[bold green]verified[/] {verdict['rows']:,} rows = {verdict['scored']:,} scored + "
            f"{verdict['quarantined']:,} quarantined, {verdict['parts']:,} parts, "
            f"run {verdict['run_id']}",
            highlight=False,
        )


@app.command()
def status(job: JobPath, json: Json = False, set: Set = None) -> None:
    """List the dates of a job: published, or how far an unfinished run has come."""
    from flows.inspect import render_status, status_facts

    _show(status_facts(_load(job, set)), render_status, as_json=json)


@app.command()
def report(job: JobPath, date: Date, json: Json = False, set: Set = None) -> None:
    """Show the report of a published date."""
    from pipeline.config import parse_date
    from pipeline.publish import read_report
    from pipeline.storage import open_storage

    loaded = _load(job, set)
    found = read_report(open_storage(loaded.output.uri), loaded.name, parse_date(date))
    show_report(found, as_json=json)


@app.command()
def doctor(json: Json = False) -> None:
    """Say what this machine can run, and what is missing for more."""
    from flows.doctor import doctor_facts, render_doctor

    _show(doctor_facts(), render_doctor, as_json=json)


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
def deploy(
    job: JobPath,
    cron: Annotated[str, typer.Option(help="Schedule, as cron.")] = "30 0 * * *",
    timezone: Annotated[str, typer.Option(help="Time zone of the schedule.")] = "UTC",
    pool: Annotated[str, typer.Option(help="Work pool; made when it is missing.")] = "nightscore",
    json: Json = False,
) -> None:
    """Register the deployment score/nightly with the Prefect server at PREFECT_API_URL."""
    from flows.deployment import deploy_nightly, render_deployment

    _load(job, None)  # a wrong job file should fail now and not at midnight
    _show(deploy_nightly(job, cron, timezone, pool), render_deployment, as_json=json)


@engine_app.command("list")
def engine_list(job: JobPath, json: Json = False, set: Set = None) -> None:
    """List the engines in the job's store."""
    from flows.inspect import engine_facts, render_engines

    _show(engine_facts(_load(job, set)), render_engines, as_json=json)


@engine_app.command("show")
def engine_show(
    job: JobPath,
    key: Annotated[str, typer.Argument(help="Key of the engine, or its first characters.")],
    json: Json = False,
    set: Set = None,
) -> None:
    """Show one engine: what it is, how it was chosen, and what each rung of the ladder gave."""
    from flows.inspect import one_engine_facts, render_engine

    _show(one_engine_facts(_load(job, set), key), render_engine, as_json=json)


def _show(facts: Any, render: Callable[[Any], Any], *, as_json: bool) -> None:
    if as_json:
        print_json(facts)
    else:
        console.print(render(facts))


if __name__ == "__main__":
    main()
