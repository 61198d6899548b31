"""`score rollback` and `score gc`: go back to an earlier version, and remove what nobody needs."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from flows.commands.terminal import Date, JobPath, Json, Set, load, number, show

AGE_DAYS = 7.0
AT_WORK_S = 3_600.0
"""Whoever touched something within this time may still be at work, whatever age is asked for."""


def rollback(
    job: JobPath,
    date: Date,
    to: Annotated[
        str | None,
        typer.Option(help="Run id of the version; by default the one that was replaced last."),
    ] = None,
    json: Json = False,
    set: Set = None,
) -> None:
    """Publish an earlier version of a date again; the current one is kept."""
    from pipeline.finish import already_published
    from pipeline.job_file import parse_date
    from pipeline.storage import open_storage
    from pipeline.versions import roll_back

    loaded = load(job, set)
    output = open_storage(loaded.output.uri)
    now = roll_back(output, loaded.name, parse_date(date), to)
    already_published(loaded, output, now)
    facts = {
        "job": now.job,
        "date": now.date,
        "version": now.version,
        "run_id": now.run_id,
        "replaces": now.manifest["replaces"],
        "output": f"{output.uri}/{now.folder}",
    }
    show(facts, _render_rollback, as_json=json)


def _render_rollback(facts: dict[str, Any]) -> str:
    return (
        f"published: {facts['date']} is version {facts['version']}, run {facts['run_id']}; "
        f"`score rollback` goes back to run {facts['replaces']}"
    )


def gc(  # noqa: PLR0913  # each argument is an option of the command
    job: JobPath,
    older_than_days: Annotated[
        float,
        number("Leave alone what is younger, and runs at work since; an hour at least."),
    ] = AGE_DAYS,
    keep_versions: Annotated[
        int, typer.Option(help="Replaced versions of a date to keep for `score rollback`.", min=0)
    ] = 1,
    unfinished: Annotated[
        bool, typer.Option("--unfinished", help="Also runs that were never published.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    json: Json = False,
    set: Set = None,
) -> None:
    """Remove what no published, kept or unfinished run needs: orphans, leftovers, old versions."""
    import time

    from pipeline.gc import GcRules, collect, find_garbage, summary
    from pipeline.storage import open_storage

    loaded = load(job, set)
    output = open_storage(loaded.output.uri)
    rules = GcRules(
        before=time.time() - max(older_than_days * 86_400, AT_WORK_S),
        keep_versions=keep_versions,
        unfinished=unfinished,
    )
    garbage = find_garbage(output, loaded.name, rules)
    if not dry_run:
        collect(output, garbage)
    facts = {"job": loaded.name, "dry_run": dry_run, **summary(garbage)}
    show(facts, _render_gc, as_json=json)


def _render_gc(facts: dict[str, Any]) -> Any:
    from rich.table import Table

    if not facts["num_files"] and not facts["num_uploads"]:
        return "nothing to remove"
    table = Table(box=None, pad_edge=False)
    table.add_column("why")
    for heading in ("files", "bytes"):
        table.add_column(heading, justify="right")
    for why, found in facts["by_reason"].items():
        table.add_row(why, f"{found['num_files']:,}", f"{found['num_bytes']:,}")
    verb = "would be removed" if facts["dry_run"] else "removed"
    table.add_row(verb, f"{facts['num_files']:,}", f"{facts['num_bytes']:,}")
    return table
