"""The file of figures: kept up to date during a run, whole at any time, and never in its way."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from flows.metrics import MetricsFile
from pipeline.config import Job
from pipeline.report import StageTimes
from tests.pipeline.conftest import REPORT
from tests.pipeline.pipeline_cases import a_job, job_data


class Told:
    """An observer that keeps what it is told."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: self.calls.append((name, arguments))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "users.prom"


@pytest.fixture
def job(tmp_path: Path, path: Path) -> Job:
    return a_job(job_data(tmp_path), metrics={"textfile": str(path)})


def values(path: Path) -> dict[str, float]:
    """Of the figures without labels of their own."""
    text = path.read_text()
    assert text.endswith("# EOF\n")
    samples = [s for family in text_string_to_metric_families(text) for s in family.samples]
    assert {sample.labels["job_name"] for sample in samples} == {"users"}
    return {s.name.removeprefix("nightscore_"): s.value for s in samples if len(s.labels) == 1}


def times(num_rows: int) -> dict[str, StageTimes]:
    return {"write": StageTimes(busy_s=1, wait_s=1, items=num_rows)}


def test_the_file_follows_a_run_from_its_start_to_its_publication(job: Job, path: Path) -> None:
    with MetricsFile(job.name, job.metrics, Told(), period_s=0) as file:
        assert values(path)["run_working"] == 1
        file.start(num_rows=1_000, num_done=100)
        file.update(times(300))
        during = values(path)
        assert (during["run_rows"], during["run_done_rows"]) == (1_000, 400)
        assert during["run_rows_per_second"] > 0
        assert "night_rows" not in during
        file.stop()
        file.publish(dataclasses.replace(REPORT, job="users", rows=1_000))
    after = values(path)
    assert (after["run_working"], after["run_failed"]) == (0, 0)
    assert after["run_done_rows"] == after["night_rows"] == 1_000


def test_a_run_that_does_not_publish_has_failed(job: Job, path: Path) -> None:
    with pytest.raises(RuntimeError), MetricsFile(job.name, job.metrics, Told()):
        raise RuntimeError("the night broke")
    ended = values(path)
    assert (ended["run_working"], ended["run_failed"]) == (0, 1)


def test_the_last_published_night_stays_while_the_next_one_works_and_fails(
    job: Job, path: Path
) -> None:
    with MetricsFile(job.name, job.metrics, Told()) as file:
        file.publish(dataclasses.replace(REPORT, rows=777))
    published_at = values(path)["night_published_timestamp_seconds"]
    with MetricsFile(job.name, job.metrics, Told()):
        now = values(path)
        assert (now["run_working"], now["night_rows"]) == (1, 777)
    assert values(path)["run_failed"] == 1
    assert values(path)["night_published_timestamp_seconds"] == published_at


def test_a_date_that_was_published_before_takes_the_place_of_no_later_night(
    job: Job, path: Path
) -> None:
    def rows_after(date: str, rows: int, status: str = "already_published") -> float:
        with MetricsFile(job.name, job.metrics, Told()) as file:
            file.publish(dataclasses.replace(REPORT, date=date, rows=rows, status=status))
        now = values(path)
        assert (now["run_failed"], now["run_rows"]) == (0, rows)
        return now["night_rows"]

    assert rows_after("2026-11-02", 2) == 2, "the file knew of none"
    assert rows_after("2026-11-20", 20) == 20
    assert rows_after("2026-11-01", 1) == 20
    assert rows_after("2026-11-20", 21) == 21
    assert rows_after("2026-11-01", 1, "published") == 1, "scored now, by --force"


def test_the_file_is_written_at_a_pace_and_leaves_no_drafts(job: Job, path: Path) -> None:
    with MetricsFile(job.name, job.metrics, Told(), period_s=3_600) as file:
        file.start(1_000, 0)
        file.update(times(10))
        written = path.stat().st_mtime_ns
        for num_rows in range(11, 200):
            file.update(times(num_rows))
        assert path.stat().st_mtime_ns == written
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_everything_is_told_on(job: Job) -> None:
    told = Told()
    with MetricsFile(job.name, job.metrics, told) as file:
        file.say("building")
        file.start(10, 2)
        file.update(times(1))
        file.expect("ends 02:00")
        file.stop()
    assert [name for name, _ in told.calls] == ["say", "start", "update", "expect", "stop"]
    assert told.calls[1][1] == (10, 2)


@pytest.mark.parametrize(
    ("name", "why"),
    [("no/users.prom", "No such file"), (f"{'n' * 300}.prom", "File name too long")],
)
def test_a_file_that_cannot_be_there_costs_one_warning(
    name: str, why: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    job = a_job(job_data(tmp_path), metrics={"textfile": str(tmp_path / name)})
    with MetricsFile(job.name, job.metrics, Told(), period_s=0) as file:
        file.start(10, 0)
        file.update(times(1))
        file.publish(REPORT)
    assert len(caplog.messages) == 1
    assert why in caplog.text


def test_a_file_of_another_program_is_replaced(job: Job, path: Path) -> None:
    path.write_bytes(b"\xff\xfe not ours")
    with MetricsFile(job.name, job.metrics, Told()):
        assert values(path)["run_working"] == 1


def test_without_the_section_nothing_is_written(tmp_path: Path) -> None:
    with MetricsFile("users", None, Told(), period_s=0) as file:
        file.start(10, 0)
        file.update(times(1))
    assert list(tmp_path.iterdir()) == []
