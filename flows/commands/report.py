"""`score report` and `score compare`: what a night did, and how it differs from others."""

from __future__ import annotations

from typing import Annotated

import typer

from flows.commands.terminal import JobPath, Json, Set, load, show


def report(
    job: JobPath,
    date: Annotated[
        str | None, typer.Option(help="ISO date; by default that of the newest night.")
    ] = None,
    last: Annotated[
        int | None, typer.Option(help="Not one night: a table of so many, the newest ones.", min=1)
    ] = None,
    send: Annotated[
        bool, typer.Option("--send", help="Mail it, unless that was done; see the job's `mail`.")
    ] = False,
    json: Json = False,
    set: Set = None,
) -> None:
    """Show the report of a published date, mail it, or show the last nights in a table."""
    from flows.commands.terminal import show_report
    from flows.nights import last_facts, render_last, report_of
    from pipeline.errors import ConfigError
    from pipeline.job_file import parse_date

    if last is not None and (send or date is not None):
        raise ConfigError(
            f"--last: together with {'--send' if send else '--date'}; expected it alone. "
            "Ask for the table and for one night's report in two commands."
        )
    loaded, day = load(job, set), None if date is None else parse_date(date)
    if last is not None:
        show(last_facts(loaded, last), render_last, as_json=json)
    elif send:
        from flows.mailing.mail import render_sent, send_facts

        show(send_facts(loaded, report_of(loaded, day)), render_sent, as_json=json)
    else:
        show_report(report_of(loaded, day), as_json=json)


def compare(
    job: JobPath,
    before: Annotated[str, typer.Argument(metavar="DATE", help="ISO date of a night.")],
    now: Annotated[str, typer.Argument(metavar="DATE", help="ISO date of another one.")],
    json: Json = False,
    set: Set = None,
) -> None:
    """Show two published nights side by side: figures, scores, and what changed between them."""
    from flows.nights import compare_facts, render_comparison
    from pipeline.job_file import parse_date

    loaded, dates = load(job, set), [parse_date(date) for date in (before, now)]
    show(compare_facts(loaded, *dates), render_comparison, as_json=json)
