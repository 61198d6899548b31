"""How a run ends: what its report says, and what a publication is followed by."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pytest
from night_cases import score_night, without_an_engine
from pipeline_cases import DATE, SumRunner, a_job, job_data, users, write_input

from pipeline import finish
from pipeline.config import Job
from pipeline.distribution import from_text
from pipeline.errors import InputChangedError, StorageError
from pipeline.report import RunReport

NUM_ROWS, BAD_ROW, SHARD_ROWS = 100, 5, 20


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    """Five shards; a row of the first has no feature."""
    without_an_engine(monkeypatch.setattr)
    f1 = [None if row == BAD_ROW else 1.0 for row in range(NUM_ROWS)]
    write_input(tmp_path / "in", users(NUM_ROWS).set_column(2, "f1", pa.array(f1, pa.float32())))
    return a_job(
        job_data(tmp_path),
        limits={"max_quarantined": 0.5, "drift_rows": 0},
        output={"uri": str(tmp_path / "out"), "delta": True},
    )


def night_folder(job: Job) -> Path:
    return Path(job.output.uri, job.name, f"dt={DATE}")


def dates_of_the_table(job: Job) -> list[str]:
    table = pl.scan_delta(f"{job.output.uri}/{job.name}")
    return table.select(pl.col("dt").cast(str)).unique().collect()["dt"].to_list()


def history(job: Job) -> list[str]:
    return [path.name for path in Path(job.output.uri, job.name, "_history").glob("*.parquet")]


@pytest.fixture
def note(job: Job, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of an attempt that scored all rows and crashed before it published them."""

    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("night_cases.finish_run", crash)
        with pytest.raises(KeyboardInterrupt):
            score_night(job, DATE, SumRunner())
    (written,) = Path(job.output.uri, job.name, "_runs").glob("*/attempts/*.json")
    return written


def committed_then(job: Job, monkeypatch: pytest.MonkeyPatch, change: Callable[[], object]) -> None:
    """Something changes between the last commit and the end of a night."""
    finish_run = finish.finish_run

    def changed(*arguments: Any) -> RunReport:
        change()
        return finish_run(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr("night_cases.finish_run", changed)
        score_night(job, DATE, SumRunner())


def input_file(job: Job) -> Path:
    (path,) = Path(job.input.uri, f"dt={DATE}").glob("*.parquet")
    return path


@pytest.mark.parametrize("change", ["written again", "gone"])
def test_a_file_that_changes_after_its_last_shard_was_committed_stops_the_run(
    job: Job, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    path = input_file(job)
    if change == "gone":
        write_input(path.parents[1], users(NUM_ROWS), name="other.parquet")

    def replace() -> None:
        data = path.read_bytes()
        path.unlink()
        if change == "written again":
            path.write_bytes(data)  # as long as before

    with pytest.raises(InputChangedError, match=rf"{path}: .*; expected \d+ bytes, version \d+"):
        committed_then(job, monkeypatch, replace)
    assert not night_folder(job).exists()
    report = score_night(job, DATE, SumRunner())
    assert (report.status, report.shards_reused) == ("published", 0)


def test_the_same_holds_for_a_night_that_was_resumed(
    job: Job, note: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert note.exists()
    with pytest.raises(InputChangedError):
        committed_then(job, monkeypatch, lambda: os.utime(input_file(job), (0, 0)))


def test_a_file_that_is_added_meanwhile_is_for_the_next_run(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = input_file(job).parents[1]
    late = users(7, first=NUM_ROWS)
    committed_then(job, monkeypatch, lambda: write_input(folder, late, name="late.parquet"))
    assert night_folder(job).exists()
    assert score_night(job, DATE, SumRunner(), again="all").rows == NUM_ROWS + 7


def test_rows_of_an_attempt_whose_note_is_damaged_were_still_scored_by_this_run(
    job: Job, note: Path
) -> None:
    note.write_bytes(note.read_bytes()[:20])
    report = score_night(job, DATE, SumRunner())
    assert report.shards_reused == report.shards
    assert report.rows_taken_over == 0


def test_what_requeue_leaves_as_it_was_is_taken_over_version_after_version(job: Job) -> None:
    assert score_night(job, DATE, SumRunner()).rows_taken_over == 0
    for version in (2, 3):
        again = score_night(job, DATE, SumRunner(), again="quarantine")
        assert again.rows_taken_over == NUM_ROWS - SHARD_ROWS, f"version {version}"
    assert score_night(job, DATE, SumRunner(), again="all").rows_taken_over == 0


def test_scores_that_are_taken_over_count_when_the_ledger_that_knew_them_is_gone(job: Job) -> None:
    score_night(job, DATE, SumRunner())
    (ledger,) = Path(job.output.uri, job.name, "_runs").iterdir()
    shutil.rmtree(ledger)  # as `score gc` does
    for version in (2, 3):
        again = score_night(job, DATE, SumRunner(), again="quarantine")
        assert again.rows_taken_over == NUM_ROWS - SHARD_ROWS, f"version {version}"
        assert again.distribution is not None
        counted = from_text(again.distribution.counts)
        assert counted.num_rows == pytest.approx(again.scored, abs=20), "a bin has whole rows"
        assert again.distribution.num_values == pytest.approx(again.scored, abs=2)


def test_an_attempt_beside_the_one_that_publishes_is_paid_and_makes_no_night_longer(
    job: Job, note: Path
) -> None:
    note.write_text(json.dumps({**json.loads(note.read_text()), "prepared_s": 3600.0}))
    report = score_night(job, DATE, SumRunner())
    assert report.wall_s < 600
    assert report.examples_per_sec == pytest.approx(NUM_ROWS / report.wall_s)
    assert report.cost.usd > report.cost.price.usd_per_hour


def test_who_loses_the_race_does_all_that_follows_a_publication(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The winner was killed right after its manifest was there."""
    real = finish.publish

    def be_second(*args: object) -> bool:
        assert real(*args)  # type: ignore[arg-type]
        return False

    monkeypatch.setattr(finish, "publish", be_second)
    report = score_night(job, DATE, SumRunner())
    assert report.status == "already_published"
    assert dates_of_the_table(job) == [DATE]
    assert (night_folder(job) / "_report.html").exists()
    assert len(history(job)) == 1


def test_a_folder_with_a_strange_file_is_told_before_anything_is_scored(job: Job) -> None:
    night_folder(job).mkdir(parents=True)
    (night_folder(job) / ".DS_Store").touch()
    with pytest.raises(StorageError, match=rf"dt={DATE}: has `\.DS_Store` and no _MANIFEST"):
        score_night(job, DATE, None)


def test_a_date_that_is_published_and_taken_away_meanwhile_is_told(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finish, "publish", lambda *_: False)
    with pytest.raises(StorageError, match=r"another version was published meanwhile"):
        score_night(job, DATE, SumRunner())


def test_the_reports_of_a_published_date_are_made_where_they_are_missing_and_only_there(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    score_night(job, DATE, SumRunner())
    page, facts = night_folder(job) / "_report.html", night_folder(job) / "_report.json"
    page.unlink()
    facts.unlink()
    assert score_night(job, DATE, SumRunner()).status == "already_published"
    assert page.exists()
    assert facts.exists()
    monkeypatch.setattr(finish, "nights_before", None)  # nobody reads the history for nothing
    assert score_night(job, DATE, SumRunner()).status == "already_published"
