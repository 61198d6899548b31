"""How far a run has come, for whoever looks from outside: its ledger's listing, and a few files.

Nothing of the run's process is asked, so that it works from another machine and on an object store.
"""

from __future__ import annotations

import datetime
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.config import Job
from pipeline.ledger import Attempt, AttemptEnd, Ledger, run_folder
from pipeline.storage import Storage
from pipeline.versions import KEPT_MANIFEST
from pipeline.window import find_window

log = logging.getLogger(__name__)

DATE_CHARACTERS = len("2026-11-20")
"""Ids of runs begin with their dates."""
RECENT_S = 600.0
"""The rate is that of the last minutes: a lane that was lost shows in it."""
MIN_SPAN_S = 2.0
"""Object stores may tell whole seconds only."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunState:
    """A run that has begun, as its ledger tells it."""

    date: str
    run_id: str
    version: int
    """Of the date: that it has, or was to be."""
    num_rows: int
    num_done: int
    """Rows of shards that are committed."""
    num_shards: int
    num_shards_done: int
    num_attempts: int
    attempt: Attempt | None
    """The last one; None: the run was only prepared."""
    end: AttemptEnd | None
    """How that one ended; None: it is at work, has published, or was killed."""
    last_commit_at: float | None
    """Unix time by the store's clock."""
    rows_per_s: float | None
    """Of the last attempt in its last minutes; None: too little is committed to tell."""
    deadline: datetime.datetime | None
    """Of the job's window, in its time zone."""
    is_kept: bool
    """It was published, and another version took its place."""

    @property
    def left_s(self) -> float | None:
        """Seconds to the last commit at the rate of the last minutes."""
        return (self.num_rows - self.num_done) / self.rows_per_s if self.rows_per_s else None


def find_runs(output: Storage, job: Job, date: str | None = None) -> list[RunState]:
    """All runs of a job that have begun, or those of a date; in the order of their ids."""
    names = output.list_folders(f"{job.name}/_runs")
    found = (_read_run(output, job, name) for name in names if date is None or _is_of(name, date))
    return [state for state in found if state is not None]


def _is_of(run_id: str, date: str) -> bool:
    return run_id[:DATE_CHARACTERS] == date


def _read_run(output: Storage, job: Job, run_id: str) -> RunState | None:
    folder = run_folder(job.name, run_id)
    data = output.read(f"{folder}/run.json")
    if data is None:  # being made, or being removed
        return None
    try:
        run = json.loads(data)
        sizes, num_rows = shard_sizes(run), sum(file["num_rows"] for file in run["files"])
        version = int(run.get("version", 1))
    except (ValueError, KeyError, TypeError) as error:
        log.warning(
            "%s/%s/run.json: damaged; the run is not shown (%s).", output.uri, folder, error
        )
        return None
    ledger = Ledger(output, job.name, run_id)
    times, attempts = ledger.commit_times(), ledger.attempts()
    attempt = attempts[-1] if attempts else None
    return RunState(
        date=run_id[:DATE_CHARACTERS],
        run_id=run_id,
        version=version,
        num_rows=num_rows,
        num_done=round(sum(sizes[shard] for shard in times if shard < len(sizes))),
        num_shards=len(sizes),
        num_shards_done=len(times),
        num_attempts=len(attempts),
        attempt=attempt,
        end=ledger.ends().get(attempt.id) if attempt else None,
        last_commit_at=max(times.values(), default=None),
        rows_per_s=recent_rate(times, sizes, attempt) if attempt else None,
        deadline=_deadline(job, run_id[:DATE_CHARACTERS], attempts),
        is_kept=output.info(f"{folder}/{KEPT_MANIFEST}") is not None,
    )


def shard_sizes(run: Mapping[str, Any]) -> Sequence[float]:
    """Rows of each shard; their mean where a ledger of an earlier version does not say."""
    if "shard_rows" in run:
        return list(run["shard_rows"])
    num_shards, num_rows = run["num_shards"], sum(file["num_rows"] for file in run["files"])
    return [num_rows / num_shards] * num_shards


def recent_rate(
    times: Mapping[int, float], sizes: Sequence[float], attempt: Attempt
) -> float | None:
    """Rows a second between the commits of the last minutes, of one attempt.

    Args:
        times: Unix time of each shard's commit.
        sizes: Rows of all shards.
        attempt: Commits from before it do not count.
    """
    began = datetime.datetime.fromisoformat(attempt.started_at).timestamp()
    since = max(began, max(times.values(), default=0.0) - RECENT_S)
    recent = sorted((at, shard) for shard, at in times.items() if at >= since)
    if not recent or recent[-1][0] - recent[0][0] < MIN_SPAN_S:
        return None
    # What was committed with the first one, or before it, took its time before the span.
    rows = sum(sizes[shard] for at, shard in recent if at > recent[0][0] and shard < len(sizes))
    return rows / (recent[-1][0] - recent[0][0])


def _deadline(job: Job, date: str, attempts: Sequence[Attempt]) -> datetime.datetime | None:
    if not attempts:
        return None
    opened = datetime.datetime.fromisoformat(attempts[0].started_at)
    window = find_window(job.window, date, opened)
    return window.deadline if window else None
