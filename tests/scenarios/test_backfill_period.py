"""A month that is caught up with: interrupted once, and stopped by what it may cost."""

from __future__ import annotations

import json
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flows.backfills.dates import dates_between
from flows.demo_data import write_users
from pipeline.verify import verify_published
from tests.scenarios.features_nights import RESUMABLE, scores_in

pytestmark = [pytest.mark.scenario, pytest.mark.timeout(400)]
FIRST, LAST, NUM_ROWS = "2026-11-01", "2026-11-30", 1_000
DATES = dates_between(FIRST, LAST)
NO_INPUT = {"2026-11-08", "2026-11-15"}
DOLLAR_A_SECOND = ("--set", "cost.usd_per_hour=3600")
ONE_MORE = 1.0
"""Dollars: some of the 22 dates that are left, of which a warm lane scores five a second."""
STOPPED = """
import os, signal, sys
from flows import cli
from flows.backfills.backfill import _Backfill
end_of, ended = _Backfill._end_of, []
def stop_at_the_fifth(self, outcome):
    end_of(self, outcome)
    ended.append(outcome)
    if len(ended) == 5:
        os.kill(os.getpid(), signal.SIGTERM)
_Backfill._end_of = stop_at_the_fifth
sys.argv.pop(0)
cli.main()
"""
"""SIGTERM from inside: whoever looks on from outside may come when all dates are scored."""


@pytest.fixture
def month(tmp_path: Path) -> Path:
    """Thirty dates of users; two of them have no input."""
    root = tmp_path / "users"
    write_users(root, FIRST, num_rows=NUM_ROWS, num_files=1)
    for date in DATES[1:]:
        if date not in NO_INPUT:
            shutil.copytree(root / f"dt={FIRST}", root / f"dt={date}")
    return root


def manifests(output: Path) -> dict[str, dict[str, Any]]:
    """By date."""
    found = [json.loads(path.read_text()) for path in output.glob("users/dt=*/_MANIFEST.json")]
    return {manifest["date"]: manifest for manifest in found}


def test_every_date_of_a_month_is_published_once_or_listed_with_why_it_is_not(
    start_score: Callable[..., Any],
    score: Callable[..., Any],
    features_job: Path,
    month: Path,
    tmp_path: Path,
) -> None:
    output = tmp_path / "scores"
    values = (f"input.uri={month}", "limits.max_quarantined=0.5", "limits.drift_rows=0")
    sets = tuple(part for value in values for part in ("--set", value))
    period = ("--from", FIRST, "--to", LAST, "--json")
    command = ("backfill", features_job, *period, *sets, *DOLLAR_A_SECOND)

    running = start_score(*command, "--concurrency", "2", prefix=(sys.executable, "-c", STOPPED))
    stopped = running.end(100)
    assert stopped.code == RESUMABLE, stopped.err
    assert len(manifests(output)) < len(DATES) - len(NO_INPUT)
    check(stopped.json, output, expected={"published", "no_input", "interrupted"})
    assert running.lingering() == []
    spent_usd = stopped.json["spent_usd"]

    capped = score(*command, "--max-usd", str(spent_usd + ONE_MORE))
    assert capped.code == 3, capped.err
    check(capped.json, output, expected={"already_published", "no_input", "cost_cap"})
    assert capped.json["began_at"] == stopped.json["began_at"]
    # What is scored when the money is spent is still committed: a shard, and a check of it.
    assert spent_usd < capped.json["spent_usd"] < spent_usd + ONE_MORE + 30

    done = score(*command)
    assert done.code == 0, done.err
    check(done.json, output, expected={"already_published", "published", "no_input"})
    assert set(manifests(output)) == set(DATES) - NO_INPUT
    runs = Counter(path.name[:10] for path in (output / "users" / "_runs").iterdir())
    assert set(runs.values()) == {1}, "no date was begun anew"
    for date, manifest in manifests(output).items():
        assert (manifest["version"], manifest["rows"]) == (1, NUM_ROWS)
        assert verify_published(str(output), "users", date)["rows"] == NUM_ROWS
    assert scores_in(output, date=FIRST) == scores_in(output, date=LAST)


def check(summary: dict[str, Any], output: Path, *, expected: set[str]) -> None:
    """Every date is listed once, as what it is, and why where it is not done."""
    assert [outcome["date"] for outcome in summary["dates"]] == DATES
    found = {outcome["date"]: outcome for outcome in summary["dates"]}
    done = {"published", "already_published"}
    said = {date for date, each in found.items() if each["status"] in done}
    # One that did not end in time may be published between the summary and the process's end.
    late = set(manifests(output)) - said
    assert said <= set(manifests(output))
    assert {found[date]["status"] for date in late} <= {"interrupted"}
    assert len(late) <= 2, "one for each that was at work"
    assert {date for date, each in found.items() if each["status"] == "no_input"} == NO_INPUT
    assert {each["status"] for each in found.values()} - {"published"} == expected - {"published"}
    for each in found.values():
        assert bool(each["why"]) == (each["status"] not in done), each
