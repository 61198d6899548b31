"""`score backfill --dry-run`: what each date of a period is expected to take and cost."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from flows.backfills.backfill import BackfillRequest, run_backfill
from flows.backfills.summary import BackfillSummary
from flows.demo_data import write_users
from flows.progress import LineProgress
from pipeline.config import Job
from pipeline.job_file import load_job
from tests.flows.forecast_cases import add_night

FIRST, LAST = "2026-11-01", "2026-11-03"
NUM_ROWS = 1_000
RATE = {"rows": NUM_ROWS, "scoring_s": 99.0, "wall_s": 100.0}


@pytest.fixture(scope="module")
def dates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three dates of users."""
    root = tmp_path_factory.mktemp("dates")
    write_users(root, FIRST, num_rows=NUM_ROWS, num_files=1)
    for day in (2, 3):
        shutil.copytree(root / f"dt={FIRST}", root / f"dt=2026-11-0{day}")
    return root


@pytest.fixture
def job(features_job: Path, dates: Path, tmp_path: Path) -> Job:
    """Its engine is not built; a second costs a dollar."""
    sets = [f"input.uri={dates}", f"engine.store={tmp_path / 'engines'}", "lanes.device=cpu"]
    return load_job(str(features_job), [*sets, "cost.usd_per_hour=3600"])


def planned(job: Job, **changes: Any) -> BackfillSummary:
    request = BackfillRequest(job=job, first=FIRST, last=LAST, dry_run=True, **changes)
    return run_backfill(request, LineProgress(lambda _: None))


def test_the_engine_of_all_dates_is_built_in_the_first_one(job: Job) -> None:
    add_night(job, "2026-10-30", **{**RATE, "wall_s": 160.0}, building_s=60.0)
    built, stored = "about 2 min 40 s and $160.00", "about 1 min 40 s and $100.00"
    assert [found.why for found in planned(job).dates] == [built, stored, stored]
    enough, less = planned(job, max_usd=361.0), planned(job, max_usd=359.0)
    assert [found.status for found in enough.dates] == ["to_do"] * 3
    assert [found.status for found in less.dates] == ["to_do", "to_do", "cost_cap"]


def test_dates_at_once_are_forecast_and_priced_by_their_share_of_the_machine(job: Job) -> None:
    add_night(job, "2026-10-28", **RATE)
    whole = planned(job)
    assert [found.why for found in whole.dates] == ["about 1 min 40 s and $100.00"] * 3
    assert [found.why for found in planned(job, concurrency=2).dates] == [
        "about 3 min 20 s and $100.00"  # nobody knows better yet
    ] * 3
    add_night(job, "2026-10-29", **{**RATE, "wall_s": 180.0, "scoring_s": 178.0}, machine_share=0.5)
    assert planned(job) == whole
    assert [found.why for found in planned(job, concurrency=2).dates] == [
        "about 3 min 00 s and $90.00"
    ] * 3
