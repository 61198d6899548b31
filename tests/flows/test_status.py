"""What `score status` says of dates that are published, at work, interrupted or killed."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from flows import status
from flows.commands import status as cli_status
from flows.status import is_alive, render_status, status_facts
from pipeline.config import Job
from pipeline.ledger import Attempt, AttemptEnd, Ledger
from pipeline.process_start import process_name
from pipeline.storage import Storage, open_storage
from tests.pipeline.pipeline_cases import a_job, job_data

RUN_ID = "2026-11-20-aaaaaaaaaaaa"


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return a_job(job_data(tmp_path), window={"max_hours": 1.0})


@pytest.fixture
def output(job: Job) -> Storage:
    return open_storage(job.output.uri)


def begin(output: Storage, attempt: Attempt, num_done: int = 2, version: int = 1) -> Ledger:
    """A run of four shards of 100 rows; a shard each ten seconds, the last one just now."""
    ledger = Ledger(output, "users", RUN_ID)
    description = {
        "run_id": RUN_ID,
        "date": "2026-11-20",
        "version": version,
        "files": [{"num_rows": 400}],
        "num_shards": 4,
        "shard_rows": [100] * 4,
    }
    ledger.open(description, attempt)
    now = datetime.datetime.now(datetime.UTC).timestamp()
    for number in range(num_done):
        path = f"{ledger.folder}/commits/{number:05d}.json"
        output.create(path, b"{}")
        at = now - 10 * (num_done - 1 - number)
        os.utime(Path(output.uri, path), (at, at))
    return ledger


def an_attempt(**changes: Any) -> Attempt:
    """Of this very process, a minute ago."""
    began = datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=60)
    mine = Attempt(
        id="a1",
        started_at=began.isoformat(),
        host=socket.gethostname(),
        pid=1,  # older than any attempt
        lanes="cpu0 cpu1",
    )
    return dataclasses.replace(mine, **changes)


def shown(job: Job) -> str:
    console = Console(width=120)
    with console.capture() as captured:
        console.print(render_status(status_facts(job)))
    return captured.get()


@pytest.fixture(autouse=True)
def _no_sampling(monkeypatch: pytest.MonkeyPatch) -> None:
    devices = [{"name": "this CPU", "busy": 0.5, "memory_bytes": None}]
    monkeypatch.setattr(status, "_devices", lambda _: devices)


def test_a_run_at_work_says_rate_end_lanes_and_devices(job: Job, output: Storage) -> None:
    begin(output, an_attempt())
    (run,) = status_facts(job)["unfinished"]
    assert run["working"]
    assert run["certain"]
    assert (run["rows_done"], run["rows"]) == (200, 400)
    assert run["rows_per_s"] == pytest.approx(10, abs=0.1)
    assert run["left_s"] == pytest.approx(20, abs=0.5)
    assert run["margin_s"] == pytest.approx(3600 - 60 - 20, abs=5)
    assert run["attempt"]["lanes"] == ["cpu0", "cpu1"]
    text = shown(job)
    for said in ("scoring", "50.0%", "10 rows/s", "before the deadline", "2 (cpu0, cpu1)"):
        assert said in text
    assert "this CPU: 50%" in text


def test_a_run_that_will_be_late_says_so(tmp_path: Path, output: Storage) -> None:
    begin(output, an_attempt())
    late = a_job(job_data(tmp_path), window={"max_hours": 0.02})
    assert "AFTER the deadline" in shown(late)


def test_a_process_that_is_gone_was_killed(job: Job, output: Storage) -> None:
    child = subprocess.Popen(["true"])
    child.wait()
    begin(output, an_attempt(pid=child.pid))
    (run,) = status_facts(job)["unfinished"]
    assert run["working"] is False
    assert (run["left_s"], run["devices"]) == (None, [])
    text = shown(job)
    assert "killed" in text
    assert "score run JOB --date 2026-11-20" in text


def test_a_number_that_belongs_to_a_younger_process_is_another_one() -> None:
    began = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=300)
    assert is_alive(an_attempt())
    assert not is_alive(an_attempt(started_at=began.isoformat(), pid=os.getpid()))


def test_a_clock_that_jumps_kills_no_process() -> None:
    began = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=300)
    mine = process_name(os.getpid())
    assert is_alive(an_attempt(started_at=began.isoformat(), pid=os.getpid(), process=mine))
    assert not is_alive(an_attempt(pid=os.getpid(), process=mine + "0"))
    with subprocess.Popen(["true"]) as child:
        assert process_name(child.pid) != mine
    assert process_name(child.pid) == ""


def test_an_interrupted_run_says_why_and_how_to_go_on(job: Job, output: Storage) -> None:
    attempt = an_attempt()
    ledger = begin(output, attempt)
    ledger.end(attempt, AttemptEnd(ended_at=attempt.started_at, why="Stop: SIGTERM", rows_begun=9))
    (run,) = status_facts(job)["unfinished"]
    assert run["working"] is False
    text = shown(job)
    assert "interrupted" in text
    assert "Stop: SIGTERM" in text


@pytest.mark.parametrize("version", [1, 2])
def test_a_run_whose_date_another_one_published_is_overtaken(
    job: Job, output: Storage, version: int
) -> None:
    begin(output, an_attempt(host="elsewhere"), version=version)
    counts = {"rows": 400, "scored": 400, "quarantined": 0}
    manifest = {"job": "users", "date": "2026-11-20", "run_id": "2026-11-20-b", **counts}
    manifest |= {"published_at": "2026-11-21T02:00:00Z"}
    output.create("users/dt=2026-11-20/_MANIFEST.json", json.dumps(manifest).encode())
    (run,) = status_facts(job)["unfinished"]
    assert (run["overtaken"], run["working"]) == (version == 1, version == 2)
    text = shown(job)
    assert ("overtaken" in text) == (version == 1)
    assert "to go on" not in text, "of one at work elsewhere nobody knows that it has ended"


def test_a_forced_run_goes_on_by_the_command_that_began_it(job: Job, output: Storage) -> None:
    ledger = begin(output, an_attempt(), version=2)
    ledger.end(an_attempt(), AttemptEnd(ended_at="2026-11-21", why="Stop: SIGTERM", rows_begun=9))
    said = "score run JOB --date 2026-11-20 --force, or score requeue: as it was begun"
    assert said in shown(job)


def test_of_another_machine_nobody_knows_whether_it_lives(job: Job, output: Storage) -> None:
    begin(output, an_attempt(host="elsewhere", pid=1))
    (run,) = status_facts(job)["unfinished"]
    assert run["working"]
    assert not run["certain"]
    assert run["devices"] == []
    assert "scoring, or killed" in shown(job)


def test_before_two_commits_it_is_too_early_to_say(job: Job, output: Storage) -> None:
    begin(output, an_attempt(), num_done=1)
    (run,) = status_facts(job)["unfinished"]
    assert (run["rows_per_s"], run["ends_at"], run["margin_s"]) == (None, None, None)
    assert "too early to say" in shown(job)


def test_a_job_that_never_ran_has_nothing(job: Job) -> None:
    assert shown(job).strip() == "users: nothing published and nothing begun"


def test_names_from_the_ledger_cannot_steer_the_terminal(job: Job, output: Storage) -> None:
    begin(output, an_attempt(host="\x1b[2Jevil", lanes="\x1b]0;x\x07"))
    assert "\x1b" not in shown(job)


def test_watching_ends_when_no_run_is_at_work(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    looks = [{"unfinished": [{"working": working}]} for working in (True, True, False)]
    pauses: list[float] = []
    monkeypatch.setattr(cli_status.time, "sleep", pauses.append)
    cli_status._watch(looks[0], iter(looks[1:]).__next__, as_json=True)
    assert len(capsys.readouterr().out.splitlines()) == 3
    assert pauses == [cli_status.WATCH_PERIOD_S] * 2


def test_a_damaged_manifest_hides_no_other_date(job: Job, output: Storage) -> None:
    begin(output, an_attempt())
    output.create("users/dt=2026-11-18/_MANIFEST.json", b"{")
    text = shown(job)
    assert "damaged" in text
    assert "scoring" in text
