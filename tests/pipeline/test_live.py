"""How far a run has come, seen from outside: from listings and a few small files."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
from pathlib import Path
from typing import Any

import pytest

from pipeline import live
from pipeline.config import Job
from pipeline.ledger import Attempt, AttemptEnd, Ledger
from pipeline.live import find_runs, recent_rate, shard_sizes
from pipeline.local_storage import LocalStorage
from pipeline.storage import Storage
from tests.pipeline.pipeline_cases import a_job, job_data

BEGAN = datetime.datetime(2026, 11, 21, 0, 30, tzinfo=datetime.UTC)
START = BEGAN.timestamp()
ATTEMPT = Attempt(id="a1", started_at=BEGAN.isoformat(), host="here", pid=1, lanes="cpu")
SIZES = [100, 100, 100, 50]
RUN_ID = "2026-11-20-aaaaaaaaaaaa"


class Watched(LocalStorage):
    """Counts what is read, alone or with others."""

    def __init__(self, root: str) -> None:
        super().__init__(root)
        self.num_read = 0

    def read(self, path: str) -> bytes | None:
        self.num_read += 1
        return super().read(path)


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return a_job(job_data(tmp_path))


@pytest.fixture
def output(job: Job) -> Watched:
    return Watched(job.output.uri)


def begin(output: Storage, run_id: str = RUN_ID, **changes: Any) -> Ledger:
    """A run that has begun."""
    ledger = Ledger(output, "users", run_id)
    description = {
        "run_id": run_id,
        "date": run_id[:10],
        "files": [{"num_rows": 200}, {"num_rows": 150}],
        "num_shards": 4,
        "shard_rows": SIZES,
        **changes,
    }
    ledger.open({key: value for key, value in description.items() if value}, ATTEMPT)
    return ledger


def commit(output: Storage, ledger: Ledger, name: str, after_s: float) -> None:
    """A commit record, so many seconds after the run began; its content does not matter here."""
    path = f"{ledger.folder}/commits/{name}.json"
    output.create(path, b"{}")
    os.utime(Path(output.uri, path), (START + after_s, START + after_s))


def test_a_run_says_how_many_rows_are_done_how_fast_and_until_when(
    job: Job, output: Watched
) -> None:
    ledger = begin(output)
    for number, after_s in ((0, 10), (1, 20), (3, 25)):
        commit(output, ledger, f"{number:05d}", after_s)
    (run,) = find_runs(output, job)
    assert (run.num_rows, run.num_done) == (350, 250)
    assert (run.num_shards, run.num_shards_done) == (4, 3)
    assert run.rows_per_s == 150 / 15  # what was committed after the first one
    assert run.left_s == 100 / 10
    assert run.last_commit_at == START + 25
    assert (run.num_attempts, run.attempt, run.end) == (1, ATTEMPT, None)


def test_a_shard_that_was_committed_twice_counts_once(job: Job, output: Watched) -> None:
    ledger = begin(output)
    commit(output, ledger, "00002", 10)
    commit(output, ledger, "00002_01", 20)  # the first record was damaged
    (run,) = find_runs(output, job)
    assert (run.num_done, run.num_shards_done, run.last_commit_at) == (100, 1, START + 20)


def test_a_ledger_of_an_earlier_version_has_shards_of_mean_size(job: Job, output: Watched) -> None:
    ledger = begin(output, shard_rows=None)
    commit(output, ledger, "00003", 10)
    (run,) = find_runs(output, job)
    assert run.num_done == round(350 / 4)
    assert shard_sizes({"num_shards": 2, "files": [{"num_rows": 10}]}) == [5, 5]


def test_the_end_of_the_last_attempt_is_told(job: Job, output: Watched) -> None:
    ledger = begin(output)
    end = AttemptEnd(ended_at=BEGAN.isoformat(), why="SIGTERM", rows_begun=3)
    ledger.end(ATTEMPT, end)
    (run,) = find_runs(output, job)
    assert run.end == end


def test_a_later_attempt_is_the_one_that_counts(job: Job, output: Watched) -> None:
    ledger = begin(output)
    ledger.end(ATTEMPT, AttemptEnd(ended_at=BEGAN.isoformat(), why="SIGTERM", rows_begun=3))
    commit(output, ledger, "00000", 5)
    later = BEGAN + datetime.timedelta(seconds=100)
    second = dataclasses.replace(ATTEMPT, id="a2", started_at=later.isoformat())
    path = f"{ledger.folder}/attempts/a2.json"
    output.create(path, second.to_json())
    (run,) = find_runs(output, job)
    assert (run.attempt, run.end, run.num_attempts) == (second, None, 2)
    assert run.rows_per_s is None, "the first attempt's commits say nothing of this one"


def test_only_the_date_that_is_asked_for_is_looked_at(job: Job, output: Watched) -> None:
    begin(output)
    begin(output, "2026-11-19-bbbbbbbbbbbb")
    assert [run.date for run in find_runs(output, job)] == ["2026-11-19", "2026-11-20"]
    assert [run.run_id for run in find_runs(output, job, "2026-11-20")] == [RUN_ID]
    assert find_runs(output, job, "2026-11-2") == []


def test_nothing_begun_is_an_empty_list(job: Job, output: Watched) -> None:
    assert find_runs(output, job) == []
    Path(output.uri, "users", "_runs", RUN_ID).mkdir(parents=True)  # being made
    assert find_runs(output, job) == []


def test_commit_records_and_parts_are_not_read(job: Job, output: Watched) -> None:
    ledger = begin(output, shard_rows=[1] * 500, num_shards=500)
    for number in range(500):
        commit(output, ledger, f"{number:05d}", 1 + number)
    output.num_read = 0
    (run,) = find_runs(output, job)
    assert run.num_shards_done == 500
    assert output.num_read == 2, "run.json and the attempt"


def test_the_deadline_is_that_of_the_jobs_window(tmp_path: Path, output: Watched) -> None:
    window = {"deadline": "07:00", "timezone": "Europe/Zurich"}
    job = a_job(job_data(tmp_path), window=window)
    begin(output)
    (run,) = find_runs(output, job)
    assert run.deadline is not None
    assert run.deadline.isoformat() == "2026-11-21T07:00:00+01:00"


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ({}, None),
        ({0: 10.0}, None),
        ({0: 10.0, 1: 11.0}, None),  # too short a span to tell
        ({0: 10.0, 1: 10.0, 2: 20.0}, 10.0),  # whole seconds: two at once
        ({0: -50.0, 1: 10.0, 2: 20.0}, 10.0),  # one of an earlier attempt
        ({0: 10.0, 1: 5_000.0, 2: 5_010.0}, 10.0),  # a long pause, and long ago
    ],
)
def test_the_rate_is_that_of_the_last_minutes_of_the_attempt(
    times: dict[int, float], expected: float | None
) -> None:
    moments = {shard: START + after_s for shard, after_s in times.items()}
    assert recent_rate(moments, SIZES, ATTEMPT) == expected
    assert live.RECENT_S < 4_000


def test_an_attempt_is_read_as_it_was_written_and_an_old_one_has_no_lanes(output: Watched) -> None:
    ledger = begin(output)
    old = {"id": "a0", "started_at": "2026-11-20T00:30:00+00:00", "host": "here", "pid": 1}
    output.create(f"{ledger.folder}/attempts/a0.json", json.dumps(old).encode())
    assert [attempt.lanes for attempt in ledger.attempts()] == ["", "cpu"]


@pytest.mark.parametrize("damaged", [b"", b"{}", b"[1]", b'{"files": 3, "num_shards": 1}'])
def test_a_damaged_run_is_left_out_with_a_warning(
    damaged: bytes, job: Job, output: Watched, caplog: pytest.LogCaptureFixture
) -> None:
    begin(output)
    output.create("users/_runs/2026-11-19-cccccccccccc/run.json", damaged)
    assert [run.run_id for run in find_runs(output, job)] == [RUN_ID]
    assert "2026-11-19-cccccccccccc/run.json: damaged" in caplog.text
