"""The flow: which date a run scores, what its form asks for, and what it hands on."""

from __future__ import annotations

import datetime
import logging
import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from flows import nightly
from flows.nightly import date_of
from pipeline.errors import ConfigError
from pipeline.run import Night


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


@pytest.mark.parametrize("timezone", ["Mars/Olympus", "", "../etc/passwd"])
def test_an_unknown_time_zone_is_refused_with_an_example(timezone: str) -> None:
    with pytest.raises(ConfigError, match=r"expected .*Europe/Zurich"):
        date_of(utc("2026-11-21 00:30"), 1, timezone)


def test_the_form_describes_every_parameter_and_asks_only_for_the_job() -> None:
    schema = nightly.score.parameters.model_dump()
    assert schema["required"] == ["job"]
    assert list(schema["properties"]) == ["job", "date", "days_back", "timezone", "accept"]
    assert all(entry.get("description") for entry in schema["properties"].values())
    assert schema["properties"]["days_back"]["minimum"] == 0


def test_importing_the_flow_switches_telemetry_off() -> None:
    assert os.environ["DO_NOT_TRACK"] == "1"
    assert os.environ["PREFECT_SERVER_ANALYTICS_ENABLED"] == "false"


@pytest.fixture
def fake_night(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Everything round the flow's body, and what it was called with."""
    calls: dict[str, Any] = {}

    def run_night(night: Night, observer: Any, map_groups: Any) -> Any:
        observer.say("building an engine")
        calls.update(job=night.job, date=night.date, map_groups=map_groups, accept=night.accept)
        return SimpleNamespace(
            job="my_job", date=night.date, rows=12, manifest="/scores/_MANIFEST.json"
        )

    def create_artifact(markdown: str, key: str, **_: Any) -> None:
        calls.update(markdown=markdown, key=key)

    replaced: dict[str, Callable[..., Any]] = {
        "load_job": lambda path: f"job of {path}",
        "run_night": run_night,
        "mailed": lambda _job, _date, _say, score: score(),
        "render_markdown": lambda report: f"# {report.rows} rows",
        "create_markdown_artifact": create_artifact,
        "get_run_logger": lambda: logging.getLogger("night"),
    }
    for name, replacement in replaced.items():
        monkeypatch.setattr(nightly, name, replacement)
    return calls


def test_the_flow_scores_the_date_asked_for_and_returns_its_manifest(
    fake_night: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "night")
    flow = nightly.score.fn
    assert flow("job.yaml", date="2026-11-20", accept=("drift",)) == "/scores/_MANIFEST.json"
    assert fake_night["accept"] == {"drift"}
    assert (fake_night["job"], fake_night["date"]) == ("job of job.yaml", "2026-11-20")
    assert fake_night["map_groups"] is nightly.map_as_tasks
    assert "building an engine" in caplog.messages


def test_the_artifact_has_a_key_that_prefect_accepts(fake_night: dict[str, Any]) -> None:
    nightly.score.fn("job.yaml", date="2026-11-20")
    assert fake_night["key"] == "nightscore-my-job-2026-11-20"
    assert fake_night["markdown"] == "# 12 rows"


def test_a_date_that_is_none_is_refused(fake_night: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="expected an ISO date"):
        nightly.score.fn("job.yaml", date="2026-11-31")
    assert not fake_night
