"""Facts for `score status`: which dates are published, and how far a run at work has come."""

from __future__ import annotations

import datetime
import socket
import time
from typing import Any

from rich.console import Group, JustifyMethod, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from engines.nvml import discover
from pipeline.config import Job
from pipeline.errors import VerifyError
from pipeline.ledger import Attempt
from pipeline.live import RunState, find_runs
from pipeline.process_start import process_age_s, process_name
from pipeline.report_words import duration, plain
from pipeline.storage import Storage, open_storage
from pipeline.telemetry import Sampler
from pipeline.versions import find_published

SAMPLE_S = 0.5
STARTED_SLACK_S = 5.0
"""Clocks of ticks and of the wall differ a little."""

Facts = dict[str, Any]


def status_facts(job: Job, date: str | None = None) -> Facts:
    """The dates of a job that are published or begun; reads listings and a few files of each.

    Args:
        job: The job.
        date: Only this one; ISO.
    """
    output = open_storage(job.output.uri)
    published = [
        found
        for folder in output.list_folders(job.name)
        if folder.startswith("dt=") and folder.removeprefix("dt=") == (date or folder[3:])
        if (found := _published(output, job, folder.removeprefix("dt=")))
    ]
    current = {entry["run_id"] for entry in published}
    versions = {entry["date"]: entry.get("version", 0) for entry in published}
    runs = [run for run in find_runs(output, job, date) if run.run_id not in current]
    return {
        "job": job.name,
        "published": published,
        "replaced": [
            {"date": run.date, "run_id": run.run_id, "rows": run.num_rows}
            for run in runs
            if run.is_kept
        ],
        "unfinished": [
            _unfinished(run, versions.get(run.date, 0)) for run in runs if not run.is_kept
        ],
    }


def _published(output: Storage, job: Job, date: str) -> Facts | None:
    try:
        found = find_published(output, job.name, date)
    except VerifyError as error:  # the other dates are still worth seeing
        return {"date": date, "run_id": "", "damaged": str(error)}
    if found is None:
        return None
    keys = ("date", "run_id", "rows", "scored", "quarantined", "published_at")
    return {**{key: found.manifest[key] for key in keys}, "version": found.version}


def _unfinished(run: RunState, published_version: int) -> Facts:
    now = datetime.datetime.now(datetime.UTC)
    attempt, is_here = run.attempt, run.attempt is not None and is_on_this_machine(run.attempt)
    working = None if attempt is None else run.end is None
    if is_here and attempt is not None and run.end is None:
        working = is_alive(attempt)
    is_overtaken = run.version <= published_version and not (working and is_here)
    working = working and not is_overtaken
    left_s = run.left_s if working else None
    ends_at = None if left_s is None else now + datetime.timedelta(seconds=left_s)
    return {
        "date": run.date,
        "run_id": run.run_id,
        "working": working,
        "certain": run.end is not None or is_here,
        "overtaken": is_overtaken,
        "version": run.version,
        "rows": run.num_rows,
        "rows_done": run.num_done,
        "shards": run.num_shards,
        "shards_done": run.num_shards_done,
        "rows_per_s": run.rows_per_s if working else None,
        "left_s": left_s,
        "ends_at": None if ends_at is None else ends_at.isoformat(timespec="seconds"),
        "deadline": None if run.deadline is None else run.deadline.isoformat(),
        "margin_s": (run.deadline - ends_at).total_seconds() if run.deadline and ends_at else None,
        "last_commit": None if run.last_commit_at is None else _iso(run.last_commit_at),
        "attempts": run.num_attempts,
        "attempt": None if attempt is None else _attempt(attempt),
        "why_ended": run.end.why if run.end else None,
        "devices": _devices(attempt) if working and is_here and attempt else [],
    }


def _attempt(attempt: Attempt) -> Facts:
    return {
        "id": attempt.id,
        "started_at": attempt.started_at,
        "host": attempt.host,
        "pid": attempt.pid,
        "lanes": attempt.lanes.split(),
    }


def is_on_this_machine(attempt: Attempt) -> bool:
    """Whether its process, if it lives, can be seen from here."""
    return attempt.host == socket.gethostname()


def is_alive(attempt: Attempt) -> bool:
    """Whether the process of an attempt on this machine still lives; numbers are used again."""
    if attempt.process:
        return process_name(attempt.pid) == attempt.process
    age_s = process_age_s(attempt.pid)  # the note is of an earlier version of this program
    began = datetime.datetime.fromisoformat(attempt.started_at).timestamp()
    return age_s is not None and time.time() - age_s <= began + STARTED_SLACK_S


