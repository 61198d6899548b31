"""The log of a backfill: what it has spent, so that the same command goes on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.backfill_log import BackfillLog
from pipeline.local_storage import LocalStorage
from pipeline.report import RunReport

PERIOD = ("2026-11-01", "2026-11-30")


@pytest.fixture
def publish(tmp_path: Path, a_report: Callable[..., RunReport]) -> Callable[[str, float], None]:
    """Writes the report of a date that cost so much."""

    def write(date: str, usd: float) -> None:
        report = a_report(job="users", date=date)
        report = dataclasses.replace(report, cost=dataclasses.replace(report.cost, usd=usd))
        path = f"users/dt={date}/_report.json"
        assert LocalStorage(str(tmp_path)).create(path, report.to_json().encode())

    return write


def test_tries_count_until_the_date_is_published_and_then_its_report(
    tmp_path: Path, publish: Callable[[str, float], None]
) -> None:
    log = BackfillLog(LocalStorage(str(tmp_path)), "users", *PERIOD)
    assert log.spent() == {}, "nobody has begun"
    log.begin(["2026-11-02", "2026-11-03"])
    log.note("2026-11-02", "interrupted", 1.0)
    log.note("2026-11-02", "failed", 0.5)
    assert log.spent() == {"2026-11-02": 1.5}
    publish("2026-11-02", 2.25)
    assert log.spent() == {"2026-11-02": 2.25}


def test_what_a_later_version_cost_takes_the_place_of_no_try(
    tmp_path: Path, publish: Callable[[str, float], None]
) -> None:
    log = BackfillLog(LocalStorage(str(tmp_path)), "users", *PERIOD)
    log.begin(["2026-11-02", "2026-11-03", "2026-11-04"])
    log.note("2026-11-02", "interrupted", 1.0)
    log.note("2026-11-02", "published", 2.25)
    publish("2026-11-02", 0.25)  # forced by hand, with the engine at hand
    log.note("2026-11-03", "published", 0.5)
    publish("2026-11-03", 9.0)
    log.note("2026-11-04", "interrupted", 1.0)
    publish("2026-11-04", 0.25)
    assert log.spent() == {"2026-11-02": 2.25, "2026-11-03": 0.5, "2026-11-04": 1.0}


def test_a_try_that_ended_while_the_engine_was_built_is_not_forgotten(tmp_path: Path) -> None:
    log = BackfillLog(LocalStorage(str(tmp_path)), "users", *PERIOD)
    log.begin(["2026-11-02"])
    log.note("2026-11-02", "interrupted", 3.0)
    log.note("2026-11-02", "published", 2.25)
    assert log.spent() == {"2026-11-02": 3.0}


def test_tries_that_a_killed_process_was_noting_or_that_are_damaged_are_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = BackfillLog(LocalStorage(str(tmp_path)), "users", *PERIOD)
    log.begin(["2026-11-02"])
    log.note("2026-11-02", "failed", 2.0)
    (note,) = tmp_path.glob("users/_backfills/*/2*.json")
    for content in (b"", note.read_bytes()):  # as `LocalStorage.create` leaves it
        note.with_name(f".{note.name}.{len(content)}.tmp").write_bytes(content)
    assert log.spent() == {"2026-11-02": 2.0}
    assert not caplog.records
    note.with_name("2026-11-02-0.json").write_bytes(b"{")
    assert log.spent() == {"2026-11-02": 2.0}
    assert "2026-11-02-0.json: damaged" in caplog.text


def test_a_date_whose_publisher_died_before_it_wrote_here_is_counted(
    tmp_path: Path, publish: Callable[[str, float], None]
) -> None:
    log = BackfillLog(LocalStorage(str(tmp_path)), "users", *PERIOD)
    log.begin(["2026-11-02"])
    publish("2026-11-02", 2.25)
    assert log.spent() == {"2026-11-02": 2.25}


def test_dates_that_were_published_before_cost_the_backfill_nothing(
    tmp_path: Path, publish: Callable[[str, float], None]
) -> None:
    publish("2026-11-01", 100.0)
    log = BackfillLog(LocalStorage(str(tmp_path)), "users", *PERIOD)
    log.begin(["2026-11-02"])
    assert log.spent() == {}


def test_the_first_command_for_a_period_says_when_it_began(tmp_path: Path) -> None:
    output = LocalStorage(str(tmp_path))
    began = BackfillLog(output, "users", *PERIOD).begin(["2026-11-02"])
    assert BackfillLog(output, "users", *PERIOD).begin([]) == began
    assert BackfillLog(output, "users", "2026-11-01", "2026-11-02").begin([]) > began
