"""The flow behind score/backfill: what its form asks for, hands on, and makes of the outcome."""

from __future__ import annotations

import datetime
import logging
from types import SimpleNamespace
from typing import Any

import pytest

from flows import run_page
from flows.backfills import flow as backfill_flow
from flows.backfills.backfill import BackfillRequest
from flows.backfills.summary import BackfillSummary, DateOutcome, Status
from pipeline.errors import ConfigError
from pipeline.report_words import usd
from tests.pipeline.pipeline_cases import a_job, job_data

FIRST, LAST = datetime.date(2026, 11, 1), datetime.date(2026, 11, 2)
TITLE = "users backfill 2026-11-01 to 2026-11-02"


def a_summary(*statuses: Status) -> BackfillSummary:
    dates = [f"2026-11-0{number}" for number, _ in enumerate(statuses, 1)]
    return BackfillSummary(
        job="users",
        first=dates[0],
        last=dates[-1],
        dates=tuple(
            DateOutcome(date=date, status=status, why="why", rows=1_000, usd=0.5)
            for date, status in zip(dates, statuses, strict=True)
        ),
        began_at=None,
        spent_usd=0.5,
        max_usd=None,
        strict=False,
        dry_run=False,
    )


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> dict[str, Any]:
    """What the flow asked for, and the table that it showed; `summary` is what comes of it."""
    calls: dict[str, Any] = {"summary": a_summary("published", "already_published")}

    def run_backfill(request: BackfillRequest, observer: Any, tell: Any) -> BackfillSummary:
        observer.say("2026-11-01, 1 of 2")
        calls["request"] = request
        tell(calls["summary"])
        summary: BackfillSummary = calls["summary"]
        return summary

    def create_table(table: Any, key: str, description: str) -> None:
        calls.update(table=table, key=key, description=description)

    job = a_job(job_data(tmp_path))
    for name, replacement in {
        "load_job": lambda _: job,
        "run_backfill": run_backfill,
        "title_of": lambda *_: TITLE,
        "create_table_artifact": create_table,
        "get_run_logger": lambda: logging.getLogger("backfill"),
        "flow_run": SimpleNamespace(id="0123", parameters={}),
    }.items():
        monkeypatch.setattr(backfill_flow, name, replacement)
    return calls


def test_the_form_becomes_the_request(scored: dict[str, Any]) -> None:
    said = backfill_flow.backfill.fn(
        "job.yaml", FIRST, LAST, order="newest", max_usd=2.5, strict=True, dry_run=True
    )
    request = scored["request"]
    assert (request.first, request.last, request.order) == ("2026-11-01", "2026-11-02", "newest")
    assert (request.max_usd, request.strict, request.dry_run) == (2.5, True, True)
    assert said == "2 dates: 1 published, 1 already published"


def test_every_date_is_a_row_of_the_table(scored: dict[str, Any]) -> None:
    backfill_flow.backfill.fn("job.yaml", FIRST, LAST)
    assert scored["key"] == "nightscore-users-backfill-2026-11-01-to-2026-11-02"
    assert scored["description"].startswith(f"{TITLE}: 2 dates")
    first = scored["table"][0]
    assert (first["date"], first["state"], first["rows"]) == ("2026-11-01", "published", "1,000")
    assert first["cost"] == usd(0.5)


@pytest.mark.parametrize("status", ["failed", "guard", "cost_cap"])
def test_a_date_that_is_not_done_fails_the_run_and_keeps_its_table(
    status: Status, scored: dict[str, Any]
) -> None:
    scored["summary"] = a_summary("published", status)
    state = backfill_flow.backfill.fn("job.yaml", FIRST, LAST)
    assert state.is_failed()
    assert "1 published" in state.message
    assert scored["table"][1]["state"].startswith("not done")


def test_a_server_that_is_gone_costs_the_table_only(
    scored: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(backfill_flow, "create_table_artifact", refuse)
    with caplog.at_level(logging.WARNING, run_page.__name__):
        said = backfill_flow.backfill.fn("job.yaml", FIRST, LAST)
    assert said == scored["summary"].headline()
    assert "no route to host" in caplog.text


@pytest.mark.usefixtures("scored")
def test_only_a_backfill_that_has_begun_speaks_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    spoken: list[str] = []
    monkeypatch.setattr(backfill_flow, "speaks_for", spoken.append)

    def refuse(*_: Any) -> None:
        raise ConfigError("--from 2026-11-02 --to 2026-11-01: 0 dates.")

    with monkeypatch.context() as patched:
        patched.setattr(backfill_flow, "run_backfill", refuse)
        with pytest.raises(ConfigError):
            backfill_flow.backfill.fn("job.yaml", LAST, FIRST)
    assert not spoken
    backfill_flow.backfill.fn("job.yaml", FIRST, LAST)
    assert spoken == ["0123"]


def test_the_form_asks_for_the_job_and_the_period_only() -> None:
    schema = backfill_flow.backfill.parameters.model_dump()
    assert schema["required"] == ["job", "first", "last"]
    assert schema["properties"]["order"]["enum"] == ["oldest", "newest"]