def _devices(attempt: Attempt) -> list[Facts]:
    """How busy the devices of this machine are right now."""
    is_gpu = any(name.startswith("gpu") for name in attempt.lanes.split())
    gpus = [found.gpu for found in discover().gpus] if is_gpu else []
    with Sampler(gpus, SAMPLE_S / 2) as sampler:
        time.sleep(SAMPLE_S)
    return [
        {"name": use.name, "busy": use.utilisation_mean, "memory_bytes": use.memory_peak_bytes}
        for use in sampler.use()
    ]


def _iso(unix_time: float) -> str:
    moment = datetime.datetime.fromtimestamp(unix_time, datetime.UTC)
    return moment.isoformat(timespec="seconds")


def render_status(facts: Facts) -> RenderableType:
    """One line for each date; then what is known of a run at work."""
    if not (facts["published"] or facts["unfinished"] or facts["replaced"]):
        return Text(f"{facts['job']}: nothing published and nothing begun")
    table = Table(box=None, pad_edge=False)
    table.add_column("date", no_wrap=True)
    for heading in ("state", "rows", "quarantined", "run"):
        side: JustifyMethod = "right" if heading in ("rows", "quarantined") else "left"
        table.add_column(heading, justify=side, overflow="fold")
    for entry in facts["published"]:
        if "damaged" in entry:
            table.add_row(plain(entry["date"]), "damaged", "", "", plain(entry["damaged"]))
            continue
        quarantined = f"{entry['quarantined']:,}"
        state = "published" if entry["version"] == 1 else f"published, version {entry['version']}"
        rows = f"{entry['rows']:,}"
        table.add_row(plain(entry["date"]), state, rows, quarantined, plain(entry["run_id"]))
    for entry in facts["replaced"]:
        rows = f"{entry['rows']:,}"
        table.add_row(plain(entry["date"]), "replaced, kept", rows, "", plain(entry["run_id"]))
    for entry in facts["unfinished"]:
        rows = f"{entry['rows_done']:,} of {entry['rows']:,}"
        table.add_row(plain(entry["date"]), _state(entry), rows, "", plain(entry["run_id"]))
    details = [
        _details(entry)
        for entry in facts["unfinished"]
        if entry["attempt"] and not entry["overtaken"]
    ]
    return Group(table, *(part for pair in details for part in (Text(""), pair)))


def _state(entry: Facts) -> str:
    if entry["working"]:
        return "scoring" if entry["certain"] else "scoring, or killed"
    if entry["overtaken"]:
        return "overtaken, for gc"
    if entry["why_ended"]:
        return "interrupted"
    return "killed" if entry["attempt"] else "not begun"


def _details(entry: Facts) -> RenderableType:
    """What a person wants to know of one unfinished run."""
    attempt, table = entry["attempt"], Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    num_rows = max(entry["rows"], 1)
    table.add_row(plain(entry["date"]), ProgressBar(num_rows, entry["rows_done"], width=40))
    shards = f"{entry['shards_done']:,} of {entry['shards']:,} shards"
    table.add_row("done", f"{entry['rows_done'] / num_rows:.1%}, {shards}")
    if entry["working"]:
        table.add_row("rate", _rate(entry))
        table.add_row("ends", _end(entry))
    table.add_row("last commit", plain(entry["last_commit"] or "none yet"))
    lanes = f"{len(attempt['lanes'])} ({', '.join(attempt['lanes'])})"
    table.add_row("lanes", Text(plain(lanes if attempt["lanes"] else "unknown")))
    for device in entry["devices"]:
        table.add_row("busy", Text(plain(_busy(device))))
    process = f"process {attempt['pid']} on {attempt['host']} since {attempt['started_at'][:19]}Z"
    table.add_row(f"attempt {entry['attempts']}", Text(plain(process)))
    if not entry["working"]:
        why = entry["why_ended"] or "killed before it could say why"
        table.add_row("ended", Text(plain(why)))
        table.add_row("to go on", _same_command(entry))
    return table


def _same_command(entry: Facts) -> str:
    run = f"score run JOB --date {plain(entry['date'])}"
    # Whichever of the two it was: what a requeue took over counts for both.
    return run if entry["version"] == 1 else f"{run} --force, or score requeue: as it was begun"


def _rate(entry: Facts) -> str:
    rate = entry["rows_per_s"]
    return "too early to say" if rate is None else f"{rate:,.0f} rows/s in the last minutes"


def _end(entry: Facts) -> str:
    if entry["ends_at"] is None:
        return "too early to say"
    said = f"about {entry['ends_at'][:19]}Z, in {duration(entry['left_s'])}"
    if entry["margin_s"] is None:
        return said
    late = "before" if entry["margin_s"] >= 0 else "AFTER"
    return f"{said}, {duration(abs(entry['margin_s']))} {late} the deadline {entry['deadline']}"


def _busy(device: Facts) -> str:
    share = "unknown" if device["busy"] is None else f"{device['busy']:.0%}"
    memory = device["memory_bytes"]
    return f"{device['name']}: {share}" + (f", {memory / 2**30:.1f} GiB" if memory else "")
