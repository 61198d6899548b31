"""`score plan`: what a date is expected to take and cost, and by when it must begin."""

from __future__ import annotations

import datetime
import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from flows.planning.plan import plan_facts, render_plan
from pipeline.config import Job, WindowSection
from pipeline.job_file import load_job
from tests.conftest import DATE
from tests.flows.forecast_cases import add_night

HOUR_S = 3_600.0


@pytest.fixture
def job(features_job: Path, tmp_path: Path) -> Job:
    sets = [f"engine.store={tmp_path / 'engines'}", "lanes.device=cpu"]
    return load_job(str(features_job), sets)


def shown(facts: dict[str, Any]) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(render_plan(facts))
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return " ".join(text.split())


def test_the_last_nights_say_what_a_date_takes_and_costs(job: Job) -> None:
    for day, scoring_s in (("17", 99.0), ("18", 199.0), ("19", 399.0)):
        add_night(job, f"2026-11-{day}", scoring_s)
    add_night(job, "2026-11-16", 99.0, building_s=60.0, wall_s=160.0)
    facts = plan_facts(job, DATE)
    found = facts["forecast"]
    assert (facts["rows_to_do"], facts["shards_to_do"]) == (40_000, 8)
    assert facts["engine"] is None
    assert found["build_s"] == 60, "as it took when it was built last"
    assert (found["low_s"], found["wall_s"], found["high_s"]) == (160, 210, 460)
    assert found["usd"] == pytest.approx(210 * 0.085 / 3600)
    text = shown(facts)
    assert "expected 3 min 30 s (2 min 40 s to 7 min 40 s), 1 min 00 s of it for the engine" in text
    assert "cost $0.00496 ($0.00378 to $0.0109)" in text
    assert "taken from 4 nights until 2026-11-19" in text


def test_without_such_a_night_nothing_is_made_up(job: Job) -> None:
    add_night(job, "2026-11-19", 99.0, instance="g6.xlarge")
    facts = plan_facts(job, DATE)
    assert facts["forecast"] is None
    assert "expected unknown: no night of this job on such a machine yet" in shown(facts)


def test_a_plan_says_by_when_to_begin(job: Job) -> None:
    """A window that began now, as the clock is not ours to set."""
    add_night(job, "2026-11-18", HOUR_S)
    add_night(job, "2026-11-19", 3 * HOUR_S)
    for hours, fits in ((2.5, True), (1.5, False)):
        window = WindowSection(max_hours=hours, timezone="Europe/Zurich")
        facts = plan_facts(job.model_copy(update={"window": window}), DATE)
        found = facts["window"]
        assert found["left_s"] == pytest.approx(hours * HOUR_S)
        assert found["fits_now"] is fits
        deadline, start, sure = (
            datetime.datetime.fromisoformat(found[key])
            for key in ("deadline", "start_by", "start_by_to_be_sure")
        )
        assert (deadline - start).total_seconds() == pytest.approx(2 * HOUR_S + 1, abs=2)
        assert (deadline - sure).total_seconds() == pytest.approx(3 * HOUR_S + 1, abs=2)
        said = "begun now it is in time" if fits else "begun now it is too late"
        assert f"window due {deadline:%H:%M on %Y-%m-%d (UTC%z)}: {said}; begin by" in shown(facts)


def test_a_deadline_is_told_even_where_nothing_can_be_forecast(job: Job) -> None:
    window = WindowSection(max_hours=2)
    facts = plan_facts(job.model_copy(update={"window": window}), DATE)
    assert (facts["window"]["fits_now"], facts["window"]["start_by"]) == (None, None)
    assert "window due " in shown(facts)
