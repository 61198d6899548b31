"""`score backfill --json` that is interrupted: one object, with the exit code of the process."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

DATE, LAST = "2026-11-04", "2026-11-05"


@pytest.fixture
def damaged(features_job: Path, tmp_path: Path) -> Path:
    """A job with two dates that fail at once."""
    for date in (DATE, LAST):
        (tmp_path / "bad" / f"dt={date}").mkdir(parents=True)
        (tmp_path / "bad" / f"dt={date}" / "users-0.parquet").write_bytes(b"PAR1 but no more")
    return features_job


def backfill(
    script: str, damaged: Path, *options: str, before: Sequence[str] = ()
) -> subprocess.CompletedProcess[str]:
    """The command over both dates, as a script runs it; `before` are arguments of the script."""
    sets = ["--set", f"input.uri={damaged.parent / 'bad'}", "--set", "lanes.device=cpu"]
    period = ["--from", DATE, "--to", LAST]
    command = ["backfill", str(damaged), *period, "--json", *sets, *options]
    return subprocess.run(
        [sys.executable, "-c", script, *before, *command],
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("meets", "options", "code", "said"),
    [
        ("nothing_to_do", [], 75, "SIGINT received"),
        ("_Backfill.begin", [], 75, "SIGINT received"),
        ("_Backfill._next", [], 75, "SIGINT received"),
        ("plan_facts", ["--dry-run"], 75, "SIGINT received"),
        ("notify", [], 1, "all dates have ended; the mail about them may not be sent."),
    ],
)
def test_ctrl_c_at_any_moment_leaves_one_object_with_the_exit_code(
    damaged: Path, meets: str, options: list[str], code: int, said: str
) -> None:
    script = """
import os, signal, sys
from flows import cli
from flows.backfills import backfill
def ctrl_c(*_, **__):
    os.kill(os.getpid(), signal.SIGINT)
signal.signal(signal.SIGINT, signal.default_int_handler)
*owner, name = sys.argv.pop(1).split(".")
setattr(getattr(backfill, owner[0]) if owner else backfill, name, ctrl_c)
cli.main()
"""
    ended = backfill(script, damaged, *options, before=[meets])
    assert ended.returncode == code, ended.stderr
    assert said in ended.stderr
    (line,) = ended.stdout.splitlines()
    assert json.loads(line)["exit_code"] == code


@pytest.mark.timeout(120)
def test_dates_at_work_when_ctrl_c_comes_get_time_to_end(damaged: Path) -> None:
    script = """
import os, signal, sys, threading, time
from flows import cli
from flows.backfills import backfill
run_night, both = backfill.run_night, threading.Barrier(2)
def run_on(night, *arguments, **options):
    if both.wait() == 0:
        os.kill(os.getpid(), signal.SIGINT)
    time.sleep(2 if night.date == "2026-11-04" else 0)
    return run_night(night, *arguments, **options)
signal.signal(signal.SIGINT, signal.default_int_handler)
backfill.run_night = run_on
cli.main()
"""
    ended = backfill(script, damaged, "--concurrency", "2")
    dates = json.loads(ended.stdout)["dates"]
    assert [date["status"] for date in dates] == ["failed", "failed"], ended.stderr
    assert ended.returncode == 1
