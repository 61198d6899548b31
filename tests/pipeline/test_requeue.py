"""`score requeue` scores what was in quarantine or has changed, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from night_cases import score_night, without_an_engine
from pipeline_cases import DATE, SumRunner, a_job, job_data, users, write_input

from pipeline.config import Job
from pipeline.errors import GuardError
from pipeline.report import RunReport
from pipeline.verify import verify_published

FILES, FILE_ROWS, SHARD_ROWS, BAD_ROW = ("a", "b", "c"), 40, 20, 5


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    """Three files of two shards each; a row of the first shard has no feature."""
    without_an_engine(monkeypatch.setattr)
    limits = {"max_quarantined": 0.5, "drift_rows": 0}
    job = a_job(job_data(tmp_path), limits=limits, output={"uri": str(tmp_path / "out")})
    for number, name in enumerate(FILES):
        write(job, name, users(FILE_ROWS, first=FILE_ROWS * number))
    write(job, "a", with_a_null(users(FILE_ROWS)))
    return job


def with_a_null(table: pa.Table) -> pa.Table:
    values = [None if row == BAD_ROW else 1.0 for row in range(len(table))]
    return table.set_column(2, "f1", pa.array(values, pa.float32()))


def with_ids(table: pa.Table, kind: pa.DataType) -> pa.Table:
    return table.set_column(0, "user_id", table["user_id"].cast(kind))


def write(job: Job, name: str, table: pa.Table) -> None:
    write_input(Path(job.input.uri), table, name=f"{name}.parquet")


def mend(job: Job) -> None:
    write(job, "a", users(FILE_ROWS))


def night(job: Job) -> RunReport:
    return score_night(job, DATE, SumRunner())


def requeued(job: Job) -> RunReport:
    """The report of a requeue, whose version is found to be whole."""
    report = score_night(job, DATE, SumRunner(), again="quarantine")
    assert verify_published(job.output.uri, job.name, DATE)["scored"] == report.scored
    return report


def folder(job: Job) -> Path:
    return Path(job.output.uri, job.name, f"dt={DATE}")


def manifest_of(job: Job) -> Path:
    return folder(job) / "_MANIFEST.json"


def version(job: Job) -> int:
    return int(json.loads(manifest_of(job).read_text())["version"])


def id_types(job: Job) -> set[pa.DataType]:
    return {pq.read_schema(path).field("user_id").type for path in folder(job).glob("*.parquet")}


class TestTakenOver:
    """What the version before has scored stays, file by file."""

    def test_after_one_file_was_mended_the_others_are_taken_over(self, job: Job) -> None:
        assert night(job).quarantined == 1
        mend(job)
        again = requeued(job)
        assert (again.quarantined, again.rows_taken_over) == (0, 2 * FILE_ROWS)
        assert again.scored == 3 * FILE_ROWS

    def test_behind_a_file_with_more_shards_than_before_all_are_scored_again(
        self, job: Job
    ) -> None:
        night(job)
        write(job, "b", users(2 * FILE_ROWS, first=FILE_ROWS))
        again = requeued(job)
        assert again.rows_taken_over == SHARD_ROWS  # of `a`: the shard without the bad row
        assert again.rows == 4 * FILE_ROWS

    def test_a_file_that_could_not_be_read_is_scored_when_it_is_mended(self, job: Job) -> None:
        mend(job)
        damaged = Path(job.input.uri, f"dt={DATE}", "d.parquet")
        damaged.write_bytes(b"no Parquet")
        assert night(job).degraded
        write(job, "d", users(FILE_ROWS, first=3 * FILE_ROWS))
        again = requeued(job)
        assert (again.rows, again.rows_taken_over) == (4 * FILE_ROWS, 3 * FILE_ROWS)
        assert not again.degraded

    @pytest.mark.parametrize(
        ("before", "now"), [(pa.int32(), pa.int64()), (pa.int64(), pa.int32())]
    )
    def test_a_file_that_changes_the_type_of_a_copied_column_changes_all_parts(
        self, job: Job, before: pa.DataType, now: pa.DataType
    ) -> None:
        for name in FILES:
            write(job, name, with_ids(with_a_null(users(FILE_ROWS)), pa.int32()))
        write(job, "a", with_ids(with_a_null(users(FILE_ROWS)), before))
        night(job)
        assert id_types(job) == {before}
        write(job, "a", with_ids(users(FILE_ROWS), now))
        assert requeued(job).rows_taken_over == 0
        assert id_types(job) == {now}

    def test_another_order_of_features_changes_all_scores(self, job: Job) -> None:
        night(job)
        data = job.model_dump()
        data["input"]["features"]["columns"] = ["f1", "f0"]
        assert requeued(a_job(data)).rows_taken_over == 0

    @pytest.mark.parametrize(
        ("is_mended", "num_taken_over"), [(False, 3 * FILE_ROWS - SHARD_ROWS), (True, 0)]
    )
    def test_of_a_manifest_that_tells_no_columns_all_files_must_be_the_same(
        self, job: Job, is_mended: bool, num_taken_over: int
    ) -> None:
        night(job)
        manifest = json.loads(manifest_of(job).read_text())
        del manifest["input"]["columns_sha256"]
        manifest_of(job).write_text(json.dumps(manifest))
        if is_mended:
            mend(job)
        assert requeued(job).rows_taken_over == num_taken_over


class TestNothingToTry:
    """A published date without rows in quarantine is left as it is."""

    def test_it_gets_no_new_version(self, job: Job) -> None:
        mend(job)
        first = night(job)
        again = requeued(job)
        assert (again.status, again.run_id) == ("already_published", first.run_id)
        assert version(job) == 1

    def test_not_even_after_its_quarantine_was_emptied(self, job: Job) -> None:
        night(job)
        mend(job)
        assert requeued(job).status == "published"
        assert requeued(job).status == "already_published"
        assert version(job) == 2

    @pytest.mark.parametrize(
        "change",
        [
            lambda job: write(job, "b", users(FILE_ROWS)),
            lambda job: write(job, "d", users(FILE_ROWS)),
            lambda job: Path(job.input.uri, f"dt={DATE}", "c.parquet").unlink(),
        ],
        ids=["written again", "new", "gone"],
    )
    def test_unless_its_input_has_changed(self, job: Job, change: Callable[[Job], None]) -> None:
        mend(job)
        night(job)
        change(job)
        assert requeued(job).status == "published"
        assert version(job) == 2

    def test_a_file_that_cannot_be_read_is_tried_again(self, job: Job) -> None:
        mend(job)
        Path(job.input.uri, f"dt={DATE}", "d.parquet").write_bytes(b"no Parquet")
        night(job)
        assert requeued(job).status == "published"

    def test_a_next_version_that_a_guard_stopped_is_tried_again(
        self, job: Job, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        mend(job)
        night(job)

        def stop(*_: object) -> None:
            raise GuardError("quarantine", "too many rows")

        with monkeypatch.context() as patch:
            patch.setattr("night_cases.finish_run", stop)
            with pytest.raises(GuardError):
                score_night(job, DATE, SumRunner(), again="all")
        assert requeued(job).status == "published"
        assert version(job) == 2
