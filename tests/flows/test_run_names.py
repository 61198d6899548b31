"""Which date a flow run scores, and what its page is called."""

from __future__ import annotations

import datetime
from pathlib import Path

import pytest

from flows.run_names import date_of, job_name, title_of, wanted_date
from pipeline.errors import ConfigError

ROOT = Path(__file__).parents[2]
JOB = str(ROOT / "configs" / "demo.yaml")


def utc(text: str) -> datetime.datetime:
    return datetime.datetime.fromisoformat(text).replace(tzinfo=datetime.UTC)


@pytest.mark.parametrize(
    ("scheduled", "days_back", "timezone", "expected"),
    [
        ("2026-11-21 00:30", 1, "UTC", "2026-11-20"),
        ("2026-11-21 00:30", 0, "UTC", "2026-11-21"),
        ("2026-11-20 23:30", 1, "Europe/Zurich", "2026-11-20"),  # 00:30 of the 21st there
        ("2026-11-21 04:30", 1, "America/New_York", "2026-11-19"),  # 23:30 of the 20th there
        ("2026-11-20 10:30", 1, "Pacific/Kiritimati", "2026-11-20"),  # 14 hours ahead
        ("2026-03-28 23:30", 1, "Europe/Zurich", "2026-03-28"),  # the night clocks go forward
        ("2026-10-24 22:30", 1, "Europe/Zurich", "2026-10-24"),  # the night clocks go back
        ("2027-01-01 00:30", 1, "UTC", "2026-12-31"),
        ("2028-03-01 00:30", 1, "UTC", "2028-02-29"),
    ],
)
def test_a_run_scores_the_day_before_its_schedule_in_its_time_zone(
    scheduled: str, days_back: int, timezone: str, expected: str
) -> None:
    assert date_of(utc(scheduled), days_back, timezone) == expected


@pytest.mark.parametrize("timezone", ["Mars/Olympus", "", "../etc/passwd", "Europe"])
def test_an_unknown_time_zone_is_refused_with_an_example(timezone: str) -> None:
    with pytest.raises(ConfigError, match=r"expected .*Europe/Zurich"):
        date_of(utc("2026-11-21 00:30"), 1, timezone)


def test_a_date_that_is_asked_for_wins_over_the_schedule() -> None:
    scheduled = utc("2026-11-21 00:30")
    asked = {"date": datetime.date(2026, 1, 2), "days_back": 1, "timezone": "UTC"}
    assert wanted_date(asked, scheduled) == "2026-01-02"
    assert wanted_date({**asked, "date": None}, scheduled) == "2026-11-20"


def test_a_page_is_called_by_the_name_that_the_job_gives_itself() -> None:
    assert job_name(JOB) == "demo"
    assert job_name("/nowhere/users.yaml") == "users"


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ({"job": JOB, "date": "2026-11-20"}, "demo 2026-11-20"),
        ({"job": JOB, "days_back": 2, "timezone": "UTC"}, "demo 2026-11-19"),
        ({"job": JOB, "timezone": "Mars/Olympus"}, "demo Mars/Olympus"),
        ({"job": JOB, "timezone": "Europe"}, "demo Europe"),
        ({"job": JOB, "days_back": 10**9, "timezone": "UTC"}, "demo UTC"),
        ({"job": JOB, "date": "2026-11-31"}, "demo 2026-11-31"),
        (
            {"job": JOB, "first": "2026-11-01", "last": "2026-11-09"},
            "demo backfill 2026-11-01 to 2026-11-09",
        ),
        ({"job": "/nowhere/users.yaml", "date": "2026-11-20"}, "users 2026-11-20"),
        ({}, " 2026-11-20"),
    ],
)
def test_a_title_says_job_and_date_whatever_is_wrong(
    parameters: dict[str, object], expected: str
) -> None:
    assert title_of(parameters, utc("2026-11-21 00:30")) == expected
